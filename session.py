"""One run of a script, from its first step or from a checkpoint to its last epoch, or to a signal.

A script makes a Session, builds its networks and optimisers, and runs its epoch loop inside `start`:

    session = Session(args, explicit, script="train", name=stages.run_name, world=world)
    with session.start(model=model, stateful=..., kind="stage1", ...) as run:
        for epoch in session.epochs(args.epochs):
            train = train_one_epoch(..., **session.position())
            session.finish_epoch(epoch, {...}, score=...)
"""

from __future__ import annotations

import argparse
import glob
import math
import shlex
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from augment import Normalize
from checkpoint import Checkpointer, find_resumable, load_checkpoint
from data import ImageSet, Share, channel_statistics, load_set
from distributed import World, restarted
from engine import Interrupted, StopSignal
from logger import Run, create_run
from model import ModelConfig
from utils import InputError, RunFailed


class Session:
    """Where a run stands, and what must happen around its epochs. `name` makes a run's name of its flags.

    With --resume, `checkpoint` is the one to go on from and `args` takes over its flags, where the user has
    not given them; otherwise `checkpoint` is None. Nothing is written before `start`.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        explicit: set[str],
        *,
        script: str,
        name: Callable[[argparse.Namespace], str],
        world: World,
    ):
        self.args, self.script, self.name, self.world = args, script, name, world
        self.stop = StopSignal()
        self.checkpoint, self.folder = None, None
        resume = args.resume or ("auto" if restarted() else None)
        if resume:
            path = find_resumable(
                resume,
                script=script,
                args=vars(args),
                explicit=explicit,
                runs=f"{glob.escape(name(args))}-[0-9]*",
            )
            path = world.broadcast(path)
            if path is not None:
                self.folder, self.checkpoint = path.parent, load_checkpoint(path)
                for flag, value in self.checkpoint["args"].items():
                    if flag not in explicit and flag not in ("device", "gpu", "resume"):
                        setattr(args, flag, value)
        self._epoch = self.checkpoint["epoch"] if self.checkpoint else 0
        self._step = self.checkpoint["step"] if self.checkpoint else 0
        self._sums = self.checkpoint["sums"] if self.checkpoint else None
        self.best = self.checkpoint["best"] if self.checkpoint else None

    @property
    def config(self) -> ModelConfig | None:
        """The network of the run that is resumed, whatever has become of its genotype file since."""
        return ModelConfig.from_dict(self.checkpoint["config"]) if self.checkpoint else None

    @contextmanager
    def start(self, *, model: torch.nn.Module, stateful: dict[str, Any], **header: Any) -> Iterator[Run]:
        """Make the run's folder or go on in it; `header` is kept in every checkpoint (see checkpoint.py).

        SIGINT and SIGTERM, noted from here on, end the run with a checkpoint and exit code 128 + signal.
        """
        header = {"script": self.script, "args": vars(self.args), **header}
        if self.folder is None:
            self.folder = self.world.broadcast(
                create_run(self.name(self.args), vars(self.args)) if self.world.is_main else None
            )
        folder = self.folder if self.world.is_main else None
        run = self.run = Run(folder, report_freq=self.args.report_freq)
        self.checkpoints = Checkpointer(
            folder, header=header, model=model, stateful=stateful, world=self.world
        )
        try:
            with self.stop:
                if self.checkpoint is not None:
                    self._check_unchanged(header["data"])
                    self.checkpoints.restore(self.checkpoint)
                    run.rewind(self._epoch)
                    run.log(f"resumed {self.folder} at epoch {self._epoch}, step {self._step}")
                else:
                    self._save()  # so that a crash in the first epoch finds a run to go on with
                    if self.args.resume or restarted():
                        run.log("nothing to resume: a new run")
                run.log(f"run folder {self.folder}")
                yield run
        except RunFailed as error:
            run.log(f"stopped: {error}")
            raise
        except Interrupted as interrupted:
            if interrupted.step:  # within an epoch; else finish_epoch has saved
                self._step, self._sums = interrupted.step, interrupted.sums
                self._save()
            run.log(f"{interrupted}: stopped at epoch {self._epoch}, step {interrupted.step}; to go on:")
            run.log(shlex.join(["python", sys.argv[0], "--resume", str(self.folder)]))
            sys.exit(128 + interrupted.signum)
        finally:
            run.close()

    def _check_unchanged(self, data: dict[str, Any]) -> None:
        """Raise InputError where the images are others, or the run has moved on before it was locked."""
        for entry in ("set", "image_size", "classes", "mean", "std"):
            if data[entry] != self.checkpoint["data"][entry]:
                raise InputError(
                    f"{self.folder} was run on other images: their {entry} differs; give its --data"
                )
        current = load_checkpoint(self.folder)
        if any(current[entry] != self.checkpoint[entry] for entry in ("epoch", "step", "finished")):
            raise InputError(
                f"{self.folder} has moved on in another process; look at it, then resume it again"
            )

    def epochs(self, total: int) -> Iterator[int]:
        """The epochs still to run."""
        yield from range(self._epoch, total)

    def position(self) -> dict[str, Any]:
        """Where in the present epoch to start: arguments of train_one_epoch."""
        return {"start_step": self._step, "sums": self._sums}

    def finish_epoch(self, epoch: int, record: dict[str, Any], *, score: float) -> None:
        """Write an epoch's metrics and checkpoint; `score` (higher is better) decides which epoch is best.

        Raises Interrupted where a signal has come.
        """
        for name, value in record.items():
            if isinstance(value, float) and not math.isfinite(value):
                raise RunFailed(
                    f"{name} is {value} after epoch {epoch}; the last good checkpoint is in {self.folder}"
                )
        is_best = self.best is None or score > self.best["score"]
        if is_best:
            self.best = {"epoch": epoch, "score": score}
        self.run.metrics({"epoch": epoch, **record})
        self._epoch, self._step, self._sums = epoch + 1, 0, None
        finished = self._epoch == self.args.epochs
        self._save(is_best=is_best, finished=finished)
        stopped = self.world.any(self.stop.received > 0)  # also: nobody goes on before the files are written
        if stopped and not finished:
            raise Interrupted(self.stop.received or signal.SIGTERM, 0, [])

    def path(self, name: str) -> Path:
        return self.folder / name

    def _save(self, *, is_best: bool = False, finished: bool = False) -> None:
        self.checkpoints.save(
            epoch=self._epoch,
            step=self._step,
            sums=self._sums,
            best=self.best,
            is_best=is_best,
            finished=finished,
        )


def prepare_data(
    args: argparse.Namespace, world: World, *, test: bool
) -> tuple[ImageSet, ImageSet | None, dict[str, Any]]:
    """Training and, if asked for, test images of the set that the flags name, on the device; and what a
    checkpoint keeps of them.

    The first process of a machine downloads before the others look. Raises InputError as load_set does.
    """
    with world.first_on_machine():
        train, held_out = (
            load_set(args.set, args.data, train=part, image_size=args.image_size, workers=args.workers)
            if part or test
            else None
            for part in (True, False)
        )
    mean, std = channel_statistics(args.set, train)
    description = {
        "set": args.set,
        "root": str(args.data),
        "image_size": args.image_size,
        "classes": list(train.classes),
        "mean": list(mean),
        "std": list(std),
    }
    return train.to(world.device), held_out.to(world.device) if test else None, description


def loader_settings(args: argparse.Namespace, data: dict[str, Any], world: World) -> dict[str, Any]:
    """The arguments that all loaders of a run have in common."""
    return {
        "normalize": Normalize(data["mean"], data["std"]),
        "seed": args.seed,
        "share": Share(world.rank, world.size),
    }
