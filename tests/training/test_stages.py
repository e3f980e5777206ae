"""The two training stages: which stage-1 run the second starts from, and the learning rate by epoch."""

import math

import pytest
import torch
from support.scripts import TINY_STAGE

from training.optimizers import cosine

pytestmark = pytest.mark.usefixtures("without_pictures")


def test_stage_2_starts_from_the_newest_stage_1_made_as_asked(scripts, data_flags):
    flags = [*data_flags, *TINY_STAGE, "--epochs", 1]
    kinds = {
        "w1a32": ["--stage1", "w1a32"],
        "w32a1": ["--stage1", "w32a1"],
        "balanced": ["--weight_binarization", "balanced"],
    }
    for name, kind in kinds.items():
        scripts.run("train.py", *flags, *kind, "--save", name)
    for name, kind in kinds.items():
        (stage1,) = scripts.runs(f"eval-{name}-stage1-*")
        output = scripts.run("train.py", *flags, *kind, "--binary").stdout
        assert f"starting from runs/{stage1.name}/last.pt" in output
    own = scripts.run("train.py", *flags, "--recipe", "own", "--binary").stdout  # EBNAS's own is `ebnas`
    assert "starting from runs/eval-w1a32-stage1-" in own
    missing = [*kinds["w32a1"], *kinds["balanced"], "--binary"]
    error = scripts.run("train.py", *flags, *missing, code=2).stderr
    assert "no finished stage-1 run of this set, genotype and size, with " in error
    assert "--recipe ebnas --stage1 w32a1 --weight_binarization balanced, to start from" in error


@pytest.mark.parametrize("warmup", [0, 1, 5])
@pytest.mark.parametrize("least", [0.0, 1e-5])
def test_learning_rates_by_epoch_and_through_resume(warmup, least):
    """A linear rise from 1 / warmup of the rate, then half a cosine over the other epochs."""
    epochs, highest = 12, 1e-2

    def start():
        optimizer = torch.optim.Adam([torch.zeros(1, requires_grad=True)], lr=highest)
        return optimizer, cosine(optimizer, epochs=epochs, steps=1, warmup=warmup, least=least)

    optimizer, scheduler = start()
    for epoch in range(epochs):
        done = (epoch - warmup) / (epochs - warmup)
        expected_cosine = least + (highest - least) * (1 + math.cos(math.pi * done)) / 2
        expected = highest * (epoch + 1) / warmup if epoch < warmup else expected_cosine
        assert scheduler.get_last_lr() == pytest.approx([expected], rel=1e-6)
        assert optimizer.param_groups[0]["lr"] == scheduler.get_last_lr()[0]
        states = optimizer.state_dict(), scheduler.state_dict()
        optimizer, scheduler = start()
        optimizer.load_state_dict(states[0])
        scheduler.load_state_dict(states[1])
        optimizer.step()
        scheduler.step()
