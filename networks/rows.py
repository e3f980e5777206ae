"""The rows of the published tables, by name: system, width and depth, published figures."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import NamedTuple

from utils import InputError


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

CELL_SYSTEMS = ("ebnas", "bnas", "bats", "dcp")
"""Whose networks are made of a genotype's cells."""

USUAL_ROW = {
    "ebnas": {"cifar": "EBNAS", "imagenet": "EBNAS"},
    "bnas": {"cifar": "BNAS-A", "imagenet": "BNAS-F"},
    "bats": {"cifar": "BATS", "imagenet": "BATS"},
    "dcp": {"cifar": "DCP-NAS-L", "imagenet": "DCP-NAS-L"},
}
"""Whose size a genotype has that comes without one."""


def system_of(arch: str, system: str | None = None) -> str:
    """The system that `--arch` and, where it is given, `--system` ask for."""
    own = ROWS[arch].system if arch in ROWS else "ebnas"
    if system is None or system == own:
        return own
    if own == "resnet":
        raise InputError(f"{arch} is made of no cells: leave --system out")
    return system


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
