"""Checkpoints are whole or not there, hold the random streams, and load without pickled code."""

import os
import pickle
import random

import numpy as np
import pytest
import torch

from checkpoint import Checkpointer, load_checkpoint, random_state, set_random_state
from distributed import World
from genotypes import GENOTYPES
from model import ModelConfig, build_model
from utils import InputError, write_atomically

WORLD = World(torch.device("cpu"))


@pytest.fixture
def checkpointer(tmp_path):
    config = ModelConfig(GENOTYPES["EBNAS"], init_channels=4, layers=3, groups=2, num_classes=2)
    model = build_model(config)
    optimizer = torch.optim.Adam(model.parameters())
    images = {"set": "folder", "root": "data", "image_size": 16, "classes": ["a", "b"]}
    data = {**images, "mean": [0.5] * 3, "std": [0.25] * 3}
    return Checkpointer(
        tmp_path,
        header={"script": "train", "kind": "stage1", "args": {}, "config": config.to_dict(), "data": data},
        model=model,
        stateful={"optimizer": optimizer},
        world=WORLD,
    )


def test_random_streams_continue(checkpointer, tmp_path):
    checkpointer.save(epoch=1)
    draws = random.random(), np.random.rand(), torch.rand(3)
    checkpointer.restore(load_checkpoint(tmp_path))
    again = random.random(), np.random.rand(), torch.rand(3)
    assert draws[:2] == again[:2] and torch.equal(draws[2], again[2])


def test_random_state_survives_a_gaussian_in_the_cache():
    np.random.seed(3)
    random.gauss(0, 1)
    np.random.randn()  # the second of a pair waits in the state
    state = random_state(WORLD.device)
    expected = np.random.randn(), random.gauss(0, 1)
    set_random_state(state, WORLD.device)
    assert (np.random.randn(), random.gauss(0, 1)) == expected


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_atomically(path, b"old")

    def broken(_descriptor):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", broken)
    with pytest.raises(OSError, match="no space"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "executed"),)

    torch.save({"format": Evil()}, tmp_path / "evil.pt")
    (tmp_path / "plain.pt").write_bytes(pickle.dumps(Evil()))
    for name in ("evil.pt", "plain.pt"):
        with pytest.raises(InputError, match=name):
            load_checkpoint(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_truncation_anywhere_is_an_input_error(checkpointer, tmp_path):
    checkpointer.save(epoch=1)
    whole = (tmp_path / "last.pt").read_bytes()
    for length in range(0, len(whole), max(1, len(whole) // 40)):
        (tmp_path / "cut.pt").write_bytes(whole[:length])
        with pytest.raises(InputError, match="truncated or is no checkpoint"):
            load_checkpoint(tmp_path / "cut.pt")


def test_a_flipped_byte_is_an_input_error(checkpointer, tmp_path):
    checkpointer.save(epoch=1)
    content = bytearray((tmp_path / "last.pt").read_bytes())
    content[content.index(checkpointer.model.classifier.weight.detach().numpy().tobytes())] ^= 1
    (tmp_path / "last.pt").write_bytes(content)
    with pytest.raises(InputError, match="checksum"):
        load_checkpoint(tmp_path)


def test_best_is_kept_when_a_later_epoch_is_worse(checkpointer, tmp_path):
    checkpointer.save(epoch=1, is_best=True)
    checkpointer.save(epoch=2)
    assert load_checkpoint(tmp_path / "best.pt")["epoch"] == 1
    assert load_checkpoint(tmp_path)["epoch"] == 2
