"""The flags of a training script, settled: which stage of which network they ask for, how it is trained."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from flags import options
from flags.choices import STAGE1_BITS
from flags.settings import NetworkSettings, settings_from
from networks.registry import Config, make_config, settings_of
from networks.rows import EBNAS_ROW, system_of, usual_size
from run.distributed import World
from run.resume import Origin, find_origin
from training.recipes import EBNAS, get_recipe
from utils import InputError

STAGE1 = {"ebnas": ("w1a32", "w32a1", "w32a32"), "bats": ("w32a1", "w1a32"), "dcp": ("w32a1",)}
"""What each system's stage 1 can be, the usual one first. Those that are not here have a single stage."""

ONLY_STAGE_BITS = {"bnas": (1, 1), "resnet": (32, 32)}

NETWORK_FLAGS = ("init_channels layers groups auxiliary weight_binarization variant activation").split()


def find_run(
    flags: options.Flags, *, parser: options.Parser, script: str, family: str, world: World
) -> Origin:
    """Which run of a training script this is; its `flags` are settled.

    Raises InputError on flags that the network has no use for, and as resume.find_origin.
    """
    named = flags.values.resume not in (None, "auto")  # such a run has its own flags
    values = as_usual(vars(flags.values), family) if named else settle(flags, family=family)
    name = f"eval-{values['save']}-{stage_of(values)}"
    return find_origin(values, flags.given, script=script, name=name, parser=parser, world=world)


def settle(flags: options.Flags, *, family: str) -> dict[str, Any]:
    """The value of every flag, with what --arch and --recipe say where the user has said nothing.

    Raises InputError on flags that the network has no use for.
    """
    values, given = dict(vars(flags.values)), flags.given
    arch, system = values["arch"], system_of(values["arch"], values["family"])
    for name in NETWORK_FLAGS:
        if name in given and name not in settings_of(system):
            raise InputError(f"{arch} has no use for --{name}; leave it out")
    if system == "resnet" and "drop_path_prob" in given:
        raise InputError(f"{arch} has no paths to drop; leave --drop_path_prob out")
    if system not in STAGE1:
        which = "has no stages: it trains in full precision" if system == "resnet" else "trains in one stage"
        for name in ("binary", "stage1", "from_scratch", "stage1_weight_decay"):
            if name in given:
                raise InputError(f"{arch} {which}; leave --{name} out")
    elif values["stage1"] not in (None, *STAGE1[system]):
        raise InputError(f"--stage1 {values['stage1']}: that of {arch} is {', '.join(STAGE1[system])}")
    recipe = get_recipe(values["recipe"], system, family)
    sizes = {}
    if {"init_channels", "layers"} - given:
        sizes = usual_size(arch, values["family"], family)._asdict()
    own = {"stage1": STAGE1.get(system, STAGE1["ebnas"])[0], **sizes, **recipe.flags}
    values |= {name: value for name, value in own.items() if name not in given and value is not None}
    values = as_usual(values, family)
    if recipe.taught and not values["teacher"]:
        raise InputError(
            f"--recipe {values['recipe']} learns from a network in full precision: train one with the same "
            "flags and `--recipe ebnas --stage1 w32a32`, then name its folder with --teacher"
        )
    check_beyond(values, given)
    if values["resume"] is None:  # what makes no network is said before any data is read
        config_of(settings_from(NetworkSettings, values), family=family, num_classes=1)
    return values


def as_usual(values: dict[str, Any], family: str) -> dict[str, Any]:
    """`values` with those of EBNAS's recipe and network for what is None."""
    usual = {"stage1": STAGE1["ebnas"][0], **EBNAS_ROW[family], **EBNAS[family].flags}
    return values | {name: value for name, value in usual.items() if values[name] is None}


def check_beyond(values: Mapping[str, Any], given: Collection[str]) -> None:
    """Raise InputError where flags beyond the paper do not go with others."""
    if values["stage1_weight_decay"] and values["weight_decay"]:
        raise InputError(
            "--stage1_weight_decay (of some weights, in stage 1) and --weight_decay (of all, in each stage) "
            "contradict each other; give one"
        )
    if values["stage1_weight_decay"] and values["from_scratch"]:
        raise InputError("--stage1_weight_decay has no use with --from_scratch, which has no stage 1")
    if (
        values["teacher"]
        and values["teacher_weight"] == 1
        and "label_smooth" in given
        and values["label_smooth"]
    ):
        raise InputError(
            "--label_smooth has no use with --teacher_weight 1, which takes no labels; leave it out, or give "
            "a smaller --teacher_weight"
        )


def stage_of(values: Mapping[str, Any]) -> str:
    if system_of(values["arch"], values["family"]) not in STAGE1:
        return "single"
    return "stage2" if values["binary"] else "stage1"


def config_of(network: NetworkSettings, *, family: str, num_classes: int) -> Config:
    """The network of the stage that is asked for. Raises InputError as its configuration does."""
    system = system_of(network.arch, network.family)
    stage1 = ONLY_STAGE_BITS[system] if system not in STAGE1 else STAGE1_BITS[network.stage1]
    weight_bits, activation_bits = (1, 1) if network.binary else stage1
    known = settings_of(system)
    return make_config(
        network.arch,
        network.family,
        family=family,
        num_classes=num_classes,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        **{name: getattr(network, name) for name in NETWORK_FLAGS if name in known},
    )
