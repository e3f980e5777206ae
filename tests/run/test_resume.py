"""A run that is killed or interrupted, and resumed, ends bit-identical to one that was not."""

import re
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from support.scripts import TINY_SEARCH, TINY_STAGE, Killed, Scripts, kill, receive

import train_search
from run import checkpoint as checkpoints
from run import signals
from run.checkpoint import load_checkpoint
from run.runs import Run, read_metrics

pytestmark = pytest.mark.usefixtures("without_pictures")

BEYOND = [
    word
    for flag in (
        "activation rprelu",
        "stage1_weight_decay 1e-4",
        "ema 0.9",
        "teacher_weight 0.7",
        "teacher_temperature 2",
    )
    for word in f"--{flag}".split()
]
CASES = {
    # script, flags, steps of an epoch, batches of its evaluation
    "search": ("train_search.py", [*TINY_SEARCH, "--arch_start_epoch", 0, "--accumulate", 2], 2, 2),
    "stage1": ("train.py", [*TINY_STAGE, "--auxiliary", "--cutout", "--mixup", "--accumulate", 3], 4, 1),
    "stage2": ("train.py", [*TINY_STAGE, "--binary", "--from_scratch", "--drop_path_prob", 0.5], 4, 1),
    "beyond": (
        "train.py",
        [*TINY_STAGE, "--auxiliary", "--mixup", *BEYOND, "--clip_weights"],
        4,
        1,
    ),
    "imagenet": ("train_imagenet.py", ["--drop_path_prob", 0.5], 4, 1),
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
    assert checkpoint["finished"]
    del checkpoint["args"]
    timed = ("seconds", "cpu_seconds", "images_per_second")
    return checkpoint, [{k: v for k, v in record.items() if k not in timed} for record in read_metrics(run)]


@pytest.mark.parametrize("case", CASES)
def test_a_run_stopped_at_every_kind_of_moment(
    case, scripts, at_step, data_flags, imagenet_flags, stopped, tmp_path_factory
):
    script, flags, steps, batches = CASES[case]
    flags = [*(imagenet_flags if case == "imagenet" else data_flags), *flags, "--save_freq", 1]
    if case == "beyond":
        flags += ["--teacher", *(stopped / "runs").iterdir()]
    whole = Scripts(tmp_path_factory.mktemp("whole"))
    whole.run(script, *flags)

    at_step(2, kill)  # within epoch 0
    with pytest.raises(Killed):
        scripts.run(script, *flags)
    (run,) = scripts.runs("*")
    asides = [run / f".{name}.0123abcd" for name in ("last.pt", "best.pt", "genotype.json")]
    for aside in asides:
        aside.write_bytes(b"what a killed process leaves")

    at_step(steps, kill)  # in the evaluation of epoch 0
    with pytest.raises(Killed):
        scripts.run(script, *flags, "--resume", "auto")
    assert "at epoch 0, step 1\n" in (run / "log.txt").read_text()
    assert not any(aside.exists() for aside in asides)

    at_step(batches + 1, receive(signal.SIGINT))  # within epoch 1
    output = scripts.run(script, *flags, "--resume", "auto", code=130).stdout
    assert f"at epoch 0, step {steps}\n" in output and f"--resume runs/{run.name}\n" in output

    at_step(steps, receive(signal.SIGTERM))  # in the evaluation of epoch 1
    output = scripts.run(script, "--resume", run, code=143).stdout  # the flags are in the checkpoint
    assert "resumed " in output and "at epoch 1, step 1\n" in output

    assert f"at epoch 1, step {steps}\n" in scripts.run(script, "--resume", run).stdout
    assert scripts.runs("*") == [run]
    assert_same(final_state(run), final_state(*whole.runs("*")))


def test_a_real_process_is_killed(scripts, data_flags, tmp_path_factory):
    script, flags, *_ = CASES["stage1"]
    flags = [*data_flags, *flags]
    whole = Scripts(tmp_path_factory.mktemp("whole"))
    whole.run(script, *flags)
    process = scripts.start(script, *flags)
    wait_for(process, r"epoch 1 lr")
    wait_for(process, r"train 000 ")
    process.kill()
    process.wait()
    assert "at epoch 1, step 0" in scripts.run(script, *flags, "--resume", "auto").stdout
    assert_same(final_state(*scripts.runs("*")), final_state(*whole.runs("*")))


def test_a_real_process_is_interrupted(scripts, data_flags):
    process = scripts.start("train.py", *data_flags, *TINY_STAGE, "--epochs", 1000)
    wait_for(process, r"train 000 ")
    process.send_signal(signal.SIGTERM)
    rest = process.stdout.read()
    assert process.wait() == 128 + signal.SIGTERM
    (run,) = scripts.runs("*")
    assert f"--resume runs/{run.name}" in rest and "Traceback" not in rest
    assert load_checkpoint(run)["step"] > 0


def test_signals_wait_until_the_interrupted_checkpoint_is_written(scripts, at_step, data_flags, monkeypatch):
    write, later = checkpoints.write_atomically, SimpleNamespace(monotonic=lambda: float("inf"))
    written = []

    def interrupted_write(path, content):
        if written:  # the first checkpoint is written before the first step
            monkeypatch.setattr(signals, "time", later)  # a second Ctrl-C, long after the first
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGTERM)
        write(path, content)
        written.append(path)

    monkeypatch.setattr(checkpoints, "write_atomically", interrupted_write)
    at_step(1, receive(signal.SIGINT))
    scripts.run("train.py", *data_flags, *TINY_STAGE, code=130)
    (run,) = scripts.runs("*")
    assert load_checkpoint(run)["step"] == 1 and len(written) == 2


def test_the_test_evaluation_of_a_holdout_is_repeated(scripts, at_step, data_flags):
    flags = [*data_flags, *TINY_STAGE, "--holdout", 30, "--learning_rate", 1e-30]
    at_step(2 * (4 + 1) + 1, receive(signal.SIGTERM))  # two epochs, then the test
    assert "test top-1" not in scripts.run("train.py", *flags, code=143).stdout
    (run,) = scripts.runs("*")
    assert not load_checkpoint(run)["finished"]
    assert (
        "the best on 30 held-out training images: test top-1"
        in scripts.run("train.py", "--resume", run).stdout
    )
    last, best = load_checkpoint(run), load_checkpoint(run, "best.pt")
    assert last["finished"]
    batches = "stem.1.num_batches_tracked"  # the first of two equal epochs is the best; the last stays last
    assert (best["model"][batches], last["model"][batches]) == (4, 8)


def test_a_genotype_is_of_a_finite_epoch(scripts, data_flags, monkeypatch):
    record = train_search.epoch_record
    monkeypatch.setattr(
        train_search, "epoch_record", lambda *args, **kw: {**record(*args, **kw), "valid_loss": float("nan")}
    )
    result = scripts.run("train_search.py", *data_flags, *TINY_SEARCH, code=1)
    assert "valid_loss is nan after epoch 0; the last good checkpoint is in runs/" in result.stderr
    (run,) = scripts.runs("*")
    assert not (run / "genotype.json").exists() and not (run / "metrics.jsonl").exists()
    assert "stopped: valid_loss is nan" in (run / "log.txt").read_text()


def test_a_restart_by_torchrun_goes_on_with_the_run_that_was_to_be_resumed(interrupted, scripts, monkeypatch):
    run = interrupted.rename(interrupted.with_name("eval-other-stage1-1"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    output = scripts.run("train.py", "--resume", f"runs/{run.name}").stdout
    assert f"resumed runs/{run.name} at" in output
    assert scripts.runs("*") == [run]


def test_other_flags_are_refused(interrupted, scripts, data_flags):
    result = scripts.run("train.py", "--resume", interrupted, "--seed", 5, code=2)
    assert "--seed 0, not 5" in result.stderr and result.stderr.count("\n") == 1
    fresh = [*data_flags, *TINY_STAGE, "--epochs", 1, "--resume", "auto"]
    assert "nothing to resume: a new run" in scripts.run("train.py", *fresh).stdout


def test_other_images_are_refused(interrupted, scripts, images, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(images, other)
    for part in ("train", "test"):
        first = sorted((other / part).iterdir())[0]
        first.rename(first.with_name("another"))
    before = (interrupted / "last.pt").read_bytes()
    result = scripts.run("train.py", "--resume", interrupted, "--data", other, code=2)
    assert "was run on other images: not the same classes; give its --data" in result.stderr
    assert (interrupted / "last.pt").read_bytes() == before


def test_a_run_is_resumed_by_one_process(interrupted, scripts):
    lock = Run(interrupted)
    assert "is in use by another process" in scripts.run("train.py", "--resume", interrupted, code=2).stderr
    lock.close()


def test_damaged_files_beside_the_checkpoint(interrupted, scripts, at_step):
    (interrupted / "args.json").write_text("{")
    (interrupted / "metrics.jsonl").write_text("nonsense\n{}\n")
    result = scripts.run("train.py", "--resume", interrupted, code=2)
    assert "metrics.jsonl, line 1: not JSON" in result.stderr and result.stderr.count("\n") == 1

    (interrupted / "metrics.jsonl").unlink()
    at_step(4, lambda: (interrupted / "metrics.jsonl").write_text('{"epoch": 0}\n'))
    assert "cannot look back on the run" in scripts.run("train.py", "--resume", interrupted).stdout
    assert load_checkpoint(interrupted)["finished"]


def test_the_events_of_tensorboard_may_go(scripts, at_step, data_flags):
    def delete():
        (run,) = scripts.runs("*")
        shutil.rmtree(run / "tensorboard")

    at_step(6, delete)
    result = scripts.run("train.py", *data_flags, *TINY_STAGE)
    (run,) = scripts.runs("*")
    assert (
        result.stderr == ""
        and len(read_metrics(run)) == 2
        and len(list((run / "tensorboard").iterdir())) == 1
    )


def test_flags_without_a_value_are_damage(interrupted, scripts):
    checkpoint = torch.load(interrupted / "last.pt", weights_only=True)
    checkpoint["args"]["epochs"] = None
    torch.save(checkpoint, interrupted / "last.pt")
    assert (
        "of its flags, --epochs has no value"
        in scripts.run("train.py", "--resume", interrupted, code=2).stderr
    )
