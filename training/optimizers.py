"""The optimisers and the learning rates' schedules of recipes, by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import (
    CosineAnnealingLR,
    CosineAnnealingWarmRestarts,
    LinearLR,
    LRScheduler,
    MultiStepLR,
    SequentialLR,
)


def _adam(parameters: Any, **settings: float) -> Optimizer:
    return torch.optim.Adam(parameters, fused=True, **settings)


def _adamw(parameters: Any, **settings: float) -> Optimizer:
    return torch.optim.AdamW(parameters, fused=True, **settings)


def _sgd(parameters: Any, **settings: float) -> Optimizer:
    return torch.optim.SGD(parameters, momentum=0.9, fused=True, **settings)


class OneCycle(LRScheduler):
    """By step, as BNAS has it. In the first 90 % the rate rises linearly from 1/20 of its highest, and falls
    back, while the momentum falls from 0.95 to 0.85, and rises; in the rest it falls to 1/2000.

    (`OneCycleLR` of torch, with three phases, ends its phases a step earlier.)
    """

    def __init__(self, optimizer: Optimizer, steps: int):
        self.steps = steps
        super().__init__(optimizer)

    def get_lr(self) -> list[float]:
        done = self.last_epoch / self.steps
        if done <= 0.9:
            height = 1 - abs(done - 0.45) / 0.45
            factor, momentum = 0.05 + 0.95 * height, 0.95 - 0.1 * height
        else:
            left = max(0.0, 1 - done) / 0.1
            factor, momentum = 0.0005 + 0.0495 * left, 0.95
        for group in self.optimizer.param_groups:
            group["momentum"] = momentum
        return [highest * factor for highest in self.base_lrs]


def cosine(
    optimizer: Optimizer, *, epochs: int, steps: int, warmup: int = 0, least: float = 0.0
) -> LRScheduler:
    """By epoch: `warmup` epochs of linear rise from 1/warmup of the rate, then a cosine to `least`."""
    fall = CosineAnnealingLR(optimizer, max(epochs - warmup, 1), eta_min=least)
    if not warmup:
        return fall
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=max(warmup - 1, 1))
    return SequentialLR(optimizer, [rise, fall], milestones=[warmup])


def one_cycle(optimizer: Optimizer, *, epochs: int, steps: int, **_unused: Any) -> LRScheduler:
    return OneCycle(optimizer, epochs * steps)


def restarts(optimizer: Optimizer, *, epochs: int, steps: int, **_unused: Any) -> LRScheduler:
    """By step: a cosine to 0, from the start again every 50 epochs."""
    return CosineAnnealingWarmRestarts(optimizer, 50 * steps)


def thirds(optimizer: Optimizer, *, epochs: int, steps: int, **_unused: Any) -> LRScheduler:
    """By epoch: a tenth of the rate after each third of them."""
    return MultiStepLR(optimizer, [max(1, epochs // 3), max(1, 2 * epochs // 3)])


class Schedule(Protocol):
    """Makes a schedule for `epochs` of `steps` steps; the cosine alone uses `warmup` and the `least` rate."""

    def __call__(
        self, optimizer: Optimizer, *, epochs: int, steps: int, warmup: int, least: float
    ) -> LRScheduler: ...


OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"adam": _adam, "adamw": _adamw, "sgd": _sgd}
"""Each takes parameters, lr and weight_decay."""

SCHEDULES: dict[str, Schedule] = {
    "cosine": cosine,
    "one_cycle": one_cycle,
    "restarts": restarts,
    "thirds": thirds,
}
