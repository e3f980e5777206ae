"""What tests share: running the real scripts in a folder of their own."""

import contextlib
import importlib
import io
import itertools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from images.shapes import SHAPES, draw_shapes
from run.signals import StopSignal
from utils import run_main

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--batch_size", "32", "--layers", "3", "--epochs", "2", "--report_freq", "1"]
TINY_SEARCH = [*TINY, "--init_channels", "8"]
TINY_STAGE = [*TINY, "--init_channels", "4", "--groups", "2"]

torch.set_num_threads(1)  # two threads that share cores with other processes wait for each other


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


@pytest.fixture(scope="session")
def images(tmp_path_factory) -> Path:
    """A `folder` set: three classes of the shapes, 16 x 16, 128 images to train on and 30 to test."""
    root = tmp_path_factory.mktemp("images")
    drawn, labels = draw_shapes(600, 16, seed=7)
    for index, kept in enumerate(np.flatnonzero(labels < 3)[:158]):
        folder = root / ("train" if index < 128 else "test") / list(SHAPES)[labels[kept]]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn[kept].transpose(1, 2, 0)).save(folder / f"{index}.png")
    return root


@pytest.fixture(scope="session")
def data_flags(images) -> list[str]:
    return ["--set", "folder", "--data", str(images), "--image_size", "16", "--workers", "0"]


@pytest.fixture(scope="session")
def imagenet_flags(images, tmp_path_factory) -> list[str]:
    """Of train_imagenet.py, for the same images in folders like ImageNet's."""
    root = tmp_path_factory.mktemp("imagenet")
    (root / "ILSVRC2012").mkdir()
    (root / "ILSVRC2012" / "train").symlink_to(images / "train")
    (root / "ILSVRC2012" / "val").symlink_to(images / "test")
    size = ["--image_size", "64", "--init_channels", "8", "--workers", "1"]
    return ["--tmp_data_dir", str(root), *TINY_STAGE, *size]


@pytest.fixture
def scripts(tmp_path) -> Scripts:
    return Scripts(tmp_path)


@pytest.fixture
def fails(scripts):
    """Scripts.fails, in an empty folder that is also the present one."""
    return scripts.fails


@pytest.fixture
def without_pictures(monkeypatch) -> None:
    """The scripts draw nothing and count nothing, which takes longer than a tiny run."""
    for module, name in (
        ("training.stages", "draw_curves"),
        ("train_search", "draw_curves"),
        ("train_search", "draw_genotype"),
        ("train_search", "describe_found"),
    ):
        monkeypatch.setattr(f"{module}.{name}", lambda *_: [])


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


@pytest.fixture
def at_step(monkeypatch) -> Callable[[int, Callable[[], None]], None]:
    """`at_step(n, event)`: see call_at_step."""
    return partial(call_at_step, monkeypatch)


@pytest.fixture(scope="session")
def stopped(tmp_path_factory, data_flags) -> Path:
    """A folder with a stage-1 run in it that was interrupted after its second step: look, do not touch."""
    scripts = Scripts(tmp_path_factory.mktemp("stopped"))
    with pytest.MonkeyPatch.context() as patch:
        call_at_step(patch, 2, receive(signal.SIGTERM))
        scripts.run("train.py", *data_flags, *TINY_STAGE, code=143)
    return scripts.folder


@pytest.fixture
def interrupted(stopped, scripts) -> Path:
    """The run of `stopped`, copied to the folder of `scripts`."""
    shutil.copytree(stopped, scripts.folder, dirs_exist_ok=True)
    (run,) = scripts.runs("*")
    return run


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, data_flags) -> Scripts:
    """A folder with one tiny finished search, stage 1 and stage 2: look, do not touch."""
    scripts = Scripts(tmp_path_factory.mktemp("pipeline"))
    scripts.run("train_search.py", *data_flags, *TINY_SEARCH, "--score_random", 2)
    (search,) = scripts.runs("search-*")
    stage = [*data_flags, *TINY_STAGE, "--arch", search, "--auxiliary", "--cutout"]
    scripts.run("train.py", *stage)
    scripts.run("train.py", *stage, "--binary")
    return scripts
