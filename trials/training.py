"""Training a candidate by train.py for as many epochs as are asked for, at once or in several parts."""

from __future__ import annotations

import hashlib
import json
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flags.options import command_line
from genotypes import save_genotype
from run.processes import PROGRAM, claimed, end, environment, last_word, start
from run.runs import LOCATION, RESULT, RUNS, read_metrics
from trials.cells import Candidate
from trials.strategies import Epoch
from utils import InputError, RunFailed

LOOK = 0.1
"""Seconds between looks at what a training has written."""


@dataclass(frozen=True)
class Trainer:
    """Trains candidates in train.py's stages, each run in its own folder under runs/.

    `flags` of train.py for all trials, of which those in runs.LOCATION say where and not what; `words` are
    more of them, as typed. Stage 1 has `stage1_epochs`, where 0 means none (--from_scratch), stage 2 has
    `epochs`. A curve is that of stage 1, then that of stage 2.

    A training that is to stop earlier is told to, once that epoch stands in its metrics: it leaves a
    checkpoint a step or so later, and goes on from there. So its schedule is that of the full training, and
    what it gives is, on a CPU, the same to the bit as in one go.
    """

    flags: Mapping[str, Any]
    words: Sequence[str]
    stage1_epochs: int
    epochs: int

    def train(
        self, candidate: Candidate, epochs: int, progress: Callable[[int], None] = lambda _: None
    ) -> tuple[Epoch, ...]:
        """The curve of the first `epochs`. `progress` is told of the epochs that are done.

        Raises RunFailed where a run fails, InputError where train.py does not take its flags.
        """
        genotype = RUNS / f"trial-{candidate.key}.json"
        RUNS.mkdir(exist_ok=True)
        save_genotype(genotype, candidate.genotype)
        size = {"init_channels": candidate.init_channels, "layers": candidate.layers}
        both = {**self.flags, **size, "arch": genotype}
        start, curve = {"from_scratch": True}, ()
        if self.stage1_epochs:
            first = self._run({**both, "epochs": self.stage1_epochs}, epochs, progress)
            curve = first.curve[:epochs]
            start = {"pretrained": first.folder}
        if epochs > self.stage1_epochs:
            flags = {**both, "epochs": self.epochs, "binary": True, **start}
            until = epochs - self.stage1_epochs
            second = self._run(flags, until, lambda done: progress(self.stage1_epochs + done))
            curve += second.curve[:until]
        return curve

    def _run(self, flags: Mapping[str, Any], until: int, progress: Callable[[int], None]) -> _Trained:
        """Run, or go on with, train.py until `until` of its epochs are done."""
        until = min(until, flags["epochs"])
        key = _key(flags, self.words)
        with claimed(f"trial-{key}"):
            trained = _Trained.find(key)
            if not trained.has(until, flags["epochs"]):
                words = [*self.words, *command_line({**flags, "save": f"trial-{key}", "resume": "auto"})]
                command = [sys.executable, str(PROGRAM / "train.py"), *words]
                with tempfile.TemporaryFile() as errors:
                    code = _watched(command, key, until, flags["epochs"], progress, errors)
                    errors.seek(0)
                    reason = last_word(errors.read())
                trained = _Trained.find(key)
                if not trained.has(until, flags["epochs"]):
                    if code < 0:
                        reason = f"ended by {signal.Signals(-code).name}, as when memory runs out"
                    raise (InputError if code == 2 else RunFailed)(
                        f"train.py: {reason.removeprefix('error: ')}"
                    )
        progress(until)
        return trained


@dataclass(frozen=True)
class _Trained:
    """A run as far as it has come: its folder and its curve so far."""

    folder: Path | None
    curve: tuple[Epoch, ...] = ()

    @classmethod
    def find(cls, key: str) -> _Trained:
        folders = [path.parent for path in RUNS.glob(f"eval-trial-{key}-*/metrics.jsonl")]
        curves = {folder: _curve(folder) for folder in sorted(folders)}
        if not curves:
            return cls(None)
        folder = max(curves, key=lambda each: ((each / RESULT).exists(), len(curves[each]), each))
        return cls(folder, curves[folder])

    def has(self, until: int, epochs: int) -> bool:
        """Whether `until` of its `epochs` are done: of the last one, all that follows it too."""
        done = len(self.curve) >= until
        return done and (until < epochs or (self.folder / RESULT).exists())


def _curve(folder: Path) -> tuple[Epoch, ...]:
    return tuple(
        Epoch(record["train_loss"], record["valid_loss"], record["valid_top1"])
        for record in read_metrics(folder)
    )


def _watched(
    command: Sequence[str],
    key: str,
    until: int,
    epochs: int,
    progress: Callable[[int], None],
    errors: Any,
) -> int:
    """Start a training, end it after epoch `until`, and return its exit code. What ends us ends it, with a
    checkpoint."""
    process = start(command, env=environment(), stderr=errors, ends_with_us=True)
    told, seen = False, -1
    try:
        while process.poll() is None:
            done = len(_Trained.find(key).curve)
            if done != seen:
                progress(min(done, until))
                seen = done
            if done >= until and until < epochs and not told:
                end(process)
                told = True
            time.sleep(LOOK)
    except BaseException:
        end(process)
        process.wait()
        raise
    return process.returncode


def _key(flags: Mapping[str, Any], words: Sequence[str]) -> str:
    """Names what a run computes."""
    what = {name: str(value) for name, value in sorted(flags.items()) if name not in LOCATION}
    return hashlib.sha256(json.dumps([what, list(words)]).encode()).hexdigest()[:12]
