"""The weights that a run starts from: which checkpoint fits, what of it is taken, and how it is loaded."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from flags import options
from flags.choices import STAGE1_BITS
from flags.settings import StageSettings
from networks.registry import Config
from run.checkpoint import is_own, network_config
from run.originals import Said, find_file, load_any
from run.runs import newest_checkpoint
from training.recipes import get_recipe
from utils import InputError, command_text

AUXILIARY = "auxiliary_head."
CLASSIFIERS = ("classifier", "fc")
"""What the systems call the layers, of the auxiliary head too, that have a row a class."""


@dataclass(frozen=True)
class Start:
    """The weights that a run starts from: those of a checkpoint, but for the `left_out`; in words."""

    weights: dict[str, torch.Tensor]
    left_out: tuple[str, ...]
    words: str


def find_start(settings: StageSettings, config: Config, data: dict[str, Any]) -> Start | None:
    """What this run starts from; None for random weights: those of stage 1 itself, of a network of one stage,
    and of --from_scratch.

    --pretrained names any checkpoint of the same network. Without it, stage 2 takes the newest finished
    stage-1 run of the same set, genotype and size, made as the flags ask.
    Raises InputError: there is none (with the command that makes one), or it does not fit.
    """
    network = settings.network
    if network.from_scratch:
        if not network.binary:
            raise InputError("--from_scratch is for stage 2; add --binary, or leave it out")
        if network.pretrained:
            raise InputError("--from_scratch and --pretrained contradict each other; give one")
        return None
    if network.pretrained:
        path = find_file(network.pretrained)
        return _start_from(path, load_start_checkpoint(path, settings, data), settings, config, data)
    if not network.binary:
        return None
    found = newest_checkpoint(
        "eval-*-stage1-*",
        lambda checkpoint: (
            checkpoint["kind"] == "stage1"
            and checkpoint["finished"]
            and not _other_network(checkpoint, config)
            and not _other_images(checkpoint, data)
            and not saw_holdout(checkpoint["args"], settings)
            and _made_as_asked(checkpoint, settings, config)
        ),
    )
    if found is None:
        stage1 = command_text(["python", *(word for word in sys.argv if word != "--binary")])
        raise InputError(
            "no finished stage-1 run of this set, genotype and size, with "
            f"{command_text(_asked(settings, config))}, to start from; first run `{stage1}`, or give "
            "--pretrained PATH, or --from_scratch"
        )
    return _start_from(*found, settings, config, data)


def load_start_checkpoint(path: Path, settings: StageSettings, data: dict[str, Any]) -> dict:
    """The checkpoint that --pretrained names. That of another program says nothing of its stage, genotype and
    images: it is taken as of this run's stage 1, genotype and, with as many classes, images."""
    network = settings.network
    checkpoint = load_any(path, Said(network.arch, network.variant, network.stage1, data["set"]))
    if not is_own(checkpoint) and len(checkpoint["data"]["classes"]) == len(data["classes"]):
        checkpoint["data"] = data
    return checkpoint


def _start_from(
    path: Path, checkpoint: dict, settings: StageSettings, config: Config, data: dict[str, Any]
) -> Start:
    """The start from a checkpoint of this network, of any stage and any images. The classifiers are left out
    where the classes are others. Raises InputError on another network, and on held-out images."""
    if checkpoint["kind"] == "search":
        raise InputError(f"{path} is a search's checkpoint; train its genotype, --arch {path.parent}")
    if differing := _other_network(checkpoint, config):
        raise InputError(f"{path} is of another network: {', '.join(differing)}")
    other = _other_images(checkpoint, data)
    if not other and saw_holdout(checkpoint["args"], settings):
        raise InputError(
            f"{path} has trained on images that --holdout {settings.images.holdout} holds out; "
            "train it with the same --holdout and --seed"
        )
    theirs = checkpoint["data"]
    weights, left_out = checkpoint["model"], ()
    if theirs["classes"] != data["classes"]:
        left_out = tuple(name for name in weights if name.split(".")[-2] in CLASSIFIERS)
    if not other and checkpoint["kind"] == "stage1" and settings.network.binary:
        return Start(weights, left_out, str(path))  # as the method has it
    of = checkpoint.get("program") or f"{theirs['set']}, {checkpoint['epoch']} epochs"
    words = f"{path}, a {checkpoint['kind']} network of {of}"
    if left_out:
        taken = sum(name not in left_out for name in weights)
        words += (
            f": {taken} of {len(weights)} tensors, all but the classifier's, because its "
            f"{len(theirs['classes'])} classes are not these {len(data['classes'])}"
        )
    else:
        words += ": all its weights"
    if other:
        words += f" (learnt from other images: {', '.join(other)})"
    return Start(weights, left_out, f"{words}; the schedule begins anew")


def _other_network(checkpoint: dict, config: Config) -> list[str]:
    """What keeps a checkpoint's weights from fitting: `layers 8, not 16`. The bits differ by design, and
    neither the classes nor the auxiliary head need be in both."""
    ours, theirs = config.to_dict(), network_config(checkpoint)
    if config.system != theirs.system:
        return [f"system {theirs.system}, not {config.system}"]
    theirs = theirs.to_dict()
    sizes = ("family", "variant", "init_channels", "layers", "groups", "activation")
    differing = _differing(theirs, ours, sizes)
    return differing + ["other genotype"] * (theirs.get("genotype") != ours.get("genotype"))


def _other_images(checkpoint: dict, data: dict[str, Any]) -> list[str]:
    """How the images of a checkpoint differ from `data`: `image_size 16, not 32`."""
    theirs = checkpoint["data"]
    differing = _differing(theirs, data, ("set", "image_size", "value_range"))
    if new := set(data.get("test_files", ())) - set(theirs.get("test_files", ())):
        differing.append(f"{len(new)} images to test on are others, which it may know")
    return differing + ["other classes"] * (theirs["classes"] != data["classes"])


def _differing(theirs: Mapping[str, Any], ours: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    return [
        f"{name} {theirs.get(name)}, not {ours.get(name)}"
        for name in names
        if theirs.get(name) != ours.get(name)
    ]


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


def load_start(model: nn.Module, start: Start) -> None:
    """Load the weights; of the auxiliary head where both have one, else the model's stay, as they do for what
    is left out."""
    ours = model.state_dict()
    kept = {name for name in ours if name.startswith(AUXILIARY) and name not in start.weights}
    kept |= set(start.left_out)
    model.load_state_dict({name: ours[name] if name in kept else start.weights[name] for name in ours})
