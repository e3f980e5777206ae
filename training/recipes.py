"""How a network is trained, as a value: EBNAS's recipe, the same for all rows, and each system's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from utils import InputError


@dataclass(frozen=True)
class Recipe:
    """`optimizer` and `schedule` are names of training/optimizers.py's. A schedule is stepped with each step
    (`by_step`), or with each epoch. `flags` are those of the training script where the user does not give
    them: epochs, batch, rate, decay, loss, and what else differs from EBNAS's. `color_jitter` takes the place
    of Lighting on ImageNet. `taught`: it is nothing without a --teacher.
    """

    words: str
    optimizer: str = "adam"
    schedule: str = "cosine"
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
        "sgd",
        "one_cycle",
        by_step=True,
        flags={
            **{"epochs": 600, "batch_size": 256, "learning_rate": 0.05, "weight_decay": 3e-6},
            **{"grad_clip": 0.0, "drop_path_prob": 0.2, "label_smooth": 0.0},
        },
    ),
    ("bnas", "imagenet"): Recipe(
        "SGD, a cosine by step that starts again every 50 epochs, colour jitter",
        "sgd",
        "restarts",
        by_step=True,
        color_jitter=True,
        flags={
            **{"epochs": 250, "batch_size": 256, "learning_rate": 0.05, "weight_decay": 3e-5},
            **{"grad_clip": 5.0, "drop_path_prob": 0.0, "label_smooth": 0.1},
        },
    ),
    ("dcp", "imagenet"): Recipe(
        "AdamW, a cosine by epoch, the answers of a ResNet34 as the only targets",
        "adamw",
        flags={
            **{"epochs": 256, "batch_size": 512, "learning_rate": 1e-3, "learning_rate_min": 1e-5},
            **{"warmup_epochs": 0, "stage1_weight_decay": 1e-5, "grad_clip": 0.0, "drop_path_prob": 0.0},
            **{"label_smooth": 0.0, "teacher": "resnet34", "teacher_weight": 1.0},
        },
    ),
    ("resnet", "imagenet"): Recipe(
        "SGD, a tenth of the rate after each third of the epochs",
        "sgd",
        "thirds",
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
