"""torch.compile by regions: what networks are made of is compiled once per shape, not once per occurrence."""

from __future__ import annotations

import torch._dynamo
from torch import nn
from torchvision.models.resnet import BasicBlock

from baselines.bats import BatsFactorizedReduce, BatsUnit
from baselines.bnas import BnasUnit
from baselines.dcp_nas import DcpConvolution, DcpFactorizedReduce, DcpUnit
from operations import BinaryUnit, FactorizedReduce, SearchPreprocess, SourceOperations

CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
MODES = ("default", *CUDA_GRAPH_MODES, "max-autotune-no-cudagraphs")

REGIONS = (
    *(BinaryUnit, FactorizedReduce, SearchPreprocess, SourceOperations),
    *(BnasUnit, BatsUnit, BatsFactorizedReduce, DcpUnit, DcpFactorizedReduce, DcpConvolution, BasicBlock),
)
"""The units of cells. All of a class share their graphs, which take the parameters as inputs. Whole cells
compile longer and run no faster (docs/performance.md)."""

GRAPHS = 1024
"""Of one class of regions, for its shapes and settings; by default torch gives up after 8."""


def compile_regions(model: nn.Module, *, mode: str = "default", backend: str = "inductor") -> None:
    """Have each region of `model` compiled when it is first called with a shape, in torch.compile's `mode`.

    A region is one graph of fixed sizes: what would split it, or take sizes as variables, is an error.
    """
    torch._dynamo.config.cache_size_limit = GRAPHS  # torch 2.6's name of recompile_limit
    torch._dynamo.config.accumulated_cache_size_limit = GRAPHS
    for module in model.modules():
        if isinstance(module, REGIONS):
            module.compile(fullgraph=True, dynamic=False, backend=backend, mode=mode)
    if mode in CUDA_GRAPH_MODES:
        # else torch guesses where a step begins, and may write over what an earlier region has given
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
