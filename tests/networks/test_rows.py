"""The rows through the scripts: stages, resume, evaluation, and flags that do not fit, in small sizes."""

import shlex
import signal

import pytest
from support.scripts import TINY, receive

from run.checkpoint import load_checkpoint
from run.runs import read_metrics

pytestmark = pytest.mark.usefixtures("without_pictures")

ONE_EPOCH = [*TINY, "--epochs", 1, "--batch_size", 64]
CELLS = {
    "BNAS-A": [*ONE_EPOCH, "--init_channels", 4],
    "BATS": [*ONE_EPOCH, "--init_channels", 4, "--groups", 2, "--auxiliary"],
    "DCP-NAS-L": [*ONE_EPOCH, "--init_channels", 4],
}
FLAGS = {**CELLS, "ResNet18": ["--batch_size", 64, "--epochs", 1, "--init_channels", 8]}
STAGES = {
    "BNAS-A": ["single"],
    "ResNet18": ["single"],
    "BATS": ["stage1", "stage2"],
    "DCP-NAS-L": ["stage1", "stage2"],
}
NOT_PACKED = {
    "DCP-NAS-L": "cells.0.preprocess0.conv convolves real activations, not signs",
    "ResNet18": "conv1 is in full precision",
}


@pytest.mark.parametrize("arch", FLAGS)
def test_a_row_trains_in_its_stages_and_is_evaluated(scripts, data_flags, arch):
    flags = [*data_flags, "--arch", arch, *FLAGS[arch]]
    for stage in STAGES[arch]:
        binary = ["--binary"] if stage == "stage2" else []
        scripts.run("train.py", *flags, *binary)
        (run,) = scripts.runs(f"eval-EXP-{stage}-*")
        checkpoint = load_checkpoint(run)
        assert checkpoint["kind"] == stage and checkpoint["finished"]
    output = scripts.run("evaluate.py", run).stdout
    assert f"{read_metrics(run)[-1]['valid_top1']:.2f}" in output
    assert arch in output
    if arch in ("BATS", "DCP-NAS-L"):
        assert "stand-in" in output or "CP-NAS is not public" in output
    if arch in NOT_PACKED:
        for command in ("export.py", run), ("evaluate.py", run, "--packed"):
            assert NOT_PACKED[arch] in scripts.run(*command, code=2).stderr
    else:
        scripts.run("export.py", run)
        assert (run / "model.ebnas").is_file()
        assert "the class of the float form on 100.00 %" in scripts.run("evaluate.py", run, "--packed").stdout


def test_what_goes_on_is_what_was_not_interrupted(scripts, data_flags, at_step):
    """BNAS by its own recipe: its update rule and its schedule go with each step."""
    flags = [*data_flags, "--arch", "BNAS-A", *FLAGS["BNAS-A"], "--recipe", "own"]
    scripts.run("train.py", *flags, "--save", "whole")
    at_step(1, receive(signal.SIGTERM))
    scripts.run("train.py", *flags, "--save", "parts", code=143)
    scripts.run("train.py", "--resume", scripts.runs("eval-parts-*")[0])
    whole, parts = (load_checkpoint(scripts.runs(f"eval-{name}-*")[0]) for name in ("whole", "parts"))
    assert whole["epoch"] == parts["epoch"] == 1
    assert whole["state"]["scheduler"]["last_epoch"] == 2  # steps
    assert "momentum_buffer" in whole["state"]["optimizer"]["state"][0]
    assert all(tensor.equal(parts["model"][name]) for name, tensor in whole["model"].items())


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--arch", "ResNet18", "--binary"],
            "ResNet18 has no stages: it trains in full precision; leave --binary out",
        ),
        (["--arch", "BNAS-A", "--binary"], "BNAS-A trains in one stage; leave --binary out"),
        (["--arch", "BNAS-A", "--groups", 7], "BNAS-A has no use for --groups"),
        (["--arch", "DCP-NAS-L", "--auxiliary"], "DCP-NAS-L has no use for --auxiliary"),
        (["--arch", "ResNet18", "--layers", 7], "ResNet18 has no use for --layers"),
        (["--arch", "ResNet18", "--drop_path_prob", 0.1], "ResNet18 has no paths to drop"),
        (["--arch", "ResNet18", "--family", "bats"], "is made of no cells"),
        (["--arch", "BATS", "--weight_binarization", "balanced"], "has no use for --weight_binarization"),
        (["--arch", "BATS", "--variant", "as_run"], "choose from ('learned', 'mean')"),
        (["--arch", "DCP-NAS-L", "--stage1", "w1a32"], "that of DCP-NAS-L is w32a1"),
        (["--arch", "BATS", "--recipe", "own"], "that of bats is not public; use --recipe ebnas"),
        (["--arch", "BNAS-H"], "BNAS-H has no published size for cifar images"),
        (["--arch", "BNAS-A", "--image_size", 18, "--batch_size", 64], "shortcuts halve even sizes only"),
        (["--arch", "CP-NAS"], "unknown genotype 'CP-NAS': choose from EBNAS, BNAS-A"),
    ],
)
def test_flags_that_do_not_fit(fails, data_flags, flags, message):
    assert message in fails("train.py", *data_flags, *flags)


def test_reproduce_runs_a_row_from_start_to_figure_and_goes_on(scripts):
    """The chain of BATS, cut off after its first stage; full scale is printed, and not run."""
    flags = ["BATS", "cifar10", "--scale", "tiny", "--run"]
    printed = scripts.run("reproduce.py", *flags[:-1]).stdout
    assert "stand-in" in printed and "GPU memory, counted" in printed and "# 1 epoch a stage" in printed
    assert not scripts.runs("*")
    first, second, _ = [line for line in printed.splitlines() if line.startswith("python")]
    scripts.run("train.py", *shlex.split(first)[2:])
    (stage1,) = scripts.runs("eval-BATS-cifar10-tiny-stage1-*")
    changed = (stage1 / "last.pt").stat().st_mtime_ns
    process = scripts.start("reproduce.py", *flags)
    output, _ = process.communicate()
    assert process.returncode == 0, output
    assert "stage2 W1A1" in output and output.count("published: nothing of this size") == 2
    assert (stage1 / "last.pt").stat().st_mtime_ns == changed
    assert "--binary" in second and "*" not in second  # a pattern may be of two folders
    (stage2,) = scripts.runs("eval-BATS-cifar10-tiny-stage2-*")
    assert f"starting from runs/{stage1.name}/" in (stage2 / "log.txt").read_text()


def test_reproduce_prints_what_is_published_at_full_scale(scripts, fails):
    lines = scripts.run("reproduce.py", "ResNet18", "cifar10").stdout.splitlines()
    assert "# published: error 7.0 %, 11.2M parameters" in lines and "GPU memory" in lines[-1]
    assert "leave --data out" in fails("reproduce.py", "BATS", "cifar10", "--scale", "tiny", "--data", "x")


def test_rows_that_a_set_does_not_have(fails):
    assert "BNAS-H is no network for cifar10; its sets are imagenet" in fails(
        "reproduce.py", "BNAS-H", "cifar10"
    )
