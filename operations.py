"""The seven operations of a cell, in their derived form and their search form, and drop-path.

Derived: affine BN, binary weights, groups, PReLU; an operation is one module per edge of the genotype.
Search: no affine BN, real weights, no groups; the operations of all edges that leave one state are one
module, `SourceOperations`, because they read the same input.
At stride 2 every operation gives ceil(size / 2), so that all edges of a node agree at odd sizes too.

These modules are the definitions. `kernels.accelerate` puts faster ones of the same values in their place.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from binary_ops import ACTIVATION_MODULES, BinaryConv2d, binary_sign
from search_space import ENTRIES, PRIMITIVES, SEVEN

CONVOLUTIONS = {entry.name: entry.geometry for entry in SEVEN if entry.kernel}
"""Of the seven: (kernel size, padding, dilation) by name; the padding keeps the size at stride 1."""


def drop_path(x: Tensor, keep: Tensor) -> Tensor:
    """Zero whole samples of x (n, c, h, w) but with probability `keep`, and scale those to keep the mean.

    A new tensor, never in place (Larsson et al., FractalNet, 2017; per sample as in DARTS). `keep` is a
    float32 tensor (), on x's device: a number would stay as it is in a compiled graph or a CUDA graph.
    """
    return x * drop_factor(x, keep).to(x.dtype)


def drop_factor(x: Tensor, keep: Tensor) -> Tensor:
    """The factor of drop-path for each sample of x (n, ...): 1 / keep, or 0; (n, 1, 1, 1)."""
    return (torch.rand((x.shape[0], 1, 1, 1), device=x.device) < keep) / keep


def halving_pool() -> nn.AvgPool2d:
    """2x2 average at stride 2, (n, c, h, w) -> (n, c, ceil(h/2), ceil(w/2)); a window over an odd edge
    averages what it holds."""
    return nn.AvgPool2d(2, 2, ceil_mode=True)


class BinaryUnit(nn.Module):
    """PReLU(BN2(binconv(sign(BN1(x)))) [+ residual]), (n, c_in, h, w) -> (n, c_out, h', w').

    The residual (cell convolutions) is x, or its 2x2 average at stride 2; preprocessing has none. `bits`
    are BinaryConv2d's keyword arguments weight_bits, activation_bits, weight_binarization; `activation` is
    one of choices.ACTIVATIONS.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int,
        *,
        bits: dict,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        residual: bool = False,
        activation: str = "prelu",
    ):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv = BinaryConv2d(
            c_in,
            c_out,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            **bits,
        )
        self.bn2 = nn.BatchNorm2d(c_out)
        self.prelu = ACTIVATION_MODULES[activation](c_out)
        self.shortcut = None
        if residual:
            self.shortcut = nn.Identity() if stride == 1 else halving_pool()

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv(self.bn1(x)))
        return self.prelu(y if self.shortcut is None else y + self.shortcut(x))


class FactorizedReduce(nn.Module):
    """PReLU(BN2(cat of two 1x1 binary convolutions at stride 2, the second shifted by one pixel)).

    (n, c_in, h, w) -> (n, c_out, ceil(h/2), ceil(w/2)); each half gives c_out / 2 channels.
    """

    def __init__(self, c_in: int, c_out: int, *, bits: dict, activation: str = "prelu"):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv_1 = BinaryConv2d(c_in, c_out // 2, 1, stride=2, **bits)
        self.conv_2 = BinaryConv2d(c_in, c_out // 2, 1, stride=2, **bits)
        self.bn2 = nn.BatchNorm2d(c_out)
        self.prelu = ACTIVATION_MODULES[activation](c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(x)
        y = torch.cat([self.conv_1(x), pad_to_half(self.conv_2(x[:, :, 1:, 1:]), x)], dim=1)
        return self.prelu(self.bn2(y))


def pad_to_half(y: Tensor, x: Tensor) -> Tensor:
    """Zeros right of and below y (n, c, h // 2, w // 2), up to half the size of x rounded up.

    The shifted half of a factorised reduction has one row or column less where x has an odd size.
    """
    height, width = x.shape[2:]
    return F.pad(y, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else y


def conv_bn_relu(
    c_in: int, c_out: int, *, stride: int, groups: int = 1, last_relu: bool = True
) -> list[nn.Module]:
    """A full-precision 3x3 convolution of a stem, (n, c_in, h, w) -> (n, c_out, ceil(h / stride), ...)."""
    layers = [nn.Conv2d(c_in, c_out, 3, stride, 1, groups=groups, bias=False), nn.BatchNorm2d(c_out)]
    return [*layers, nn.ReLU()] if last_relu else layers


def imagenet_convolutions(channels: int) -> tuple[list[nn.Module], ...]:
    """EBNAS's stems for large images, each with its BN: (n, 3, h, w) -> (n, channels / 2, h/2, w/2) ->
    (n, channels, h/4, w/4) -> (n, channels, h/8, w/8)."""
    return (
        conv_bn_relu(3, channels // 2, stride=2, last_relu=False),
        conv_bn_relu(channels // 2, channels, stride=2, groups=4, last_relu=False),
        conv_bn_relu(channels, channels, stride=2, groups=2, last_relu=False),
    )


class Pool(nn.Module):
    """3x3 max or average (padding not counted), padding 1, (n, c, h, w) -> (n, c, h', w')."""

    def __init__(self, kind: str, stride: int):
        super().__init__()
        self.kind, self.stride = kind, stride
        self.pool = (
            nn.MaxPool2d(3, stride, 1)
            if kind == "max"
            else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.pool(x)


class Zero(nn.Module):
    """`none`: zeros of the size that other operations give, (n, c, h, w) -> (n, c, ceil(h / stride), ...); no
    gradient passes."""

    def __init__(self, stride: int):
        super().__init__()
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        n, c, h, w = x.shape
        return x.new_zeros(()).expand(n, c, -(-h // self.stride), -(-w // self.stride))


def make_operation(
    name: str, channels: int, stride: int, *, groups: int, bits: dict, activation: str = "prelu"
) -> nn.Module:
    """The derived form of primitive `name` on an edge of `channels` channels.

    Raises KeyError on a name that is not a primitive: genotypes are validated before they get here.
    """
    if name == "skip_connect":
        if stride == 1:
            return nn.Identity()
        return FactorizedReduce(channels, channels, bits=bits, activation=activation)
    entry = ENTRIES[name]
    if entry.derived:
        return entry.derived(channels, stride, groups=groups, bits=bits, activation=activation)
    if entry.pool:
        return Pool(entry.pool, stride)
    kernel_size, padding, dilation = entry.geometry
    return BinaryUnit(
        channels,
        channels,
        kernel_size,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
        residual=True,
        bits=bits,
        activation=activation,
    )


class SourceOperations(nn.Module):
    """Search form: the operations `names`, mixed, on all m edges of a cell that leave one state.

    x (n, c, h, w), mixing (m, p) -> (n, m, c, h', w'): on edge e the sum of mixing[e, p] times operation p of
    `names`. The edges read the same channels, so pools with their BN (without affine parameters they are the
    same on every edge) and the residual occur once, and a kind of convolution has the filters of all edges,
    m * c, edge by edge. Modules of an operation's own are one for each edge.
    """

    def __init__(self, channels: int, edges: int, stride: int, names: tuple[str, ...] = PRIMITIVES):
        super().__init__()
        self.stride, self.names = stride, names
        entries = [ENTRIES[name] for name in names]
        self.convolutions = nn.ModuleList()
        for entry in entries:
            if entry.kernel:
                size, padding, dilation = entry.geometry
                self.convolutions.append(
                    nn.Conv2d(channels, edges * channels, size, stride, padding, dilation, bias=False)
                )
        reduces = stride == 2 and "skip_connect" in names
        self.skip = nn.ModuleList(
            nn.Conv2d(channels, edges * channels // 2, 1, 2, bias=False) for _ in range(2 if reduces else 0)
        )
        convolved, pools = len(self.convolutions) + reduces, sum(bool(entry.pool) for entry in entries)
        self.norm = nn.BatchNorm2d(convolved * edges * channels, affine=False) if convolved else None
        self.pool_norm = nn.BatchNorm2d(pools * channels, affine=False) if pools else None
        self.own = nn.ModuleDict(
            {
                entry.name: nn.ModuleList(entry.search(channels, stride) for _ in range(edges))
                for entry in entries
                if entry.search
            }
        )
        self.shortcut = nn.Identity() if stride == 1 else halving_pool()

    def forward(self, x: Tensor, mixing: Tensor) -> Tensor:
        residual = self.shortcut(x).unsqueeze(1)
        convolved, pooled = iter(self.convolved(x, len(mixing))), iter(self.pooled(x))
        operations = {}  # by name, (n, m or 1, c, h', w')
        for name in self.names:
            if ENTRIES[name].search:
                operations[name] = torch.stack([module(x) for module in self.own[name]], 1)
            elif ENTRIES[name].pool:
                operations[name] = next(pooled)
            elif ENTRIES[name].kernel:
                operations[name] = next(convolved) + residual
            else:
                operations[name] = residual
        if self.skip:  # at stride 2 the skip is the last of what is convolved
            operations["skip_connect"] = next(convolved)
        weights = mixing.t()[:, :, None, None, None]  # (p, m, 1, 1, 1)
        return sum(weight * y for weight, y in zip(weights, operations.values(), strict=True))

    def convolved(self, x: Tensor, edges: int) -> tuple[Tensor, ...]:
        """The results of the convolutions, and of the skip at stride 2, after their BN: (n, m, c, h', w')."""
        if self.norm is None:
            return ()
        signs = binary_sign(x)
        results = [convolution(signs) for convolution in self.convolutions]  # each (n, m * c, h', w')
        if self.skip:
            halves = reduced_halves(signs, self.skip)
            results.append(torch.cat([half.unflatten(1, (edges, -1)) for half in halves], 2).flatten(1, 2))
        norm, joined = self.norm, torch.cat(results, 1)
        running = norm.running_mean, norm.running_var  # the batches of this BN are not counted
        joined = F.batch_norm(joined, *running, None, None, self.training, norm.momentum, norm.eps)
        return joined.unflatten(1, (-1, edges, x.shape[1])).unbind(1)

    def pooled(self, x: Tensor) -> tuple[Tensor, ...]:
        """The pools after their BN: (n, 1, c, h', w')."""
        if self.pool_norm is None:
            return ()
        kinds = [ENTRIES[name].pool for name in self.names if ENTRIES[name].pool]
        pools = [
            F.max_pool2d(x, 3, self.stride, 1)
            if kind == "max"
            else F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False)
            for kind in kinds
        ]
        return tuple(y.unsqueeze(1) for y in self.pool_norm(torch.cat(pools, 1)).chunk(len(kinds), 1))


def reduced_halves(signs: Tensor, convolutions: nn.ModuleList) -> list[Tensor]:
    """The two halves of a factorised reduction: 1x1 convolutions of the pixels that stride 2 meets, and of
    those one further right and down. Taking these pixels first spares the convolutions the others."""
    pixels = (signs[:, :, ::2, ::2], signs[:, :, 1::2, 1::2])
    even, odd = (F.conv2d(x, conv.weight) for x, conv in zip(pixels, convolutions, strict=True))
    return [even, pad_to_half(odd, signs)]


class SearchPreprocess(nn.Module):
    """Search form: BN(conv1x1(sign(x))), or its factorised reduction, (n, c_in, h, w) -> (n, c_out, ...)."""

    def __init__(self, c_in: int, c_out: int, *, reduce: bool):
        super().__init__()
        widths = (c_out // 2, c_out // 2) if reduce else (c_out,)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c_in, c, 1, 2 if reduce else 1, bias=False) for c in widths
        )
        self.norm = nn.BatchNorm2d(c_out, affine=False)

    def forward(self, x: Tensor) -> Tensor:
        signs = binary_sign(x)
        if len(self.convolutions) == 2:
            return self.norm(torch.cat(reduced_halves(signs, self.convolutions), 1))
        return self.norm(self.convolutions[0](signs))
