"""A run around its epochs: signals, and what ends it."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.scripts import ROOT, TINY_STAGE, environment
from torch._inductor.exc import InvalidCxxCompiler

from run.checkpoint import load_checkpoint
from run.distributed import World
from run.signals import StopSignal
from training import engine


def test_signals_are_noted_and_the_handlers_come_back():
    before = signal.getsignal(signal.SIGTERM)
    with StopSignal(World(torch.device("cpu"))) as stop:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.received == signal.SIGTERM
        signal.raise_signal(signal.SIGINT)  # within a second of the first
        stop.at -= 2
        stop.held = True
        signal.raise_signal(signal.SIGINT)
        stop.held = False
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        assert stop.received == signal.SIGTERM
    assert signal.getsignal(signal.SIGTERM) is before


@pytest.mark.skipif(not Path("/proc/self/maps").is_file(), reason="sees through /proc what is imported")
def test_an_interrupt_while_torch_is_imported(tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py"],
        cwd=tmp_path,
        env=environment(),
        stderr=subprocess.PIPE,
        text=True,
    )
    while "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8"):
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate()
    assert (process.returncode, errors) == (130, "error: interrupted\n")


NO_MEMORY = (
    "there is not enough memory for --batch_size 32 and this network; "
    "give a smaller one, or a larger --accumulate"
)
NO_COMPILER = "it needs a C++ compiler; leave it out"


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), NO_MEMORY),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried"), NO_MEMORY),
        (InvalidCxxCompiler(), NO_COMPILER),
    ],
)
def test_what_ends_a_run_is_explained_also_in_its_log(error, message, scripts, data_flags, monkeypatch):
    def failing(*_args, **_keywords):
        raise error

    monkeypatch.setattr(engine, "update", failing)
    line = scripts.run("train.py", *data_flags, *TINY_STAGE, code=1).stderr
    assert line.endswith(f"{message}\n") and line.count("\n") == 1
    (run,) = scripts.runs("*")
    assert (run / "log.txt").read_text().endswith(line.replace("error", "stopped"))


@pytest.fixture
def small_disk(tmp_path):
    """A folder on a disk of 2 MB, where this user may make one."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", tmp_path]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("cannot mount a small disk")
    yield tmp_path
    subprocess.run(["umount", tmp_path], check=True)


def test_a_full_disk_ends_the_run_with_its_last_good_checkpoint(
    small_disk, scripts, data_flags, at_step, without_pictures
):
    def fill():
        with open(small_disk / "large", "wb", buffering=0) as file, pytest.raises(OSError):
            while True:
                file.write(bytes(4096))

    at_step(2, fill)
    result = scripts.run("train.py", *data_flags, *TINY_STAGE, code=1)
    assert "no space left on device" in result.stderr and result.stderr.count("\n") == 1
    (run,) = scripts.runs("*")
    assert f"{run.name}/last.pt: cannot write: no space left" in (run / "log.txt").read_text()
    assert load_checkpoint(run)["epoch"] == 0
    (small_disk / "large").unlink()
    scripts.run("train.py", "--resume", run)


def test_flags_and_arithmetic_are_kept(interrupted):
    assert load_checkpoint(interrupted)["args"]["precision"] == "fp32"
    assert '"tf32": false' in (interrupted / "args.json").read_text()
    assert "1 x cpu, fp32" in (interrupted / "log.txt").read_text()
