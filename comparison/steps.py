"""The steps that are timed, ours as the training scripts take them and the original program's."""

from __future__ import annotations

import gc
import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from architect import Architect, edge_regularizer, path_regularizer
from comparison.original_search import OriginalSupernet
from images.loaders import Batch
from model import CellNetwork
from model_search import Supernet
from run.distributed import World
from training.engine import Precision, Training, backward, training_loss, training_step, update
from utils import is_out_of_memory

CRITERION = nn.CrossEntropyLoss()


def random_batch(n: int, size: int, classes: int, device: torch.device) -> Batch:
    images = torch.randn(n, 3, size, size, device=device)
    return Batch(images, torch.randint(classes, (n,), device=device), n)


def step_of(
    model: nn.Module,
    parameters: list[nn.Parameter],
    batch: Batch,
    precision: Precision,
    world: World,
    *,
    fused_adam: bool = True,
) -> Callable[[], Tensor]:
    """A call takes a step on `batch`, as the training scripts take it by default, and gives its loss."""
    # None, not False: Adam's default chooses its form by the device
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=fused_adam or None)
    if isinstance(model, CellNetwork):  # not a supernet
        model.register_update_rule(optimizer)

    training = Training(model, CRITERION, optimizer, world, precision, grad_clip=5.0, auxiliary_weight=0.4)
    losses: list[Tensor] = []

    def step() -> Tensor:
        losses.clear()
        training_step(training, batch, lambda objective, *_: losses.append(objective.detach()))
        return losses[0]

    return step


def search_steps(
    network: Supernet, batch: Batch, precision: Precision, world: World
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A weight step; an architecture step and a weight step. Each gives the weight step's loss."""
    architect = Architect(
        network, learning_rate=6e-4, weight_decay=1e-3, path_reg_weight=1.5, edge_reg_weight=0.8
    )
    weight_step = step_of(network, network.weight_parameters(), batch, precision, world)
    batches, n = itertools.repeat(batch), len(batch.images)

    def both_steps() -> Tensor:
        architect.step(batches, ramp=1.0, batch_size=n, world=world, precision=precision)
        return weight_step()

    return weight_step, both_steps


def original_search_steps(
    network: OriginalSupernet, batch: Batch, precision: Precision, world: World
) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """The weight step, and both steps, as the original takes them: each computes the gradients of all
    parameters, and Adam is torch's default one."""
    weights, arch = network.weight_parameters(), network.arch
    weight_optimizer = torch.optim.Adam(weights, lr=1e-3, weight_decay=3e-4)
    training = Training(network, CRITERION, weight_optimizer, world, precision)
    arch_optimizer = torch.optim.Adam(arch.values(), lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    def loss() -> Tensor:
        network.zero_grad()  # of what the optimiser does not step, too
        return training_loss(training, batch)[0]

    def weight_step() -> None:
        backward(loss(), precision)
        update(weight_optimizer, world, precision, grad_clip=5.0)

    def both_steps() -> None:
        path = path_regularizer(arch["alphas_normal"]) + path_regularizer(arch["alphas_reduce"])
        edge = edge_regularizer(arch["betas_normal"]) + edge_regularizer(arch["betas_reduce"])
        backward(loss() + 1.5 * path + 0.8 * edge, precision)
        update(arch_optimizer, world, precision)
        weight_step()

    return weight_step, both_steps


def until_it_fits(make: Callable[[int], Callable[[], Any]], images: int) -> tuple[Callable[[], Any], int]:
    """The step that `make` gives for `images` images, or for a half, a quarter, ... of them: the first that
    runs in the memory there is; and of how many images it is. It has run twice. What runs out of memory with
    two images raises what it raised."""
    while True:
        try:
            step = make(images)
            step()  # makes the optimiser's state
            step()
            return step, images
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error) or images < 4:
                raise
        step = None
        release_memory()
        images //= 2


def release_memory() -> None:
    """Give a GPU back what nothing holds any more."""
    gc.unfreeze()  # `measure` has frozen what there was
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
