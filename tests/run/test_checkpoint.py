"""Checkpoints are whole or not there, hold the random streams, and load without pickled code."""

import os
import pickle
import random

import numpy as np
import pytest
import torch
from support.scripts import ROOT

from genotypes import GENOTYPES
from model import ModelConfig, build_model
from run.checkpoint import ENTRIES, Checkpointer, load_checkpoint, random_state, set_random_state
from run.distributed import World
from utils import InputError

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


def test_a_packed_network_is_told_where_to_go(fails):
    file = ROOT / "models" / "shapes.ebnas"
    assert "a packed network, no checkpoint; infer.py and benchmark.py infer run it" in fails(
        "evaluate.py", file
    )


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


NAN, WEIGHT, BUFFER = float("nan"), "classifier.weight", "stem.1.running_var"


def put(*keys, value):
    """A change of a checkpoint: at `keys` stands `value`, or what it makes of what is there."""

    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        checkpoint[keys[-1]] = value(checkpoint[keys[-1]]) if callable(value) else value

    return change


def drop(*keys):
    def change(checkpoint):
        for key in keys[:-1]:
            checkpoint = checkpoint[key]
        del checkpoint[keys[-1]]

    return change


MOMENTS, GROUP = ("state", "optimizer", "state", 0), ("state", "optimizer", "param_groups", 0)
CORRUPTIONS = {
    **{f"no {name}": drop(name) for name in ENTRIES},
    **{f"{name} of another type": put(name, value=(1, 2)) for name in ENTRIES},
    "a list": None,
    "another format": put("format", value="ebnas-checkpoint-0"),
    "no weight": drop("model", WEIGHT),
    "a weight more": put("model", "more", value=torch.zeros(1)),
    "a weight that is a list": put("model", WEIGHT, value=[0.0]),
    "a weight of NaN": put("model", WEIGHT, value=lambda weight: weight * NAN),
    "a statistic of infinity": put("model", BUFFER, value=lambda buffer: buffer / 0),
    "a weight of another shape": put("model", WEIGHT, value=lambda weight: weight.T.contiguous()),
    "a weight in half precision": put("model", WEIGHT, value=torch.Tensor.half),
    "no optimizer": drop("state", "optimizer"),
    "an empty optimizer": put("state", "optimizer", value={}),
    "an empty scheduler": put("state", "scheduler", value={}),
    "a scheduler without its epoch": drop("state", "scheduler", "last_epoch"),
    "a scheduler of words": put("state", "scheduler", "last_epoch", value="one"),
    "no learning rate": drop(*GROUP, "lr"),
    "a learning rate of NaN": put(*GROUP, "lr", value=NAN),
    "an optimizer of fewer parameters": put(*GROUP, "params", value=lambda numbers: numbers[:-1]),
    "an optimizer of other parameters": put(*GROUP, "params", value=lambda numbers: numbers[::-1]),
    "moments of another shape": put(*MOMENTS, "exp_avg", value=torch.zeros(1)),
    "moments of NaN": put(*MOMENTS, "exp_avg_sq", value=lambda moment: moment * NAN),
    "moments that are missing": drop(*MOMENTS, "exp_avg_sq"),
    "moments of no parameter": put("state", "optimizer", "state", 10_000, value={}),
    "no process": put("random", value=[]),
    "a short random state": put("random", 0, "torch", value=lambda state: state[:-1]),
    "a random state of words": put("random", 0, "python", value="state"),
    "no random state of NumPy": drop("random", 0, "numpy"),
    "statistics of more processes": put("buffers", value=[{}, {}]),
    "statistics of no buffer": put("buffers", value=[{"more": torch.zeros(1)}]),
    "a negative epoch": put("epoch", value=-1),
    "an epoch of NaN": put("epoch", value=NAN),
    "three sums": put("sums", value=[1.0, 2.0, 3.0]),
    "sums of NaN": put("sums", value=[NAN] * 4),
    "a best epoch without its score": put("best", value={"epoch": 0}),
    "no layers": drop("config", "layers"),
    "an unknown field": put("config", "more", value=1),
    "other layers": put("config", "layers", value=4),
    "a word for layers": put("config", "layers", value="3"),
    "huge layers": put("config", "layers", value=10**9),
    "huge channels": put("config", "init_channels", value=10**6),
    "channels that do not divide": put("config", "init_channels", value=3),
    "two bits": put("config", "weight_bits", value=2),
    "words for bits": put("config", "activation_bits", value=[32]),
    "another binarization": put("config", "weight_binarization", value=["plain"]),
    "another activation": put("config", "activation", value=["prelu"]),
    "no genotype": put("config", "genotype", value=None),
    "an unknown operation": put("config", "genotype", "normal", 0, 0, value="conv"),
    "a supernet's kind": put("kind", value="search"),
    "classes of numbers": put("data", "classes", value=[1, 2, 3]),
    "fewer classes": put("data", "classes", value=["one"]),
    "no deviation": put("data", "std", value=[0.0] * 3),
    "a mean of NaN": put("data", "mean", value=[NAN] * 3),
    "no size": put("data", "image_size", value=0),
    "a word for epochs": put("args", "epochs", value="ten"),
    "no epochs": put("args", "epochs", value=0),
    "another size in the flags": put("args", "report_freq", value=0),
    "an unknown precision": put("args", "precision", value="fp8"),
    "a list for a path": put("args", "data", value=["data"]),
    "a number for a switch": put("args", "auxiliary", value=3),
}


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_a_corrupt_checkpoint_gets_one_line(name, interrupted, scripts):
    checkpoint = torch.load(interrupted / "last.pt", weights_only=True)
    if CORRUPTIONS[name]:
        CORRUPTIONS[name](checkpoint)
    else:
        checkpoint = list(checkpoint)
    torch.save(checkpoint, interrupted / "last.pt")
    before = sorted(interrupted.iterdir())
    message = scripts.fails("train.py", "--resume", interrupted)
    assert "last.pt is" in message or "the checkpoint's" in message
    assert sorted(interrupted.iterdir()) == before


def test_evaluate_refuses_a_network_of_nan(interrupted, scripts):
    checkpoint = torch.load(interrupted / "last.pt", weights_only=True)
    put("model", WEIGHT, value=lambda weight: weight * NAN)(checkpoint)
    torch.save(checkpoint, interrupted / "last.pt")
    assert "the training of this network has diverged" in scripts.fails("evaluate.py", interrupted)
