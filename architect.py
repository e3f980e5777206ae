"""The architecture step: first order, with the path and edge regularisers of EBNAS."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from genotypes import NODES
from model_search import Supernet, edge_weights


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
