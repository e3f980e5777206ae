"""DCP-NAS's networks (Li et al., DCP-NAS: Discrepant child-parent neural architecture search for 1-bit CNNs,
IJCV 2023), the successor of CP-NAS by the same group; of CP-NAS itself nothing is public.

A convolution has modulated weights: sign(w) times a learned scale per filter. Most read real activations;
only the pointwise half of a separable convolution signs its input. Blocks are those of the authors' code
(YanjingLi0202/DCP-NAS, e801d50).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from binary_ops import BinaryConv2d, binary_sign
from model import CellNetwork
from networks.config import BaselineConfig
from operations import Pool, conv_bn_relu, pad_to_half
from utils import InputError

MODULATION = 0.02
"""Of a filter's scale, |M| times this."""

RECONSTRUCTION = 1e-4
"""Weight of the loss between real and binary weights, |w - B|^2 / 2, that the gradients contain."""

EPS = 1e-3
"""Of the BN behind convolutions and pools."""


@dataclass(frozen=True)
class DcpNasConfig(BaselineConfig):
    """The CIFAR form is ours: EBNAS's stem before DCP-NAS's cells; the authors' code has ImageNet's only."""

    system = "dcp"
    counts_global_mean = False
    allowed_bits = ((1, 1), (32, 1))

    def __post_init__(self):
        super().__post_init__()
        if self.init_channels % 2:
            raise InputError(
                f"init_channels {self.init_channels} is odd; a factorised reduction has two halves"
            )

    def build(self) -> DcpNasNetwork:
        return DcpNasNetwork(self)


class _ModulatedWeight(torch.autograd.Function):
    """B = sign(w) * 0.02 * |M|. Backward, with G the gradient of B: to w G * |M|, not clipped and without the
    0.02; to M the sum of G * w over the filter, without the sign of M. As the authors' code."""

    @staticmethod
    def forward(ctx, weight, modulation):
        ctx.save_for_backward(weight, modulation)
        return weight.sign() * (MODULATION * modulation.abs())

    @staticmethod
    def backward(ctx, grad):
        weight, modulation = ctx.saved_tensors
        return grad * modulation.abs(), (grad * weight).sum((1, 2, 3), keepdim=True)


class ModulatedConv2d(BinaryConv2d):
    """A convolution by sign(w) * 0.02 * |M|, M learned per filter; at `activation_bits` 1, of signs."""

    def __init__(self, *sizes: int, **settings):
        super().__init__(*sizes, **settings)
        self.modulation = nn.Parameter(torch.randn(self.out_channels, 1, 1, 1))

    @property
    def filter_scales(self) -> int:
        return 0  # modulation is a parameter

    def binarized_input(self, x: Tensor) -> Tensor:
        return binary_sign(x, zeros=True)

    def effective_weight(self) -> Tensor:
        return self.weight if self.weight_bits == 32 else _ModulatedWeight.apply(self.weight, self.modulation)

    @torch.no_grad()
    def add_reconstruction_gradient(self, factor: Tensor | float) -> None:
        """Add to the gradients those of the reconstruction loss, times `factor`: with e = w - B, 1e-4 * e to
        w's, and to M's -1e-4 * the filter's sum of e * sign(w) * 0.02."""
        if self.weight.grad is None:
            return
        sign = self.weight.sign()
        error = (self.weight - sign * (MODULATION * self.modulation.abs())) * (RECONSTRUCTION * factor)
        self.weight.grad += error
        self.modulation.grad -= (error * sign).sum((1, 2, 3), keepdim=True) * MODULATION


class DcpUnit(nn.Module):
    """PReLU(BN(conv1x1(BN(x)))), real activations: preprocessing, (n, c_in, h, w) -> (n, c_out, h, w)."""

    def __init__(self, c_in: int, c_out: int, *, weight_bits: int):
        super().__init__()
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv = ModulatedConv2d(c_in, c_out, 1, weight_bits=weight_bits, activation_bits=32)
        self.bn2 = nn.BatchNorm2d(c_out, eps=EPS)
        self.prelu = nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        return self.prelu(self.bn2(self.conv(self.bn1(x))))


class DcpFactorizedReduce(nn.Module):
    """PReLU(BN(cat of two 1x1 convolutions at stride 2 of BN(x), the second shifted by one pixel))."""

    def __init__(self, c_in: int, c_out: int, *, weight_bits: int):
        super().__init__()
        bits = {"weight_bits": weight_bits, "activation_bits": 32}
        self.bn1 = nn.BatchNorm2d(c_in)
        self.conv_1 = ModulatedConv2d(c_in, c_out // 2, 1, stride=2, **bits)
        self.conv_2 = ModulatedConv2d(c_in, c_out // 2, 1, stride=2, **bits)
        self.bn2 = nn.BatchNorm2d(c_out, eps=EPS)
        self.prelu = nn.PReLU(c_out)

    def forward(self, x: Tensor) -> Tensor:
        x = self.bn1(x)
        y = torch.cat([self.conv_1(x), pad_to_half(self.conv_2(x[:, :, 1:, 1:]), x)], dim=1)
        return self.prelu(self.bn2(y))


class DcpConvolution(nn.Module):
    """A depthwise convolution of real activations, and a pointwise one of their signs:

    y = PReLU(BN(depthwise(BN(x)))); PReLU(BN(pointwise(sign(y))) [+ x, at stride 1]).
    """

    def __init__(self, channels: int, kernel_size: int, *, stride: int, dilation: int, weight_bits: int):
        super().__init__()
        self.bn0 = nn.BatchNorm2d(channels, eps=EPS)
        self.depthwise = ModulatedConv2d(
            channels,
            channels,
            kernel_size,
            stride=stride,
            padding=kernel_size // 2 * dilation,
            dilation=dilation,
            groups=channels,
            weight_bits=weight_bits,
            activation_bits=32,
        )
        self.bn1 = nn.BatchNorm2d(channels, eps=EPS)
        self.prelu1 = nn.PReLU(channels)
        self.pointwise = ModulatedConv2d(channels, channels, 1, weight_bits=weight_bits, activation_bits=1)
        self.bn2 = nn.BatchNorm2d(channels, eps=EPS)
        self.prelu2 = nn.PReLU(channels)
        self.residual = stride == 1

    def forward(self, x: Tensor) -> Tensor:
        y = self.prelu1(self.bn1(self.depthwise(self.bn0(x))))
        y = self.bn2(self.pointwise(y))
        return self.prelu2(y + x if self.residual else y)


class DcpNasNetwork(CellNetwork):
    """DCP-NAS's network: the stem and the classifier in full precision, no auxiliary head."""

    def imagenet_stems(self, channels: int) -> tuple[list[nn.Module], list[nn.Module]]:
        return (
            # the last ReLU is the first layer of the authors' stem1, but it works in place
            [*conv_bn_relu(3, channels // 2, stride=2), *conv_bn_relu(channels // 2, channels, stride=2)],
            conv_bn_relu(channels, channels, stride=2, last_relu=False),
        )

    def preprocess(self, c_in: int, channels: int) -> nn.Module:
        return DcpUnit(c_in, channels, weight_bits=self.config.weight_bits)

    def reduce(self, c_in: int, channels: int) -> nn.Module:
        return DcpFactorizedReduce(c_in, channels, weight_bits=self.config.weight_bits)

    def operation(self, name: str, channels: int, stride: int) -> nn.Module:
        if name == "skip_connect":
            return nn.Identity() if stride == 1 else self.reduce(channels, channels)
        if name in ("max_pool_3x3", "avg_pool_3x3"):
            return nn.Sequential(Pool(name[:3], stride), nn.BatchNorm2d(channels, eps=EPS))
        settings = {"weight_bits": self.config.weight_bits}
        size = int(name[-1])
        if name.startswith("dil"):
            return DcpConvolution(channels, size, stride=stride, dilation=2, **settings)
        return nn.Sequential(
            DcpConvolution(channels, size, stride=stride, dilation=1, **settings),
            DcpConvolution(channels, size, stride=1, dilation=1, **settings),
        )

    def register_update_rule(self, optimizer: torch.optim.Optimizer) -> None:
        layers = [m for m in self.modules() if isinstance(m, ModulatedConv2d) and m.weight_bits == 1]

        def before_step(optimizer: torch.optim.Optimizer, *_) -> None:
            # a fused optimiser under a GradScaler takes gradients that are still scaled
            scale = getattr(optimizer, "grad_scale", None)
            for layer in layers:
                layer.add_reconstruction_gradient(1.0 if scale is None else scale)

        optimizer.register_step_pre_hook(before_step)
