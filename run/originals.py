"""Checkpoints of other programs, read as if this one had written them: those of the original EBNAS
(github.com/sscckk/EBNAS, commit 687be1c) and of BNAS (github.com/gistvision/bnas, commit 675ecc7).

Such a file holds tensors by name, and perhaps the epoch. Their shapes tell the system, the images' family,
width, depth, groups and number of classes. What they do not tell a caller says (`Said`): the genotype (a pool
has no weights, and a dilated convolution those of a plain one), the stage, and what the images were.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from flags.choices import STAGE1_BITS
from genotypes import reduction_cells
from images.files import class_names
from model import build_model
from networks.registry import Config, make_config
from networks.rows import ROWS, USUAL_ROW
from run.checkpoint import FORMAT, check_tensor, checked, is_own, read_file, resolve_checkpoint
from utils import InputError

FILES = ("model_best.pth.tar", "checkpoint.pth.tar", "weights.pt")
"""What these programs leave in a run's folder, the best first."""

PROGRAMS = {"ebnas": "github.com/sscckk/EBNAS", "bnas": "github.com/gistvision/bnas"}

RENAMED: dict[str, dict[str, str | Callable[[re.Match], str]]] = {
    "ebnas": {
        r"\._ops\.": ".operations.",
        # the auxiliary head's average pool is theirs at 0
        r"(head\.features)\.(\d+)": lambda match: f"{match[1]}.{int(match[2]) - 1}",
    },
    "bnas": {
        r"^stem\.bn\.": "stem.0.",
        r"^stem\.op\.0\.": "stem.1.",
        r"(preprocess[01])(_red)?\.op\.0\.": r"\1.conv.",
        r"(preprocess[01])_red\.": r"\1.",
        r"preprocess_res\.": "shortcut.",
        r"_ops\.(\d)\.op\.0\.": r"operations.\1.conv.",
        r"\._ops\.": ".operations.",
    },
}
"""By system: the authors' names, and ours in their place."""


def our_name(system: str, name: str) -> str:
    """Our name of the tensor that the authors of a system call `name`."""
    for pattern, new in RENAMED[system].items():
        name = re.sub(pattern, new, name)
    return name


@dataclass(frozen=True)
class Said:
    """What a caller says of a file of another program; None is what is usual there.

    `arch` as --arch takes it. `stage1`: that of a file of stage 1, one of STAGE1_BITS; a file is else of
    stage 2. `set`: one of TRAINED_SETS. `root`: where its images are.
    """

    arch: str | None = None
    variant: str | None = None
    stage1: str | None = None
    set: str | None = None
    image_size: int | None = None
    root: str | None = None


def load_any(path: str | Path, said: Said) -> dict:
    """A checkpoint of this program or of another one, with the entries that build and run its network.

    That of another program has `data`, `config`, `model`, `kind`, `args`, `epoch` (None: not known) and
    `finished`, and `program`, its name; what is said is for it alone. Raises InputError as
    load_checkpoint does, where it is of neither, and where what is said does not fit.
    """
    path = find_file(path)
    content = read_file(path)
    if is_own(content):
        return checked(path, content)
    state = tensors_of(content)
    system = system_of_names(state)
    if system is None:
        raise InputError(
            f"{path} is a checkpoint of another program or version: neither {FORMAT} nor of "
            + " or ".join(PROGRAMS.values())
        )
    try:
        return _as_ours(content, state, system, said)
    except InputError as error:
        raise InputError(f"{path}, of {PROGRAMS[system]}: {error}") from None


def load_as_said(path: str | Path, said: Said) -> dict:
    """As load_any; raises InputError also where something is said of a checkpoint that knows it itself."""
    checkpoint = load_any(path, said)
    given = [name for name, value in vars(said).items() if value is not None and name != "root"]
    if given and is_own(checkpoint):
        raise InputError(f"{path} knows its own network and images: leave out --{', --'.join(given)}")
    return checkpoint


def find_file(path: str | Path) -> Path:
    """As resolve_checkpoint, which knows this program's folders; and in those of others one of FILES."""
    folder = Path(path)
    others = (folder / name for name in FILES if (folder / name).is_file())
    try:
        return resolve_checkpoint(path)
    except InputError:
        if found := next(others, None):
            return found
        raise


def tensors_of(content: Any) -> dict[str, Tensor]:
    """The tensors by name of what was saved: a state_dict alone, or as the entry of that name; without the
    `module.` that DataParallel puts before names. None where it is neither."""
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    if not isinstance(state, dict) or not all(
        isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in state.items()
    ):
        return {}
    return {name.removeprefix("module."): tensor for name, tensor in state.items()}


def system_of_names(names: Iterable[str]) -> str | None:
    """The system whose authors' program calls its tensors so; None: neither of them.

    Raises InputError on a supernet's.
    """
    names = set(names)
    if any(re.match(r"cells\.0\._ops\.0\._ops\.", name) for name in names):
        raise InputError(
            "these are weights of a search, without the genotype that it found: train that, with train.py "
            "--arch"
        )
    first = "cells.0.preprocess1"
    for system, parts in (("ebnas", ("bn1", "conv", "bn2", "prelu")), ("bnas", ("bn", "op.0"))):
        own = {name.removeprefix(f"{first}.") for name in names if name.startswith(f"{first}.")}
        if own and {name.rpartition(".")[0] for name in own} == set(parts):
            return system
    return None


def _as_ours(content: dict, theirs: dict[str, Tensor], system: str, said: Said) -> dict:
    """Raises InputError where the tensors make no network, or not the one that is said."""
    state = {our_name(system, name): tensor for name, tensor in theirs.items()}
    config = _config(state, system, said)
    with torch.device("meta"):  # shapes only
        network = build_model(config)
    expected = network.state_dict()
    _check_operations(network, state, said)
    for name, like in expected.items():
        if name.endswith("num_batches_tracked"):  # nothing that is computed depends on it
            state.setdefault(name, torch.zeros((), dtype=like.dtype))
    if odd := sorted(set(expected).symmetric_difference(state)):
        raise InputError(f"it lacks, or should not have, {', '.join(odd[:3])}")
    for name, like in expected.items():
        state[name] = state[name].to(like.dtype)
        check_tensor(state[name], like, name)
    epoch = content.get("epoch")
    done = epoch + (system == "ebnas") if type(epoch) is int else None  # the original keeps the last one done
    return {
        "program": PROGRAMS[system],
        "kind": "single" if system == "bnas" else "stage1" if said.stage1 else "stage2",
        "args": {},
        "config": config.to_dict(),
        "data": _data(config, said),
        "model": {name: state[name] for name in expected},
        "epoch": done,
        "finished": True,
    }


def _config(state: dict[str, Tensor], system: str, said: Said) -> Config:
    """The network of these tensors, by our names."""

    def shape(name: str) -> tuple[int, ...]:
        if name not in state or state[name].dim() == 0:
            raise InputError(f"it lacks {name}")
        return tuple(state[name].shape)

    family = "imagenet" if any(name.startswith("stem0.") for name in state) else "cifar"
    if family == "imagenet":
        channels = shape("stem0.3.weight")[0]
    else:
        channels = shape("stem.0.weight" if system == "ebnas" else "stem.1.weight")[0] // 3
    arch = said.arch or USUAL_ROW[system][family]
    if arch in ROWS and ROWS[arch].system != system:
        raise InputError(f"--arch {arch} is of {ROWS[arch].system}, and this file of {system}")
    if said.stage1 and system == "bnas":
        raise InputError("BNAS trains in one stage: leave --stage1 out")
    weight_bits, activation_bits = STAGE1_BITS[said.stage1] if said.stage1 else (1, 1)
    layers = len({name.split(".")[1] for name in state if name.startswith("cells.")})
    return make_config(
        arch,
        system,
        family=family,
        num_classes=shape("classifier.weight")[0],
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        init_channels=channels,
        layers=layers,
        groups=_groups(state) if system == "ebnas" else None,
        auxiliary=any(name.startswith("auxiliary_head.") for name in state),
        variant=said.variant,
    )


def _groups(state: dict[str, Tensor]) -> int:
    """Of the convolutions in cells, whose weights are (c, c / groups, k, k); 1 where there is none."""
    for name, tensor in state.items():
        if re.fullmatch(r"cells\.\d+\.operations\.\d+\.conv\.weight", name) and tensor.dim() == 4:
            return tensor.shape[0] // max(tensor.shape[1], 1)
    return 1


def _check_operations(network: nn.Module, state: dict[str, Tensor], said: Said) -> None:
    """Raise InputError where the tensors show another operation than the genotype has there."""
    genotype = network.config.genotype
    for cell, layer in enumerate(network.cells):
        kind = "reduce" if cell in reduction_cells(len(network.cells)) else "normal"
        for pair, operation in enumerate(layer.operations):
            prefix = f"cells.{cell}.operations.{pair}."
            ours = _seen({prefix + name: tensor for name, tensor in operation.state_dict().items()}, prefix)
            theirs = _seen(state, prefix)
            if ours != theirs:
                name = said.arch or "of the paper"
                raise InputError(
                    f"the genotype {name} has {getattr(genotype, kind)[pair][0]} as pair {pair} of its "
                    f"{kind} cell, where the weights are those of {theirs}: give its own with --arch"
                )


def _seen(state: dict[str, Tensor], prefix: str) -> str:
    """The name of an operation as its tensors tell it."""
    if f"{prefix}conv_1.weight" in state:
        return "a skip_connect at stride 2"
    if f"{prefix}conv.weight" in state:
        size = state[f"{prefix}conv.weight"].shape[-1]
        return f"a {size}x{size} convolution"
    return "a pool or a skip_connect, of none"


def _data(config: Config, said: Said) -> dict[str, Any]:
    """What the checkpoint's images were: the set of that family and number of classes, unless it is said."""
    is_imagenet = config.family == "imagenet"
    usual_set = "imagenet" if is_imagenet else {10: "cifar10", 100: "cifar100"}.get(config.num_classes)
    name = said.set or usual_set
    if name is None:
        raise InputError(
            f"it tells {config.num_classes} classes apart, as neither CIFAR set does: say what its images "
            "were with --set folder --data DIR"
        )
    from images.sets import STATISTICS  # which export.py does not need for a file of ours

    statistics = STATISTICS[name if name in STATISTICS else "cifar10"]  # of a folder, in place of CIFAR-10
    return {
        "set": name,
        "root": said.root or "data",
        "image_size": said.image_size or (224 if is_imagenet else 32),
        "classes": numbered(config.num_classes),
        "mean": list(statistics.mean),
        "std": list(statistics.std),
    }


def numbered(count: int) -> list[str]:
    """The classes of a file that does not name them."""
    return [f"class {number}" for number in range(count)]


def named(data: dict[str, Any], classes: Iterable[str]) -> dict[str, Any]:
    """`data` of a checkpoint, where its classes are numbered, with the names `classes`, if as many."""
    names = list(classes)
    return {**data, "classes": names} if data["classes"] == numbered(len(names)) else data


def named_by_its_images(data: dict[str, Any]) -> dict[str, Any]:
    """`data` of a checkpoint, where its classes are numbered, with the names that its images have at `root`.

    Raises InputError where there are no such images, or as many classes.
    """
    name, root = data["set"], data["root"]
    if data["classes"] != numbered(len(data["classes"])):
        return data
    from images.files import imagenet_folders
    from images.sets import load_set

    if name == "imagenet":
        classes = class_names(imagenet_folders(root)[0])
    elif name == "folder":
        classes = class_names(Path(root, "train"))
    else:
        classes = list(load_set(name, root, train=False).classes)
    if len(classes) != len(data["classes"]):
        raise InputError(f"{root} has {len(classes)} classes, the network {len(data['classes'])}")
    return named(data, classes)
