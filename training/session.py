"""What happens around the steps and epochs of a run: progress, log lines, checkpoints, an end on a signal.

origin = find_origin(...)  # which run this is
session = Session(origin, settings, world=world, precision=precision)
with session.start(model=model, stateful=..., kind="stage1", ...) as run:
    for epoch in session.epochs():
        train = train_one_epoch(..., start=session.position, after_step=session.training(loader))
        valid = evaluate(..., after_step=session.evaluating(loader))
        session.finish_epoch(epoch, {...}, score=...)
    session.finish()
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from flags.choices import CUDA_GRAPH_MODES
from flags.settings import Settings, StepSettings, table
from run.checkpoint import Checkpointer
from run.distributed import World, launch_name
from run.resume import Origin
from run.runs import Run, create_run
from run.signals import Interrupted, StopSignal
from training.engine import AfterStep, Position, Precision, Sums
from training.memory import GB, StepMemory, free_bytes
from utils import InputError, RunFailed, command_text, is_out_of_memory, one_line, os_error_message


class Session:
    """A run from its origin to its last epoch, or to a signal. Nothing is written before `start`.

    `position` is where training goes on, `best` the best epoch so far. `notes` are lines that the log begins
    with.
    """

    def __init__(
        self,
        origin: Origin,
        settings: Settings,
        *,
        world: World,
        precision: Precision,
        notes: Iterable[str] = (),
    ):
        check_parts(settings.step, world)
        self.origin, self.settings, self.world, self.precision = origin, settings, world, precision
        self.notes, self.folder = tuple(notes), origin.folder
        self.stop = StopSignal(world)
        start = origin.checkpoint or {"epoch": 0, "step": 0, "sums": None, "best": None}
        self.position = Position(start["epoch"], start["step"], start["sums"])
        self.best = start["best"]

    @contextmanager
    def start(self, *, model: torch.nn.Module, stateful: dict[str, Any], **header: Any) -> Iterator[Run]:
        """Make the run's folder or go on in it; `header` is kept in every checkpoint (see run/checkpoint.py).

        SIGINT and SIGTERM, noted from here on, end the run with a checkpoint and exit code 128 + signal.
        Whatever else ends it stands in log.txt.
        """
        origin, step = self.origin, self.settings.step
        header = {"script": origin.script, "args": origin.flags, **header}
        if self.folder is None:
            is_main, device = self.world.is_main, self.world.device
            folder = create_run(origin.name, origin.flags, device) if is_main else None
            self.folder = self.world.broadcast(folder)
        folder = self.folder if self.world.is_main else None
        stateful = {**stateful, "scaler": self.precision.scaler}
        self.run = run = Run(folder, launch=launch_name())
        self.checkpoints = Checkpointer(
            folder, header=header, model=model, stateful=stateful, world=self.world
        )
        images = math.ceil(step.batch_size / self.world.size)
        self.free = free_bytes(self.world.device)
        self.memory = StepMemory(
            model.config, header["data"]["image_size"], images, self.precision.name, step.accumulate
        )
        with self.stop:
            try:
                self._begin()
                yield run
            except Interrupted:
                run.log(f"stopped at epoch {self.position.epoch}, step {self.position.step}; to go on:")
                run.log(command_text(["python", sys.argv[0], "--resume", str(self.folder)]))
            except BaseException as error:
                explained = self._explained(error)
                is_file = isinstance(explained, OSError)
                run.log(f"stopped: {os_error_message(explained) if is_file else one_line(explained)}")
                if explained is error:
                    raise
                raise explained from None
            finally:
                run.close()
            self.world.close()  # all meet: one that goes would make torchrun end those that still write
        if self.stop.received:
            sys.exit(128 + self.stop.received)

    def _begin(self) -> None:
        """Write the first checkpoint, or put back the one to go on from."""
        run = self.run
        if self.origin.checkpoint is None:
            for network in self.checkpoints.networks.values():
                self.world.broadcast_model(network)
            self._save()  # so that a crash in the first epoch finds a run to go on with
            if self.origin.asked:
                run.log("nothing to resume: a new run")
        else:
            self.origin.check_unchanged()
            self.checkpoints.restore(self.origin.checkpoint)
            run.rewind(self.position.epoch)
            run.log(f"resumed {self.folder} at epoch {self.position.epoch}, step {self.position.step}")
        run.log(f"run folder {self.folder}")
        for line in (*self.notes, *table(self.settings)):
            run.log(line)
        precision = self.precision.name
        if self.world.device.type == "cuda":
            precision += ", TF32 allowed" if self.settings.step.tf32 else ", without TF32"
        run.log(f"{self.world.size} x {self.world.device.type}, {precision}")
        if self.free is not None:
            run.log(
                f"memory: a training step needs {self.memory.needs() / GB:.1f} GB by count, "
                f"{self.free / GB:.1f} GB are free"
            )

    def _explained(self, error: BaseException) -> BaseException:
        """`error`, or what to tell the user in its place."""
        if isinstance(error, RunFailed):
            return RunFailed(f"{error}; the last good checkpoint is in {self.folder}")
        if is_out_of_memory(error):
            step = self.settings.step
            return RunFailed(
                f"there is not enough memory for --batch_size {step.batch_size} and this network; "
                f"{self.memory.advice(self.free, batch_size=step.batch_size)}"
            )
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return RunFailed(
                f"--compile failed ({one_line(error, 100)}): it needs a C++ compiler; leave it out"
            )
        return error

    def epochs(self) -> Iterator[int]:
        """The epochs still to run."""
        yield from range(self.position.epoch, self.settings.run.epochs)

    def training(self, loader: Any) -> AfterStep:
        """What follows each training step: progress, a log line every --report_freq steps, a checkpoint every
        --save_freq steps, on a signal, and at the end of the epoch, so that its evaluation may be lost."""
        epoch, last, settings = self.position.epoch, len(loader), self.settings.run
        bar = self.run.progress(f"epoch {epoch}", total=last, start=self.position.step)

        def after_step(step: int, sums: Sums) -> None:
            bar.update()
            done = step + 1
            if step % settings.report_freq == 0:
                means = sums.means(self.world)
                self.run.log(f"train {step:03d} {means['loss']:.6e} {means['top1']:.4f} {means['top5']:.4f}")
            stopping = self.stop.after_step(step)
            if stopping or done == last or (settings.save_freq and done % settings.save_freq == 0):
                self.position = Position(epoch, done, self.world.sum(sums.values).tolist())
                self._save()
            if stopping:
                raise Interrupted
            if done == last:
                bar.close()

        return after_step

    def evaluating(self, loader: Any) -> AfterStep:
        """What follows each batch of an evaluation: progress, and on a signal the end (all else is saved)."""
        bar = self.run.progress("evaluate", total=len(loader))

        def after_step(step: int, _sums: Sums) -> None:
            bar.update()
            if self.stop.after_step(step):
                raise Interrupted
            if step + 1 == len(loader):
                bar.close()

        return after_step

    def finish_epoch(self, epoch: int, record: dict[str, Any], *, score: float) -> None:
        """Write an epoch's metrics and checkpoint; `score` (higher is better) decides which epoch is best.

        Raises Interrupted where a signal has come, RunFailed where a number of the record is not finite.
        """
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RunFailed(f"{name} is {value} after epoch {epoch}")
        is_best = self.best is None or score > self.best["score"]
        if is_best:
            self.best = {"epoch": epoch, "score": score}
        self.run.metrics({"epoch": epoch, **record})
        self.position = Position(epoch + 1)
        self._save(is_best=is_best)
        if self.stop.after_epoch():  # also: all wait for the files
            raise Interrupted

    def finish(self) -> None:
        """Mark the run as finished, once nothing is left to do that a resumed run would have to repeat."""
        self._save(finished=True)

    def _save(self, *, is_best: bool = False, finished: bool = False) -> None:
        self.stop.held = True
        try:
            self.checkpoints.save(
                epoch=self.position.epoch,
                step=self.position.step,
                sums=self.position.sums,
                best=self.best,
                is_best=is_best,
                finished=finished,
            )
        finally:
            self.stop.held = False


def check_parts(step: StepSettings, world: World) -> None:
    """Raise InputError where --accumulate does not go with the other flags."""
    if step.batch_size < 2 * world.size:
        each = f" for each of {world.size} processes" if world.size > 1 else ""
        raise InputError(
            f"batch normalisation needs at least 2 images a step{each}: --batch_size {2 * world.size} or more"
        )
    if (most := step.batch_size // (2 * world.size)) < step.accumulate:
        raise InputError(
            f"--accumulate {step.accumulate} is too much for --batch_size {step.batch_size}: batch "
            f"normalisation needs at least 2 images a part; --accumulate {most} or less"
        )
    if step.accumulate > 1 and step.compile and step.compile_mode in CUDA_GRAPH_MODES:
        raise InputError(
            f"--compile_mode {step.compile_mode} does not go with --accumulate: a CUDA graph writes over the "
            "gradients of the part before; leave one out"
        )
