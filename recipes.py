"""How a network is trained, as a value: EBNAS's recipe, the same for all rows, and each system's own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts, LRScheduler, MultiStepLR

from utils import InputError


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


def _one_cycle(optimizer: Optimizer, epochs: int, steps: int) -> LRScheduler:
    return OneCycle(optimizer, epochs * steps)


def _restarts(optimizer: Optimizer, _epochs: int, steps: int) -> LRScheduler:
    """A cosine to 0, from the start again every 50 epochs."""
    return CosineAnnealingWarmRestarts(optimizer, 50 * steps)


def _thirds(optimizer: Optimizer, epochs: int, _steps: int) -> LRScheduler:
    """A tenth of the rate after each third of the epochs."""
    return MultiStepLR(optimizer, [max(1, epochs // 3), max(1, 2 * epochs // 3)])


@dataclass(frozen=True)
class Recipe:
    """`optimizer` takes parameters, lr and weight_decay. `schedule` takes the optimiser, the epochs and the
    steps of an epoch; None is EBNAS's: warm-up and cosine. It is stepped with each step (`by_step`), or with
    each epoch. `flags` are those of the training script where the user does not give them: epochs, batch,
    rate, decay, loss, and what else differs from EBNAS's. `color_jitter` takes the place of Lighting on
    ImageNet. `taught`: it is nothing without a --teacher.
    """

    words: str
    optimizer: Callable[..., Optimizer] = _adam
    schedule: Callable[[Optimizer, int, int], LRScheduler] | None = None
    by_step: bool = False
    color_jitter: bool = False
    taught: bool = False
    flags: Mapping[str, Any] = field(default_factory=dict)


_USUAL = {
    "epochs": 600,
    "batch_size": 256,
    "learning_rate": 1e-3,
    "learning_rate_min": 0.0,
    "weight_decay": 0.0,
    "stage1_weight_decay": 0.0,
    "grad_clip": 5.0,
    "drop_path_prob": 0.2,
    "label_smooth": 0.0,
    "teacher_weight": 1.0,
}

EBNAS = {
    "cifar": Recipe("Adam, a cosine by epoch", flags=_USUAL),
    "imagenet": Recipe(
        "Adam, a cosine by epoch",
        flags={**_USUAL, "epochs": 100, "drop_path_prob": 0.0, "label_smooth": 0.1, "warmup_epochs": 5},
    ),
}
"""By family of images. The other recipes' flags are these where they say nothing."""

OWN = {
    **{("ebnas", family): recipe for family, recipe in EBNAS.items()},
    ("bnas", "cifar"): Recipe(
        "SGD, one cycle of rate and momentum by step",
        _sgd,
        _one_cycle,
        by_step=True,
        flags={
            **{"epochs": 600, "batch_size": 256, "learning_rate": 0.05, "weight_decay": 3e-6},
            **{"grad_clip": 0.0, "drop_path_prob": 0.2, "label_smooth": 0.0},
        },
    ),
    ("bnas", "imagenet"): Recipe(
        "SGD, a cosine by step that starts again every 50 epochs, colour jitter",
        _sgd,
        _restarts,
        by_step=True,
        color_jitter=True,
        flags={
            **{"epochs": 250, "batch_size": 256, "learning_rate": 0.05, "weight_decay": 3e-5},
            **{"grad_clip": 5.0, "drop_path_prob": 0.0, "label_smooth": 0.1},
        },
    ),
    ("dcp", "imagenet"): Recipe(
        "AdamW, a cosine by epoch, the answers of a ResNet34 as the only targets",
        _adamw,
        flags={
            **{"epochs": 256, "batch_size": 512, "learning_rate": 1e-3, "learning_rate_min": 1e-5},
            **{"warmup_epochs": 0, "stage1_weight_decay": 1e-5, "grad_clip": 0.0, "drop_path_prob": 0.0},
            **{"label_smooth": 0.0, "teacher": "resnet34", "teacher_weight": 1.0},
        },
    ),
    ("resnet", "imagenet"): Recipe(
        "SGD, a tenth of the rate after each third of the epochs",
        _sgd,
        _thirds,
        flags={
            **{"epochs": 90, "batch_size": 256, "learning_rate": 0.1, "weight_decay": 1e-4},
            **{"grad_clip": 0.0, "label_smooth": 0.0},
        },
    ),
}
"""By system and family of images. Of BNAS and DCP-NAS: their authors' code; of ResNet18: He et al. (2016)."""


BEST = replace(EBNAS["cifar"], words="Adam, a cosine by epoch, a teacher's answers as targets", taught=True)
"""What helped, of all that the study `beyond` tried with EBNAS's networks (results/beyond.md): a teacher,
there the same network in full precision."""


def get_recipe(name: str, system: str, family: str) -> Recipe:
    """The recipe that --recipe asks for. Raises InputError: there is none for this system and images."""
    if name == "ebnas":
        return EBNAS[family]
    if name == "best":
        if (system, family) != ("ebnas", "cifar"):
            raise InputError(
                f"--recipe best is of EBNAS's networks with train.py, not of {system} on {family} images: "
                "nothing was measured there; use --recipe ebnas, with the flags you like"
            )
        return BEST
    if (system, family) not in OWN:
        reason = "is not public" if system == "bats" else f"is not known for {family} images"
        raise InputError(
            f"--recipe own: that of {system} {reason}; use --recipe ebnas, the same for all rows"
        )
    return OWN[system, family]
