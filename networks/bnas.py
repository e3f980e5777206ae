"""BNAS's networks of 1-bit cells (Kim et al., Learning architectures for binary networks, ECCV 2020).

A unit is ReLU(conv(sign(BN(x)))). A cell has zero operations, and adds its newer input to its output: as it
is, or where it reduces, by a full-precision convolution. Blocks, weights and their update rule are those of
the authors' code (gistvision/bnas, 675ecc7).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from binary_ops import BinaryConv2d, clipped_sign
from model import Cell, CellNetwork
from networks.config import BaselineConfig
from operations import CONVOLUTIONS, Pool, Zero, conv_bn_relu
from utils import InputError


@dataclass(frozen=True)
class BnasConfig(BaselineConfig):
    """`variant`: `as_run`, as the authors' code runs: the network's last two convolutions keep real weights,
    for the rule that numbers those to binarise does not count the two shortcuts. `intended`: they do not."""

    system = "bnas"
    allowed_bits = ((1, 1),)
    variants = ("as_run", "intended")

    def __post_init__(self):
        super().__post_init__()
        if len(self.genotype.normal_concat) != len(self.genotype.reduce_concat):
            raise InputError(
                "BNAS adds a cell's input to its output: both cells must concatenate as many nodes"
            )
        if self.family == "imagenet" and self.init_channels % 2:
            raise InputError(f"init_channels {self.init_channels} is odd; the stem has half as many")

    def build(self) -> BnasNetwork:
        return BnasNetwork(self)

    def check_image_size(self, size: int) -> None:
        step = 4 if self.family == "cifar" else 32
        if size % step:
            raise InputError(
                f"image size {size}: BNAS's shortcuts halve even sizes only; give a multiple of {step}"
            )


class _BinaryWeight(torch.autograd.Function):
    """sign(w) * mean |w| over the filter, of the latent w. The gradient is passed on as it is: G, that of the
    binary weight, is what is clipped; the rest of the rule follows in `apply_update_rule`."""

    @staticmethod
    def forward(ctx, weight):
        latent = latent_weight(weight)
        return latent.sign() * latent.abs().mean((1, 2, 3), keepdim=True)

    @staticmethod
    def backward(ctx, grad):
        return grad


def latent_weight(weight: Tensor) -> Tensor:
    """Stored weights (out, in, k, k) centred over the input channels and clamped to [-1, 1]."""
    return (weight - weight.mean(1, keepdim=True)).clamp_(-1, 1)


class BnasConv2d(BinaryConv2d):
    """A convolution of signs by sign(w) * mean |w|, w the centred and clamped weight.

    A sign is 0 where its input is 0: a channel that is 0 everywhere, whose BN has a bias of 0, is left out.
    """

    def binarized_input(self, x: Tensor) -> Tensor:
        return clipped_sign(x, zeros=True)

    def effective_weight(self) -> Tensor:
        return _BinaryWeight.apply(self.weight) if self.weight_bits == 1 else self.weight

    @torch.no_grad()
    def apply_update_rule(self) -> None:
        """Centre and clamp the weight w in place, and turn its gradient from G, that of sign(w) * m, into
        (1 - 1 / in) * (n * m * G + sign(w) * sum of sign(w) * G), with sum and mean m = mean |w| over the n
        weights of a filter: the gradient that BNAS gives its optimiser."""
        weight, grad = self.weight, self.weight.grad
        weight.copy_(latent_weight(weight))
        if grad is None:
            return
        sign, filters = weight.sign(), (1, 2, 3)
        scale = weight.abs().mean(filters, keepdim=True).mul_(weight[0].numel())
        along = (sign * grad).sum(filters, keepdim=True)
        grad.mul_(scale).addcmul_(sign, along).mul_(1 - 1 / self.in_channels)


class BnasUnit(nn.Module):
    """ReLU(conv(sign(BN(x)))), (n, c_in, h, w) -> (n, c_out, h', w')."""

    def __init__(
        self,
        c_in: int,
        c_out: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        affine: bool = True,
    ):
        super().__init__()
        self.bn = nn.BatchNorm2d(c_in, affine=affine)
        self.conv = BnasConv2d(c_in, c_out, kernel_size, stride=stride, padding=padding, dilation=dilation)
        self.relu = nn.ReLU(inplace=True)  # of the convolution's result, which nothing else reads

    def forward(self, x: Tensor) -> Tensor:
        return self.relu(self.conv(self.bn(x)))


class BnasCell(Cell):
    """A cell that adds `shortcut` of its newer input to its output; the network's first cell has none."""

    def __init__(self, *parts, **settings):
        super().__init__(*parts, **settings)
        self.shortcut: nn.Module | None = None

    def forward(self, s0: Tensor, s1: Tensor, *settings) -> Tensor:
        y = super().forward(s0, s1, *settings)
        return y if self.shortcut is None else y.add_(self.shortcut(s1))


class BnasNetwork(CellNetwork):
    """BNAS's network. Image sizes that halve evenly at each reduction, for its shortcut rounds down."""

    cell_type = BnasCell

    def __init__(self, config: BnasConfig):
        super().__init__(config)
        if config.variant == "as_run":
            for conv in self.convolutions()[-2:]:
                if isinstance(conv, BnasConv2d):
                    conv.weight_bits = 32

    def convolutions(self) -> list[nn.Conv2d]:
        """All convolutions of cells in the authors' order: shortcuts stand before a cell's operations."""
        found = []
        for cell in self.cells:
            parts = (cell.preprocess0, cell.preprocess1, cell.shortcut, cell.operations)
            found += [
                m for part in parts if part is not None for m in part.modules() if isinstance(m, nn.Conv2d)
            ]
        return found

    def cifar_stem(self, channels: int) -> list[nn.Module]:
        return [nn.BatchNorm2d(3), nn.Conv2d(3, 3 * channels, 3, padding=1, bias=False), nn.ReLU()]

    def imagenet_stems(self, channels: int) -> tuple[list[nn.Module], list[nn.Module]]:
        return (
            [
                *conv_bn_relu(3, channels // 2, stride=2),
                *conv_bn_relu(channels // 2, channels, stride=2, last_relu=False),
            ],
            [nn.ReLU(), *conv_bn_relu(channels, channels, stride=2, last_relu=False)],
        )

    def preprocess(self, c_in: int, channels: int) -> nn.Module:
        return BnasUnit(c_in, channels, 1)

    def reduce(self, c_in: int, channels: int) -> nn.Module:
        return BnasUnit(c_in, channels, 3, stride=2, padding=1, affine=self.config.family == "imagenet")

    def operation(self, name: str, channels: int, stride: int) -> nn.Module:
        if name == "none":
            return Zero(stride)
        if name in ("max_pool_3x3", "avg_pool_3x3"):
            return Pool(name[:3], stride)
        kernel_size, padding, dilation = CONVOLUTIONS[name]
        return BnasUnit(channels, channels, kernel_size, stride=stride, padding=padding, dilation=dilation)

    def make_cell(self, c_older: int, c_newer: int, channels: int, **reductions: bool) -> Cell:
        cell = super().make_cell(c_older, c_newer, channels, **reductions)
        if self.cells:
            cell.shortcut = nn.Identity()
            if reductions["reduction"]:
                halved = nn.Conv2d(c_newer, cell.out_channels, 2, stride=2)
                cell.shortcut = nn.Sequential(nn.BatchNorm2d(c_newer), halved)
        return cell

    def register_update_rule(self, optimizer: torch.optim.Optimizer) -> None:
        layers = [m for m in self.modules() if isinstance(m, BnasConv2d) and m.weight_bits == 1]

        def before_step(*_) -> None:
            for layer in layers:
                layer.apply_update_rule()

        optimizer.register_step_pre_hook(before_step)
