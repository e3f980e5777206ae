"""Binarisation: signs with straight-through estimators, weight scaling, the 1-bit convolution, and RPReLU."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from flags.choices import WEIGHT_BINARIZATIONS
from utils import InputError


def sign(x: Tensor, *, negative_zeros: bool = True) -> Tensor:
    """+1 where x >= 0 (also -0.0), -1 where x < 0, NaN where x is NaN; never 0, so that one bit holds it.

    An x without `negative_zeros` spares a pass.
    """
    # clamp to [1, 1] keeps NaN; adding 0 turns -0.0 into +0.0. Vectorised on a CPU, where torch.where is not
    return x.clamp(1, 1).copysign_(x + 0.0 if negative_zeros else x)


class _QuadraticSign(Function):
    @staticmethod
    def forward(ctx, x, zeros):
        ctx.save_for_backward(x)
        return x.sign() if zeros else sign(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * torch.rsub(x.abs(), 2, alpha=2).relu_(), None


def binary_sign(x: Tensor, *, zeros: bool = False) -> Tensor:
    """Sign of an activation, any shape.

    Forward: +1 where x >= 0, else -1, never 0; with `zeros`, as in DCP-NAS, 0 where x is 0. NaN stays NaN.
    Backward: grad * max(0, 2 - 2|x|) (Liu et al., Bi-Real Net, ECCV 2018, eq. 5).
    """
    return _QuadraticSign.apply(x, zeros)


class _ClippedSign(Function):
    @staticmethod
    def forward(ctx, x, zeros):
        ctx.save_for_backward(x.abs() < 1)  # a byte an element
        return x.sign() if zeros else sign(x)

    @staticmethod
    def backward(ctx, grad):
        (passed,) = ctx.saved_tensors
        return grad * passed, None


def clipped_sign(x: Tensor, *, zeros: bool = False) -> Tensor:
    """Sign of a weight, or of an activation of BNAS and BATS, any shape.

    Forward: +1 where x >= 0, else -1; with `zeros`, as in the activations of BNAS and BATS, 0 where x is 0.
    Backward: grad where |x| < 1, else 0 (Hubara et al., Binarized Neural Networks, 2016).
    """
    return _ClippedSign.apply(x, zeros)


def binarize_weight(weight: Tensor, method: str = "plain") -> Tensor:
    """Binary weights with one scale a filter: (out, ...) -> the same shape, each filter of +s and -s.

    s = mean |(w - mean w) / std w| over the filter, std unbiased; no gradient flows through s.
    `plain`: sign(w) * s, as in the EBNAS program. Backward: grad * s where |w| < 1, else 0.
    `balanced`: sign((w - mean w) / std w) * s, whose gradient, passed where the standardised weight is
    within (-1, 1), flows on through the standardisation (Qin et al., IR-Net, CVPR 2020, eq. 5).
    A filter with no spread (constant, or of a single weight) has s = 1, and is not standardised.
    Raises InputError on another `method`.
    """
    if method not in WEIGHT_BINARIZATIONS:
        raise InputError(f"unknown weight binarization {method!r}; choose from {WEIGHT_BINARIZATIONS}")
    latent = weight if method == "balanced" else weight.detach()
    if latent.dtype in (torch.float16, torch.bfloat16):
        latent = latent.float()
    dims = tuple(range(1, weight.dim()))
    if latent[0].numel() == 1:
        return clipped_sign(weight)
    # std of the centred weight, in this order, as the original: the scale is then the same to the last bit.
    # It decides ties: a 1-bit convolution gives many pixels one value up to rounding, and which of them a
    # max pool picks, and so routes the gradient to, is that rounding's choice.
    centred = latent - latent.mean(dims, keepdim=True)
    std = centred.std(dims, keepdim=True)
    if method == "plain":
        signed, scale = weight, (centred / std).abs_().mean(dims, keepdim=True)
        # below 1, but of a constant filter: there it is 0/0, or a quotient of rounding errors
        scale = scale.nan_to_num_(nan=1.0).clamp_max_(1)
    else:
        # a constant filter may leave a spread of rounding errors, which must not be blown up
        spread = std > torch.finfo(latent.dtype).eps * latent.abs().amax(dims, keepdim=True)
        signed = torch.where(spread, centred, weight) / torch.where(spread, std, 1)
        scale = torch.where(spread, signed.detach().abs().mean(dims, keepdim=True), 1)
    return (clipped_sign(signed) * scale).to(weight.dtype)


class BinaryConv2d(nn.Conv2d):
    """A convolution without bias whose weights and input activations have 1 or 32 bits each.

    (n, in, h, w) -> (n, out, h', w'), arguments as nn.Conv2d. With `activation_bits` 1 it takes the sign of
    its input itself (`binary_sign`), with `weight_bits` 1 of its weights (`binarize_weight`): so W1A1,
    W1A32, W32A1 and W32A32 are one class, and `weight` always holds the latent real weights.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        weight_bits: int = 1,
        activation_bits: int = 1,
        weight_binarization: str = "plain",
    ):
        super().__init__(
            in_channels,
            out_channels,
            kernel_size,
            stride=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            bias=False,
        )
        if weight_bits not in (1, 32) or activation_bits not in (1, 32):
            raise InputError(
                f"bits are 1 or 32, not {weight_bits} (weights) and {activation_bits} (activations)"
            )
        self.weight_bits = weight_bits
        self.activation_bits = activation_bits
        self.weight_binarization = weight_binarization

    def binarized_input(self, x: Tensor) -> Tensor:
        return binary_sign(x)

    @property
    def filter_scales(self) -> int:
        """How many scales 1-bit filters are stored with, beside the parameters."""
        return self.out_channels

    def effective_weight(self) -> Tensor:
        """The weights that the convolution uses: binary and scaled, or the latent ones at 32 bits."""
        if self.weight_bits == 1:
            return binarize_weight(self.weight, self.weight_binarization)
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        stride = self.stride
        if self.kernel_size == (1, 1):  # reads only every other pixel at stride 2: take these first
            x, stride = x[:, :, :: stride[0], :: stride[1]], (1, 1)
        geometry = stride, self.padding, self.dilation, self.groups
        if self.activation_bits == 1:
            x = self.binarized_input(x)
        return F.conv2d(x, self.effective_weight(), None, *geometry)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, W{self.weight_bits}A{self.activation_bits}"


class RPReLU(nn.PReLU):
    """PReLU(x) + shift, one slope and one shift a channel, (n, channels, h, w); the shifts start at 0.

    ReActNet's RPReLU (Liu et al., ECCV 2020), f(x) = PReLU(x - gamma) + zeta: `shift` is zeta, and -gamma is
    the bias of the BN before it.
    """

    def __init__(self, channels: int):
        super().__init__(channels)
        self.shift = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor) -> Tensor:
        y = super().forward(x)
        return y + self.shift.to(y.dtype).view(-1, 1, 1)


ACTIVATION_MODULES = {"prelu": nn.PReLU, "rprelu": RPReLU}
