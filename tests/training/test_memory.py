"""The count of a step's memory: what real tensors take, what fits, and what a run says of it."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from support.scripts import TINY_SEARCH, TINY_STAGE

from genotypes import GENOTYPES
from model import ModelConfig
from model_search import SearchConfig
from training import memory, session
from training.memory import Allocations, StepMemory, count_bytes, table

NETWORK = StepMemory(
    ModelConfig(GENOTYPES["EBNAS"], init_channels=4, groups=2, layers=3, auxiliary=True), 32, images=16
)
STEPS = {"network": NETWORK, "supernet": StepMemory(SearchConfig(8, 3), 32, images=16)}


def test_allocations_by_hand():
    with Allocations() as allocations:
        x = torch.ones(1000, requires_grad=True)
        assert allocations.held == 4000
        y = (x * 2).exp()  # keeps its result; x * 2 is gone
        assert (allocations.held, allocations.peak) == (8000, 12000)
        assert y[:10].view(2, 5).shape == (2, 5)  # views are free
        assert allocations.held == 8000
        del x, y
    assert allocations.held == 0


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", STEPS)
def test_fake_tensors_count_what_real_ones_take(name, precision, monkeypatch):
    for accumulate in (1, 3):
        step = replace(STEPS[name], precision=precision, accumulate=accumulate)
        counted = count_bytes.__wrapped__(step)
        with monkeypatch.context() as real:
            real.setattr(memory, "FakeTensorMode", nullcontext)
            assert counted == pytest.approx(count_bytes.__wrapped__(step), rel=1e-3)


def test_a_count_leaves_the_random_state_alone():
    state = torch.get_rng_state()
    count_bytes.__wrapped__(NETWORK)
    assert torch.equal(torch.get_rng_state(), state)


def test_stage_1_needs_what_stage_2_does():
    stage1 = replace(NETWORK, config=replace(NETWORK.config, activation_bits=32))
    assert count_bytes(stage1) == pytest.approx(count_bytes(NETWORK), rel=0.05)


def test_the_fewest_parts_that_fit():
    steps = [replace(NETWORK, accumulate=n) for n in (1, 2, 4, 8)]
    needs = [step.needs() for step in steps]
    assert needs == sorted(needs, reverse=True)
    assert [NETWORK.that_fits(free) for free in needs] == steps
    assert NETWORK.that_fits(needs[-1] - 1) is None, "parts of one image"
    assert steps[2].that_fits(needs[0]) == steps[2], "not fewer than asked for"


def test_the_table_has_a_line_for_each_run_and_precision(monkeypatch):
    monkeypatch.setattr(memory, "PUBLISHED", STEPS)
    monkeypatch.setattr(memory, "WORKSPACE", 0)
    monkeypatch.setattr(memory, "CARDS", (1, (count_bytes(NETWORK) + memory.CONTEXT) / memory.GB))
    header, _, *lines = table()
    assert len(lines) == 4 and lines[0].startswith("| network | fp32 | 0.5 | yes | `--accumulate 2` |")
    assert all(line.count("|") == header.count("|") for line in lines)


@pytest.mark.parametrize("script", ["train.py", "train_search.py"])
def test_a_run_says_what_it_needs_and_what_would_fit(script, scripts, data_flags, monkeypatch):
    """As on a GPU."""

    def out_of_memory(*_args, **_flags):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    flags = [*data_flags, *{"train.py": TINY_STAGE, "train_search.py": TINY_SEARCH}[script]]
    module = {"train.py": "training.stages", "train_search.py": "train_search"}[script]
    monkeypatch.setattr(f"{module}.train_one_epoch", out_of_memory)
    assert "give a smaller one, or a larger --accumulate" in scripts.run(script, *flags, code=1).stderr

    monkeypatch.setattr(session, "free_bytes", lambda _device: 12 * memory.GB)
    run = scripts.run(script, *flags, code=1)
    assert "memory: a training step needs 0.5 GB by count, 12.0 GB are free" in run.stdout
    assert "by count, --accumulate 2 fits, or --batch_size 16" in run.stderr and run.stderr.count("\n") == 1
