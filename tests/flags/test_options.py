"""Flags: what has no use is said, and what a run saved is taken back only where its flag would take it."""

import pytest
from support.scripts import TINY_STAGE

import benchmark
import train
import train_imagenet
import train_search
from utils import InputError


@pytest.mark.parametrize(
    ("script", "flags", "lines"),
    [
        (train, "--alpha 0.3", ["--alpha has no use here: it needs --mixup"]),
        (train, "--alpha 0.3 --mixup", []),
        (train, "--mixup", []),
        (train, "--cutout_length 8", ["--cutout_length has no use here: it needs --cutout"]),
        (train_search, "--cutout_length 8", ["--cutout_length has no use here: it needs --cutout"]),
        (
            train_imagenet,
            "--auxiliary_weight 1",
            ["--auxiliary_weight has no use here: it needs --auxiliary"],
        ),
        (train, "--auxiliary_weight 1 --auxiliary --cutout --cutout_length 8", []),
        (
            train_search,
            "--drop_path_prob 1",
            ["--drop_path_prob has no use here: the supernet has no drop-path, as in the original"],
        ),
        (
            train,
            "--set shapes --data d",
            ["--data has no use here: --set shapes is drawn, and reads nothing"],
        ),
        (
            train,
            "--momentum 1",
            ["--momentum has no use here: Adam is the optimiser; a recipe with SGD has its own"],
        ),
    ],
)
def test_flags_without_use_say_so(script, flags, lines):
    assert list(script.parser().read(flags.split()).idle) == lines


@pytest.mark.parametrize("flags", ["--tf32", "--gpu 1", "--cudnn_benchmark"])
def test_flags_for_a_gpu_have_no_use_on_a_cpu(flags, monkeypatch):
    name = flags.split()[0]
    (line,) = train.parser().read([*flags.split(), "--device", "cpu"]).idle
    assert line == f"{name} has no use here: it is for a GPU, and this runs on the CPU"
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert train.parser().read(flags.split()).idle == ()
    assert train.parser().read([]).idle == ()


def test_torchrun_chooses_the_gpu(monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    lines = train.parser().read(["--gpu", "1", "--device", "cuda:1"]).idle
    reason = "has no use here: under torchrun each process takes the GPU of its local rank"
    assert list(lines) == [f"--gpu {reason}", f"the number in --device cuda:1 {reason}"]
    assert train.parser().read(["--device", "cuda"]).idle == ()


def test_idle_flags_stand_in_the_log(scripts, data_flags, without_pictures):
    output = scripts.run("train.py", *data_flags, *TINY_STAGE, "--epochs", 1, "--alpha", 0.3).stdout
    assert "--alpha has no use here: it needs --mixup" in output


def test_the_flags_given_are_told_from_defaults():
    flags = train.parser().read(["--epochs", "600", "--binary"])
    assert flags.given == {"epochs", "binary"} and flags.values.epochs == 600
    flags = benchmark.parser().read(["infer", "--arch", "EBNAS", "--threads", "1"])
    assert flags.given >= {"arch", "threads"} and "batch_size" not in flags.given


def test_help_says_every_default():
    """Of each flag that takes a value, but for those that stand for nothing where they are not given."""
    without = {"note", "resume", "family", "variant", "teacher", "pretrained", "tmp_data_dir"}
    for script in (train, train_imagenet, train_search):
        parser = script.parser()
        for action in parser._actions:
            if action.option_strings and action.nargs != 0 and action.dest not in without:
                words = parser._get_formatter()._expand_help(action)
                assert "default" in words or "without use" in words, action.dest


def test_all_that_a_parser_gives_it_takes_back():
    flags = "--save x --note=-n --learning_rate 1e-3 --binary --seed 7 --momentum 0.9 --data=--odd"
    parser = train.parser()
    args = parser.parse_args(flags.split())
    parser.check(vars(args))


VALUES = [("epochs", 0), ("epochs", 2.5), ("epochs", True), ("binary", 1), ("data", 3),
          ("save", "a/b"), ("learning_rate", float("nan")), ("set", "mnist"), ("layers", [8])]  # fmt: skip


@pytest.mark.parametrize(("name", "value"), VALUES)
def test_values_that_no_flag_takes(name, value):
    with pytest.raises(InputError, match=f"--{name}"):
        train.parser().check({name: value})
