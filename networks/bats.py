"""BATS's networks of 1-bit cells (Bulat et al., BATS: Binary ArchitecTure Search, ECCV 2020).

A unit is PReLU(binconv(sign(BN(x)))), in a cell with groups, a channel shuffle behind and, at stride 1, its
input added. Blocks and binarisation are those of the authors' code (1adrianb/binary-networks-pytorch,
51bdeee), which has neither genotype, widths nor training: its rows here are stand-ins.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from binary_ops import BinaryConv2d, clipped_sign
from model import AuxiliaryHead, CellNetwork
from networks.config import BaselineConfig
from operations import Pool, Zero, conv_bn_relu, pad_to_half
from utils import InputError, nearest_multiples

SHUFFLE_GROUPS = 4

CONVOLUTIONS = {  # name: (kernel size, padding, dilation)
    "sep_conv_3x3": (3, 1, 1),
    "sep_conv_5x5": (5, 2, 1),
    "sep_conv_7x7": (7, 3, 1),
    "dil_conv_3x3": (3, 2, 2),
    "dil_conv_5x5": (5, 4, 2),
}


@dataclass(frozen=True)
class BatsConfig(BaselineConfig):
    """`variant`: `learned`, the authors' recipe for ImageNet: a filter is sign(w), its output times a learned
    alpha. `mean`: the library's other recipe, in which it is sign(w) * mean |w| besides."""

    system = "bats"
    allowed_bits = ((1, 1), (32, 1), (1, 32))
    variants = ("learned", "mean")

    groups: int = 12
    auxiliary: bool = False

    def __post_init__(self):
        super().__post_init__()
        channels = self.init_channels
        step = math.lcm(self.groups, SHUFFLE_GROUPS)
        if channels % step:
            raise InputError(
                f"init_channels {channels} is no multiple of {step}, which {self.groups} groups and a "
                f"shuffle in {SHUFFLE_GROUPS} need; try {nearest_multiples(channels, step)}"
            )
        stem = self.stem_groups
        if self.family == "imagenet" and channels // 2 % stem:
            raise InputError(
                f"init_channels {channels}: half of it does not divide into the stem's {stem} groups "
                "(init_channels // 20); give another"
            )

    @property
    def stem_groups(self) -> int:
        """How many groups ImageNet's second and third convolutions have."""
        return max(1, self.init_channels // 20)

    @property
    def conv_settings(self) -> dict:
        """The keyword arguments of a BatsConv2d."""
        return {
            "weight_bits": self.weight_bits,
            "activation_bits": self.activation_bits,
            "scales_by_mean": self.variant == "mean",
        }

    def build(self) -> BatsNetwork:
        return BatsNetwork(self)


class BatsConv2d(BinaryConv2d):
    """A convolution of signs (0 stays 0) by sign(w), times a learned `alpha` (1, out, 1, 1) per filter;
    `scales_by_mean`: by sign(w) * mean |w|, through which the gradient flows too (XNOR-Net's scale)."""

    def __init__(self, *sizes: int, scales_by_mean: bool, **settings):
        super().__init__(*sizes, **settings)
        self.scales_by_mean = scales_by_mean
        self.alpha = nn.Parameter(torch.ones(1, self.out_channels, 1, 1))

    @property
    def filter_scales(self) -> int:
        return 0  # alpha is a parameter, and mean |w| may be folded into it

    def binarized_input(self, x: Tensor) -> Tensor:
        return clipped_sign(x, zeros=True)

    def effective_weight(self) -> Tensor:
        if self.weight_bits == 32:
            return self.weight
        if self.scales_by_mean:
            return clipped_sign(self.weight) * self.weight.abs().mean((1, 2, 3), keepdim=True)
        return clipped_sign(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.alpha


class BatsUnit(nn.Module):
    """PReLU(binconv(sign(BN(x)))) [shuffled] [+ x], (n, c_in, h, w) -> (n, c_out, h', w').

    A cell's convolutions shuffle; x is added where the size stays.
    """

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int,
        *,
        settings: dict,
        shuffles: bool = False,
        **geometry: int,
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(c_in)
        self.conv = BatsConv2d(c_in, c_out, kernel_size, **geometry, **settings)
        self.prelu = nn.PReLU(c_out)
        self.shuffles = shuffles
        self.residual = c_in == c_out and self.conv.stride == (1, 1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu(self.conv(self.bn(x)))
        if self.shuffles:
            y = channel_shuffle(y, SHUFFLE_GROUPS)
        return y + x if self.residual else y


def channel_shuffle(x: Tensor, groups: int) -> Tensor:
    """Channel i * (c / groups) + j of x (n, c, h, w) goes to j * groups + i."""
    if x.is_contiguous(memory_format=torch.channels_last):  # in this order in memory, as before
        x = x.permute(0, 2, 3, 1)
        return x.unflatten(3, (groups, -1)).transpose(3, 4).flatten(3).permute(0, 3, 1, 2)
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class BatsFactorizedReduce(nn.Module):
    """PReLU(cat of two 1x1 binary convolutions at stride 2 of sign(BN(x)), the second shifted by one pixel).

    (n, c_in, h, w) -> (n, c_out, ceil(h/2), ceil(w/2)); each half gives c_out / 2 channels.
    """

    def __init__(self, c_in: int, c_out: int, *, settings: dict):
        super().__init__()
        self.bn = nn.BatchNorm2d(c_in)
        self.conv_1 = BatsConv2d(c_in, c_out // 2, 1, stride=2, **settings)
        self.conv_2 = BatsConv2d(c_in, c_out // 2, 1, stride=2, **settings)
        self.prelu = nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn(x)
        y = torch.cat([self.conv_1(x), pad_to_half(self.conv_2(x[:, :, 1:, 1:]), x)], dim=1)
        return self.prelu(y)


class BatsAuxiliaryHead(AuxiliaryHead):
    """AvgPool 5x5, BN, 1x1 conv to 128, PReLU, BN, 2x2 conv to 768, PReLU, linear."""

    def make_features(self, channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.BatchNorm2d(channels),
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.PReLU(128),
            nn.BatchNorm2d(128),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.PReLU(768),
        )


class BatsNetwork(CellNetwork):
    """BATS's network: stems, auxiliary head and classifier in full precision."""

    auxiliary_head_type = BatsAuxiliaryHead

    def imagenet_stems(self, channels: int) -> tuple[list[nn.Module], list[nn.Module]]:
        groups = self.config.stem_groups
        return (
            # the last ReLU is the first layer of the authors' stem1, but it works in place
            [
                *conv_bn_relu(3, channels // 2, stride=2),
                *conv_bn_relu(channels // 2, channels, stride=2, groups=groups),
            ],
            conv_bn_relu(channels, channels, stride=2, groups=groups, last_relu=False),
        )

    def preprocess(self, c_in: int, channels: int) -> nn.Module:
        return BatsUnit(c_in, channels, 1, settings=self.config.conv_settings)

    def reduce(self, c_in: int, channels: int) -> nn.Module:
        return BatsFactorizedReduce(c_in, channels, settings=self.config.conv_settings)

    def operation(self, name: str, channels: int, stride: int) -> nn.Module:
        if name == "none":
            return Zero(stride)
        if name == "skip_connect":
            return nn.Identity() if stride == 1 else self.reduce(channels, channels)
        if name in ("max_pool_3x3", "avg_pool_3x3"):
            return Pool(name[:3], stride)
        kernel_size, padding, dilation = CONVOLUTIONS[name]
        return BatsUnit(
            channels,
            channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=self.config.groups,
            shuffles=True,
            settings=self.config.conv_settings,
        )
