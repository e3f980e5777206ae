"""Fixtures: small sets of images, the real scripts in a folder of their own, and runs to look at."""

import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.scripts import TINY_SEARCH, TINY_STAGE, Scripts, call_at_step, receive

from images.shapes import SHAPES, draw_shapes

torch.set_num_threads(1)  # two threads that share cores with other processes wait for each other


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
