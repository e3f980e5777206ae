"""Two gloo processes compute what one computes on the joined batch; a run survives the loss of one."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from functools import partial
from operator import attrgetter
from pathlib import Path

import pytest
import torch
from support.scripts import ROOT, TINY_STAGE, environment
from test_resume import assert_same, final_state, wait_for
from torch import Tensor, multiprocessing, nn

from architect import Architect
from images.augment import Normalize
from images.loaders import BatchLoader, Shard
from images.sets import ImageSet
from model_search import SearchConfig, Supernet
from run import distributed
from run.checkpoint import load_checkpoint
from run.distributed import World, setup
from training.engine import Position, Precision, Training, evaluate, train_one_epoch
from training.teacher import DistillationLoss, Teacher
from training.weights import moving_average
from utils import InputError, RunFailed, one_line

PROCESSES = 2
CRITERION = nn.CrossEntropyLoss()
TRAIN, TEST = 21, 17  # images, in batches of 8: of the last ones a process gets 2 or 3, and none or 1


class DoubleSupernet(Supernet):
    """In float64, so that the order of sums is not what differs; BN always in evaluation mode, if told so."""

    batch_statistics = True

    def train(self, mode: bool = True):
        return super().train(mode and self.batch_statistics)

    def forward(self, x: Tensor):
        return super().forward(x.double())


def loader(n: int, world: World, **keywords) -> BatchLoader:
    generator = torch.Generator().manual_seed(n)
    images = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.randint(7, (n,), generator=generator)
    dataset = ImageSet(images, labels, tuple("abcdefg"))
    normalize, shard = Normalize((0.5,) * 3, (0.25,) * 3), Shard(world.rank, world.size)
    return BatchLoader(dataset, 8, normalize=normalize, shard=shard, **keywords)


def search(
    world: World,
    *,
    batch_statistics: bool,
    accumulate: int = 1,
    criterion: nn.Module = CRITERION,
    targets_of: Callable = attrgetter("targets"),
) -> dict:
    """An epoch of a search with both kinds of step, each in `accumulate` parts, and its evaluation. The
    gradients, the network and its average after it, and all that was measured."""
    torch.manual_seed(0)
    model = DoubleSupernet(SearchConfig(8, 3, 7)).double()
    model.batch_statistics = batch_statistics
    weights = model.weight_parameters()
    optimizer = torch.optim.SGD(weights, lr=0.1)  # Adam would magnify rounding in small gradients
    architect = Architect(
        model, learning_rate=6e-4, weight_decay=1e-3, path_reg_weight=1.5, edge_reg_weight=0.8
    )
    shared = {"world": world, "precision": Precision("fp32", world.device)}
    parts = {"accumulate": accumulate}
    batches = loader(TRAIN, world, shuffle=True, stream=1).epoch(0)
    arch_step = partial(architect.step, batches, ramp=1.0, batch_size=8, **parts, **shared)
    average = moving_average(model, optimizer, 0.5)
    gradients = []
    optimizer.register_step_post_hook(lambda *_: gradients.append([p.grad.clone() for p in weights]))
    training = Training(model, criterion, optimizer, targets_of=targets_of, grad_clip=5.0, **parts, **shared)
    weight_loader = loader(TRAIN, world, shuffle=True, stream=0)
    train = train_one_epoch(training, weight_loader, start=Position(0), before_step=arch_step)
    for network in (model, average):
        world.average_buffers(network)
    test = evaluate(model, loader(TEST, world), **shared)
    for means in (train, test):
        del means["seconds"], means["cpu_seconds"]
    del train["images_per_second"]
    return {
        "gradients": gradients,
        "model": model.state_dict(),
        "average": average.state_dict(),
        "train": train,
        "test": test,
        "genotype": model.genotype(),
    }


def distil(world: World) -> dict:
    """The same with a teacher."""
    torch.manual_seed(1)
    teacher = Teacher(DoubleSupernet(SearchConfig(8, 3, 7)).double(), "a teacher", {})
    loss = DistillationLoss(CRITERION, weight=0.7, temperature=2)
    return search(world, batch_statistics=False, criterion=loss, targets_of=teacher)


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def search_in_processes(rank: int, port: int, folder: Path) -> None:
    place = {"RANK": rank, "WORLD_SIZE": PROCESSES, "MASTER_ADDR": "localhost", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()})
    torch.set_num_threads(1)
    world = setup("cpu")
    assert (world.rank, world.size, world.is_main) == (rank, PROCESSES, rank == 0)
    with world.in_turn("a test"):
        pass
    results = {statistics: search(world, batch_statistics=statistics) for statistics in (False, True)}
    results["parts"] = search(world, batch_statistics=False, accumulate=2)
    results["taught"] = distil(world)
    votes = [world.vote(rank == 1), world.vote(False)]  # the first is read after the second is asked
    results["votes"] = [vote.result() for vote in votes]
    results["gathered"] = world.gather({"rank": rank})
    results["broadcast"] = world.broadcast(f"from {rank}")
    torch.manual_seed(rank)
    model = Supernet(SearchConfig(8, 3, 7))
    results["before"] = model.classifier.weight.clone()
    world.broadcast_model(model)
    results["after"] = model.state_dict()
    torch.save(results, folder / f"{rank}.pt")
    world.close()


@pytest.fixture(scope="module")
def by_rank(tmp_path_factory) -> list[dict]:
    folder = tmp_path_factory.mktemp("ranks")
    multiprocessing.spawn(search_in_processes, (free_port(), folder), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(PROCESSES)]


def test_gradients_and_metrics_equal_those_of_one_process_on_the_joined_batch(by_rank):
    """Also where each process takes its shard in parts, or with a teacher."""
    plain, taught = (
        search(World(torch.device("cpu")), batch_statistics=False),
        distil(World(torch.device("cpu"))),
    )
    assert len(plain["gradients"]) == 3 and plain["train"]["samples"] == TRAIN
    assert plain["train"]["loss"] != taught["train"]["loss"]
    cases = ((False, plain), ("parts", plain), ("taught", taught))
    for together, alone in ((results[how], alone) for results in by_rank for how, alone in cases):
        for ours, theirs in zip(together["gradients"], alone["gradients"], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)  # losses are in float32
        for network in ("model", "average"):
            torch.testing.assert_close(together[network], alone[network], rtol=1e-5, atol=1e-7)
        assert together["train"] == pytest.approx(alone["train"], rel=1e-6)
        assert together["test"] == pytest.approx(alone["test"], rel=1e-6)
        assert together["test"]["samples"] == TEST
        assert together["genotype"] == alone["genotype"]


def test_processes_agree_to_the_last_bit(by_rank):
    """Also where each normalises by the statistics of its own part of the batch."""
    one, other = by_rank
    for statistics in (False, True):
        assert_same(one[statistics]["gradients"], other[statistics]["gradients"])
        for network in ("model", "average"):
            assert_same(dict(one[statistics][network]), dict(other[statistics][network]))
        assert one[statistics]["genotype"] == other[statistics]["genotype"]
    assert one[True]["model"]["alphas_normal"].std() > 0


def test_what_processes_tell_each_other(by_rank):
    for results in by_rank:
        assert results["votes"] == [True, False]
        assert results["gathered"] == [{"rank": 0}, {"rank": 1}]
        assert results["broadcast"] == "from 0"


def test_processes_start_from_the_weights_of_the_main_one(by_rank):
    one, other = by_rank
    assert not torch.equal(one["before"], other["before"])
    assert torch.equal(one["before"], one["after"]["classifier.weight"])
    assert_same(dict(one["after"]), dict(other["after"]))


@pytest.mark.parametrize(("backend", "told"), [("nccl", [1]), ("gloo", None)])
def test_nccl_is_told_which_gpu_waits(monkeypatch, backend, told):
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_backend", lambda: backend)
    monkeypatch.setattr(distributed.dist, "destroy_process_group", lambda: None)
    waits = []
    monkeypatch.setattr(distributed.dist, "barrier", lambda device_ids: waits.append(device_ids))
    World(torch.device("cuda", 1), size=2).close()
    assert waits == [told]


def take_turns(download: Callable[[int], None]) -> list[BaseException | None]:
    """Four processes, here threads, of two on each of two machines go in turn through a `download`, which is
    given their rank: what each ends with."""
    store = torch.distributed.HashStore()

    def process(rank: int) -> None:
        with World(torch.device("cpu"), rank, 4, f"machine {rank // 2}", rank % 2, store).in_turn(
            "a download"
        ):
            download(rank)

    with ThreadPoolExecutor(4) as pool:
        jobs = {rank: pool.submit(process, rank) for rank in (3, 2, 1, 0)}
        return [jobs[rank].exception(timeout=60) for rank in range(4)]


def test_the_first_of_all_goes_first_and_before_others_the_first_of_their_machine():
    begun, done = [], []

    def download(rank: int) -> None:
        begun.append(rank)
        time.sleep(0.05)
        assert rank == 0 or 0 in done
        assert rank != 3 or 2 in done
        done.append(rank)

    assert take_turns(download) == [None] * 4
    assert begun[0] == 0 and sorted(done) == [0, 1, 2, 3]


def test_nobody_goes_on_before_the_last_has_had_its_turn(monkeypatch):
    """Who did would wait for the others in a barrier of the devices, and give up after minutes."""
    monkeypatch.setattr(distributed, "LONGEST_WAIT", timedelta(milliseconds=20))
    store = torch.distributed.HashStore()
    with (
        pytest.raises(torch.distributed.DistStoreError),
        World(torch.device("cpu"), 0, 2, "here", 0, store).in_turn("a download"),
    ):
        pass


@pytest.mark.parametrize("error", [InputError("no such set"), KeyboardInterrupt()])
@pytest.mark.parametrize("failing", range(4))
def test_nobody_waits_for_one_that_failed(error, failing):
    def download(rank: int) -> None:
        if rank == failing:
            raise error

    endings = take_turns(download)
    assert endings.pop(failing) is error
    for ending in endings:
        assert type(ending) is RunFailed
        assert str(ending) == f"another process failed at a download: {one_line(error)}"


@pytest.mark.parametrize(
    ("visible", "local", "expected"), [(4, "2", "cuda:2"), (1, "1", "cuda:0"), (4, None, "cuda:3")]
)
def test_which_gpu_a_process_takes(monkeypatch, visible, local, expected):
    """SLURM can show each task one GPU only, whatever its number on the machine."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: visible)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if local is not None:
        monkeypatch.setenv("LOCAL_RANK", local)
    assert str(setup(gpu=3).device) == expected


ONE_MACHINE = ("--standalone", "--max_restarts=1", f"--nproc_per_node={PROCESSES}")
MANY_STEPS = (*TINY_STAGE, "--batch_size", 4, "--auxiliary", "--drop_path_prob", 0.5, "--ema", 0.9)
"""Flags of 32 steps an epoch, and of two networks, each with its statistics."""


class Torchrun:
    """Stage 1 in two processes, in `folder`; `place` says to torchrun how they are spread."""

    def __init__(self, folder: Path, flags: list, place: Sequence[str] = ONE_MACHINE):
        self.folder = folder
        script = [ROOT / "train.py", *flags, *MANY_STEPS]
        launcher = [sys.executable, "-m", "torch.distributed.run", *place]
        self.command = [str(word) for word in (*launcher, *script)]

    def start(self, *more: object) -> subprocess.Popen:
        return subprocess.Popen(
            [*self.command, *map(str, more)],
            cwd=self.folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def run(self) -> Path:
        """The folder of the one run there is."""
        (run,) = (self.folder / "runs").iterdir()
        return run


@pytest.fixture(scope="module")
def two_machines(tmp_path_factory, data_flags) -> tuple[Path, list[str]]:
    """A run of two launchers of one process each, which meet at an address, as on two machines that share
    folder and data; and what each of them printed."""
    place = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d")
    address = f"--rdzv_endpoint=localhost:{free_port()}"
    folder = tmp_path_factory.mktemp("machines")
    # on one machine both would take themselves for the host of that address
    torchruns = [
        Torchrun(folder, data_flags, (*place, address, f"--rdzv_conf=is_host={is_host}"))
        for is_host in ("true", "false")
    ]
    machines = [torchrun.start() for torchrun in torchruns]
    try:
        outputs = [machine.communicate(timeout=300)[0] for machine in machines]
    finally:
        for machine in machines:
            machine.kill()
    assert [machine.returncode for machine in machines] == [0, 0], outputs
    return torchruns[0].run(), outputs


def test_only_the_main_process_writes(two_machines):
    run, outputs = two_machines
    assert sorted(output.count("run folder ") for output in outputs) == [0, 1]
    assert len(re.findall(r"train 000 ", "".join(outputs))) == 2  # one line in each epoch
    assert len((run / "metrics.jsonl").read_text().splitlines()) == 2
    assert len(load_checkpoint(run)["random"]) == PROCESSES


@pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="finds the workers through /proc")
def test_killed_restarted_interrupted_and_resumed(two_machines, tmp_path, data_flags):
    """One process is killed, and torchrun starts all again; then a signal ends them within an epoch. In the
    end all is as on two machines that nothing happened to."""
    torchrun = Torchrun(tmp_path, data_flags)
    process = torchrun.start()
    wait_for(process, r"epoch 0 lr")
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text(encoding="utf-8").split()
    assert len(children) == PROCESSES
    os.kill(int(children[1]), signal.SIGKILL)
    wait_for(process, r"resumed .* at epoch 0, step 0")
    wait_for(process, r"epoch 1 lr")
    process.send_signal(signal.SIGTERM)
    output = process.communicate()[0]
    assert "stopped at epoch 1, step " in output, output

    stopped = load_checkpoint(torchrun.run())
    assert stopped["step"] > 0
    one, other = stopped["buffers"]
    for name in ("stem.1.running_mean", "live.stem.1.running_mean"):
        assert not torch.equal(one[name], other[name])

    process = torchrun.start("--resume", torchrun.run())
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert f"at epoch 1, step {stopped['step']}\n" in output
    assert_same(final_state(torchrun.run()), final_state(two_machines[0]))
