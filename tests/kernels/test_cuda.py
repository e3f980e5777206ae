"""What only a CUDA GPU can show: scripts train on it, no step waits for it, its state is saved, NCCL runs."""

import itertools
import shutil
import socket
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from support.scripts import TINY_SEARCH, TINY_STAGE
from torch import nn

from architect import Architect
from flags.choices import PRECISIONS
from genotypes import GENOTYPES
from images.loaders import Batch
from model import ModelConfig, Network, build_model
from model_search import SearchConfig, Supernet
from run.checkpoint import Checkpointer, load_checkpoint
from run.distributed import World, setup
from run.runs import read_metrics
from training.engine import FiniteWatch, Precision, Sums, Training, training_step
from utils import RunFailed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU")
DEVICE = torch.device("cuda", 0)
WORLD = World(DEVICE)


@pytest.fixture
def script(scripts) -> Callable[..., Path]:
    """Run a script's main in this process, on the GPU, in an empty folder: the newest run's folder."""

    def run(name: str, *flags: object) -> Path:
        scripts.run(name, *flags, "--device", "cuda")
        return max(scripts.runs("*"), key=lambda folder: (folder / "last.pt").stat().st_mtime_ns)

    return run


def check_finished(run: Path, precision: str) -> None:
    checkpoint = load_checkpoint(run)
    assert checkpoint["finished"] and checkpoint["args"]["precision"] == precision
    assert checkpoint["random"][0]["cuda"] is not None
    assert len(read_metrics(run)) == checkpoint["args"]["epochs"]


@pytest.mark.parametrize("precision", PRECISIONS)
def test_search_and_both_stages_train(script, data_flags, precision):
    """Three steps an epoch or more; the second epoch of the search has architecture steps."""
    flags = [*data_flags, "--precision", precision]
    search = script("train_search.py", *flags, *TINY_SEARCH, "--batch_size", 20)
    assert (search / "genotype.json").is_file()
    check_finished(search, precision)
    stage = [*flags, *TINY_STAGE, "--arch", search, "--auxiliary", "--cutout", "--mixup"]
    check_finished(script("train.py", *stage), precision)
    check_finished(script("train.py", *stage, "--binary"), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
def test_imagenet_trains_both_stages(script, images, tmp_path, precision):
    """Three steps or more, of images that two processes read into pinned memory."""
    for theirs, ours in (("train", "train"), ("test", "val")):
        shutil.copytree(images / theirs, tmp_path / "set" / ours)
    flags = ["--tmp_data_dir", tmp_path / "set", *TINY_STAGE, "--init_channels", 8, "--image_size", 32]
    flags += ["--auxiliary", "--workers", 2, "--precision", precision]
    check_finished(script("train_imagenet.py", *flags), precision)
    check_finished(script("train_imagenet.py", *flags, "--binary"), precision)


def derived_network() -> Network:
    config = ModelConfig(
        GENOTYPES["EBNAS"], init_channels=4, layers=3, groups=2, num_classes=4, auxiliary=True
    )
    network = build_model(config).to(DEVICE)
    network.drop_path_prob = 0.2
    return network


def make_batch() -> Batch:
    return Batch(torch.randn(8, 3, 16, 16, device=DEVICE), torch.arange(8, device=DEVICE) % 4, 8)


def steps_of(network: nn.Module, parameters: list[nn.Parameter], precision: Precision) -> Callable[[], None]:
    """A training step as in engine.train_one_epoch, with its sums and its watch over the loss."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)
    settings = {"grad_clip": 5.0, "auxiliary_weight": 0.4}
    training = Training(network, nn.CrossEntropyLoss(), optimizer, WORLD, precision, **settings)
    sums, watch = Sums(DEVICE), FiniteWatch(0)

    def observe(objective, loss, logits, targets) -> None:
        sums.add(loss, logits, targets)
        watch.add(0, objective)

    return partial(training_step, training, make_batch(), observe)


def search_step(precision: Precision) -> Callable[[], None]:
    network = Supernet(SearchConfig(8, 3, 4)).to(DEVICE)
    architect = Architect(
        network, learning_rate=6e-4, weight_decay=1e-3, path_reg_weight=1.5, edge_reg_weight=0.8
    )
    weight_step = steps_of(network, network.weight_parameters(), precision)
    batches = itertools.repeat(make_batch())

    def step() -> None:
        architect.step(batches, ramp=1.0, batch_size=8, world=WORLD, precision=precision)
        weight_step()

    return step


def stage_step(precision: Precision) -> Callable[[], None]:
    network = derived_network()
    return steps_of(network, list(network.parameters()), precision)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("make_step", [search_step, stage_step])
def test_a_step_does_not_wait_for_the_gpu(make_step, precision):
    step = make_step(Precision(precision, DEVICE))
    step()  # makes the optimisers' states and chooses kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_found_after_its_step(value):
    watch = FiniteWatch(4)
    with pytest.raises(RunFailed, match="epoch 4, step 7;"):
        for step in range(20):
            watch.add(step, torch.tensor(value if step == 7 else 1.0, device=DEVICE))
        watch.finish()
    healthy = FiniteWatch(0)
    healthy.add(0, torch.tensor(1.0, device=DEVICE))
    healthy.finish()
    assert not healthy.pending


def test_a_checkpoint_restores_weights_optimizer_and_cudas_random_stream(tmp_path):
    precision = Precision("fp16", DEVICE)

    def make() -> tuple[Network, torch.optim.Optimizer, Checkpointer]:
        network = derived_network()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-3, fused=True)
        header = {
            "script": "train",
            "kind": "stage2",
            "args": {},
            "config": network.config.to_dict(),
            "data": {
                "set": "shapes",
                "root": "data",
                "image_size": 16,
                "classes": list("abcd"),
                "mean": [0] * 3,
                "std": [1] * 3,
            },
        }
        stateful = {"optimizer": optimizer, "scaler": precision.scaler}
        return (
            network,
            optimizer,
            Checkpointer(tmp_path, header=header, model=network, stateful=stateful, world=WORLD),
        )

    network, optimizer, checkpoints = make()
    training_step(Training(network, nn.CrossEntropyLoss(), optimizer, WORLD, precision), make_batch())
    checkpoints.save(epoch=1)
    draws = torch.rand(5, device=DEVICE)

    again, optimizer_again, checkpoints = make()
    checkpoints.restore(load_checkpoint(tmp_path))
    assert torch.equal(torch.rand(5, device=DEVICE), draws)
    for name, tensor in again.state_dict().items():
        assert tensor.device == DEVICE and torch.equal(tensor, network.state_dict()[name])
    for ours, theirs in zip(again.parameters(), network.parameters(), strict=True):
        for name, tensor in optimizer_again.state[ours].items():
            assert tensor.device == DEVICE and torch.equal(tensor, optimizer.state[theirs][name])


@pytest.fixture
def nccl(monkeypatch):
    """The World of one process under torchrun, which asks NCCL as if it were one of two."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    places = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in places.items():
        monkeypatch.setenv(name, str(value))
    world = setup("cuda")
    assert dist.get_backend() == "nccl" and world == WORLD
    yield replace(world, size=2)
    replace(world, size=2).close()
    assert not dist.is_initialized()


def test_nccl_with_one_process(nccl):
    values = torch.tensor([1.0, 3.0], dtype=torch.float64, device=DEVICE)
    assert nccl.sum(values).tolist() == [1, 3]
    parameter = nn.Parameter(torch.zeros(2, device=DEVICE))
    parameter.grad = torch.tensor([2.0, 6.0], device=DEVICE)
    nccl.average_gradients([parameter])
    assert parameter.grad.tolist() == [1, 3]  # the sum over the one process there is, by two
    norm = nn.BatchNorm1d(2).to(DEVICE)
    nccl.average_buffers(norm)
    assert norm.running_var.tolist() == [0.5, 0.5]
    assert nccl.broadcast({"folder": Path("runs")}) == {"folder": Path("runs")}
    votes = [nccl.vote(True), nccl.vote(False)]
    assert [vote.result() for vote in votes] == [True, False]
