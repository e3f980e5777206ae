"""The rows of the published tables: EBNAS, and the networks that it is compared with, by name.

A row is a genotype in the blocks of a system, at its published width and depth. A configuration knows its
system, and builds its network; a checkpoint that names no system is EBNAS's.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import nn

from baselines.bats import BatsConfig
from baselines.bnas import BnasConfig
from baselines.dcp_nas import DcpNasConfig
from baselines.resnet import ResNetConfig
from genotypes import GENOTYPES, get_genotype
from model import ModelConfig, build_model
from utils import InputError

SYSTEMS = {
    config.system: config for config in (ModelConfig, BnasConfig, BatsConfig, DcpNasConfig, ResNetConfig)
}
"""By name, what a system's networks are built from."""

CELL_SYSTEMS = tuple(system for system in SYSTEMS if system != "resnet")

Config = ModelConfig | BnasConfig | BatsConfig | DcpNasConfig | ResNetConfig


class Size(NamedTuple):
    init_channels: int
    layers: int | None = None
    groups: int | None = None


class Published(NamedTuple):
    """What a set's table says of a row: parameters (M) or OPs (1e8), errors in percent. Of BNAS-A and BNAS-F
    the parameters alone, from their authors' logs."""

    params: float | None = None
    ops: float | None = None
    error: float | None = None
    top5_error: float | None = None


@dataclass(frozen=True)
class Row:
    """`sizes` by family of images, as published or, where the label says so, a stand-in; `published` by set.
    `own_form`: the family of images for which we have made up stem and size."""

    system: str
    sizes: dict[str, Size]
    label: str = "{name}"
    own_form: str | None = None
    published: dict[str, Published] = dataclasses.field(default_factory=dict)


BATS_LABEL = "{name} (stand-in: second-hand cell, C {init_channels}, {layers} cells)"
DCP_LABEL = "{name} (CP-NAS's successor; CP-NAS is not public)"

ROWS = {
    "ResNet18": Row(
        "resnet",
        {"cifar": Size(64), "imagenet": Size(64)},
        "{name} (full precision)",
        published={
            "cifar10": Published(params=11.2, error=7.0),
            "cifar100": Published(params=11.2, error=24.39),
            "imagenet": Published(ops=18.2, error=30.4, top5_error=10.8),
        },
    ),
    "BNAS-A": Row("bnas", {"cifar": Size(36, 20)}, published={"cifar10": Published(params=5.58)}),
    "BNAS-C": Row(
        "bnas", {"cifar": Size(108, 16)}, published={"cifar10": Published(params=42.4, error=5.57)}
    ),
    "BNAS-D": Row("bnas", {"imagenet": Size(64, 12)}),
    "BNAS-E": Row("bnas", {"imagenet": Size(68, 12)}),
    "BNAS-F": Row("bnas", {"imagenet": Size(68, 15)}, published={"imagenet": Published(params=39.8)}),
    "BNAS-G": Row("bnas", {"imagenet": Size(74, 11)}),
    "BNAS-H": Row(
        "bnas",
        {"imagenet": Size(128, 16)},
        published={"imagenet": Published(ops=4.71, error=36.49, top5_error=16.09)},
    ),
    "DCP-NAS-L": Row("dcp", {"cifar": Size(108, 10), "imagenet": Size(108, 10)}, DCP_LABEL, "cifar"),
    "BATS": Row(
        "bats",
        {"cifar": Size(60, 20, 12), "imagenet": Size(72, 14, 12)},
        BATS_LABEL,
        published={
            "cifar10": Published(params=10.0, error=4.5),
            "cifar100": Published(params=10.0, error=24.3),
        },
    ),
    "BATS-2x": Row(
        "bats",
        {"imagenet": Size(120, 14, 12)},
        BATS_LABEL,
        published={"imagenet": Published(ops=1.55, error=33.9, top5_error=13.0)},
    ),
    "EBNAS": Row(
        "ebnas",
        {"cifar": Size(84, 16, 14), "imagenet": Size(112, 14, 14)},
        published={
            "cifar10": Published(params=10.0, error=4.39),
            "cifar100": Published(params=10.0, error=21.90),
            "imagenet": Published(ops=1.72, error=32.2, top5_error=12.6),
        },
    ),
}
"""In the order of the tables. CP-NAS has no row: nothing of it is public but its search space."""

EBNAS_ROW = {family: size._asdict() for family, size in ROWS["EBNAS"].sizes.items()}
"""EBNAS's width, depth and groups, by family of images."""

NOT_PUBLIC = {
    "CP-NAS (not public)": {
        "cifar10": Published(params=10.6, error=4.73),
        "imagenet": Published(ops=2.58, error=33.5, top5_error=13.2),
    }
}
"""Rows of the published tables that nobody can build."""

USUAL_ROW = {
    "ebnas": {"cifar": "EBNAS", "imagenet": "EBNAS"},
    "bnas": {"cifar": "BNAS-A", "imagenet": "BNAS-F"},
    "bats": {"cifar": "BATS", "imagenet": "BATS"},
    "dcp": {"cifar": "DCP-NAS-L", "imagenet": "DCP-NAS-L"},
}
"""Whose size a genotype has that comes without one."""


def system_of(arch: str, system: str | None = None) -> str:
    """The system that `--arch` and, where it is given, `--family` ask for."""
    own = ROWS[arch].system if arch in ROWS else "ebnas"
    if system is None or system == own:
        return own
    if own == "resnet":
        raise InputError(f"{arch} is made of no cells: leave --family out")
    return system


def settings_of(system: str) -> frozenset[str]:
    """What a system's networks are built from, by name."""
    return frozenset(field.name for field in dataclasses.fields(SYSTEMS[system]))


def usual_size(arch: str, system: str | None, family: str) -> Size:
    """The width and depth of a row; of another genotype in the blocks of `system`, those usual there.

    Raises InputError where a row has no published size for this `family` of images.
    """
    own = system_of(arch, system)
    if arch not in ROWS or ROWS[arch].system != own:
        return ROWS[USUAL_ROW[own][family]].sizes[family]
    if family not in ROWS[arch].sizes:
        others = [name for name, row in ROWS.items() if row.system == own and family in row.sizes]
        raise InputError(
            f"{arch} has no published size for {family} images: choose {' or '.join(others)}, "
            "or give --init_channels and --layers"
        )
    return ROWS[arch].sizes[family]


def make_config(
    arch: str,
    system: str | None = None,
    *,
    family: str = "cifar",
    num_classes: int = 10,
    weight_bits: int = 1,
    activation_bits: int = 1,
    **settings: Any,
) -> Config:
    """The configuration of a row or of another genotype, of the usual size where `settings` say nothing.

    `settings` are init_channels, layers, groups, auxiliary, weight_binarization, activation and variant; None
    is nothing.
    Raises InputError on what makes no network, and on a setting that the system does not have.
    """
    own = system_of(arch, system)
    fields = {"family": family, "num_classes": num_classes}
    given = {name: value for name, value in settings.items() if value is not None}
    if not {"init_channels", "layers"} <= given.keys():
        size = usual_size(arch, system, family)._asdict()
        given = {name: value for name, value in size.items() if value is not None} | given
    kind = SYSTEMS[own]
    if own != "resnet":
        translate = own if arch in ROWS or system is not None else None
        fields |= {"genotype": get_genotype(arch, translate)}
        fields |= {"weight_bits": weight_bits, "activation_bits": activation_bits}
    known = settings_of(own)
    for name, value in given.items():
        if name not in known and value:
            raise InputError(f"{own} has no {name}; leave it out")
    return kind(**fields, **{name: value for name, value in given.items() if name in known})


def config_from_dict(fields: dict[str, Any]) -> Config:
    """The configuration that a checkpoint carries. Raises InputError, TypeError or KeyError: none is."""
    system = fields.get("system", "ebnas")
    if system not in SYSTEMS:
        raise InputError(f"unknown system {system!r}; choose from {tuple(SYSTEMS)}")
    return SYSTEMS[system].from_dict(fields)


def trained_network(checkpoint: dict) -> nn.Module:
    """The network of a training run's checkpoint, rebuilt from it alone: on the CPU, evaluation mode.

    Raises InputError on a search's checkpoint, which holds a supernet.
    """
    if checkpoint["kind"] == "search":
        raise InputError("this is a search's checkpoint: train its genotype first, with train.py --arch")
    model = build_model(config_from_dict(checkpoint["config"]))
    model.load_state_dict(checkpoint["model"])
    return model.eval()


def label(config: Config) -> str:
    """The name of a network, and that it is a stand-in where it is one: `BATS (stand-in: ...)`; with its
    width where that is not its row's."""
    rows = {
        name: row
        for name, row in ROWS.items()
        if row.system == config.system and (name not in GENOTYPES or GENOTYPES[name] == config.genotype)
    }
    if not rows:
        return f"a cell of its own in the blocks of {config.system}, C {config.init_channels}"
    size = tuple(getattr(config, part, None) for part in Size._fields)
    as_published = [name for name, row in rows.items() if row.sizes.get(config.family) == size]
    name = (as_published or list(rows))[0]
    text = rows[name].label.format(name=name, init_channels=size[0], layers=size[1])
    if not as_published and "C " not in text:
        text += f", C {config.init_channels}"
    is_ours = config.family == rows[name].own_form
    return f"{text}, {config.family.upper()} form ours" if is_ours else text
