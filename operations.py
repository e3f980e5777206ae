"""The seven operations of a cell, in their derived form and their search form, and drop-path.

Derived: affine BN, binary weights, groups, PReLU; an operation is one module per edge of the genotype.
Search: no affine BN, real weights, no groups; the operations of all edges that leave one state are one
module, `SourceOperations`, for they read the same input.
At stride 2 every operation gives ceil(size / 2), so that all edges of a node agree at odd sizes too.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

import lean
from binary_ops import ACTIVATIONS, BinaryConv2d, binary_sign

CONVOLUTIONS = {  # name: (kernel size, padding, dilation); the padding keeps the size at stride 1
    "bin_conv_3x3": (3, 1, 1),
    "bin_conv_5x5": (5, 2, 1),
    "bin_dil_conv_3x3": (3, 2, 2),
    "bin_dil_conv_5x5": (5, 4, 2),
}


def drop_path(x: Tensor, keep: Tensor) -> Tensor:
    """Zero whole samples of x (n, c, h, w) but with probability `keep`, and scale those to keep the mean.

    A new tensor, never in place (Larsson et al., FractalNet, 2017; per sample as in DARTS). `keep` is a
    float32 tensor (), on x's device: a number would stay as it is in a compiled graph or a CUDA graph.
    """
    mask = torch.rand((x.shape[0], 1, 1, 1), device=x.device) < keep
    return x * (mask / keep).to(x.dtype)


def halving_pool() -> nn.AvgPool2d:
    """2x2 average at stride 2, (n, c, h, w) -> (n, c, ceil(h/2), ceil(w/2)); a window over an odd edge
    averages what it holds."""
    return nn.AvgPool2d(2, 2, ceil_mode=True)


class BinaryUnit(nn.Module):
    """PReLU(BN2(binconv(sign(BN1(x)))) [+ residual]), (n, c_in, h, w) -> (n, c_out, h', w').

    The residual (cell convolutions) is x, or its 2x2 average at stride 2; preprocessing has none. `bits`
    are BinaryConv2d's keyword arguments weight_bits, activation_bits, weight_binarization; `activation` is
    one of ACTIVATIONS. Where a gradient may be asked for, `lean.unit` computes what the modules do.
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
        self.prelu = ACTIVATIONS[activation](c_out)
        self.shortcut = None
        if residual:
            self.shortcut = nn.Identity() if stride == 1 else halving_pool()

    @property
    def convolutions(self) -> tuple[BinaryConv2d, ...]:
        return (self.conv,)

    def forward(self, x: Tensor, weight: Tensor | None = None) -> Tensor:
        """`weight`: the convolution's effective one, from a network that binarises those of all units, and
        counts their batches, at once."""
        residual = None if self.shortcut is None else self.shortcut(x)
        if torch.is_grad_enabled():
            alone = weight is None
            weight = self.conv.effective_weight() if alone else weight
            convolution = lean.Convolution.of(self.conv)
            return lean.unit(x, residual, weight, convolution, self.bn1, self.bn2, self.prelu, count=alone)
        y = self.bn2(self.conv(self.bn1(x)))
        return self.prelu(y if residual is None else y + residual)


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
        self.prelu = ACTIVATIONS[activation](c_out)

    @property
    def convolutions(self) -> tuple[BinaryConv2d, ...]:
        return self.conv_1, self.conv_2

    def forward(self, x: Tensor, *weights: Tensor) -> Tensor:
        """`weights`: the convolutions' effective ones, as for BinaryUnit."""
        if torch.is_grad_enabled():
            return self._lean(x, weights)
        x = self.bn1(x)
        y = torch.cat([self.conv_1(x), pad_to_half(self.conv_2(x[:, :, 1:, 1:]), x)], dim=1)
        return self.prelu(self.bn2(y))

    def _lean(self, x: Tensor, weights: Sequence[Tensor]) -> Tensor:
        """Both halves as one convolution of 2x2 kernels, which hold the first half's weight at (0, 0), the
        second's at (1, 1). At an odd size they are 3x3, with a border of zeros, to read beyond the edge."""
        alone = len(weights) == 0
        weights = weights or [conv.effective_weight() for conv in self.convolutions]
        odd = (x.shape[2] | x.shape[3]) % 2
        corners = ((odd, 1, odd, 1), (1 + odd, 0, 1 + odd, 0))
        halves = [F.pad(weight, pad) for weight, pad in zip(weights, corners, strict=True)]
        convolution = lean.Convolution.of(self.conv_1)._replace(padding=(odd, odd))
        return lean.unit(x, None, torch.cat(halves), convolution, self.bn1, self.bn2, self.prelu, count=alone)


def pad_to_half(y: Tensor, x: Tensor) -> Tensor:
    """Zeros right of and below y (n, c, h // 2, w // 2), up to half the size of x rounded up.

    The shifted half of a factorised reduction has one row or column less where x has an odd size.
    """
    height, width = x.shape[2:]
    return F.pad(y, (0, width % 2, 0, height % 2)) if height % 2 or width % 2 else y


class Pool(nn.Module):
    """3x3 max or average (padding not counted), padding 1, (n, c, h, w) -> (n, c, h', w')."""

    def __init__(self, kind: str, stride: int):
        super().__init__()
        self.kind = kind
        self.pool = (
            nn.MaxPool2d(3, stride, 1)
            if kind == "max"
            else nn.AvgPool2d(3, stride, 1, count_include_pad=False)
        )

    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "max" and torch.is_grad_enabled():
            return lean.max_pool(x, self.pool.stride)
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
    if name in ("max_pool_3x3", "avg_pool_3x3"):
        return Pool(name[:3], stride)
    kernel_size, padding, dilation = CONVOLUTIONS[name]
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


class _NormalizedMixture(Function):
    """sum_p coefficient[p, m] * BN(y[:, p, m]), y (n, p, m, c, h, w), coefficient (p, m) -> (n, m, c, h, w).

    BN without affine parameters is linear but for its statistics, so normalising and mixing are one sum of
    scaled y: no normalised copy of y is made, and none is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, y, coefficient, mean, inverse_std, batch_statistics):
        # (p, m, c, 1, 1), in this order also in memory, and so the gradient of y, which else is copied
        scale = inverse_std * _per_channel(coefficient)
        mixed = torch.addcmul((mean * scale).sum(0).neg_(), y[:, 0], scale[0])
        for p in range(1, y.shape[1]):
            mixed.addcmul_(y[:, p], scale[p])
        ctx.save_for_backward(y, scale, mean, inverse_std)
        ctx.batch_statistics = batch_statistics
        return mixed

    @staticmethod
    def backward(ctx, grad):
        y, scale, mean, inverse_std = ctx.saved_tensors
        grad = grad.contiguous()  # the sums' last bits depend on the layout
        total = grad.sum((0, 3, 4), keepdim=True)[0]  # (m, c, 1, 1)
        grad = grad.unsqueeze(1)
        along = (grad * y).sum((0, 4, 5), keepdim=True)[0]
        # the sum of grad times normalised y, (p, m, c, 1, 1)
        along = torch.addcmul(along, mean, total, value=-1).mul_(inverse_std)
        grad_y = grad_coefficient = None
        if ctx.needs_input_grad[0]:
            if ctx.batch_statistics:
                of_each = scale / -(grad.numel() // total.numel())  # of the pixels that give the statistics
                slope = of_each * inverse_std * along
                offset = torch.addcmul(of_each * total, slope, mean, value=-1)
                grad_y = torch.addcmul(offset, y, slope).addcmul_(grad, scale)
            else:
                grad_y = grad * scale
        if ctx.needs_input_grad[1]:
            grad_coefficient = along.sum((2, 3, 4))
        return grad_y, grad_coefficient, None, None, None


def _per_channel(coefficient: Tensor) -> Tensor:
    return coefficient[:, :, None, None, None]


def coefficients(mixing: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """mixing (m, 7), by edge and operation of PRIMITIVES -> the arguments of SourceOperations.

    `convolving` (p, m) multiplies the convolutions' normalised results, p = 4, or 5 at stride 2, where the
    skip connection is one of them; `sharing` (m, 3) what the edges share: max-pool, average-pool, residual.
    """
    skip, pooling, convolving = mixing.split((1, 2, 4), dim=1)
    residual = convolving.sum(1, keepdim=True)
    if stride == 1:
        residual = residual + skip
    else:
        convolving = torch.cat([convolving, skip], 1)
    return convolving.t(), torch.cat([pooling, residual], 1)


Statistics = tuple[Tensor, Tensor, int]
"""Mean and biased variance (channels,) of a batch, and of how many values."""


class SourceOperations(nn.Module):
    """Search form: the seven operations, mixed, on all m edges of a cell that leave one state.

    These edges read the same channels, so the sign, both pools with their BN (without affine parameters
    they are the same on every edge) and the residual are computed once, and a kind of convolution is one
    convolution with m times the output channels. x (n, c, h, w) and the `coefficients` of the edges' mixing
    (m, 7) -> (n, m, c, h', w'): on edge e the sum of mixing[e, p] times operation p of PRIMITIVES.
    """

    def __init__(self, channels: int, edges: int, stride: int):
        super().__init__()
        self.stride = stride
        self.convolutions = nn.ModuleList(
            nn.Conv2d(channels, edges * channels, size, stride, padding, dilation, bias=False)
            for size, padding, dilation in CONVOLUTIONS.values()
        )
        self.skip = nn.ModuleList(
            nn.Conv2d(channels, edges * channels // 2, 1, 2, bias=False)
            for _ in range(2 if stride == 2 else 0)
        )
        convolved = len(CONVOLUTIONS) + (stride == 2)
        self.norm = nn.BatchNorm2d(convolved * edges * channels, affine=False)
        self.pool_norm = nn.BatchNorm2d(2 * channels, affine=False)
        self.shortcut = nn.Identity() if stride == 1 else halving_pool()

    def forward(
        self, x: Tensor, convolving: Tensor, sharing: Tensor, kernels: Sequence[Tensor]
    ) -> tuple[Tensor, Statistics | None]:
        """`kernels`: see joined_kernels. Also the statistics of the batch in training, for update_running."""
        signs = binary_sign(x)
        pairs = zip(kernels, self.convolutions[1::2], strict=True)
        outputs = [F.conv2d(signs, kernel, None, c.stride, c.padding, c.dilation) for kernel, c in pairs]
        if self.stride == 2:
            outputs.append(self._reduced(signs, len(sharing)))
        pools = [
            F.max_pool2d(x, 3, self.stride, 1),
            F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False),
        ]
        pools = normalized(self.pool_norm, torch.cat(pools, 1))
        mixed, statistics = self._normalized_mixture(torch.cat(outputs, 1), convolving)
        # what all edges share: both pools and the residual, (n, 3, c * h' * w')
        shared = torch.cat([pools, self.shortcut(x)], 1).unflatten(1, (3, -1)).flatten(2)
        # not matmul, which folds and copies `shared` where `sharing` needs a gradient
        sharing = sharing.to(shared.dtype).expand(len(x), -1, -1)
        return mixed + torch.bmm(sharing, shared).view_as(mixed), statistics

    def _normalized_mixture(self, y: Tensor, coefficient: Tensor) -> tuple[Tensor, Statistics | None]:
        """BN, then the mixture of the convolutions: y (n, p * m * c, h, w), coefficient (p, m)."""
        norm, statistics = self.norm, None
        if self.training:
            with torch.no_grad():
                wide = torch.promote_types(y.dtype, torch.float32)  # in autocast too, as nn.BatchNorm2d
                mean = y.mean((0, 2, 3), keepdim=True, dtype=wide)
                var = (y - mean).square_().mean((0, 2, 3))  # on a CPU 8 times faster than torch.var_mean
                mean = mean.flatten()
                statistics = mean, var, y.numel() // y.shape[1]
        else:
            var, mean = norm.running_var, norm.running_mean
        layout = (*coefficient.shape, -1, 1, 1)
        y = y.unflatten(1, (*coefficient.shape, -1))
        moments = mean.view(layout), (var + norm.eps).rsqrt().view(layout)
        return _NormalizedMixture.apply(y, coefficient, *moments, self.training), statistics

    def _reduced(self, signs: Tensor, edges: int) -> Tensor:
        """The skip connection at stride 2, a factorised reduction before its BN: (n, m * c, h', w')."""
        halves = [half.unflatten(1, (edges, -1)) for half in reduced_halves(signs, self.skip)]
        return torch.cat(halves, 2).flatten(1, 2)


def joined_kernels(sources: Iterable[SourceOperations]) -> dict[SourceOperations, Sequence[Tensor]]:
    """By dilation, the kernels of a source's 3x3 and 5x5 convolutions as those of one, (2 * m * c, c, 5, 5),
    the 3x3 ones with a border of zeros. Of all sources of one width at once, in few operations."""
    joined, alike = {}, defaultdict(list)
    for source in sources:
        alike[source.convolutions[0].in_channels].append(source)
    for group in alike.values():
        small, large = ([c.weight for s in group for c in s.convolutions[size::2]] for size in (0, 1))
        lengths = [len(weight) for weight in small]
        small = F.pad(torch.cat(small), (1, 1, 1, 1)).split(lengths)
        kernels = torch.cat([weight for pair in zip(small, large, strict=True) for weight in pair])
        parts = iter(kernels.split([2 * length for length in lengths]))
        joined |= dict(zip(group, zip(parts, parts, strict=True), strict=True))
    return joined


@torch.no_grad()
def update_running(norms: Sequence[nn.BatchNorm2d], statistics: Sequence[Statistics]) -> None:
    """Move the running statistics of BNs of one momentum towards those of their batches. Their batches are
    not counted, for the momentum is fixed."""
    means, variances, counts = zip(*statistics, strict=True)
    unbiased = torch._foreach_mul(variances, [count / (count - 1) for count in counts])
    momentum = norms[0].momentum
    torch._foreach_lerp_([norm.running_mean for norm in norms], means, momentum)
    torch._foreach_lerp_([norm.running_var for norm in norms], unbiased, momentum)


def normalized(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(x), but that the batch is not counted: the network does that for all (`lean.count_batches`)."""
    running = norm.running_mean, norm.running_var
    return F.batch_norm(x, *running, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)


def reduced_halves(signs: Tensor, convolutions: Iterable[nn.Conv2d]) -> list[Tensor]:
    """The two halves of a factorised reduction: 1x1 convolutions of the pixels that stride 2 meets, and of
    those one further right and down. Taking these pixels first spares the convolutions the others."""
    pixels = (signs[:, :, ::2, ::2], signs[:, :, 1::2, 1::2])
    even, odd = (F.conv2d(x, conv.weight) for x, conv in zip(pixels, convolutions, strict=True))
    return [even, pad_to_half(odd, signs)]


class SearchPreprocess(nn.Module):
    """Search form: BN(conv1x1(signs)), or its factorised reduction, (n, c_in, h, w) -> (n, c_out, ...).

    It is given the signs of its input: two cells read each cell's output.
    """

    def __init__(self, c_in: int, c_out: int, *, reduce: bool):
        super().__init__()
        widths = (c_out // 2, c_out // 2) if reduce else (c_out,)
        self.convolutions = nn.ModuleList(
            nn.Conv2d(c_in, c, 1, 2 if reduce else 1, bias=False) for c in widths
        )
        self.norm = nn.BatchNorm2d(c_out, affine=False)

    def forward(self, signs: Tensor) -> Tensor:
        if len(self.convolutions) == 2:
            return normalized(self.norm, torch.cat(reduced_halves(signs, self.convolutions), 1))
        return normalized(self.norm, self.convolutions[0](signs))
