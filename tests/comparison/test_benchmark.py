"""The benchmark's table and its line of JSON, at sizes that take seconds."""

import json
import sys

import pytest
import torch

import benchmark
from comparison.measure import CLOCKS, Case, count_operations, measure, measure_memory
from kernels.library import unavailable
from packed import available_kernels

TINY = "--init_channels 8 --layers 3 --batch_size 4 --repeats 3 --warmup 0 --device cpu --precision fp32"
NETWORK = f"{TINY} --groups 2"
CASES = {
    f"search {TINY} --image_size 16": [
        "weight",
        "weight, original",
        "architecture + weight",
        "architecture + weight, original",
    ],
    f"train {NETWORK} --image_size 16 --bits w1a32 --threads 2": [
        "training",
        "training, original",
        "training, 2 threads",
    ],
    f"train {NETWORK} --image_size 64 --family imagenet": ["training", "training, original"],
    f"data {NETWORK} --image_size 32 --images 6 --workers 0 --clock cpu": [
        "cifar loader",
        "cifar training",
        "imagenet loader",
        "imagenet training",
    ],
}


@pytest.mark.parametrize(("flags", "names"), CASES.items())
def test_table_and_json(flags, names, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags.split()])
    benchmark.main(benchmark.parser().read())
    lines = capsys.readouterr().out.splitlines()
    result = json.loads(lines[-1])
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    head, body = table[0], table[2:]
    assert [row[0] for row in body] == [row["case"] for row in result["rows"]] == names
    assert result["settings"]["layers"] == 3 and result["machine"]["torch"] == torch.__version__
    assert torch.backends.cpu.get_cpu_capability() in lines[0] and torch.__version__ in lines[0]
    assert "layers 3" in lines[1]
    by_name = {row["case"]: row for row in result["rows"]}
    for row, cells in zip(result["rows"], body, strict=True):
        assert len(cells) == len(head)
        assert 0 < row["min"] <= row["median"] <= row["max"]
        assert cells[1] == f"{1000 * row['median']:.1f}"
        if "loader" not in row["case"]:
            assert row["images_per_second"] == pytest.approx(4 / row["median"])
            assert row["memory_bytes"] > 0
    ours, against = result["rows"][0], by_name[names[1]]
    assert against.keys().isdisjoint({"ratio", "memory_ratio"})
    low = against["min"] / ours["max"] if "data" not in flags else 0
    assert low <= ours["ratio"] and body[0][7] == f"{ours['ratio']:.2f}"
    if "data" not in flags:
        assert ours["memory_ratio"] < 1
    if "search" in flags:
        assert 0 < ours["operations"] < against["operations"] / 4


@pytest.mark.skipif(bool(unavailable()), reason="no native kernels here")
def test_kernels_stand_beside_what_a_core_can_do(monkeypatch, capsys):
    flags = "kernels --init_channels 28 --image_size 8 --batch_size 2 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags.split()])
    benchmark.main(benchmark.parser().read())
    *units, alone = json.loads(capsys.readouterr().out.splitlines()[-1])["rows"]
    assert len(units) == 10 and alone["case"] == "multiply-adds alone"
    for row in units:  # three products, of 8 x 8 pixels of 2 images
        kind = row["case"].removesuffix(", torch")
        weights = 4 * 28 if kind.startswith("1x1") else 2 * int(kind[-1]) ** 2
        assert row["gmacs_per_second"] * row["median"] == pytest.approx(3 * 128 * 28 * weights / 1e9)
    assert alone["gmacs_per_second"] > 1


def test_operations_that_do_work_are_counted():
    x = torch.ones(2, 2)
    assert count_operations(lambda: x.view(4).unbind()) == 0
    assert count_operations(lambda: x.t().mul(2).sum()) == 2
    assert count_operations(lambda: torch.empty(3).copy_(x[0, 0])) == 1
    assert count_operations(lambda: torch.where(x > 0, 1.0, -1.0)) == 2
    x.requires_grad_()
    assert count_operations(lambda: torch.autograd.grad(x.exp().sum(), x)) == 4  # and 1, 1 * exp(x)


def test_bytes_kept_for_the_backward_pass():
    x = torch.randn(100, requires_grad=True)  # 400 bytes

    def step() -> None:
        y = x.exp()  # keeps its result
        (y[:50] * y[50:]).sum().backward()  # keeps two views of that storage
        (x * x).sum().backward()  # keeps x, twice, after y is gone

    assert measure_memory(step, torch.device("cpu")) == 400


def test_ratio_is_of_rates_and_not_of_calls(monkeypatch):
    moments = iter([0, 0, 0, 1, 1, 3])  # in seconds: two warm-up calls, then one of 1 s and one of 2 s
    monkeypatch.setitem(CLOCKS, "fake", lambda: next(moments))
    cases = [Case("one", lambda: None, 10, against="other"), Case("other", lambda: None, 40)]
    one, other = measure(cases, repeats=1, warmup=1, clock="fake", device=torch.device("cpu"), count=False)
    assert (one["median"], other["median"]) == (1, 2)
    assert (one["images_per_second"], other["images_per_second"]) == (10, 20)
    assert one["ratio"] == 0.5


def test_flags_are_checked(fails):
    assert "invalid choice" in fails("benchmark.py", "serach")
    assert "--repeats is 0" in fails("benchmark.py", "search", "--repeats", 0)
    assert "one of the two" in fails("benchmark.py", "infer")
    assert "--layers has no use here" in fails("benchmark.py", "infer", "model.ebnas", "--layers", 3)


def test_a_row_on_packed_bits(monkeypatch, capsys):
    flags = "infer --arch BATS --init_channels 12 --groups 2 --layers 3 --image_size 16 --rivals"
    monkeypatch.setattr(sys, "argv", ["benchmark.py", *flags.split(), "--repeats", "1", "--warmup", "0"])
    benchmark.main(benchmark.parser().read())
    output = capsys.readouterr().out
    assert output.count("top-1 as eager 100.0%") == len(available_kernels())
