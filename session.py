"""One run of a script, from its first step or from a checkpoint to its last epoch, or to a signal.

A script makes a Session, builds its networks and optimisers, and runs its epoch loop inside `start`:

    session = Session(args, parser=parser(), script="train", name=stages.run_name, world=world)
    args = session.args
    with session.start(model=model, stateful=..., kind="stage1", ...) as run:
        for epoch in session.epochs():
            train = train_one_epoch(..., start=session.position, after_step=session.training(loader))
            valid = evaluate(..., after_step=session.evaluating(loader))
            session.finish_epoch(epoch, {...}, score=...)
        session.finish()
"""

from __future__ import annotations

import argparse
import glob
import math
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import options
from augment import Normalize
from checkpoint import Checkpointer, load_checkpoint
from data import ImageSet, Share, channel_statistics, load_set
from distributed import Vote, World, launch_name, restarted
from engine import AfterStep, Position, Sums, choose_precision
from kernels.compilation import CUDA_GRAPH_MODES
from memory import GB, Step, free_bytes
from runs import Run, create_run, find_launched, find_resumable
from utils import InputError, RunFailed, command_text, is_out_of_memory, one_line, os_error_message

STOP_FREQ = 8
"""Steps after which several processes ask one another whether to stop, and after as many more each reads the
answer, so that nobody waits for it."""


STOPPING = (signal.SIGINT, signal.SIGTERM, *filter(None, [getattr(signal, "SIGBREAK", None)]))
"""What asks a run to stop; SIGBREAK (Ctrl-Break) is Windows' own."""


class Interrupted(Exception):
    """A signal asked to stop, and the checkpoint to go on from is written."""


class StopSignal:
    """A context in which the signals of STOPPING are noted, not obeyed: `received` is one's number or 0.

    A second Ctrl-C stops at once, but not while `held` (a checkpoint is written), and not within a second of
    the first: a terminal's Ctrl-C reaches a worker twice, from the terminal and from torchrun.
    """

    def __enter__(self) -> StopSignal:
        self.received, self.at, self.held = 0, 0.0, False
        self._previous = {s: signal.signal(s, self._note) for s in STOPPING}
        return self

    def _note(self, signum: int, _frame) -> None:
        if self.received and signum == signal.SIGINT and not self.held and time.monotonic() > self.at + 1:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.at = signum, time.monotonic()

    def __exit__(self, *_exception) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)


class Session:
    """Where a run stands, and what must happen around its epochs. `name` makes a run's name of its flags.

    `args` are the flags of this run: with --resume those of its checkpoint, where the user has not given
    others; `checkpoint` is then the one to go on from, else None. Nothing is written before `start`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        *,
        parser: options.Parser,
        script: str,
        name: Callable[[argparse.Namespace], str],
        world: World,
    ):
        self.script, self.name, self.world = script, name, world
        self.stop = StopSignal()
        self.vote: Vote | None = None  # that has been asked for, and not read
        path = world.broadcast(self._find(args) if world.is_main else None)
        self.folder = path.parent if path else None
        self.checkpoint = load_checkpoint(path) if path else None
        if self.checkpoint:
            try:
                parser.check(self.checkpoint["args"])
            except InputError as error:
                raise InputError(f"{path} is damaged: of its flags, {error}; use an earlier one") from None
        self.args = self._own_flags(args)
        check_parts(self.args, world)
        self.precision = choose_precision(
            self.args.precision,
            world.device,
            tf32=self.args.tf32,
            cudnn_benchmark=self.args.cudnn_benchmark,
        )
        start = self.checkpoint or {"epoch": 0, "step": 0, "sums": None, "best": None}
        self.position = Position(start["epoch"], start["step"], start["sums"])
        self.best = start["best"]

    def _find(self, args: argparse.Namespace) -> Path | None:
        runs = f"{glob.escape(self.name(args))}-[0-9]*"
        if restarted() and args.resume in (None, "auto"):  # any other names the run, on every start
            return find_launched(launch_name(), runs)
        if args.resume is None:
            return None
        flags = options.as_dict(args)
        return find_resumable(args.resume, script=self.script, args=flags, given=args.given, runs=runs)

    def _own_flags(self, args: argparse.Namespace) -> argparse.Namespace:
        own = dict(vars(args))
        if self.checkpoint is not None:
            here = {*args.given, "device", "gpu", "resume"}
            own |= {name: value for name, value in self.checkpoint["args"].items() if name not in here}
        return argparse.Namespace(**own)

    @contextmanager
    def start(self, *, model: torch.nn.Module, stateful: dict[str, Any], **header: Any) -> Iterator[Run]:
        """Make the run's folder or go on in it; `header` is kept in every checkpoint (see checkpoint.py).

        SIGINT and SIGTERM, noted from here on, end the run with a checkpoint and exit code 128 + signal.
        Whatever else ends it stands in log.txt.
        """
        args = options.as_dict(self.args)
        header = {"script": self.script, "args": args, **header}
        if self.folder is None:
            folder = create_run(self.name(self.args), args, self.world.device) if self.world.is_main else None
            self.folder = self.world.broadcast(folder)
        folder = self.folder if self.world.is_main else None
        stateful = {**stateful, "scaler": self.precision.scaler}
        self.run = run = Run(folder, launch=launch_name())
        self.checkpoints = Checkpointer(
            folder, header=header, model=model, stateful=stateful, world=self.world
        )
        images = math.ceil(self.args.batch_size / self.world.size)
        self.free = free_bytes(self.world.device)
        self.step = Step(
            model.config, header["data"]["image_size"], images, self.precision.name, self.args.accumulate
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
        if self.checkpoint is None:
            for network in self.checkpoints.networks.values():
                self.world.broadcast_model(network)
            self._save()  # so that a crash in the first epoch finds a run to go on with
            if self.args.resume or restarted():
                run.log("nothing to resume: a new run")
        else:
            self._check_unchanged()
            self.checkpoints.restore(self.checkpoint)
            run.rewind(self.position.epoch)
            run.log(f"resumed {self.folder} at epoch {self.position.epoch}, step {self.position.step}")
        run.log(f"run folder {self.folder}")
        for line in self.args.idle:
            run.log(line)
        precision = self.precision.name
        if self.world.device.type == "cuda":
            precision += ", TF32 allowed" if self.args.tf32 else ", without TF32"
        run.log(f"{self.world.size} x {self.world.device.type}, {precision}")
        if self.free is not None:
            run.log(
                f"memory: a training step needs {self.step.needs() / GB:.1f} GB by count, "
                f"{self.free / GB:.1f} GB are free"
            )

    def _explained(self, error: BaseException) -> BaseException:
        """`error`, or what to tell the user in its place."""
        if isinstance(error, RunFailed):
            return RunFailed(f"{error}; the last good checkpoint is in {self.folder}")
        if is_out_of_memory(error):
            return RunFailed(
                f"there is not enough memory for --batch_size {self.args.batch_size} and this network; "
                f"{self._what_fits()}"
            )
        if type(error).__module__.startswith(("torch._dynamo", "torch._inductor")):
            return RunFailed(
                f"--compile failed ({one_line(error, 100)}): it needs a C++ compiler; leave it out"
            )
        return error

    def _what_fits(self) -> str:
        """What to do where memory has run out. By count, on a GPU; at least twice as many parts."""
        more = replace(self.step, accumulate=2 * self.step.accumulate)
        fitting = more.that_fits(self.free) if self.free is not None else None
        if fitting is None:
            return "give a smaller one, or a larger --accumulate"
        smaller = self.args.batch_size * self.step.accumulate // fitting.accumulate
        return f"by count, --accumulate {fitting.accumulate} fits, or --batch_size {smaller}"

    def own_images(self, data: dict[str, Any]) -> dict[str, Any]:
        """`data` (see `describe_data`), for a resumed run with its own statistics, whose last bits depend on
        the processor. Raises InputError where it was run on other images."""
        if self.checkpoint is None:
            return data
        saved = self.checkpoint["data"]
        same = {entry: data[entry] == saved[entry] for entry in ("set", "image_size", "classes")}
        same |= {entry: np.allclose(data[entry], saved[entry], rtol=1e-5) for entry in ("mean", "std")}
        if differing := [entry for entry in same if not same[entry]]:
            raise InputError(
                f"{self.folder} was run on other images: not the same {', '.join(differing)}; give its --data"
            )
        return {**data, "mean": saved["mean"], "std": saved["std"]}

    def _check_unchanged(self) -> None:
        """Raise InputError where the run has moved on before it was locked."""
        current = load_checkpoint(self.folder)
        if any(current[entry] != self.checkpoint[entry] for entry in ("epoch", "step", "finished")):
            raise InputError(
                f"{self.folder} has moved on in another process; look at it, then resume it again"
            )

    def epochs(self) -> Iterator[int]:
        """The epochs still to run."""
        yield from range(self.position.epoch, self.args.epochs)

    def training(self, loader: Any) -> AfterStep:
        """What follows each training step: progress, a log line every --report_freq steps, a checkpoint every
        --save_freq steps, on a signal, and at the end of the epoch, so that its evaluation may be lost."""
        epoch, last = self.position.epoch, len(loader)
        bar = self.run.progress(f"epoch {epoch}", total=last, start=self.position.step)

        def after_step(step: int, sums: Sums) -> None:
            bar.update()
            done = step + 1
            if step % self.args.report_freq == 0:
                means = sums.means(self.world)
                self.run.log(f"train {step:03d} {means['loss']:.6e} {means['top1']:.4f} {means['top5']:.4f}")
            stopping = self._stopping(step)
            if stopping or done == last or (self.args.save_freq and done % self.args.save_freq == 0):
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
            if self._stopping(step):
                raise Interrupted
            if step + 1 == len(loader):
                bar.close()

        return after_step

    def _stopping(self, step: int) -> bool:
        """Whether a signal has come. All processes learn of it at the same step, within 2 * STOP_FREQ."""
        if self.world.size == 1:
            return self.stop.received > 0
        if step % STOP_FREQ:
            return False
        asked, self.vote = self.vote, self.world.vote(self.stop.received > 0)
        return asked is not None and self._voted_to_stop(asked)

    def _voted_to_stop(self, vote: Vote) -> bool:
        stopping = vote.result()
        if stopping and not self.stop.received:  # another process was told
            self.stop.received = signal.SIGTERM
        return stopping

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
        self.vote = None  # what it would have told, this one does
        if self._voted_to_stop(self.world.vote(self.stop.received > 0)):  # also: all wait for the files
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


def check_parts(args: argparse.Namespace, world: World) -> None:
    """Raise InputError where --accumulate does not go with the other flags."""
    smallest = 2 * args.accumulate * world.size
    if args.batch_size < smallest:
        raise InputError(
            f"--batch_size {args.batch_size} is too small for --accumulate {args.accumulate}, each part with "
            f"two images on each of {world.size} processes; give at least {smallest}, or less parts"
        )
    if args.accumulate > 1 and args.compile and args.compile_mode in CUDA_GRAPH_MODES:
        raise InputError(
            f"--compile_mode {args.compile_mode} does not go with --accumulate: a CUDA graph writes over the "
            "gradients of the part before; leave one out"
        )


def prepare_data(session: Session, *, test: bool) -> tuple[ImageSet, ImageSet | None, dict[str, Any]]:
    """Training and, if asked for, test images of the set that the flags name, on the device; and what a
    checkpoint keeps of them.

    The first process of a machine downloads before the others look. Raises InputError as load_set does, and
    where a resumed run had other images.
    """
    args, world = session.args, session.world
    read = partial(load_set, args.set, args.data, image_size=args.image_size, workers=args.workers)
    with world.in_turn("reading the data"):
        train_set = read(train=True, count=args.train_images)
        test_set = read(train=False) if test else None
    statistics = channel_statistics(args.set, train_set)
    data = describe_data(args.set, args.data, args.image_size, train_set.classes, statistics)
    data = session.own_images(data)
    return train_set.to(world.device), test_set.to(world.device) if test else None, data


def describe_data(
    name: str, root: str, image_size: int, classes: tuple[str, ...], normalize: Normalize
) -> dict[str, Any]:
    """What a checkpoint keeps of its images."""
    return {
        "set": name,
        "root": str(root),
        "image_size": image_size,
        "classes": list(classes),
        "mean": list(normalize.mean),
        "std": list(normalize.std),
    }


def loader_settings(args: argparse.Namespace, data: dict[str, Any], world: World) -> dict[str, Any]:
    """The arguments that all loaders of a run have in common."""
    return {
        "normalize": Normalize(data["mean"], data["std"]),
        "seed": args.seed,
        "share": Share(world.rank, world.size),
    }
