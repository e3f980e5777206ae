"""What training does to weights beside Adam's step: which of them decay, a clip, and their moving average."""

from __future__ import annotations

import copy
from typing import Any, TypeVar

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.swa_utils import get_ema_multi_avg_fn

from binary_ops import BinaryConv2d

Module = TypeVar("Module", bound=nn.Module)


def decaying_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameter groups of an optimiser: the weights of convolutions and linear layers decay, nothing else.

    So neither thresholds (BN1's bias), slopes and shifts nor BN and biases do. Decay in stage 1 and none in
    stage 2: Martinez et al., Training Binary Neural Networks with Real-to-Binary Convolutions, ICLR 2020;
    why: Liu et al., How Do Adam and Training Strategies Help BNNs Optimization?, ICML 2021.
    """
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d | nn.Linear)]
    decaying = {layer.weight: None for layer in layers}
    others = [parameter for parameter in model.parameters() if parameter not in decaying]
    return [
        {"params": list(decaying), "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def clip_latent_weights(model: nn.Module, optimizer: Optimizer) -> None:
    """From here on bring the latent weights of 1-bit convolutions back into [-1, 1] after each step of
    `optimizer` (Courbariaux et al., BinaryConnect, NeurIPS 2015, algorithm 1).

    The ends are the last numbers within (-1, 1): there the estimator still passes a gradient (|w| < 1),
    without which no weight would come back from an end.
    """
    layers = [module for module in model.modules() if isinstance(module, BinaryConv2d)]
    weights = [layer.weight.detach() for layer in layers if layer.weight_bits == 1]
    if not weights:
        return
    end = 1 - torch.finfo(weights[0].dtype).eps / 2

    def clip(*_: Any) -> None:
        torch._foreach_clamp_min_(weights, -end)
        torch._foreach_clamp_max_(weights, end)

    optimizer.register_step_post_hook(clip)


def moving_average(model: Module, optimizer: Optimizer, decay: float) -> Module:
    """A copy of `model` in evaluation mode that from here on follows it, after each step of `optimizer`:

        average = decay * average + (1 - decay) * model

    for parameters, and for the BN statistics that belong to them; batches are counted as in `model`
    (Tarvainen and Valpola, Mean Teachers, NeurIPS 2017). By torch's `get_ema_multi_avg_fn`, but not its
    AveragedModel, which copies or averages each buffer by itself. A step that a loss scaler skips counts.
    """
    average = copy.deepcopy(model).eval()
    pairs = list(zip(average.state_dict().values(), model.state_dict().values(), strict=True))
    averages, values = zip(*(pair for pair in pairs if pair[0].is_floating_point()), strict=True)
    counts, counted = zip(*(pair for pair in pairs if not pair[0].is_floating_point()), strict=True)
    update = get_ema_multi_avg_fn(decay)

    def follow(*_: Any) -> None:
        update(averages, values, None)
        torch._foreach_copy_(counts, counted)

    optimizer.register_step_post_hook(follow)
    return average
