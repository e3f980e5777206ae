"""What a derived network trains with: its unit and its max pool as autograd functions that keep little.

As five modules a unit, PReLU(BN2(conv(sign(BN1(x)))) + r), keeps x, BN1's result, the convolution's and the
sum. As one function it keeps x, which all operations on a state share, and the convolution's result. The rest
is computed again in the backward pass, by the same operations on the same values, so the same to the bit: no
sign and no choice of a pool differs from that of the forward pass, also where rounding decided it.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from binary_ops import BinaryConv2d, RPReLU, sign


def unit(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    convolution: Convolution,
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
    """What each BN does beside its work in training, for all of them in one operation."""
    if counters := [bn.num_batches_tracked for bn in norms if bn.training]:
        torch._foreach_add_(counters, 1)


class Convolution(NamedTuple):
    """conv2d(sign(a), weight), or conv2d(a, weight), without a bias."""

    stride: tuple[int, int]
    padding: tuple[int, int]
    dilation: tuple[int, int]
    groups: int
    signs: bool

    @classmethod
    def of(cls, conv: BinaryConv2d) -> Convolution:
        return cls(conv.stride, conv.padding, conv.dilation, conv.groups, conv.activation_bits == 1)

    def inputs(self, a: Tensor) -> Tensor:
        """What is convolved. BN gives -0.0 only where a product is too small for the type, as in float16."""
        return sign(a, negative_zeros=a.dtype == torch.float16) if self.signs else a

    def forward(self, a: Tensor, weight: Tensor) -> Tensor:
        return F.conv2d(self.inputs(a), weight, None, *self[:4])

    def backward(self, grad: Tensor, a: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of a, which it overwrites, and of the weight.

        Under autocast grad has the type of the convolution, a and the weight another.
        """
        inputs, weight = self.inputs(a).to(grad.dtype), weight.to(grad.dtype)
        geometry = *self[:3], False, (0, 0), self.groups
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
