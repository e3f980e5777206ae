"""A run that is killed or interrupted, and resumed, ends bit-identical to one that was not."""

import re
import shutil
import signal

import pytest
import torch
from conftest import TINY_SEARCH, TINY_STAGE, Scripts

from checkpoint import load_checkpoint
from runs import read_metrics

CASES = {
    "search": ("train_search.py", [*TINY_SEARCH, "--arch_start_epoch", 0, "--accumulate", 2]),
    "stage1": ("train.py", [*TINY_STAGE, "--auxiliary", "--cutout", "--mixup", "--accumulate", 3]),
    "stage2": ("train.py", [*TINY_STAGE, "--binary", "--from_scratch", "--drop_path_prob", 0.5]),
}


def wait_for(process, pattern: str) -> None:
    """Read the output of a run until a line matches."""
    for line in process.stdout:
        if re.search(pattern, line):
            return
    raise AssertionError(f"{pattern!r} did not appear")


def assert_same(one, other, where: str = "checkpoint") -> None:
    assert type(one) is type(other), where
    if isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, list | tuple):
        assert len(one) == len(other), where
        for index, pair in enumerate(zip(one, other, strict=True)):
            assert_same(*pair, f"{where}[{index}]")
    elif isinstance(one, torch.Tensor):
        assert torch.equal(one, other), where
    else:
        assert one == other, where


def final_state(run) -> tuple[dict, list[dict]]:
    """The last checkpoint without its flags, the metrics without their times."""
    checkpoint = dict(load_checkpoint(run))
    del checkpoint["args"]
    timed = ("seconds", "images_per_second")
    return checkpoint, [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(run)]


@pytest.fixture(scope="module", params=CASES)
def uninterrupted(request, tmp_path_factory, data_flags):
    script, flags = CASES[request.param]
    whole = Scripts(tmp_path_factory.mktemp(request.param))
    whole.run(script, *data_flags, *flags)
    (run,) = whole.runs("*")
    return script, [*data_flags, *flags], final_state(run)


def test_killed_mid_epoch(uninterrupted, scripts):
    script, flags, expected = uninterrupted
    process = scripts.start(script, *flags)
    wait_for(process, r"epoch 1 lr")
    wait_for(process, r"train 000 ")
    process.kill()
    process.wait()
    (run,) = scripts.runs("*")
    assert not load_checkpoint(run)["finished"]
    output = scripts.run(script, *flags, "--resume", "auto").stdout
    assert "at epoch 1, step 0" in output
    assert scripts.runs("*") == [run]
    assert_same(final_state(run), expected)


def test_interrupted_mid_epoch(uninterrupted, scripts):
    script, flags, expected = uninterrupted
    number = signal.SIGINT if script == "train_search.py" else signal.SIGTERM
    process = scripts.start(script, *flags)
    wait_for(process, r"train 000 ")
    process.send_signal(number)
    rest = process.stdout.read()
    assert process.wait() == 128 + number
    (run,) = scripts.runs("*")
    assert f"--resume runs/{run.name}" in rest
    assert load_checkpoint(run)["step"] > 0
    scripts.run(script, "--resume", run)  # the flags are in the checkpoint
    assert_same(final_state(run), expected)


def test_resume_with_other_flags_is_refused(scripts, data_flags):
    flags = [*data_flags, *TINY_STAGE, "--epochs", 50]
    process = scripts.start("train.py", *flags)
    wait_for(process, r"train 000 ")
    process.send_signal(signal.SIGINT)
    process.stdout.read()
    assert process.wait() == 128 + signal.SIGINT
    (run,) = scripts.runs("*")
    result = scripts.run("train.py", "--resume", run, "--seed", 5, code=2)
    assert "--seed 0, not 5" in result.stderr and result.stderr.count("\n") == 1
    fresh = [*data_flags, *TINY_STAGE, "--epochs", 1, "--resume", "auto"]
    assert "nothing to resume: a new run" in scripts.run("train.py", *fresh).stdout


def test_resume_on_other_images_is_refused(scripts, data_flags, images, tmp_path_factory):
    flags = [*data_flags, *TINY_STAGE, "--epochs", 50]
    process = scripts.start("train.py", *flags)
    wait_for(process, r"train 000 ")
    process.send_signal(signal.SIGTERM)
    process.stdout.read()
    process.wait()
    (run,) = scripts.runs("*")
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(images, other, dirs_exist_ok=True)
    for part in ("train", "test"):
        first = sorted((other / part).iterdir())[0]
        first.rename(first.with_name("another"))
    before = (run / "last.pt").read_bytes()
    result = scripts.run("train.py", "--resume", run, "--data", other, code=2)
    assert "was run on other images: their classes differs" in result.stderr
    assert (run / "last.pt").read_bytes() == before
