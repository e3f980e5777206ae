"""The batch loop of training and of evaluation, once, for all scripts; precision; stopping on a signal."""

from __future__ import annotations

import signal
import time
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from distributed import World
from utils import InputError, RunFailed

if TYPE_CHECKING:  # data brings torchvision, which not every script needs
    from data import Loader
    from logger import Run

PRECISIONS = ("fp32", "bf16", "fp16")
STOP_FREQ = 8
"""Steps between the moments at which several processes agree whether to stop."""


class Precision:
    """Autocast and, for fp16, a gradient scaler. `name` None: bf16 on a GPU that has it, else fp32."""

    def __init__(self, name: str | None, device: torch.device):
        cuda = device.type == "cuda"
        self.name = name or (
            "bf16" if cuda and torch.cuda.is_bf16_supported(including_emulation=False) else "fp32"
        )
        if self.name not in PRECISIONS:
            raise InputError(f"unknown precision {name!r}; choose from {PRECISIONS}")
        self.device = device
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.name == "fp16")

    def autocast(self) -> AbstractContextManager:
        if self.name == "fp32":
            return nullcontext()
        dtype = torch.bfloat16 if self.name == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype)

    def step(
        self,
        loss: Tensor,
        optimizer: torch.optim.Optimizer,
        parameters: list[nn.Parameter],
        *,
        world: World,
        grad_clip: float = 0.0,
    ) -> None:
        """Backward, mean of the gradients over processes, clipping by norm (0: none), optimiser step."""
        optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        world.average_gradients(parameters)
        if grad_clip > 0:
            self.scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(parameters, grad_clip)
        self.scaler.step(optimizer)
        self.scaler.update()


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

    def __init__(self, epoch: int, hint: str):
        self.epoch, self.hint = epoch, hint
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
            raise RunFailed(f"the loss is {loss.item()} at epoch {self.epoch}, step {step}; {self.hint}")


class Interrupted(Exception):
    """A signal asked to stop: where the epoch stands (the next step, and what has been summed so far)."""

    def __init__(self, signum: int, step: int, sums: list[float]):
        super().__init__(signal.Signals(signum).name)
        self.signum, self.step, self.sums = signum, step, sums


class StopSignal:
    """A context in which SIGINT and SIGTERM are noted, not obeyed: `received` is the signal's number or 0."""

    def __enter__(self) -> StopSignal:
        self.received = 0
        self._previous = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _note(self, signum: int, _frame) -> None:
        if self.received:  # asked twice: stop now
            raise KeyboardInterrupt
        self.received = signum

    def __exit__(self, *_exception) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


def train_one_epoch(
    model: nn.Module,
    loader: Loader,
    optimizer: torch.optim.Optimizer,
    criterion: nn.Module,
    *,
    parameters: list[nn.Parameter],
    epoch: int,
    world: World,
    precision: Precision,
    run: Run,
    stop: StopSignal,
    grad_clip: float,
    auxiliary_weight: float = 0.0,
    before_step: Callable[[], None] | None = None,
    start_step: int = 0,
    sums: Iterable[float] | None = None,
) -> dict[str, float]:
    """Train `parameters` for one epoch, and give its means: loss, top1, top5 (percent), samples,
    seconds, images_per_second.

    `model` maps images to (logits, auxiliary logits or None); it is put into training mode.
    `before_step` runs before each weight step. An epoch that was interrupted goes on from
    `start_step` with its `sums`. Raises RunFailed on a loss that is not finite; Interrupted, after the
    step that a signal arrived in.
    """
    model.train()
    totals = Sums(world.device, sums if sums and world.is_main else None)
    watch = FiniteWatch(
        epoch, f"the last good checkpoint is in {run.folder}; a lower --learning_rate may help"
    )
    started = time.perf_counter()
    with run.progress(f"epoch {epoch}", total=len(loader), start=start_step) as bar:
        for step, batch in enumerate(loader.epoch(epoch, start_step), start_step):
            if before_step is not None:
                before_step()
            with precision.autocast():
                logits, auxiliary_logits = model(batch.images)
                logits = logits.float()
                loss = criterion(logits, batch.targets)
                objective = loss
                if auxiliary_logits is not None:
                    objective = loss + auxiliary_weight * criterion(auxiliary_logits.float(), batch.targets)
            precision.step(
                objective * world.share(batch), optimizer, parameters, world=world, grad_clip=grad_clip
            )
            totals.add(loss, logits, batch.targets)
            watch.add(step, objective)
            bar.update()
            if step % run.report_freq == 0:
                means = totals.means(world)
                run.log(f"train {step:03d} {means['loss']:.6e} {means['top1']:.4f} {means['top5']:.4f}")
            # every process must learn of a signal at the same step, and asking all of them costs time
            if (world.size == 1 or step % STOP_FREQ == 0) and world.any(stop.received > 0):
                watch.finish()
                raise Interrupted(
                    stop.received or signal.SIGTERM, step + 1, world.sum(totals.values).tolist()
                )
    watch.finish()
    means = totals.means(world)
    seconds = time.perf_counter() - started
    images = means["samples"] - (list(sums)[-1] if sums else 0)  # of this part of an interrupted epoch
    return {**means, "seconds": seconds, "images_per_second": images / seconds}


@torch.no_grad()
def evaluate(
    model: nn.Module, loader: Loader, *, world: World, precision: Precision, run: Run
) -> dict[str, float]:
    """Means over all samples of `loader`: loss, top1, top5 (percent), samples, seconds.

    Puts `model` into evaluation mode, and leaves it there.
    """
    model.eval()
    totals = Sums(world.device)
    started = time.perf_counter()
    with run.progress("evaluate", total=len(loader)) as bar:
        for batch in loader.epoch(0):
            if len(batch.images):
                with precision.autocast():
                    logits = model(batch.images)[0].float()
                totals.add(nn.functional.cross_entropy(logits, batch.targets), logits, batch.targets)
            bar.update()
    return {**totals.means(world), "seconds": time.perf_counter() - started}
