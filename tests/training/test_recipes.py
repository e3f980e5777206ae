"""The recipes: BNAS's schedule by step, what an own recipe sets, and which are not known."""

from types import SimpleNamespace

import pytest
import torch
from torch.optim.lr_scheduler import CosineAnnealingWarmRestarts

import train
import train_imagenet
from training.optimizers import OPTIMIZERS, SCHEDULES, OneCycle
from training.recipes import BEST, EBNAS, OWN, get_recipe
from training.stage_flags import settle
from utils import InputError


def schedule(
    kind, steps: int, **settings
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.05, momentum=0.9)
    return optimizer, kind(optimizer, steps, **settings)


def test_bnas_schedule_is_its_authors():
    """600 epochs of 196 steps: the rate of epoch 1 stands in their log."""
    optimizer, one_cycle = schedule(OneCycle, 600 * 196)
    group, rates, momenta = optimizer.param_groups[0], [], []
    optimizer.step()
    for _ in range(600 * 196):
        rates.append(group["lr"])
        momenta.append(group["momentum"])
        one_cycle.step()
    assert rates[0] == pytest.approx(0.0025)
    assert rates[196] == pytest.approx(2.675926e-3, rel=1e-6)
    assert max(rates) == pytest.approx(0.05) == rates[270 * 196]
    assert rates[540 * 196] == pytest.approx(0.0025)
    assert group["lr"] == pytest.approx(2.5e-5)
    assert (momenta[0], momenta[270 * 196], momenta[-1]) == pytest.approx((0.95, 0.85, 0.95))


def test_every_recipe_makes_an_optimiser_and_a_schedule():
    for recipe in (*OWN.values(), BEST, *EBNAS.values()):
        parameters = [torch.zeros(1, requires_grad=True)]
        optimizer = OPTIMIZERS[recipe.optimizer](parameters, lr=0.1, weight_decay=0.0)
        scheduler = SCHEDULES[recipe.schedule](optimizer, epochs=2, steps=3, warmup=0, least=0.0)
        assert scheduler.get_last_lr()[0] <= 0.1
    optimizer, restarts = schedule(CosineAnnealingWarmRestarts, 50)
    rates = []
    optimizer.step()
    for _ in range(51):
        rates.append(restarts.get_last_lr()[0])
        restarts.step()
    assert rates[25] == pytest.approx(0.025) and rates[50] == rates[0] == 0.05


def settled(script, *words: str) -> SimpleNamespace:
    family = "cifar" if script is train else "imagenet"
    return SimpleNamespace(**settle(script.parser().read([*words]), family=family))


def test_an_own_recipe_gives_the_flags_that_the_user_does_not():
    args = settled(train, "--arch", "BNAS-A", "--recipe", "own", "--epochs", "5")
    assert (args.epochs, args.learning_rate, args.weight_decay, args.grad_clip) == (5, 0.05, 3e-6, 0)
    args = settled(train_imagenet, "--arch", "DCP-NAS-L", "--recipe", "own")
    assert (args.batch_size, args.stage1_weight_decay, args.teacher) == (512, 1e-5, "resnet34")
    args = settled(train, "--arch", "BNAS-A")
    assert (args.epochs, args.learning_rate, args.init_channels, args.layers) == (600, 1e-3, 36, 20)
    args = settled(train)
    assert (args.init_channels, args.layers, args.groups) == (84, 16, 14)


@pytest.mark.parametrize(
    ("system", "family", "message"),
    [("bats", "cifar", "that of bats is not public"), ("dcp", "cifar", "is not known for cifar images")],
)
def test_recipes_that_are_not_known(system, family, message):
    with pytest.raises(InputError, match=message):
        get_recipe("own", system, family)


def test_the_best_recipe_is_ebnas_with_a_teacher():
    args, ebnas = settled(train, "--recipe", "best", "--teacher", "runs/RUN"), settled(train)
    same = vars(args).keys() - {"recipe", "teacher"}
    assert all(getattr(args, name) == getattr(ebnas, name) for name in same)
    with pytest.raises(InputError, match=r"learns from a network in full precision: .*--stage1 w32a32"):
        settled(train, "--recipe", "best")
    for script, arch in ((train, "BATS"), (train_imagenet, "EBNAS")):
        with pytest.raises(InputError, match="nothing was measured there"):
            settled(script, "--arch", arch, "--recipe", "best", "--teacher", "runs/RUN")
