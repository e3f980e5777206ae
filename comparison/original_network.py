"""A derived network as the original program computes it: its units, in the place of ours.

Its cost is the original's (tests/comparison/test_comparison.py). It has the same cells, stems and heads as
ours.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from binary_ops import BinaryConv2d
from comparison.original_binary import Sign, binary_weight
from model import Network
from operations import BinaryUnit, FactorizedReduce, Pool, pad_to_half


class OriginalConvolution(nn.Module):
    """A convolution of signs, or of what it is given at 32 bits; its weights binary, or real at 32 bits."""

    def __init__(self, ours: BinaryConv2d):
        super().__init__()
        self.weight, self.weight_bits = ours.weight, ours.weight_bits
        self.geometry = ours.stride, ours.padding, ours.dilation, ours.groups

    def forward(self, x: Tensor) -> Tensor:
        weight = binary_weight(self.weight) if self.weight_bits == 1 else self.weight
        return F.conv2d(x, weight, None, *self.geometry)


def sign_before(ours: BinaryConv2d) -> nn.Module:
    return Sign() if ours.activation_bits == 1 else nn.Identity()


class Unit(nn.Module):
    """PReLU(BN2(conv(sign(BN1(x)))) + residual)."""

    def __init__(self, ours: BinaryUnit):
        super().__init__()
        self.bn1, self.bn2, self.prelu, self.shortcut = ours.bn1, ours.bn2, ours.prelu, ours.shortcut
        self.sign, self.conv = sign_before(ours.conv), OriginalConvolution(ours.conv)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv(self.sign(self.bn1(x))))
        if self.shortcut is not None:
            y += self.shortcut(x)
        return self.prelu(y)


class Reduction(nn.Module):
    """PReLU(BN2(cat of two 1x1 convolutions at stride 2, the second shifted by one pixel))."""

    def __init__(self, ours: FactorizedReduce):
        super().__init__()
        self.bn1, self.bn2, self.prelu = ours.bn1, ours.bn2, ours.prelu
        self.sign = sign_before(ours.conv_1)
        self.conv_1, self.conv_2 = OriginalConvolution(ours.conv_1), OriginalConvolution(ours.conv_2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.sign(self.bn1(x))
        y = torch.cat([self.conv_1(x), pad_to_half(self.conv_2(x[:, :, 1:, 1:]), x)], 1)
        return self.prelu(self.bn2(y))


def original_network(network: Network) -> Network:
    """A copy of `network` (weights binarised `plain`) whose units are the original's; names stay."""
    network = copy.deepcopy(network)
    forms = {BinaryUnit: Unit, FactorizedReduce: Reduction, Pool: lambda ours: ours.pool}
    for name, module in list(network.named_modules()):
        if form := forms.get(type(module)):
            parent, _, child = name.rpartition(".")
            setattr(network.get_submodule(parent), child, form(module))
    return network
