"""Running the real scripts, in this process or in one of their own, and events in the middle of them."""

import contextlib
import importlib
import io
import itertools
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from run.signals import StopSignal
from utils import run_main

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = sorted(path.name for path in ROOT.glob("*.py") if "\n    run_main(main," in path.read_text())
TINY = ["--batch_size", "32", "--layers", "3", "--epochs", "2", "--report_freq", "1"]
TINY_SEARCH = [*TINY, "--init_channels", "8"]
TINY_STAGE = [*TINY, "--init_channels", "4", "--groups", "2"]


def environment() -> dict[str, str]:
    """One thread a process: two that share the cores would wait for each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@dataclass(frozen=True)
class Result:
    stdout: str
    stderr: str


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Scripts:
    """Runs scripts as a user would, in `folder`: `run` in this process, `start` in one of their own."""

    def __init__(self, folder: Path):
        self.folder = folder

    def run(self, script: str, *flags: object, code: int = 0, terminal: bool = False) -> Result:
        """A script's main with these flags; it must end with exit code `code`. Its stderr is a `terminal`?"""
        module = importlib.import_module(script.removesuffix(".py"))
        argv, place = sys.argv, Path.cwd()
        stdout, stderr, ended = io.StringIO(), Terminal() if terminal else io.StringIO(), 0
        sys.argv = [script, *map(str, flags)]
        os.chdir(self.folder)
        try:
            with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
                run_main(module.main, module.parser)
        except SystemExit as error:
            ended = error.code
        finally:
            sys.argv = argv
            os.chdir(place)
        assert ended == code, stdout.getvalue()[-2000:] + stderr.getvalue()[-4000:]
        return Result(stdout.getvalue(), stderr.getvalue())

    def fails(self, script: str, *flags: object, code: int = 2) -> str:
        """The one line on stderr of a run that ends with exit code 2 and leaves nothing behind."""
        before = sorted(self.folder.rglob("*"))
        line = self.run(script, *flags, code=code).stderr
        assert line.startswith("error: ") and line.count("\n") == 1, line
        assert sorted(self.folder.rglob("*")) == before
        return line

    def command(self, script: str, *flags: object) -> list[str]:
        return [sys.executable, str(ROOT / script), *map(str, flags)]

    def start(self, script: str, *flags: object, **options) -> subprocess.Popen:
        """A process of its own; its output, with its errors, is a pipe unless `options` say otherwise."""
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, **options}
        return subprocess.Popen(
            self.command(script, *flags), cwd=self.folder, env=environment(), text=True, **options
        )

    def runs(self, pattern: str) -> list[Path]:
        return sorted((self.folder / "runs").glob(pattern))


class Killed(BaseException):
    """Raised within a run in place of a SIGKILL: it ends there, and writes no checkpoint."""


def kill() -> None:
    raise Killed


def receive(signum: int) -> Callable[[], None]:
    """An event: this process gets the signal, and notes it before it goes on."""
    return lambda: signal.raise_signal(signum)


def call_at_step(patch: pytest.MonkeyPatch, n: int, event: Callable[[], None]) -> None:
    """In the next run of this process call `event` after the n-th step, those of training and the batches of
    evaluations counted together, and before anything is saved there."""
    counter = itertools.count(1)

    def after_step(stop: StopSignal, step: int) -> bool:
        if next(counter) == n:
            event()
        return stopping(stop, step)

    stopping = StopSignal.after_step
    patch.setattr(StopSignal, "after_step", after_step)
