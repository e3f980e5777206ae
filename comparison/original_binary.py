"""The original program's signs and its binary convolution, as it computes them and with what they keep.

Only where a value is exactly 0 do they differ from binary_ops.py: their sign of it is 0, ours +1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function


class ActivationSign(Function):
    """sign(x); backward: grad * max(0, 2 - 2|x|)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return (2 - 2 * x.abs()).clamp(min=0) * grad.clone()


class WeightSign(Function):
    """sign(w); backward: grad where |w| < 1, else 0."""

    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return torch.sign(w)

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        grad = grad.clone()
        grad[w.ge(1)] = 0
        grad[w.le(-1)] = 0
        return grad


class Sign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return ActivationSign.apply(x)


def binary_weight(weight: Tensor) -> Tensor:
    """sign(w) times the mean of |(w - mean) / std| over the filter, (out, in, h, w) -> the same shape."""
    dims = (1, 2, 3)
    centred = weight - weight.mean(dims, keepdim=True)
    standardised = centred / centred.std(dims, keepdim=True)
    scale = standardised.abs().mean(3, keepdim=True).mean(2, keepdim=True).mean(1, keepdim=True).detach()
    return WeightSign.apply(weight) * scale
