"""Binarisation as its formulas read, in float tensors, by autograd alone: what the lean forms must equal."""

from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from binary_ops import BinaryConv2d


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def plain_sign(x: Tensor) -> Tensor:
    """Bi-Real Net's sign: the gradient is that of the piecewise quadratic x (2 - |x|) on [-1, 1]."""
    inside = x.clamp(-1, 1)
    return straight_through(torch.where(x >= 0, 1.0, -1.0).to(x.dtype), inside * (2 - inside.abs()))


def plain_weight(weight: Tensor, method: str = "plain") -> Tensor:
    """Binary weights with one scale a filter; sign's gradient is that of its argument within (-1, 1)."""
    dims = (1, 2, 3)
    centred = weight - weight.mean(dims, keepdim=True)
    standardised = centred / centred.std(dims, keepdim=True)
    signed = standardised if method == "balanced" else weight
    value = torch.where(signed >= 0, 1.0, -1.0).to(weight.dtype)
    passed = torch.where(signed.abs() < 1, signed, signed.detach())
    return straight_through(value, passed) * standardised.detach().abs().mean(dims, keepdim=True)


def plain_convolution(conv: BinaryConv2d, x: Tensor) -> Tensor:
    """What `conv` computes."""
    if conv.activation_bits == 1:
        x = plain_sign(x)
    weight = plain_weight(conv.weight, conv.weight_binarization) if conv.weight_bits == 1 else conv.weight
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


def use_plain_convolutions(model: nn.Module) -> nn.Module:
    """Make each 1-bit convolution of `model` compute in its plain form, in place."""
    for module in model.modules():
        if isinstance(module, BinaryConv2d):
            module.forward = partial(plain_convolution, module)
    return model
