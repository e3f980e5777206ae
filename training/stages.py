"""What the two training scripts share: a stage's network, what trains it, its epochs, what is said of it."""

from __future__ import annotations

import sys
import warnings
from contextlib import suppress
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from flags.settings import StageSettings
from images.loaders import Loader
from kernels import Form, accelerate, choose_form
from kernels.compilation import compile_regions
from model import build_model
from networks.registry import label
from networks.rows import system_of
from pictures import draw_curves
from run.checkpoint import LIVE, network_config
from run.distributed import World
from run.resume import Origin
from run.runs import Run, read_args, read_metrics
from training.engine import Precision, Training, evaluate, in_memory_format, train_one_epoch
from training.optimizers import OPTIMIZERS, SCHEDULES
from training.pretrained import find_start, load_start, saw_holdout
from training.recipes import Recipe, get_recipe
from training.session import Session
from training.stage_flags import config_of, stage_of
from training.teacher import DistillationLoss, Teacher, find_teacher
from training.weights import clip_latent_weights, decaying_groups, moving_average
from utils import InputError, command_text, human, one_line, seed_everything


@dataclass(frozen=True)
class Built:
    """A stage's network on its device. `start`: where its weights come from, in words."""

    model: nn.Module
    form: Form
    start: str


@dataclass(frozen=True)
class StageTraining(Training):
    """What trains in a stage: with what its epochs and checkpoints need. `average` is that of the model over
    the steps, with --ema."""

    schedule: LRScheduler | None = None
    by_step: bool = False  # the schedule goes by steps, not by epochs
    average: nn.Module | None = None
    teacher: Teacher | None = None

    @property
    def evaluated(self) -> nn.Module:
        """The network that is evaluated and that a checkpoint has as its own."""
        return self.average or self.model

    @property
    def stateful(self) -> dict[str, Any]:
        """The objects whose state a checkpoint keeps beside the network."""
        return {
            "optimizer": self.optimizer,
            "scheduler": self.schedule,
            **({LIVE: self.model} if self.average else {}),
            **({"teacher": self.teacher} if self.teacher else {}),
        }


def build_teacher(settings: StageSettings, data: dict[str, Any], world: World) -> Teacher | None:
    """The network that --teacher names. Raises InputError where it has seen held-out images."""
    recipe = settings.recipe
    if not recipe.teacher:
        return None
    teacher = find_teacher(recipe.teacher, data, world)
    if teacher.flags and saw_holdout(teacher.flags, settings):
        raise InputError(
            f"--teacher {recipe.teacher} has trained on images that --holdout {settings.images.holdout} "
            "holds out; train it with the same --holdout and --seed"
        )
    _place(teacher.network, settings, world)
    return teacher


def build_network(settings: StageSettings, origin: Origin, data: dict[str, Any], world: World) -> Built:
    """This run's network on its device, with the weights that it starts from (see find_start)."""
    if origin.checkpoint:  # whatever has become of its genotype file since
        config, found, start = network_config(origin.checkpoint), None, "its checkpoint"
    else:
        family, num_classes = settings.images.family, len(data["classes"])
        config = config_of(settings.network, family=family, num_classes=num_classes)
        found = find_start(settings, config, data)
        start = found.words if found else "random weights"
    config.check_image_size(data["image_size"])
    seed_everything(settings.run.seed)
    model = build_model(config)
    if found is not None:
        load_start(model, found)
    form = _place(model, settings, world)
    torch.manual_seed(settings.run.seed + world.rank)  # drop-path differs between processes
    return Built(model, form, start)


def build_optimizer(settings: StageSettings, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's, with what a system or --clip_weights does after each of its steps."""
    ours, parameters = settings.recipe, model.parameters()
    if ours.stage1_weight_decay and not settings.network.binary:
        parameters = decaying_groups(model, ours.stage1_weight_decay)
    make = OPTIMIZERS[recipe_of(settings).optimizer]
    optimizer = make(parameters, lr=ours.learning_rate, weight_decay=ours.weight_decay)
    model.register_update_rule(optimizer)
    if ours.clip_weights:
        clip_latent_weights(model, optimizer)
    return optimizer


def build_schedule(
    settings: StageSettings, optimizer: torch.optim.Optimizer, *, steps: int, warmup: int
) -> LRScheduler:
    """The recipe's, for epochs of `steps` steps; EBNAS's begins with `warmup` epochs of linear rise."""
    # a run that goes on where an epoch's steps were done, in another process, takes the schedule's first
    warnings.filterwarnings("ignore", r"Detected call of `lr_scheduler\.step", UserWarning)
    recipe = recipe_of(settings)
    schedule = SCHEDULES[recipe.schedule](
        optimizer,
        epochs=settings.run.epochs,
        steps=steps,
        warmup=warmup,
        least=settings.recipe.learning_rate_min,
    )
    if recipe.by_step:
        optimizer.register_step_post_hook(lambda *_: schedule.step())
    return schedule


def build_training(
    settings: StageSettings,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    schedule: LRScheduler,
    teacher: Teacher | None,
    *,
    precision: Precision,
    world: World,
) -> StageTraining:
    """All that a step and an epoch take. Compiles the model, if that is asked for."""
    step, ours = settings.step, settings.recipe
    criterion = nn.CrossEntropyLoss(label_smoothing=ours.label_smooth)
    if teacher:
        criterion = DistillationLoss(
            criterion, weight=ours.teacher_weight, temperature=ours.teacher_temperature
        )
    average = moving_average(model, optimizer, ours.ema) if ours.ema else None  # of what is clipped
    if step.compile:
        compile_regions(model, mode=step.compile_mode)
    return StageTraining(
        model,
        criterion,
        optimizer,
        world,
        precision,
        targets_of=teacher or attrgetter("targets"),
        accumulate=step.accumulate,
        grad_clip=step.grad_clip,
        auxiliary_weight=ours.auxiliary_weight,
        schedule=schedule,
        by_step=recipe_of(settings).by_step,
        average=average,
        teacher=teacher,
    )


def recipe_of(settings: StageSettings) -> Recipe:
    network = settings.network
    system = system_of(network.arch, network.family)
    return get_recipe(settings.recipe.recipe, system, settings.images.family)


def _place(network: nn.Module, settings: StageSettings, world: World) -> Form:
    """Bring it to the device, in the form and the layout that are asked for: `auto`, the fastest known."""
    step, device = settings.step, world.device
    form = choose_form(step.kernels, device, precision=step.precision, compiled=step.compile)
    accelerate(network.to(device), form.name)
    # torch's pools and small grouped convolutions are 1.5 times faster so on a CPU
    channels_last = device.type == "cpu" and form.name != "native"
    in_memory_format(network, step.memory_format, auto="channels_last" if channels_last else "contiguous")
    return form.told(network)


# Its epochs


def train_epochs(
    session: Session, training: StageTraining, train_loader: Loader, valid_loader: Loader
) -> None:
    """Train and evaluate, epoch after epoch, from where the run stands."""
    world, precision, settings = training.world, training.precision, session.settings
    for epoch in session.epochs():
        learning_rate = training.schedule.get_last_lr()[0]
        session.run.log(f"epoch {epoch} lr {learning_rate:e}")
        training.model.drop_path_prob = settings.recipe.drop_path_prob * epoch / settings.run.epochs
        train = train_one_epoch(
            training, train_loader, start=session.position, after_step=session.training(train_loader)
        )
        if not training.by_step:
            training.schedule.step()
        for network in filter(None, (training.model, training.average)):
            world.average_buffers(network)
        after_step = session.evaluating(valid_loader)
        valid = evaluate(
            training.evaluated, valid_loader, world=world, precision=precision, after_step=after_step
        )
        session.run.log(
            f"train_acc {train['top1']:.2f} valid_acc {valid['top1']:.2f} top5 {valid['top5']:.2f} "
            f"loss {valid['loss']:.4f}"
        )
        session.finish_epoch(epoch, epoch_record(train, valid, learning_rate), score=valid["top1"])


# What is said of it


def header_of(origin: Origin, built: Built, data: dict[str, Any]) -> dict[str, Any]:
    """The entries that every checkpoint of the run keeps, for Session.start."""
    config = built.model.config.to_dict()
    return {"kind": stage_of(origin.flags), "config": config, "data": data, "kernels": built.form.name}


def log_start(session: Session, built: Built) -> None:
    """Say which stage this is, of what size, and which weights it begins with."""
    run, origin = session.run, session.origin
    config = built.model.config
    parameters = sum(parameter.numel() for parameter in built.model.parameters())
    run.log(
        f"{label(config)}, {stage_of(origin.flags)}: W{config.weight_bits}A{config.activation_bits}, "
        f"{human(parameters)} parameters, starting from {built.start}"
    )
    run.log(f"recipe {origin.flags['recipe']}: {recipe_of(session.settings).words}")
    log_form(run, built.form, origin.checkpoint)


def log_form(run: Run, form: Form, checkpoint: dict | None) -> None:
    """Say what computes; and of a run that goes on from `checkpoint`, if something else did so far."""
    run.log(form.words)
    before = form.name if checkpoint is None else checkpoint.get("kernels", "torch")
    if before != form.name:
        run.log(f"so far it was {before}: the same computation, rounded otherwise")


def epoch_record(train: dict, valid: dict, learning_rate: float) -> dict:
    """A training run's line in metrics.jsonl for an epoch."""
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
    if stage_of(session.origin.flags) != "stage1":
        run.log(f"next: python evaluate.py {run.folder}")
    else:
        run.log(f"next: {command} --binary --pretrained {command_text([str(run.folder)])}")
