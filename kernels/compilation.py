"""torch.compile by regions: what networks are made of is compiled once per shape, not once per occurrence."""

from __future__ import annotations

from torch import nn

from flags.choices import CUDA_GRAPH_MODES

GRAPHS = 1024
"""How many compiled graphs one class of regions may have, one for each shape and setting. torch's default is
8."""


def regions() -> tuple[type, ...]:
    """The units of cells. All of a class share their graphs, which take the parameters as inputs. Whole cells
    compile longer and run no faster (docs/performance.md)."""
    from torchvision.models.resnet import BasicBlock

    from networks.bats import BatsFactorizedReduce, BatsUnit
    from networks.bnas import BnasUnit
    from networks.dcp_nas import DcpConvolution, DcpFactorizedReduce, DcpUnit
    from operations import BinaryUnit, FactorizedReduce, SearchPreprocess, SourceOperations

    ours = BinaryUnit, FactorizedReduce, SearchPreprocess, SourceOperations
    theirs = BnasUnit, BatsUnit, BatsFactorizedReduce, DcpUnit, DcpFactorizedReduce, DcpConvolution
    return *ours, *theirs, BasicBlock


def compile_regions(model: nn.Module, *, mode: str = "default", backend: str = "inductor") -> None:
    """Have each region of `model` compiled when it is first called with a shape, in torch.compile's `mode`.

    A region is one graph of fixed sizes: what would split it, or take sizes as variables, is an error.
    """
    import torch._dynamo  # takes seconds, and most runs do not compile

    torch._dynamo.config.cache_size_limit = GRAPHS  # torch 2.6's name of recompile_limit
    torch._dynamo.config.accumulated_cache_size_limit = GRAPHS
    kinds = regions()
    for module in model.modules():
        if isinstance(module, kinds):
            module.compile(fullgraph=True, dynamic=False, backend=backend, mode=mode)
    if mode in CUDA_GRAPH_MODES:
        # else torch guesses where a step begins, and may write over what an earlier region has given
        model.register_forward_pre_hook(lambda *_: torch.compiler.cudagraph_mark_step_begin())
