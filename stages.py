"""What the two training scripts share: the stage that the flags ask for, its network, its start, its end."""

from __future__ import annotations

import argparse
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LinearLR, LRScheduler, SequentialLR

import options
from baselines import Config, label, make_config, settings_of, system_of, usual_size
from checkpoint import LIVE, load_checkpoint, network_config, resolve_checkpoint
from data import Batch, Loader
from engine import in_memory_format
from figures import draw_curves
from kernels import Form, accelerate, choose_form
from kernels.compilation import compile_regions
from model import build_model
from recipes import Recipe, get_recipe
from runs import Run, newest_checkpoint, read_args, read_metrics
from session import Session
from teacher import DistillationLoss, Teacher, find_teacher
from utils import InputError, command_text, human, one_line, seed_everything
from weights import clip_latent_weights, decaying_groups, moving_average

STAGE1_BITS = {"w1a32": (1, 32), "w32a1": (32, 1), "w32a32": (32, 32)}
"""Bits of weights and of activations in stage 1; stage 2 is W1A1."""

STAGE1 = {"ebnas": ("w1a32", "w32a1", "w32a32"), "bats": ("w32a1", "w1a32"), "dcp": ("w32a1",)}
"""What each system's stage 1 can be, the usual one first. Those that are not here have a single stage."""

ONLY_STAGE_BITS = {"bnas": (1, 1), "resnet": (32, 32)}

NETWORK_FLAGS = (
    *("init_channels", "layers", "groups", "auxiliary", "weight_binarization", "variant", "activation"),
)

AUXILIARY = "auxiliary_head."


def settle(args: argparse.Namespace, *, family: str) -> argparse.Namespace:
    """The flags, with what --arch and --recipe say where the user has said nothing.

    Raises InputError on flags that the network has no use for. A run that is named to be resumed has its own.
    """
    if args.resume not in (None, "auto"):
        return args
    system = system_of(args.arch, args.family)
    for name in NETWORK_FLAGS:
        if name in args.given and name not in settings_of(system):
            raise InputError(f"{args.arch} has no use for --{name}; leave it out")
    if system == "resnet" and "drop_path_prob" in args.given:
        raise InputError(f"{args.arch} has no paths to drop; leave --drop_path_prob out")
    if system not in STAGE1:
        which = "has no stages: it trains in full precision" if system == "resnet" else "trains in one stage"
        for name in ("binary", "stage1", "pretrained", "from_scratch", "stage1_weight_decay"):
            if name in args.given:
                raise InputError(f"{args.arch} {which}; leave --{name} out")
    settled = argparse.Namespace(**vars(args))
    if {"init_channels", "layers"} - args.given:
        for name, value in usual_size(args.arch, args.family, family)._asdict().items():
            if value is not None and name not in args.given:
                setattr(settled, name, value)
    if system in STAGE1:
        if "stage1" not in args.given:
            settled.stage1 = STAGE1[system][0]
        if settled.stage1 not in STAGE1[system]:
            raise InputError(f"--stage1 {settled.stage1}: that of {args.arch} is {', '.join(STAGE1[system])}")
    recipe = get_recipe(args.recipe, system, family)
    for name, value in recipe.flags.items():
        if name not in args.given:
            setattr(settled, name, value)
    if recipe.taught and not settled.teacher:
        raise InputError(
            f"--recipe {args.recipe} learns from a network in full precision: train one with the same flags "
            "and `--recipe ebnas --stage1 w32a32`, then name its folder with --teacher"
        )
    if args.resume is None:  # what makes no network is said before any data is read
        config_of(settled, family=family, num_classes=1)
    return settled


def stage(args: argparse.Namespace) -> str:
    if system_of(args.arch, args.family) not in STAGE1:
        return "single"
    return "stage2" if args.binary else "stage1"


def run_name(args: argparse.Namespace) -> str:
    return f"eval-{args.save}-{stage(args)}"


def config_of(args: argparse.Namespace, *, family: str, num_classes: int) -> Config:
    """The network of the stage that the flags ask for. Raises InputError as its configuration does."""
    system = system_of(args.arch, args.family)
    stage1 = ONLY_STAGE_BITS[system] if system not in STAGE1 else STAGE1_BITS[args.stage1]
    weight_bits, activation_bits = (1, 1) if args.binary else stage1
    known = settings_of(system)
    return make_config(
        args.arch,
        args.family,
        family=family,
        num_classes=num_classes,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        **{name: getattr(args, name) for name in NETWORK_FLAGS if name in known},
    )


# The start of stage 2


def find_start(args: argparse.Namespace, config: Config, data: dict[str, Any]) -> tuple[Path, dict] | None:
    """The stage-1 checkpoint that this run starts from; None for stage 1 itself and for --from_scratch.

    --pretrained names it; else it is the newest finished stage-1 run of the same set, genotype and size, made
    as the flags ask.
    Raises InputError: there is none (with the command that makes one), or it does not fit.
    """
    if not args.binary:
        for flag in ("pretrained", "from_scratch"):
            if getattr(args, flag):
                raise InputError(f"--{flag} is for stage 2; add --binary, or leave it out")
        return None
    if args.from_scratch:
        if args.pretrained:
            raise InputError("--from_scratch and --pretrained contradict each other; give one")
        return None
    if args.pretrained:
        path = resolve_checkpoint(args.pretrained)
        checkpoint = load_checkpoint(path)
        if checkpoint["kind"] != "stage1":
            raise InputError(
                f"{path} is a {checkpoint['kind']} checkpoint; stage 2 starts from stage 1, which the same "
                "command without --binary trains"
            )
        if differing := _differences(checkpoint, config, data):
            raise InputError(f"{path} is of another configuration: {', '.join(differing)}")
        if _saw_holdout(checkpoint["args"], args):
            raise InputError(
                f"{path} has trained on images that --holdout {args.holdout} holds out; "
                "train stage 1 with the same --holdout and --seed"
            )
        return path, checkpoint
    found = newest_checkpoint(
        "eval-*-stage1-*",
        lambda checkpoint: (
            checkpoint["kind"] == "stage1"
            and checkpoint["finished"]
            and not _differences(checkpoint, config, data)
            and not _saw_holdout(checkpoint["args"], args)
            and _made_as_asked(checkpoint, args, config)
        ),
    )
    if found is None:
        stage1 = command_text(["python", *(word for word in sys.argv if word != "--binary")])
        raise InputError(
            "no finished stage-1 run of this set, genotype and size, with "
            f"{command_text(_asked(args, config))}, to start from; first run `{stage1}`, or give "
            "--pretrained PATH, or --from_scratch"
        )
    return found


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


def _saw_holdout(theirs: dict, args: argparse.Namespace) -> bool:
    """Whether a run of flags `theirs` trained on images that this one holds out to choose an epoch."""
    if not getattr(args, "holdout", 0):
        return False
    return any(theirs.get(name) != getattr(args, name) for name in ("holdout", "seed"))


def _made_as_asked(checkpoint: dict, args: argparse.Namespace, config: Config) -> bool:
    """Whether stage 1 had the bits of --stage1, --stage1_weight_decay, --recipe (EBNAS's own is `ebnas`)
    and --weight_binarization."""
    theirs, flags = checkpoint["config"], checkpoint["args"]
    bits = (theirs["weight_bits"], theirs["activation_bits"])
    binarization = theirs.get("weight_binarization", args.weight_binarization)
    recipe = get_recipe(flags.get("recipe", "ebnas"), config.system, config.family)
    return (
        bits == STAGE1_BITS[args.stage1]
        and binarization == args.weight_binarization
        and flags.get("stage1_weight_decay", 0.0) == args.stage1_weight_decay
        and recipe == get_recipe(args.recipe, config.system, config.family)
    )


def _asked(args: argparse.Namespace, config: Config) -> list[str]:
    """The flags that choose among the stage-1 runs that fit: what _made_as_asked and _saw_holdout look at."""
    holdout = getattr(args, "holdout", 0)
    return options.command_line(
        {
            "recipe": args.recipe,
            "stage1": args.stage1,
            "stage1_weight_decay": args.stage1_weight_decay or None,
            "weight_binarization": getattr(config, "weight_binarization", None),
            **({"holdout": holdout, "seed": args.seed} if holdout else {}),
        }
    )


def load_start(model: nn.Module, weights: dict[str, torch.Tensor]) -> None:
    """Load stage 1's weights; of the auxiliary head where both have one, else the model's stay."""
    ours = model.state_dict()
    kept = {name for name in ours if name.startswith(AUXILIARY) and name not in weights}
    model.load_state_dict({name: ours[name] if name in kept else weights[name] for name in ours})


# What is trained, and how


@dataclass(frozen=True)
class Training:
    """What a training script trains, and with what; `header` and `stateful` are for Session.start."""

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    scheduler: LRScheduler
    recipe: Recipe
    header: dict[str, Any]
    start: str  # where its weights come from, in words
    form: Form
    teacher: Teacher | None = None
    average: nn.Module | None = None  # of `model` over the steps, with --ema

    def end_epoch(self) -> None:
        """Step the schedule, where it goes by epochs."""
        if not self.recipe.by_step:
            self.scheduler.step()

    @property
    def network(self) -> nn.Module:
        """What is evaluated, and is a checkpoint's network."""
        return self.average or self.model

    @property
    def networks(self) -> tuple[nn.Module, ...]:
        return (self.model, self.average) if self.average else (self.model,)

    @property
    def targets_of(self) -> Callable[[Batch], Any]:
        """What the criterion compares logits with, of a batch."""
        return self.teacher or attrgetter("targets")

    @property
    def stateful(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            **({LIVE: self.model} if self.average else {}),
            **({"teacher": self.teacher} if self.teacher else {}),
        }


def build(session: Session, loader: Loader, *, family: str, data: dict[str, Any], warmup: int) -> Training:
    """This run's network on its device, in stage 2 with stage 1's weights; its loss, optimiser and schedule
    for the batches of `loader`."""
    args, world = session.args, session.world
    check_beyond(args)
    form = choose_form(args.kernels, world.device, precision=args.precision, compiled=args.compile)
    if session.checkpoint:  # whatever has become of its genotype file since
        config, found, start = network_config(session.checkpoint), None, "its checkpoint"
    else:
        config = config_of(args, family=family, num_classes=len(data["classes"]))
        found = find_start(args, config, data)
        start = str(found[0]) if found else "random weights"
    config.check_image_size(data["image_size"])
    criterion, teacher = nn.CrossEntropyLoss(label_smoothing=args.label_smooth), None
    if args.teacher:
        teacher = find_teacher(args.teacher, data, world)
        if teacher.flags and _saw_holdout(teacher.flags, args):
            raise InputError(
                f"--teacher {args.teacher} has trained on images that --holdout {args.holdout} holds out; "
                "train it with the same --holdout and --seed"
            )
        _place(teacher.network, world.device, args.memory_format, form)
        criterion = DistillationLoss(
            criterion, weight=args.teacher_weight, temperature=args.teacher_temperature
        )
    seed_everything(args.seed)
    model = build_model(config)
    if found is not None:
        load_start(model, found[1]["model"])
    _place(model, world.device, args.memory_format, form)
    torch.manual_seed(args.seed + world.rank)  # drop-path differs between processes
    decay, parameters = args.weight_decay, model.parameters()
    if args.stage1_weight_decay and not args.binary:
        parameters = decaying_groups(model, args.stage1_weight_decay)
    recipe = recipe_of(args, family)
    optimizer = recipe.optimizer(parameters, lr=args.learning_rate, weight_decay=decay)
    model.register_update_rule(optimizer)
    if args.clip_weights:
        clip_latent_weights(model, optimizer)
    # a run that goes on where an epoch's steps were done, in another process, takes the schedule's first
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)
    if recipe.schedule is None:
        scheduler = make_scheduler(optimizer, args, warmup=warmup)
    else:
        scheduler = recipe.schedule(optimizer, args.epochs, len(loader))
    if recipe.by_step:
        optimizer.register_step_post_hook(lambda *_: scheduler.step())
    average = moving_average(model, optimizer, args.ema) if args.ema else None  # of what is clipped
    if args.compile:
        compile_regions(model, mode=args.compile_mode)
    return Training(
        model,
        criterion,
        optimizer,
        scheduler,
        recipe,
        {"kind": stage(args), "config": config.to_dict(), "data": data, "kernels": form.name},
        start,
        form,
        teacher,
        average,
    )


def recipe_of(args: argparse.Namespace, family: str) -> Recipe:
    return get_recipe(args.recipe, system_of(args.arch, args.family), family)


def check_beyond(args: argparse.Namespace) -> None:
    """Raise InputError where flags of options.add_beyond_flags do not go with others."""
    if args.stage1_weight_decay and args.weight_decay:
        raise InputError(
            "--stage1_weight_decay (of some weights, in stage 1) and --weight_decay (of all, in each stage) "
            "contradict each other; give one"
        )
    if args.stage1_weight_decay and args.from_scratch:
        raise InputError("--stage1_weight_decay has no use with --from_scratch, which has no stage 1")
    if args.teacher and args.teacher_weight == 1 and "label_smooth" in args.given and args.label_smooth:
        raise InputError(
            "--label_smooth has no use with --teacher_weight 1, which takes no labels; leave it out, or give "
            "a smaller --teacher_weight"
        )


def _place(network: nn.Module, device: torch.device, memory_format: str, form: Form) -> None:
    """Bring it to the device, in its form and the layout that is asked for: `auto`, the fastest known."""
    accelerate(network.to(device), form.name)
    # torch's pools and small grouped convolutions are 1.5 times faster so on a CPU
    channels_last = device.type == "cpu" and form.name != "native"
    in_memory_format(network, memory_format, auto="channels_last" if channels_last else "contiguous")


def make_scheduler(optimizer: torch.optim.Optimizer, args: argparse.Namespace, *, warmup: int) -> LRScheduler:
    """By epoch: `warmup` epochs of linear rise from 1/warmup, then a cosine to `learning_rate_min`."""
    cosine = CosineAnnealingLR(optimizer, max(args.epochs - warmup, 1), eta_min=args.learning_rate_min)
    if not warmup:
        return cosine
    rise = LinearLR(optimizer, start_factor=1 / warmup, total_iters=max(warmup - 1, 1))
    return SequentialLR(optimizer, [rise, cosine], milestones=[warmup])


# What is said of it


def log_start(run: Run, args: argparse.Namespace, training: Training, checkpoint: dict | None) -> None:
    """Say which stage this is, of what size, and which weights it begins with."""
    config = training.model.config
    parameters = sum(parameter.numel() for parameter in training.model.parameters())
    run.log(
        f"{label(config)}, {stage(args)}: W{config.weight_bits}A{config.activation_bits}, "
        f"{human(parameters)} parameters, starting from {training.start}"
    )
    run.log(f"recipe {args.recipe}: {training.recipe.words}")
    log_form(run, training.form, checkpoint)


def log_form(run: Run, form: Form, checkpoint: dict | None) -> None:
    """Say what computes; and of a run that goes on from `checkpoint`, if something else did so far."""
    run.log(form.words)
    before = form.name if checkpoint is None else checkpoint.get("kernels", "torch")
    if before != form.name:
        run.log(f"so far it was {before}: the same computation, rounded otherwise")


def epoch_record(train: dict, valid: dict, learning_rate: float) -> dict:
    """What metrics.jsonl keeps of an epoch of training."""
    return {
        "learning_rate": learning_rate,
        **{
            f"{part}_{name}": means[name]
            for part, means in (("train", train), ("valid", valid))
            for name in ("loss", "top1", "top5")
        },
        "seconds": train["seconds"] + valid["seconds"],
        "cpu_seconds": train["cpu_seconds"] + valid["cpu_seconds"],
        "images_per_second": train["images_per_second"],
    }


def finish(session: Session, *, held_out: str, test: dict[str, float] | None = None) -> None:
    """Write result.json and mark the run as finished; say its last and best accuracy, each with what it was
    measured on; draw its curves; say what to do next. `test`: of the best epoch, where it was not chosen on
    the test images."""
    run, best = session.run, session.best
    with suppress(InputError):  # of damaged metrics: said below
        run.write_result({"chosen_on": held_out, "best": best, "last": run.last_record(), "test": test})
    session.finish()
    if run.folder is None:
        return
    note = (
        "chosen on the test set, so optimistic" if held_out == "test" else f"chosen on the {held_out} images"
    )
    command = command_text(["python", *sys.argv])
    try:
        last = read_metrics(run.folder)[-1]
        run.log(
            f"last epoch {last['epoch']}: {held_out} top-1 {last['valid_top1']:.2f} %, "
            f"top-5 {last['valid_top5']:.2f} %"
        )
        for picture in draw_curves(run.folder):
            run.log(f"picture {picture}")
        command = read_args(run.folder)["command"]  # not the one that resumed it
    except (InputError, LookupError, OSError) as error:  # the run is done all the same
        run.log(f"cannot look back on the run: {one_line(error)}")
    run.log(f"best epoch {best['epoch']}: {held_out} top-1 {best['score']:.2f} %, {note}")
    if stage(session.args) != "stage1":
        run.log(f"next: python evaluate.py {run.folder}")
    else:
        run.log(f"next: {command} --binary --pretrained {command_text([str(run.folder)])}")
