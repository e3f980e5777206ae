"""The supernet as the original program computes it: every edge has its own seven operations, mixes and
shuffles alone. Its cost is the original's (tests/comparison/test_comparison.py).

Sizes that do not halve evenly follow our supernet's conventions, for the original has none: halves are
rounded up, a window over the border averages what it holds, and a factorised reduction is zero where its
shifted half has no pixel.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from comparison.original_binary import Sign
from genotypes import EDGES, NODES
from model_search import LEAVING, SearchPreprocess, SourceOperations, Supernet, edge_weights
from operations import CONVOLUTIONS, pad_to_half


class OriginalConvolution(nn.Module):
    """BN(conv(sign(x))) + x, or its 2x2 average."""

    def __init__(self, channels: int, size: int, stride: int, padding: int, dilation: int):
        super().__init__()
        self.sign = Sign()
        self.conv = nn.Conv2d(channels, channels, size, stride, padding, dilation, bias=False)
        self.norm = nn.BatchNorm2d(channels, affine=False)
        self.residual = nn.Identity() if stride == 1 else nn.AvgPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.conv(self.sign(x)))
        y += self.residual(x)
        return y


class Reduction(nn.Module):
    """BN(cat(conv1x1_s2(sign(x)), conv1x1_s2(sign(x)[:, :, 1:, 1:])))."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.sign = Sign()
        self.even = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.odd = nn.Conv2d(c_in, c_out // 2, 1, 2, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        signs = self.sign(x)
        halves = [self.even(signs), pad_to_half(self.odd(signs[:, :, 1:, 1:]), signs)]
        return self.norm(torch.cat(halves, 1))


class Preprocess(nn.Module):
    """BN(conv1x1(sign(x)))."""

    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.sign = Sign()
        self.conv = nn.Conv2d(c_in, c_out, 1, bias=False)
        self.norm = nn.BatchNorm2d(c_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.conv(self.sign(x)))


class Edge(nn.Module):
    """The mixture of the seven operations on the first c / k channels; the rest bypass it; shuffle."""

    def __init__(self, channels: int, k: int, stride: int):
        super().__init__()
        self.k, self.sampled = k, channels // k
        c = self.sampled
        pools = (nn.MaxPool2d(3, stride, 1), nn.AvgPool2d(3, stride, 1, count_include_pad=False))
        self.operations = nn.ModuleList(
            [
                nn.Identity() if stride == 1 else Reduction(c, c),
                *(nn.Sequential(pool, nn.BatchNorm2d(c, affine=False)) for pool in pools),
                *(
                    OriginalConvolution(c, size, stride, *geometry)
                    for size, *geometry in CONVOLUTIONS.values()
                ),
            ]
        )
        self.bypass = nn.Identity() if stride == 1 else nn.MaxPool2d(2, 2, ceil_mode=True)

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        sampled, rest = x[:, : self.sampled], x[:, self.sampled :]
        mixed = sum(w * operation(sampled) for w, operation in zip(mixing, self.operations, strict=True))
        together = torch.cat([mixed, self.bypass(rest)], 1)  # (n, c, h, w)
        return together.unflatten(1, (self.k, -1)).transpose(1, 2).contiguous().flatten(1, 2)


class Cell(nn.Module):
    def __init__(
        self, c_older: int, c_newer: int, channels: int, *, k: int, reduction: bool, reduction_before: bool
    ):
        super().__init__()
        self.reduction = reduction
        self.preprocess0 = (Reduction if reduction_before else Preprocess)(c_older, channels)
        self.preprocess1 = Preprocess(c_newer, channels)
        self.edges = nn.ModuleList(
            Edge(channels, k, 2 if reduction and source < 2 else 1) for _, source in EDGES
        )

    def forward(self, s0: Tensor, s1: Tensor, mixing: Tensor, weights: Tensor) -> Tensor:
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(NODES):
            entering = [(e, source) for e, (to, source) in enumerate(EDGES) if to == node]
            states.append(sum(weights[e] * self.edges[e](states[s], mixing[e]) for e, s in entering))
        return torch.cat(states[2:], 1)


class OriginalSupernet(nn.Module):
    """Images (n, 3, h, w) -> logits (n, classes), None: with the weights of `fused`, and what it computes.

    alpha and beta are those of `fused` themselves.
    """

    def __init__(self, fused: Supernet):
        super().__init__()
        config = fused.config
        channels = config.init_channels
        c_older = c_newer = 3 * channels
        self.stem = nn.Sequential(nn.Conv2d(3, c_newer, 3, padding=1, bias=False), nn.BatchNorm2d(c_newer))
        self.cells = nn.ModuleList()
        reduction_before = False
        for index in range(config.layers):
            reduction = index in config.reductions
            channels *= 2 if reduction else 1
            sizes = c_older, c_newer, channels
            k = config.k_reduce if reduction else config.k_normal
            self.cells.append(Cell(*sizes, k=k, reduction=reduction, reduction_before=reduction_before))
            c_older, c_newer, reduction_before = c_newer, NODES * channels, reduction
        self.classifier = nn.Linear(c_newer, config.num_classes)
        self.arch = nn.ParameterDict(fused.arch_state())
        self.to(next(fused.parameters()))
        with torch.no_grad():
            for theirs, rows, ours in pairs(fused, self):
                ours.copy_(theirs[rows])

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        s0 = s1 = self.stem(x)
        for cell in self.cells:
            kind = "reduce" if cell.reduction else "normal"
            mixing, weights = self.arch[f"alphas_{kind}"].softmax(1), edge_weights(self.arch[f"betas_{kind}"])
            s0, s1 = s1, cell(s0, s1, mixing, weights)
        return self.classifier(s1.mean((2, 3))), None

    def weight_parameters(self) -> list[nn.Parameter]:
        return [parameter for name, parameter in self.named_parameters() if not name.startswith("arch.")]


def pairs(fused: Supernet, original: OriginalSupernet) -> Iterator[tuple[Tensor, slice, Tensor]]:
    """(tensor of the fused net, the rows of it, the original net's tensor that equals them), for all weights
    and BN statistics."""
    whole = slice(None)
    for name in ("stem", "classifier"):
        ours, theirs = (getattr(network, name).state_dict(keep_vars=True) for network in (fused, original))
        yield from ((ours[key], whole, theirs[key]) for key in ours if ours[key].dim())
    for ours, theirs in zip(fused.cells, original.cells, strict=True):
        yield from pairs_of_preprocess(ours.preprocess0, theirs.preprocess0)
        yield from pairs_of_preprocess(ours.preprocess1, theirs.preprocess1)
        for source, leaving in zip(ours.sources, LEAVING, strict=True):
            yield from pairs_of_source(source, [theirs.edges[e].operations for e in leaving])


def pairs_of_preprocess(fused: SearchPreprocess, original: nn.Module) -> Iterator[tuple]:
    convolutions = [m for m in original.modules() if isinstance(m, nn.Conv2d)]
    for ours, theirs in zip(fused.convolutions, convolutions, strict=True):
        yield ours.weight, slice(None), theirs.weight
    yield from pairs_of_norm(fused.norm, slice(None), original.norm)


def pairs_of_source(fused: SourceOperations, edges: list[nn.ModuleList]) -> Iterator[tuple]:
    """A fused convolution holds its kind of operation edge after edge; the BN, one kind after another."""
    m, c = len(edges), fused.pool_norm.num_features // 2
    for e, operations in enumerate(edges):
        kinds = list(operations[3:])
        for conv, operation in zip(fused.convolutions, kinds, strict=True):
            yield conv.weight, slice(e * c, (e + 1) * c), operation.conv.weight
        if fused.stride == 2:
            half = slice(e * c // 2, (e + 1) * c // 2)
            yield fused.skip[0].weight, half, operations[0].even.weight
            yield fused.skip[1].weight, half, operations[0].odd.weight
            kinds.append(operations[0])
        for p, operation in enumerate(kinds):
            first = (p * m + e) * c
            yield from pairs_of_norm(fused.norm, slice(first, first + c), operation.norm)
        for p, pool in enumerate(operations[1:3]):
            yield from pairs_of_norm(fused.pool_norm, slice(p * c, (p + 1) * c), pool[1])


def pairs_of_norm(fused: nn.BatchNorm2d, rows: slice, original: nn.BatchNorm2d) -> Iterator[tuple]:
    yield fused.running_mean, rows, original.running_mean
    yield fused.running_var, rows, original.running_var
