"""Derived networks in fewer and larger tensor operations: the unit and the max pool as autograd functions
that keep little, and all weights binarised together.

As five modules a unit, PReLU(BN2(conv(sign(BN1(x)))) + r), keeps x, BN1's result, the convolution's and the
sum. As one function it keeps x, which all operations on a state share, and the convolution's result. The rest
is computed again in the backward pass, by the same operations on the same values, so the same to the bit: no
sign and no choice of a pool differs from that of the forward pass, also where rounding decided it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from binary_ops import BinaryConv2d, RPReLU, binarize_weight, sign
from model import Cell, Network
from networks.bnas import BnasCell
from operations import BinaryUnit, FactorizedReduce, Pool


def unit(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    convolution: Geometry,
    bn1: nn.BatchNorm2d,
    bn2: nn.BatchNorm2d,
    prelu: nn.PReLU,
    *,
    count: bool = True,
) -> Tensor:
    """PReLU(BN2(conv(sign(BN1(x)), weight)) [+ residual]) [+ RPReLU's shift], (n, c_in, h, w) ->
    (n, c_out, h', w').

    Running statistics are updated as the modules would, and with `count` the batches counted.
    """
    if count:
        count_batches([bn1, bn2])
    affine = [bn1.weight, bn1.bias, bn2.weight, bn2.bias]
    running = [bn1.running_mean, bn1.running_var, bn2.running_mean, bn2.running_var]
    norm = Norm(bn1.training, bn1.momentum, bn1.eps)
    adds_x = residual is x  # said by a flag: torch.compile takes no tensor twice
    if adds_x:
        residual = None
    shift = prelu.shift if isinstance(prelu, RPReLU) else None
    inputs = x, residual, weight, prelu.weight, shift
    return _Unit.apply(convolution, norm, adds_x, *inputs, *affine, *running)


def count_batches(norms: Iterable[nn.BatchNorm2d]) -> None:
    """Count a batch in every BN that trains, in one operation."""
    if counters := [bn.num_batches_tracked for bn in norms if bn.training]:
        torch._foreach_add_(counters, 1)


class Geometry(NamedTuple):
    """conv2d(sign(a), weight), or conv2d(a, weight), without a bias."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    signs: bool

    @classmethod
    def of(cls, conv: BinaryConv2d, padding: tuple[int, int] | None = None) -> Geometry:
        """The geometry of a layer, perhaps with other padding."""
        geometry = conv.stride, padding or conv.padding, conv.dilation, conv.groups
        return cls(*geometry, conv.activation_bits == 1)

    def inputs(self, a: Tensor) -> Tensor:
        """What is convolved. BN gives -0.0 only where a product is too small for the type, as in float16."""
        return sign(a, negative_zeros=a.dtype == torch.float16) if self.signs else a

    def forward(self, a: Tensor, weight: Tensor) -> Tensor:
        geometry = self.stride, self.padding, self.dilation, self.groups
        return F.conv2d(self.inputs(a), weight, None, *geometry)

    def backward(self, grad: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of a, which it overwrites, and of the weight.

        Under autocast grad has the type of the convolution, a and the weight another.
        """
        inputs, weight = self.inputs(a).to(grad.dtype), weight.to(grad.dtype)
        geometry = self.stride, self.padding, self.dilation, False, (0, 0), self.groups
        grad_a, grad_weight, _ = torch.ops.aten.convolution_backward(
            grad, inputs, weight, None, *geometry, (True, True, False)
        )
        del inputs
        grad_a = grad_a.to(a.dtype)
        if self.signs:
            grad_a = grad_a.mul_(torch.rsub(a.abs_(), 2, alpha=2).relu_())
        return grad_a, grad_weight


class Norm(NamedTuple):
    """Settings of a BN: with the batch's statistics (training) or with the running ones."""

    training: bool
    momentum: float
    eps: float

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor, *running: Tensor | None) -> tuple[Tensor, ...]:
        """BN(x); the batch's mean and 1 / std (channels,), empty where it does not use them."""
        return torch.native_batch_norm(x, weight, bias, *running, *self)

    def backward(
        self, grad: Tensor, x: Tensor, statistics: list[Tensor], weight: Tensor, *running: Tensor | None
    ) -> tuple[Tensor, ...]:
        """The gradients of x, of the weight and of the bias."""
        return torch.ops.aten.native_batch_norm_backward(
            grad.to(x.dtype), x, weight, *running, *statistics, self.training, self.eps, (True, True, True)
        )


class _Unit(Function):
    """The gradients, with a = BN1(x), z = BN2(y) + residual and G that of PReLU(z):

    of z and of the residual G where z > 0, else slope * G; of the slope the sum of G * z where z <= 0;
    of RPReLU's shift the sum of G;
    of y BN2's; of a the convolution's, times max(0, 2 - 2|a|) if it reads signs; of x BN1's.
    """

    @staticmethod
    def forward(ctx, convolution, norm, adds_x, x, residual, weight, slope, shift, w1, b1, w2, b2, *running):
        mean1, var1, mean2, var2 = running
        a, *_ = norm.forward(x, w1, b1, mean1, var1)
        y = convolution.forward(a, weight)
        z, *_ = norm.forward(y, w2, b2, mean2, var2)
        z = _plus(z, x if adds_x else residual)
        ctx.convolution, ctx.norm, ctx.adds_x, ctx.shifts = convolution, norm, adds_x, shift is not None
        # running statistics are of no use to the gradient in training, and other calls change them
        running = (None,) * 4 if norm.training else running
        ctx.save_for_backward(x, y, residual, weight, slope, w1, b1, w2, b2, *running)
        y = F.prelu(z, slope)
        return y if shift is None else y.add_(shift.to(y.dtype).view(-1, 1, 1))

    @staticmethod
    def backward(ctx, grad):
        x, y, residual, weight, slope, w1, b1, w2, b2, mean1, var1, mean2, var2 = ctx.saved_tensors
        z, *statistics = ctx.norm.forward(y, w2, b2, mean2, var2)
        z = _plus(z, x if ctx.adds_x else residual)
        grad_z, grad_slope = _prelu_backward(grad, z.to(grad.dtype), slope)
        grad_y, grad_w2, grad_b2 = ctx.norm.backward(grad_z, y, statistics, w2, mean2, var2)

        a, *statistics = ctx.norm.forward(x, w1, b1, mean1, var1)
        grad_a, grad_weight = ctx.convolution.backward(grad_y, a, weight)
        grad_x, grad_w1, grad_b1 = ctx.norm.backward(grad_a, x, statistics, w1, mean1, var1)
        if ctx.adds_x:
            grad_x = grad_x.add_(grad_z)
        grad_residual = None if residual is None else grad_z.to(residual.dtype)
        grad_shift = grad.sum((0, 2, 3), dtype=slope.dtype) if ctx.shifts else None
        gradients = grad_x, grad_residual, grad_weight, grad_slope, grad_shift
        return None, None, None, *gradients, grad_w1, grad_b1, grad_w2, grad_b2, *(None,) * 4


def _plus(z: Tensor, residual: Tensor | None) -> Tensor:
    """z + residual, where z is free to hold it and of a type that can; z without a residual."""
    if residual is None:
        return z
    return z.add_(residual) if torch.promote_types(z.dtype, residual.dtype) == z.dtype else z + residual


def _prelu_backward(grad: Tensor, z: Tensor, slope: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of z, which it may overwrite, and of the slopes (channels,)."""
    of_channels = slope.to(grad.dtype).view(-1, 1, 1)
    if grad.device.type == "cpu":  # torch's own, one pass on a GPU, is not vectorised there: 1.5 to 2 times
        grad_z = torch.ops.aten.threshold_backward(grad, z, 0).lerp_(grad, of_channels)
        grad_slope = z.clamp_max_(0).mul_(grad)
    else:
        grad_z, grad_slope = torch.ops.aten._prelu_kernel_backward(grad, z, of_channels)
    return grad_z, grad_slope.sum((0, 2, 3), dtype=slope.dtype)


class _MaxPool(Function):
    """max_pool, which keeps no choices: int64, they would be twice the size of x."""

    @staticmethod
    def forward(ctx, x, stride):
        ctx.save_for_backward(x)
        ctx.window = (3, 3), (stride, stride), (1, 1)
        return F.max_pool2d(x, *ctx.window)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        _, choice = torch.ops.aten.max_pool2d_with_indices(x, *ctx.window)
        backward = torch.ops.aten.max_pool2d_with_indices_backward
        return backward(grad, x, *ctx.window, (1, 1), False, choice), None


def max_pool(x: Tensor, stride: int) -> Tensor:
    """3x3 maximum, padding 1; the gradient goes to the first of equal pixels, row by row."""
    return _MaxPool.apply(x, stride)


def effective_weights(convolutions: Iterable[BinaryConv2d]) -> dict[BinaryConv2d, Tensor]:
    """`effective_weight()` of each convolution, the same to the bit, in few operations: the filters of one
    length are binarised together."""
    weights, alike = {}, defaultdict(list)
    for conv in convolutions:
        if conv.weight_bits == 1:
            alike[conv.weight_binarization, conv.weight[0].numel()].append(conv)
        else:
            weights[conv] = conv.weight
    for (method, _), batch in alike.items():
        rows = [_in_memory_order(conv.weight) for conv in batch]
        binary = binarize_weight(torch.cat([row.flatten(1) for row in rows]), method)
        for conv, row, part in zip(batch, rows, binary.split([len(row) for row in rows]), strict=True):
            part = part.view_as(row)
            weights[conv] = part if row is conv.weight else part.permute(0, 3, 1, 2)
    return weights


def _in_memory_order(weight: Tensor) -> Tensor:
    """A channels-last weight (out, in, k, k) as (out, k, k, in): the last bit of a filter's mean depends on
    the order of the sum, which is that in memory."""
    return weight if weight.is_contiguous() else weight.permute(0, 2, 3, 1)


class FusedUnit(BinaryUnit):
    """BinaryUnit; the network that it is in gives it its effective `weights`, and has counted the batch."""

    weights: tuple[Tensor, ...] | None = None

    @property
    def convolutions(self) -> tuple[BinaryConv2d, ...]:
        return (self.conv,)

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        alone = self.weights is None
        weight = self.conv.effective_weight() if alone else self.weights[0]
        residual = None if self.shortcut is None else self.shortcut(x)
        convolution = Geometry.of(self.conv)
        return unit(x, residual, weight, convolution, self.bn1, self.bn2, self.prelu, count=alone)


class FusedReduce(FactorizedReduce):
    """FactorizedReduce, likewise: both halves as one convolution of 2x2 kernels, which hold the first half's
    weight at (0, 0), the second's at (1, 1). At an odd size they are 3x3, with a border of zeros, to read
    beyond the edge."""

    weights: tuple[Tensor, ...] | None = None

    @property
    def convolutions(self) -> tuple[BinaryConv2d, ...]:
        return self.conv_1, self.conv_2

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        alone = self.weights is None
        weights = [conv.effective_weight() for conv in self.convolutions] if alone else self.weights
        odd = (x.shape[2] | x.shape[3]) % 2
        corners = ((odd, 1, odd, 1), (1 + odd, 0, 1 + odd, 0))
        kernel = torch.cat([F.pad(weight, pad) for weight, pad in zip(weights, corners, strict=True)])
        convolution = Geometry.of(self.conv_1, padding=(odd, odd))
        return unit(x, None, kernel, convolution, self.bn1, self.bn2, self.prelu, count=alone)


class FusedPool(Pool):
    def forward(self, x: Tensor) -> Tensor:
        if self.kind == "max" and torch.is_grad_enabled():
            return max_pool(x, self.pool.stride)
        return super().forward(x)


class _SharedMaxima:
    """A cell in which all max pools of one state are one."""

    def forward(self, *inputs: Tensor | None) -> Tensor:
        self.maxima: dict[int, Tensor] = {}  # by source
        try:
            return super().forward(*inputs)
        finally:
            self.maxima = {}

    def operated(self, edge: int, states: list[Tensor]) -> Tensor:
        operation, source = self.operations[edge], self.sources[edge]
        if not isinstance(operation, Pool) or operation.kind != "max":
            return super().operated(edge, states)
        if source not in self.maxima:
            self.maxima[source] = super().operated(edge, states)
        return self.maxima[source]


class FusedCell(_SharedMaxima, Cell):
    pass


class FusedBnasCell(_SharedMaxima, BnasCell):
    pass


class FusedNetwork(Network):
    """Network, which binarises the weights of all units, and counts their batches, at once."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if not torch.is_grad_enabled():
            return super().forward(x)
        units = [module for module in self.modules() if isinstance(module, (FusedUnit, FusedReduce))]
        weights = effective_weights(conv for unit in units for conv in unit.convolutions)
        count_batches(bn for unit in units for bn in (unit.bn1, unit.bn2))
        try:
            for each in units:
                each.weights = tuple(weights[conv] for conv in each.convolutions)
            return super().forward(x)
        finally:
            for each in units:
                each.weights = None


FUSED = {
    BinaryUnit: FusedUnit,
    FactorizedReduce: FusedReduce,
    Pool: FusedPool,
    Cell: FusedCell,
    BnasCell: FusedBnasCell,
    Network: FusedNetwork,
}
"""By plain class, the one whose instances compute the same in fewer operations."""
