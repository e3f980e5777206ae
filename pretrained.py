"""The weights that stage 2 starts from: which run of stage 1 fits, and how they are loaded."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from torch import nn

import options
from baselines import Config
from checkpoint import is_own, network_config
from originals import Said, find_file, load_any
from recipes import get_recipe
from runs import newest_checkpoint
from settings import StageSettings
from stage_flags import STAGE1_BITS
from utils import InputError

AUXILIARY = "auxiliary_head."


def find_start(settings: StageSettings, config: Config, data: dict[str, Any]) -> tuple[Path, dict] | None:
    """The stage-1 checkpoint that this run starts from; None for stage 1 itself and for --from_scratch.

    --pretrained names it; else it is the newest finished stage-1 run of the same set, genotype and size, made
    as the flags ask.
    Raises InputError: there is none (with the command that makes one), or it does not fit.
    """
    network = settings.network
    if not network.binary:
        for flag in ("pretrained", "from_scratch"):
            if getattr(network, flag):
                raise InputError(f"--{flag} is for stage 2; add --binary, or leave it out")
        return None
    if network.from_scratch:
        if network.pretrained:
            raise InputError("--from_scratch and --pretrained contradict each other; give one")
        return None
    if network.pretrained:
        path = find_file(network.pretrained)
        checkpoint = load_start_checkpoint(path, settings, data)
        if checkpoint["kind"] != "stage1":
            raise InputError(
                f"{path} is a {checkpoint['kind']} checkpoint; stage 2 starts from stage 1, which the same "
                "command without --binary trains"
            )
        if differing := _differences(checkpoint, config, data):
            raise InputError(f"{path} is of another configuration: {', '.join(differing)}")
        if saw_holdout(checkpoint["args"], settings):
            raise InputError(
                f"{path} has trained on images that --holdout {settings.images.holdout} holds out; "
                "train stage 1 with the same --holdout and --seed"
            )
        return path, checkpoint
    found = newest_checkpoint(
        "eval-*-stage1-*",
        lambda checkpoint: (
            checkpoint["kind"] == "stage1"
            and checkpoint["finished"]
            and not _differences(checkpoint, config, data)
            and not saw_holdout(checkpoint["args"], settings)
            and _made_as_asked(checkpoint, settings, config)
        ),
    )
    if found is None:
        stage1 = shlex.join(["python", *(word for word in sys.argv if word != "--binary")])
        raise InputError(
            "no finished stage-1 run of this set, genotype and size, with "
            f"{shlex.join(_asked(settings, config))}, to start from; first run `{stage1}`, or give "
            "--pretrained PATH, or --from_scratch"
        )
    return found


def load_start_checkpoint(path: Path, settings: StageSettings, data: dict[str, Any]) -> dict:
    """The checkpoint that --pretrained names. That of another program says nothing of its stage, genotype and
    images: it is taken as of this run's stage 1, genotype and, with as many classes, images."""
    network = settings.network
    checkpoint = load_any(path, Said(network.arch, network.variant, network.stage1, data["set"]))
    if not is_own(checkpoint) and len(checkpoint["data"]["classes"]) == len(data["classes"]):
        checkpoint["data"] = data
    return checkpoint


def _differences(checkpoint: dict, config: Config, data: dict[str, Any]) -> list[str]:
    """What keeps stage 1's weights from fitting: `layers 8, not 16`. The bits differ by design, and the
    auxiliary head need not be in both."""
    ours = {"system": config.system, **config.to_dict(), **data}
    theirs = network_config(checkpoint)
    theirs = {"system": theirs.system, **theirs.to_dict(), **checkpoint["data"]}
    if ours["system"] != theirs["system"]:
        return [f"system {theirs['system']}, not {ours['system']}"]
    sizes = (
        *("family", "variant", "init_channels", "layers", "groups", "activation"),
        *("num_classes", "set", "image_size"),
    )
    names = [name for name in sizes if name in ours]
    differing = [f"{name} {theirs[name]}, not {ours[name]}" for name in names if theirs[name] != ours[name]]
    return differing + [f"other {name}" for name in ("classes", "genotype") if theirs[name] != ours[name]]


def saw_holdout(theirs: dict, settings: StageSettings) -> bool:
    """Whether a run of flags `theirs` trained on images that this one holds out to choose an epoch."""
    ours = {"holdout": settings.images.holdout, "seed": settings.run.seed}
    return ours["holdout"] > 0 and any(theirs.get(name) != value for name, value in ours.items())


def _made_as_asked(checkpoint: dict, settings: StageSettings, config: Config) -> bool:
    """Whether stage 1 had the bits of --stage1, --stage1_weight_decay, --recipe (EBNAS's own is `ebnas`)
    and --weight_binarization."""
    theirs, flags = checkpoint["config"], checkpoint["args"]
    network, ours = settings.network, settings.recipe
    bits = (theirs["weight_bits"], theirs["activation_bits"])
    binarization = theirs.get("weight_binarization", network.weight_binarization)
    recipe = get_recipe(flags.get("recipe", "ebnas"), config.system, config.family)
    return (
        bits == STAGE1_BITS[network.stage1]
        and binarization == network.weight_binarization
        and flags.get("stage1_weight_decay", 0.0) == ours.stage1_weight_decay
        and recipe == get_recipe(ours.recipe, config.system, config.family)
    )


def _asked(settings: StageSettings, config: Config) -> list[str]:
    """The flags that choose among the stage-1 runs that fit: what _made_as_asked and saw_holdout look at."""
    holdout = settings.images.holdout
    return options.command_line(
        {
            "recipe": settings.recipe.recipe,
            "stage1": settings.network.stage1,
            "stage1_weight_decay": settings.recipe.stage1_weight_decay or None,
            "weight_binarization": getattr(config, "weight_binarization", None),
            **({"holdout": holdout, "seed": settings.run.seed} if holdout else {}),
        }
    )


def load_start(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load stage 1's weights; of the auxiliary head where both have one, else the model's stay."""
    ours = model.state_dict()
    kept = {name for name in ours if name.startswith(AUXILIARY) and name not in weights}
    model.load_state_dict({name: ours[name] if name in kept else weights[name] for name in ours})
