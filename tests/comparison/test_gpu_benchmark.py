"""`benchmark.py gpu` with a pretended GPU: what it measures, keeps and says, and what follows a failure."""

import json
import subprocess
import time
from dataclasses import replace

import pytest
import torch

import benchmark
from comparison import gpu
from comparison.gpu import Card, Kind, Report, Variant
from comparison.steps import until_it_fits
from model_search import SearchConfig
from training.memory import GB, StepMemory

CPU = torch.device("cpu")
SEARCH = StepMemory(SearchConfig(8, 3), 16, 8)
SMALL_STAGE = StepMemory(replace(gpu.TINY, layers=3, init_channels=14), 16, 8)
KINDS = (
    Kind("search, weights", SEARCH),
    Kind("search, architecture + weights", SEARCH, both=True),
    Kind("CIFAR stage 2", SMALL_STAGE),
)
VARIANTS = (
    Variant("fp32"),
    Variant("original", original=True),
    Variant("bf16", "bf16", memory_format="channels_last"),
)


class Pretended(Card):
    """A GPU that is the CPU, with two kilobytes more in use than tensors take."""

    def __init__(self):
        super().__init__(CPU)

    def describe(self):
        return {"device": "pretended"}

    def synchronize(self):
        pass

    def forget_peak(self):
        pass

    def peak(self):
        return {"peak_bytes": GB, "reserved_bytes": GB + GB // 2, "other_bytes": 2000}


@pytest.fixture
def quick(monkeypatch):
    """No call is timed for long, and no tests are run within the tests."""

    def once(_card, call, _seconds):
        call()
        return 4.0

    monkeypatch.setattr(gpu, "time_call", once)
    few = tuple(replace(kind, step=replace(kind.step, images=10)) for kind in gpu.LEARNERS)
    monkeypatch.setattr(gpu, "LEARNERS", few)
    monkeypatch.setattr(gpu, "release_memory", lambda: None)
    monkeypatch.setattr(gpu, "BATCH_NORM", (2, 3, 4, 4))
    monkeypatch.setattr(gpu, "count_bytes", lambda _step: GB // 2)
    output = "F..\nFAILED tests/kernels/test_cuda.py::test_x - y\n1 failed, 2 passed\n"
    done = subprocess.CompletedProcess([], 1, output)
    monkeypatch.setattr(gpu.subprocess, "run", lambda *_, **__: done)


def test_all_parts_in_order_each_kept_at_once(tmp_path, monkeypatch, quick, capsys):
    out, kept = tmp_path / "card.json", []
    add = Report.add

    def noting(report, part, result):
        add(report, part, result)
        kept.append((part, json.loads(out.read_text(encoding="utf-8")).keys()))

    monkeypatch.setattr(Report, "add", noting)
    content = gpu.run(Pretended(), minutes=8, out=out, kinds=KINDS, variants=VARIANTS, steps=2)
    assert json.loads(out.read_text(encoding="utf-8")) == content
    assert all(part in keys for part, keys in kept) and len(kept) == 1 + 1 + 9 + 1 + 3 + 1 + 1 + 1
    parts = "machine, tests, steps, memory, learning, batch norm, packed, summary"
    assert list(content) == parts.split(", ")
    assert content["tests"]["failed"] == ["FAILED tests/kernels/test_cuda.py::test_x - y"]
    assert [row["ms"] for row in content["steps"]] == [4.0] * 9 and content["steps"][0]["images"] == 8
    assert ["counted_bytes" in row for row in content["steps"]] == [True] * 3 + [False] * 3 + [True] * 3
    assert content["memory"]["context_bytes"] == 2000 and content["memory"]["fragmentation"] == 1.5
    assert content["memory"]["workspace_bytes"] == GB // 2 and content["memory"]["least_of_count"] == 2
    for row in content["learning"]:  # the pretended GPU is the CPU
        assert row["gpu"] == row["cpu"] and row["gpu"][-1] > 0
    lines = list(gpu.table(content))
    assert len(lines) == 11 and lines[2].endswith("| 1.00 |") and lines[2].count("|") == lines[0].count("|")
    summary = "\n".join(content["summary"])
    for words in (
        "do not all pass: 1 failed, 2 passed",
        "CIFAR stage 2 8",
        "The published runs in bf16, loading left out: search 0.2 hours.",
        "The host, not the GPU, takes the time of search, weights in fp32",
        "search: losses over 2 steps",
        "Packed is 1.0 times as fast",
    ):
        assert words in summary, summary


def test_what_fails_or_comes_too_late_is_said_and_the_rest_follows(monkeypatch, quick, tmp_path):
    def make(kind, variant, images, device):
        if variant.name == "bf16":
            raise RuntimeError("no kernel\nimage is available")
        return made(kind, variant, images, device)

    made = gpu.make_step
    monkeypatch.setattr(gpu, "make_step", make)
    monkeypatch.setattr(gpu, "packed_beside_eager", lambda: 1 / 0)
    content = gpu.run(Pretended(), minutes=8, out=None, kinds=KINDS[:1], variants=VARIANTS, steps=2)
    assert "RuntimeError: no kernel image is available" in content["steps"][2]["failed"]
    assert content["packed: failed"].startswith("ZeroDivisionError")
    summary = "\n".join(content["summary"])
    assert (
        "Failed: search, weights in bf16 (RuntimeError: no kernel" in summary and "packed: failed" in summary
    )
    assert "no kernel image" in list(gpu.table(content))[-1]

    report = Report(None, time.monotonic() + 100)
    monkeypatch.setattr(report, "left", iter((100, 100, 24)).__next__)
    gpu.time_steps(Pretended(), KINDS[:1], VARIANTS[:2], report)
    assert ["left out" in row for row in report.content["steps"]] == [False, True]
    content = gpu.run(Pretended(), minutes=0, out=None, kinds=KINDS[:1], variants=VARIANTS)
    assert content["machine"] and content["steps: left out"] == "the time was over"


def test_tests_that_take_too_long_are_ended(monkeypatch):
    def slow(command, **options):
        raise subprocess.TimeoutExpired(command, options["timeout"], output=b"...\nFAILED a\nmore\n")

    monkeypatch.setattr(gpu.subprocess, "run", slow)
    result = gpu.run_tests(1)
    assert result["code"] is None and result["failed"] == ["FAILED a"] and result["last line"] == "more"


@pytest.mark.parametrize("words", ["CUDA out of memory. Tried", "CUDNN_STATUS_ALLOC_FAILED"])
def test_the_largest_batch_that_fits(words):
    tried = []

    def make(images):
        def step():
            tried.append(images)
            if images > 60:
                raise RuntimeError(words)

        return step

    assert until_it_fits(make, 256)[1] == 32
    assert tried == [256, 128, 64, 32, 32]
    with pytest.raises(RuntimeError, match=words.split()[0]):
        until_it_fits(lambda _: make(100), 4)


def test_times_are_of_a_call(monkeypatch):
    now, calls = [0.0], []
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: now[0])

    def call():
        calls.append(1)
        now[0] += 0.05

    assert gpu.time_call(Pretended(), call, 0.2) == pytest.approx(50)
    assert len(calls) == 1 + 3 * 4


def test_without_a_gpu_there_is_a_line(fails, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "there is no CUDA GPU here" in fails("benchmark.py", "gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert "there is no folder nowhere" in fails("benchmark.py", "gpu", "--out", "nowhere/card.json")
    assert "--minutes is 0" in fails("benchmark.py", "gpu", "--minutes", 0)
    assert benchmark.parser().read(["gpu"]).values.minutes == 8
