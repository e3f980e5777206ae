"""One training step, and the batch loops of training and of evaluation, for all scripts and the benchmark."""

from __future__ import annotations

import gc
import sys
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flags.choices import PRECISIONS
from run.distributed import World
from utils import InputError, RunFailed

if TYPE_CHECKING:  # data brings torchvision, which not every script needs
    from flags.settings import StepSettings
    from images.loaders import Batch, Loader


class Precision:
    """Autocast and, for fp16, a gradient scaler. Raises InputError on another `name` than PRECISIONS'."""

    def __init__(self, name: str, device: torch.device):
        if name not in PRECISIONS:
            raise InputError(f"unknown precision {name!r}; choose from {PRECISIONS}")
        self.name, self.device = name, device
        self.scaler = torch.amp.GradScaler(device.type, enabled=name == "fp16")

    def autocast(self) -> AbstractContextManager:
        if self.name == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)


def choose_precision(
    name: str, device: torch.device, *, tf32: bool = False, cudnn_benchmark: bool = False
) -> Precision:
    """Settle the arithmetic of this process.

    Without `tf32` a GPU computes fp32 convolutions and products in fp32 (torch's default rounds the inputs of
    convolutions to TF32's 10 bits). With `cudnn_benchmark` cuDNN takes the algorithm that it finds fastest.
    """
    torch.backends.cudnn.benchmark = cudnn_benchmark
    with warnings.catch_warnings():  # newer switches must not be mixed with these, which torch.compile reads
        warnings.filterwarnings("ignore", message="Please use the new API settings")
        torch.backends.cudnn.allow_tf32 = tf32
        torch.backends.cuda.matmul.allow_tf32 = tf32
    if name == "bf16" and device.type == "cuda" and not has_bf16():
        print("warning: this GPU has no bf16 and emulates it, slowly; it has fp16", file=sys.stderr)
    return Precision(name, device)


def precision_of(step: StepSettings, device: torch.device) -> Precision:
    return choose_precision(step.precision, device, tf32=step.tf32, cudnn_benchmark=step.cudnn_benchmark)


def has_bf16() -> bool:
    """Whether the GPU computes in bf16, and does not emulate it."""
    return torch.cuda.is_bf16_supported(including_emulation=False)


def in_memory_format(model: nn.Module, name: str, *, auto: str) -> nn.Module:
    """`model` with its weights, and so what its convolutions give, in one of choices.MEMORY_FORMATS."""
    name = auto if name == "auto" else name
    return model.to(memory_format=torch.channels_last) if name == "channels_last" else model


def as_compiled(batch: Batch, batch_size: int) -> AbstractContextManager:
    """Within it compiled modules run; for a last batch of less than `batch_size`, as if they were not: to
    compile them for it would take longer than what it saves."""
    if batch.global_size == batch_size:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def parts_of(batch: Batch, accumulate: int) -> Iterator[Batch]:
    """`batch` in `accumulate` parts whose sizes differ by one at most; in fewer when the batch is small,
    because batch normalisation needs two images. `global_size` stays: `World.loss_factor` weighs a part by
    it."""
    count = max(1, min(accumulate, len(batch.images) // 2))
    for images, targets in zip(
        batch.images.tensor_split(count), batch.targets.tensor_split(count), strict=True
    ):
        yield batch._replace(images=images, targets=targets)


@dataclass(frozen=True)
class Training:
    """A model that is trained, and all that a step takes beside its batch.

    `model` maps images to (logits, auxiliary logits or None). `criterion` compares each with what
    `targets_of` makes of the batch. A step takes its batch in `accumulate` parts, one after another, which
    needs less memory; its gradient is that of the mean over the batch, but batch normalisation sees each
    part by itself, and moves its running statistics once a part. `grad_clip` is the largest norm of the
    gradient, 0 for none.
    """

    model: nn.Module
    criterion: nn.Module
    optimizer: torch.optim.Optimizer
    world: World
    precision: Precision
    targets_of: Callable[[Batch], Any] = attrgetter("targets")
    accumulate: int = 1
    grad_clip: float = 0.0
    auxiliary_weight: float = 0.0


def training_loss(training: Training, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """What is minimised, with the auxiliary head's loss; the loss alone; the logits (n, classes), float32."""
    with training.precision.autocast():
        targets = training.targets_of(batch)
        logits, auxiliary_logits = training.model(batch.images)
        logits = logits.float()
        objective = loss = training.criterion(logits, targets)
        if auxiliary_logits is not None:
            auxiliary_loss = training.criterion(auxiliary_logits.float(), targets)
            objective = loss + training.auxiliary_weight * auxiliary_loss
    return objective, loss, logits


def training_step(training: Training, batch: Batch, observe: Observe | None = None) -> None:
    """One step of the optimiser on `batch`, of which `observe` sees each part."""
    training.optimizer.zero_grad(set_to_none=True)
    for part in parts_of(batch, training.accumulate):
        objective, loss, logits = training_loss(training, part)
        backward(objective * training.world.loss_factor(part), training.precision)
        if observe is not None:
            observe(objective, loss, logits, part.targets)
    update(training.optimizer, training.world, training.precision, grad_clip=training.grad_clip)


def backward(loss: Tensor, precision: Precision) -> None:
    """Add the gradients of `loss`, scaled where fp16 needs it, to those that are there."""
    precision.scaler.scale(loss).backward()


def update(
    optimizer: torch.optim.Optimizer, world: World, precision: Precision, *, grad_clip: float = 0.0
) -> None:
    """Average the gradients over processes, clip them by their norm (0: not at all), and take a step."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    world.average_gradients(parameters)
    if grad_clip > 0:
        precision.scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(parameters, grad_clip)
    precision.scaler.step(optimizer)
    precision.scaler.update()


Observe = Callable[[Tensor, Tensor, Tensor, Tensor], None]
"""Sees a part of a batch: what was minimised, the loss, the logits, the targets."""


class Sums:
    """Loss, top-1 and top-5 summed over samples, on the device: nothing waits until `means` is asked for."""

    def __init__(self, device: torch.device, values: Iterable[float] | None = None):
        self.values = torch.tensor(list(values or (0.0,) * 4), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, targets: Tensor) -> None:
        """Count a batch: its mean loss, logits (n, classes), targets (n,) or soft (n, classes)."""
        if not len(logits):
            return
        if targets.dim() == 2:
            targets = targets.argmax(1)
        hits = logits.topk(min(5, logits.shape[1]), dim=1).indices == targets.unsqueeze(1)
        n = torch.full((), len(logits), dtype=torch.float64, device=logits.device)
        self.values += torch.stack([loss.double() * n, hits[:, 0].sum().double(), hits.sum().double(), n])

    def means(self, world: World) -> dict[str, float]:
        """Exact means over the samples of all processes; accuracies in percent. Waits for the device."""
        loss, top1, top5, samples = world.sum(self.values).tolist()
        count = max(samples, 1.0)
        return {
            "loss": loss / count,
            "top1": 100 * top1 / count,
            "top5": 100 * top5 / count,
            "samples": int(samples),
        }


class FiniteWatch:
    """Raise RunFailed on the first loss that is not finite, without making the device wait for the host.

    On a GPU a loss is looked at when its copy has arrived, a few steps later; the step is still named right.
    """

    def __init__(self, epoch: int):
        self.epoch = epoch
        self.pending: deque[tuple[int, Tensor, torch.cuda.Event]] = deque()

    def add(self, step: int, loss: Tensor) -> None:
        if loss.device.type != "cuda":
            self._check(step, loss)
            return
        copy = torch.empty((), dtype=loss.dtype, pin_memory=True).copy_(loss.detach(), non_blocking=True)
        arrived = torch.cuda.Event()
        arrived.record()
        self.pending.append((step, copy, arrived))
        while self.pending and self.pending[0][2].query():
            self._check(*self.pending.popleft()[:2])

    def finish(self) -> None:
        while self.pending:
            step, copy, arrived = self.pending.popleft()
            arrived.synchronize()
            self._check(step, copy)

    def _check(self, step: int, loss: Tensor) -> None:
        if not torch.isfinite(loss):
            raise RunFailed(
                f"the loss is {loss.item()} at epoch {self.epoch}, step {step}; "
                "a lower --learning_rate may help"
            )


@dataclass(frozen=True)
class Position:
    """Where in training to go on: `step` of `epoch` is the next one; `sums` over the steps before it."""

    epoch: int
    step: int = 0
    sums: Sequence[float] | None = None


AfterStep = Callable[[int, Sums], None]
"""Called after each step with its number and the sums so far: progress, checkpoints, an end on a signal."""


def train_one_epoch(
    training: Training,
    loader: Loader,
    *,
    start: Position,
    before_step: Callable[[], None] | None = None,
    after_step: AfterStep | None = None,
) -> dict[str, float]:
    """Train for an epoch, or the rest of one, from `start` on. Gives the means over all of the epoch, loss,
    top1, top5 (percent), samples, and of this call seconds, cpu_seconds (of this process: a loader's workers
    are left out) and images_per_second.

    The model is put into training mode. Raises RunFailed on a loss that is not finite.
    """
    training.model.train()
    gc.freeze()  # what there is will stay; to look through it again and again takes a tenth of a small step
    world = training.world
    totals = Sums(world.device, start.sums if start.sums and world.is_main else None)
    watch = FiniteWatch(start.epoch)
    started, cpu_started = time.perf_counter(), time.process_time()
    for step, batch in enumerate(loader.epoch(start.epoch, start.step), start.step):

        def observe(objective: Tensor, loss: Tensor, logits: Tensor, targets: Tensor, step=step) -> None:
            totals.add(loss, logits, targets)
            watch.add(step, objective)

        if before_step is not None:
            before_step()
        with as_compiled(batch, loader.batch_size):
            training_step(training, batch, observe)
        if after_step is not None:
            after_step(step, totals)
    watch.finish()
    means = totals.means(world)
    seconds = time.perf_counter() - started
    images = means["samples"] - (start.sums[-1] if start.sums else 0)
    return {
        **means,
        "seconds": seconds,
        "cpu_seconds": time.process_time() - cpu_started,
        "images_per_second": images / seconds,
    }


@torch.no_grad()
def evaluate(
    model: nn.Module,
    loader: Loader,
    *,
    world: World,
    precision: Precision,
    after_step: AfterStep | None = None,
) -> dict[str, float]:
    """Means over all samples of `loader`: loss, top1, top5 (percent), samples, seconds, cpu_seconds.

    Puts `model` into evaluation mode, and leaves it there. Compiled modules run as if they were not: what
    evaluate.py gives later is then the same to the last bit.
    """
    model.eval()
    totals = Sums(world.device)
    started, cpu_started = time.perf_counter(), time.process_time()
    for step, batch in enumerate(loader.epoch(0)):
        if len(batch.images):
            with precision.autocast(), torch.compiler.set_stance("force_eager"):
                logits = model(batch.images)[0].float()
            totals.add(nn.functional.cross_entropy(logits, batch.targets), logits, batch.targets)
        if after_step is not None:
            after_step(step, totals)
    return {
        **totals.means(world),
        "seconds": time.perf_counter() - started,
        "cpu_seconds": time.process_time() - cpu_started,
    }
