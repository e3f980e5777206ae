"""The supernet: every cell holds all 14 edges, every edge all seven operations, on a part of its channels.

Partial channel connections (Xu et al., PC-DARTS, ICLR 2020), binary activations, real weights. These modules
are the definition; `kernels.accelerate` puts faster ones of the same values in their place.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from flags.choices import FAMILIES
from genotypes import EDGES, NODES, Genotype, reduction_cells
from operations import SearchPreprocess, SourceOperations, imagenet_convolutions
from search_space import PRIMITIVES, checked_operations
from utils import InputError, check_count, nearest_multiples

EDGE_BIAS = (0.6931, 0.0, -0.4055)
"""Of the nodes with n = 3, 4, 5 inputs: sigmoid(b_n) = 2 / n, so that the edges of an untrained node sum to
the two it will keep."""

CERTAIN = 60.0
"""An alpha or beta of this size is a choice: exp(-60) is nothing beside 1."""

ARCH_PARAMETERS = ("alphas_normal", "alphas_reduce", "betas_normal", "betas_reduce")

LEAVING = tuple(tuple(e for e, (_, source) in enumerate(EDGES) if source == s) for s in range(1 + NODES))
"""By source state: the edges that leave it, in the order of their nodes."""


@dataclass(frozen=True)
class SearchConfig:
    """All that a supernet is built from. Raises InputError on values that make none.

    k: one in k channels of a cell goes through the operations (the published 8 and 4 are to balance the
    advantages of operations). stem: for small images (`cifar`), or for large ones (`imagenet`): three
    halvings before the first cell, as in the derived network.
    """

    init_channels: int = 16
    layers: int = 8
    num_classes: int = 10
    k_normal: int = 8
    k_reduce: int = 4
    stem: str = "cifar"
    operations: tuple[str, ...] = PRIMITIVES

    def __post_init__(self):
        object.__setattr__(self, "operations", checked_operations(self.operations))
        check_count("layers", self.layers, 3, 1_000)  # two cells reduce the size, after one that does not
        for name in ("init_channels", "num_classes"):
            check_count(name, getattr(self, name), 1, 1_000_000)
        for name in ("k_normal", "k_reduce"):  # from 2: some channels bypass the operations
            check_count(name, getattr(self, name), 2, 1_000)
        if self.stem not in FAMILIES:
            raise InputError(f"unknown stem {self.stem!r}; choose from {FAMILIES}")
        # a factorised reduction makes two halves, of C channels, or of the 2C / k that are sampled; the stem
        # of ImageNet has a convolution in 4 groups of C/2 channels
        step = math.lcm(8 if self.stem == "imagenet" else 2, self.k_normal, self.k_reduce)
        if self.init_channels % step:
            raise InputError(
                f"init_channels {self.init_channels} is no multiple of {step}, which a supernet with "
                f"k {self.k_normal} and {self.k_reduce} needs; try "
                f"{nearest_multiples(self.init_channels, step)}"
            )

    @property
    def reductions(self) -> tuple[int, int]:
        return reduction_cells(self.layers)

    def to_dict(self) -> dict:
        """Without the operations where these are the seven, as before they could be chosen."""
        fields = {**dataclasses.asdict(self), "operations": list(self.operations)}
        if self.operations == PRIMITIVES:
            del fields["operations"]
        return fields

    @classmethod
    def from_dict(cls, fields: dict) -> SearchConfig:
        """Raises InputError on fields that make no supernet, TypeError on others than to_dict gives."""
        return cls(**fields)


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel i * (c / groups) + j of x (n, c, h, w) goes to j * groups + i."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


def edge_weights(beta: Tensor) -> Tensor:
    """beta (12,) -> the weights of a cell's 14 edges: 1 on the first node's two, else sigmoid(beta + b_n)."""
    by_node = beta.split([2 + node for node in range(1, NODES)])
    biased = [part + bias for part, bias in zip(by_node, EDGE_BIAS, strict=True)]
    return torch.cat([beta.new_ones(2), torch.sigmoid(torch.cat(biased))])


def stride_of(source: int, reduction: bool) -> int:
    """The stride of the edges that leave a state: a reduction cell halves what its two inputs give."""
    return 2 if reduction and source < 2 else 1


class SearchCell(nn.Module):
    """A cell of the supernet: s0 (n, c_older, h, w), s1 (n, c_newer, h, w) -> (n, 4 * channels, h', w').

    `mixing` (14, 7) mixes the operations of each edge, `weights` (14,) the edges of each node. On an edge the
    first channels / k go through the operations and the rest bypass them (partial channel connections).
    """

    def __init__(
        self,
        c_older: int,
        c_newer: int,
        channels: int,
        *,
        k: int,
        reduction: bool,
        reduction_before: bool,
        names: tuple[str, ...] = PRIMITIVES,
    ):
        super().__init__()
        self.reduction = reduction
        self.k = k
        self.sampled = channels // k
        self.preprocess0 = SearchPreprocess(c_older, channels, reduce=reduction_before)
        self.preprocess1 = SearchPreprocess(c_newer, channels, reduce=False)
        self.sources = nn.ModuleList(
            SourceOperations(self.sampled, len(edges), stride_of(source, reduction), names)
            for source, edges in enumerate(LEAVING)
        )

    def forward(self, s0: Tensor, s1: Tensor, mixing: Tensor, weights: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        nodes: list[list[Tensor]] = [[] for _ in range(NODES)]  # what enters each
        for source, operations in enumerate(self.sources):
            edges = LEAVING[source]
            sampled, bypassing = states[source].split([self.sampled, (self.k - 1) * self.sampled], 1)
            mixed = operations(sampled, mixing[list(edges)])  # (n, edges, channels / k, h', w')
            if stride_of(source, self.reduction) == 2:
                bypassing = F.max_pool2d(bypassing, 2, 2, ceil_mode=True)
            for edge, y in zip(edges, mixed.unbind(1), strict=True):
                together = channel_shuffle(torch.cat([y, bypassing], 1), self.k)
                nodes[EDGES[edge][0]].append(weights[edge] * together)
            if source >= 1:  # the first node has its two edges, and with each further state the next has all
                states.append(sum(nodes[source - 1]))
        return torch.cat(states[2:], 1)


class Supernet(nn.Module):
    """Images (n, 3, h, w) -> logits (n, classes), None (it has no auxiliary head).

    alpha (14, 7) and beta (12,) for each cell type are parameters, so that checkpoints hold them, but
    `weight_parameters()` leaves them out: they are never in the weights' optimiser, clipping or decay.
    """

    def __init__(self, config: SearchConfig):
        super().__init__()
        self.config = config
        channels = config.init_channels
        if config.stem == "cifar":
            c_older = c_newer = 3 * channels
            self.stem = nn.Sequential(
                nn.Conv2d(3, c_newer, 3, padding=1, bias=False), nn.BatchNorm2d(c_newer)
            )
        else:  # no ReLU before a cell: it takes signs, which would all be +1
            c_older = c_newer = channels
            first, second, third = imagenet_convolutions(channels)
            self.stem0 = nn.Sequential(*first, nn.ReLU(), *second)
            self.stem1 = nn.Sequential(nn.ReLU(), *third)
        self.cells = nn.ModuleList()
        reduction_before = config.stem == "imagenet"
        for index in range(config.layers):
            reduction = index in config.reductions
            channels *= 2 if reduction else 1
            cell = SearchCell(
                c_older,
                c_newer,
                channels,
                k=config.k_reduce if reduction else config.k_normal,
                reduction=reduction,
                reduction_before=reduction_before,
                names=config.operations,
            )
            self.cells.append(cell)
            c_older, c_newer, reduction_before = c_newer, NODES * channels, reduction
        self.classifier = nn.Linear(c_newer, config.num_classes)
        for kind in ("normal", "reduce"):
            self.register_parameter(
                f"alphas_{kind}", nn.Parameter(1e-3 * torch.randn(len(EDGES), len(config.operations)))
            )
            self.register_parameter(f"betas_{kind}", nn.Parameter(1e-3 * torch.randn(len(EDGES) - 2)))

    def arch_parameters(self) -> list[nn.Parameter]:
        return list(self.arch_state().values())

    def arch_state(self) -> dict[str, nn.Parameter]:
        """alpha and beta by name."""
        return {name: getattr(self, name) for name in ARCH_PARAMETERS}

    def weight_parameters(self) -> list[nn.Parameter]:
        arch = {id(parameter) for parameter in self.arch_parameters()}
        return [parameter for parameter in self.parameters() if id(parameter) not in arch]

    def stems(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Images (n, 3, h, w) -> the older and the newer input of the first cell: twice the same, of
        (n, 3C, h, w), or with ImageNet's stem (n, C, h/4, w/4) and (n, C, h/8, w/8)."""
        if self.config.stem == "cifar":
            x = self.stem(x)
            return x, x
        older = self.stem0(x)
        return older, self.stem1(older)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        architecture = {  # by whether a cell is a reduction: the mixing of its operations, its edges' weights
            False: (self.alphas_normal.softmax(1), edge_weights(self.betas_normal)),
            True: (self.alphas_reduce.softmax(1), edge_weights(self.betas_reduce)),
        }
        s0, s1 = self.stems(x)
        for cell in self.cells:
            s0, s1 = s1, cell(s0, s1, *architecture[cell.reduction])
        return self.classifier(s1.mean((2, 3))), None

    @torch.no_grad()
    def make_discrete(self, genotype: Genotype) -> None:
        """Put alpha and beta where the supernet computes `genotype` alone, its weights as they are: an edge
        that is kept weighs 1 and is its one operation, the others weigh 0."""
        for kind, pairs in (("normal", genotype.normal), ("reduce", genotype.reduce)):
            alpha, beta = getattr(self, f"alphas_{kind}"), getattr(self, f"betas_{kind}")
            alpha.fill_(-CERTAIN)
            beta.fill_(-CERTAIN)
            for position, (operation, source) in enumerate(pairs):
                edge = EDGES.index((position // 2, source))
                alpha[edge, self.config.operations.index(operation)] = CERTAIN
                if edge >= 2:  # the first node's two edges have no beta
                    beta[edge - 2] = CERTAIN

    def genotype(self, most_skips: int | None = None) -> Genotype:
        """The genotype that the architecture parameters stand for now (a host synchronisation on a GPU);
        with at most `most_skips` skips in the normal cell (None: however many there are)."""
        state = {name: parameter.detach().cpu() for name, parameter in self.arch_state().items()}
        return derive(state, most_skips, self.config.operations)


def derive(
    arch: Mapping[str, Tensor], most_skips: int | None = None, operations: tuple[str, ...] = PRIMITIVES
) -> Genotype:
    """The genotype of alpha and beta, by the names of ARCH_PARAMETERS; see derive_cell. `most_skips` is for
    the normal cell, as in P-DARTS: at a stride of 2 a skip is a convolution."""
    concat = tuple(range(2, 2 + NODES))
    normal = derive_cell(arch["alphas_normal"], arch["betas_normal"], most_skips, operations)
    reduce = derive_cell(arch["alphas_reduce"], arch["betas_reduce"], operations=operations)
    return Genotype(normal, concat, reduce, concat)


def derive_cell(
    alpha: Tensor,
    beta: Tensor,
    most_skips: int | None = None,
    operations: tuple[str, ...] = PRIMITIVES,
) -> tuple[tuple[str, int], ...]:
    """alpha (14, 7), beta (12,) -> the eight (operation, input) pairs of a cell.

    A node keeps the two edges of largest beta, an edge its operation of largest alpha (the first, on a tie).
    Where more than `most_skips` of these are skips, the ones of smallest softmax weight give way to their
    edges' next best operations (Chen et al., Progressive DARTS, ICCV 2019, keep 2). A node's edges are listed
    by the softmax weight of their operation, the largest first (the lower input first, on a tie).
    """
    strengths = alpha.softmax(1).tolist()
    scores = [0.0, 0.0, *beta.tolist()]
    kept = []
    for node in range(NODES):
        edges = [e for e, (to, _) in enumerate(EDGES) if to == node]
        kept.append(sorted(edges, key=lambda e: (-scores[e], e))[:2])
    ranked = {e: alpha[e].sort(descending=True, stable=True).indices.tolist() for es in kept for e in es}
    chosen = {e: order[0] for e, order in ranked.items()}
    if most_skips is not None:
        skips = [e for e, index in chosen.items() if operations[index] == "skip_connect"]
        skips.sort(key=lambda e: (-strengths[e][chosen[e]], e))
        chosen |= {e: ranked[e][1] for e in skips[most_skips:]}
    return tuple(
        (operations[chosen[e]], EDGES[e][1])
        for edges in kept
        for e in sorted(edges, key=lambda e: (-strengths[e][chosen[e]], e))
    )
