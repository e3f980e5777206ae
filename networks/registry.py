"""The rows of the published tables: EBNAS, and the networks that it is compared with, by name.

A row is a genotype in the blocks of a system, at its published width and depth. A configuration knows its
system, and builds its network; a checkpoint that names no system is EBNAS's.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from torch import nn

from genotypes import GENOTYPES, get_genotype
from model import ModelConfig, build_model
from networks.bats import BatsConfig
from networks.bnas import BnasConfig
from networks.dcp_nas import DcpNasConfig
from networks.resnet import ResNetConfig
from networks.rows import ROWS, Size, system_of, usual_size
from utils import InputError

SYSTEMS = {
    config.system: config for config in (ModelConfig, BnasConfig, BatsConfig, DcpNasConfig, ResNetConfig)
}
"""By name, what a system's networks are built from."""

Config = ModelConfig | BnasConfig | BatsConfig | DcpNasConfig | ResNetConfig


def settings_of(system: str) -> frozenset[str]:
    """The names of the fields that a system's networks are built from."""
    return frozenset(field.name for field in dataclasses.fields(SYSTEMS[system]))


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
