"""What tests share: running the real scripts in a folder of their own."""

import importlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from shapes import SHAPES, draw_shapes
from utils import run_main

ROOT = Path(__file__).resolve().parent.parent
TINY = ["--batch_size", "32", "--layers", "3", "--epochs", "2", "--report_freq", "1"]
TINY_SEARCH = [*TINY, "--init_channels", "8"]
TINY_STAGE = [*TINY, "--init_channels", "4", "--groups", "2"]

torch.set_num_threads(1)  # two threads that share cores with other processes wait for each other


def environment() -> dict[str, str]:
    """One thread a process: two that share the cores would wait for each other."""
    return {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


class Scripts:
    """Runs scripts as a user would, in `folder`."""

    def __init__(self, folder: Path):
        self.folder = folder

    def command(self, script: str, *flags: object) -> list[str]:
        return [sys.executable, str(ROOT / script), *map(str, flags)]

    def run(self, script: str, *flags: object, code: int = 0) -> subprocess.CompletedProcess:
        result = subprocess.run(
            self.command(script, *flags), cwd=self.folder, env=environment(), capture_output=True, text=True
        )
        assert result.returncode == code, result.stdout[-2000:] + result.stderr[-4000:]
        return result

    def start(self, script: str, *flags: object) -> subprocess.Popen:
        return subprocess.Popen(
            self.command(script, *flags),
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def fails(self, script: str, *flags: object) -> str:
        """The one line on stderr of a run that ends with exit code 2 and leaves nothing behind."""
        before = sorted(self.folder.rglob("*"))
        result = self.run(script, *flags, code=2)
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
        assert sorted(self.folder.rglob("*")) == before
        return result.stderr

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


@pytest.fixture
def scripts(tmp_path) -> Scripts:
    return Scripts(tmp_path)


@pytest.fixture
def fails(tmp_path, monkeypatch, capsys):
    """Call a script's main, in this process and in an empty folder: the one line of error that it ends with.

    It must exit with code 2 and leave nothing behind.
    """

    def call(script: str, *flags: object) -> str:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr(sys, "argv", [script, *map(str, flags)])
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(SystemExit) as stopped:
            run_main(importlib.import_module(script.removesuffix(".py")).main)
        line = capsys.readouterr().err
        assert stopped.value.code == 2
        assert line.startswith("error: ") and line.count("\n") == 1, line
        assert sorted(tmp_path.rglob("*")) == before
        return line

    return call


@pytest.fixture(scope="session")
def pipeline(tmp_path_factory, data_flags) -> Scripts:
    """A folder with one tiny finished search, stage 1 and stage 2: look, do not touch."""
    scripts = Scripts(tmp_path_factory.mktemp("pipeline"))
    scripts.run("train_search.py", *data_flags, *TINY_SEARCH)
    (search,) = scripts.runs("search-*")
    stage = [*data_flags, *TINY_STAGE, "--arch", search, "--auxiliary", "--cutout"]
    scripts.run("train.py", *stage)
    scripts.run("train.py", *stage, "--binary")
    return scripts
