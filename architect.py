"""The architecture step: first order, with the path and edge regularisers of EBNAS."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from genotypes import NODES
from images.loaders import Batch
from model_search import Supernet, edge_weights
from run.distributed import World
from training.engine import Precision, as_compiled, backward, parts_of, update


def path_regularizer(alpha: Tensor) -> Tensor:
    """L2 path regularisation, -sum (1 - softmax(alpha))^2 over edges and operations (14, 7) -> scalar.

    On an edge it is -(5 + sum softmax(alpha)^2): it falls as one of the seven operations takes over.
    """
    return -((1 - alpha.softmax(1)) ** 2).sum()


def edge_regularizer(beta: Tensor) -> Tensor:
    """Variance-based edge regularisation of a cell, beta (12,) -> scalar.

    For each node with 3 to 5 inputs and edge weights g: -sum (g - mean g)^2 pulls the edges apart, and
    0.5 (sum g - 2)^2 keeps two.
    """
    total = beta.new_zeros(())
    for weights in edge_weights(beta)[2:].split([2 + node for node in range(1, NODES)]):
        total = total - ((weights - weights.mean()) ** 2).sum() + 0.5 * (weights.sum() - 2) ** 2
    return total


def path_of_both(model: Supernet) -> Tensor:
    """L_path of both types of cell."""
    return path_regularizer(model.alphas_normal) + path_regularizer(model.alphas_reduce)


def edge_of_both(model: Supernet) -> Tensor:
    """L_edge of both types of cell."""
    return edge_regularizer(model.betas_normal) + edge_regularizer(model.betas_reduce)


class Architect:
    """Adam on alpha and beta, one first-order step at a time (no unrolling of the weight step).

    loss = CE + ramp * (path_reg_weight * L_path + edge_reg_weight * L_edge), each over both cell types, on
    a batch of the held-out half. No gradient of the weights is computed or kept.

    `regularizers`: by name a weight, and a function of the supernet that gives a scalar.
    """

    def __init__(
        self,
        model: Supernet,
        *,
        learning_rate: float,
        weight_decay: float,
        path_reg_weight: float,
        edge_reg_weight: float,
    ):
        self.model = model
        for parameter in model.arch_parameters():  # the weight step leaves them alone
            parameter.requires_grad_(False)
        self.regularizers: dict[str, tuple[float, Callable[[Supernet], Tensor]]] = {
            "path": (path_reg_weight, path_of_both),
            "edge": (edge_reg_weight, edge_of_both),
        }
        self.optimizer = torch.optim.Adam(
            model.arch_parameters(),
            lr=learning_rate,
            betas=(0.5, 0.999),
            weight_decay=weight_decay,
            fused=True,
        )

    def step(
        self,
        batches: Iterator[Batch],
        *,
        ramp: float,
        batch_size: int,
        world: World,
        precision: Precision,
        accumulate: int = 1,
    ) -> None:
        """One step on the next of `batches`, which are of `batch_size` images, or less at an epoch's end; in
        `accumulate` parts, as engine.training_step."""
        batch = next(batches)
        arch, weights = self.model.arch_parameters(), self.model.weight_parameters()
        self.optimizer.zero_grad(set_to_none=True)
        with only_gradients_of(arch, not_of=weights), as_compiled(batch, batch_size):
            for part in parts_of(batch, accumulate):
                with precision.autocast():
                    logits, _ = self.model(part.images)
                loss = nn.functional.cross_entropy(logits.float(), part.targets) * world.loss_factor(part)
                # the same on every process, so their mean is theirs
                regularizer = ramp * sum(weight * of(self.model) for weight, of in self.regularizers.values())
                backward(loss + regularizer * (len(part.images) / len(batch.images)), precision)
            update(self.optimizer, world, precision)


@contextmanager
def only_gradients_of(parameters: list[nn.Parameter], *, not_of: list[nn.Parameter]) -> Iterator[None]:
    """Within the block `parameters` get gradients, and `not_of` none; outside it is the reverse."""
    for wanted, group in ((True, parameters), (False, not_of)):
        for parameter in group:
            parameter.requires_grad_(wanted)
    try:
        yield
    finally:
        for wanted, group in ((False, parameters), (True, not_of)):
            for parameter in group:
                parameter.requires_grad_(wanted)
