"""From a trained W1A1 network to the flat program that packed networks run. Needs torch and model.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from binary_ops import BinaryConv2d, RPReLU
from images import evaluation_resize
from model import Cell, Network
from operations import BinaryUnit, FactorizedReduce
from utils import InputError

from .program import Program, Step, View


def lower(model: Network, data: dict) -> Program:
    """The flat program of a W1A1 network in evaluation mode; `data` is a checkpoint's entry of that name.

    Raises InputError for a network of other bits, or with parameters that are not finite.
    """
    config = model.config
    if (config.weight_bits, config.activation_bits) != (1, 1):
        raise InputError(
            f"only a W1A1 network can be packed; this one is W{config.weight_bits}A{config.activation_bits}: "
            "train its second stage first (--binary)"
        )
    for name, tensor in model.state_dict().items():
        if not torch.isfinite(tensor).all():
            raise InputError(f"{name} is not finite: the training of this network has diverged")
    lowering = _Lowering(model)
    with torch.no_grad():
        lowering.network(model)
    size = data["image_size"]
    return Program(
        buffers=tuple(lowering.buffers),
        steps=tuple(lowering.steps),
        classes=tuple(data["classes"]),
        mean=tuple(data["mean"]),
        std=tuple(data["std"]),
        image_size=size,
        resize=evaluation_resize(size, imagenet=data["set"] == "imagenet"),
        config=config.to_dict(),
    )


class _Lowering:
    """Walks a network in the order of its forward pass, and collects buffers and steps.

    RPReLU's shifts cost nothing and need no format of their own: a buffer holds what the network has less its
    `offsets`, a constant a channel. Sums and both kinds of pool carry it on, and who reads takes it up: a
    threshold, the bias of a unit whose residual it is, the bias of the classifier.
    """

    def __init__(self, model: Network):
        self.buffers: list[tuple[int, int]] = []
        self.steps: list[Step] = []
        self.halves: dict[View, View] = {}
        self.offsets: dict[int, Tensor] = {}
        self.names = {module: name for name, module in model.named_modules()}

    def network(self, model: Network) -> None:
        image = self.buffer(3, 0)
        if model.config.family == "cifar":
            s0 = s1 = self.stem(model.stem, image)
        else:
            s0 = self.stem(model.stem0, image)
            s1 = self.stem(model.stem1, s0)
        for index, cell in enumerate(model.cells):
            s0, s1 = s1, self.cell(cell, s0, s1, reduction=index in model.config.reductions)
        classifier = model.classifier
        bias = classifier.bias.double() + classifier.weight.double() @ self.offset(s1)
        tensors = {"weight": _array(classifier.weight), "bias": _array(bias)}
        self.steps.append(Step("linear", s1, None, tensors, name="classifier"))

    def buffer(self, channels: int, level: int) -> View:
        self.buffers.append((channels, level))
        self.offsets[len(self.buffers) - 1] = torch.zeros(channels, dtype=torch.float64)
        return View(len(self.buffers) - 1, 0, channels)

    def offset(self, view: View) -> Tensor:
        """What its channels lack of the network's values, float64 (channels,)."""
        return self.offsets[view.buffer][view.slice]

    def pool(self, x: View, target: View, name: str, **fields: Any) -> None:
        """A pool, or a copy. Every pixel of its target lacks what its source does."""
        self.offset(target).add_(self.offset(x))
        self.steps.append(Step("pool", x, target, {}, name=name, **fields))

    def level(self, view: View) -> int:
        return self.buffers[view.buffer][1]

    def stem(self, layers: nn.Sequential, x: View) -> View:
        """conv, BN and perhaps ReLU, as often as they come; the BN is folded into the convolution."""
        layers = list(layers)
        for i, conv in enumerate(layers):
            if not isinstance(conv, nn.Conv2d):
                continue
            scale, shift = _affine(layers[i + 1])
            tensors = {
                "weight": _array(conv.weight.double() * scale.view(-1, 1, 1, 1)),
                "bias": _array(shift),
            }
            stride = conv.stride[0]
            y = self.buffer(conv.out_channels, self.level(x) + stride - 1)
            self.steps.append(
                Step(
                    "float",
                    x,
                    y,
                    tensors,
                    kernel=conv.kernel_size[0],
                    stride=stride,
                    padding=conv.padding[0],
                    groups=conv.groups,
                    relu=len(layers) > i + 2 and isinstance(layers[i + 2], nn.ReLU),
                    name=self.names[conv],
                )
            )
            x = y
        return x

    def cell(self, cell: Cell, s0: View, s1: View, *, reduction: bool) -> View:
        states = []
        for preprocess, x in ((cell.preprocess0, s0), (cell.preprocess1, s1)):
            halves = isinstance(preprocess, FactorizedReduce)
            states.append(self.buffer(preprocess.bn2.num_features, self.level(x) + halves))
            self.operation(preprocess, x, states[-1], add=False)
        channels = states[1].channels
        level = self.level(states[1]) + reduction
        out = self.buffer(channels * len(cell.concat), level)
        for node in range(len(cell.operations) // 2):
            state = 2 + node
            if state in cell.concat:
                target = View(out.buffer, channels * cell.concat.index(state), channels)
            else:
                target = self.buffer(channels, level)
            for i in (2 * node, 2 * node + 1):
                self.operation(cell.operations[i], states[cell.sources[i]], target, add=i % 2 == 1)
            states.append(target)
        return out

    def operation(self, operation: nn.Module, x: View, target: View, *, add: bool) -> None:
        name = self.names[operation]
        if isinstance(operation, BinaryUnit):
            residual = None
            if operation.shortcut is not None:
                residual = x if operation.conv.stride[0] == 1 else self.halved(x, name)
            self.binary(operation, operation.conv, x, target, slice(None), residual=residual, add=add)
        elif isinstance(operation, FactorizedReduce):
            whole = self.buffer(target.channels, self.level(target)) if add else target
            half = target.channels // 2
            for i, conv in enumerate((operation.conv_1, operation.conv_2)):
                y = View(whole.buffer, whole.first + i * half, half)
                # the second reads from pixel (1, 1) on: a padding of -1
                self.binary(operation, conv, x, y, slice(i * half, (i + 1) * half), padding=-i)
            if add:
                self.pool(whole, target, name, add=True)
        elif isinstance(operation, nn.Identity):
            self.pool(x, target, name, add=add)
        else:
            average, stride = isinstance(operation.pool, nn.AvgPool2d), operation.pool.stride
            window = {"kernel": 3, "stride": stride, "padding": 1, "average": average}
            self.pool(x, target, name, add=add, **window)

    def halved(self, x: View, name: str) -> View:
        """The 2x2 averages of x: a residual that all convolutions at stride 2 on x share."""
        if x in self.halves:
            return self.halves[x]
        y = self.halves[x] = self.buffer(x.channels, self.level(x) + 1)
        self.pool(x, y, name, kernel=2, stride=2, average=True)
        return y

    def binary(
        self,
        unit: BinaryUnit | FactorizedReduce,
        conv: BinaryConv2d,
        x: View,
        target: View,
        part: slice,
        *,
        padding: int | None = None,
        residual: View | None = None,
        add: bool = False,
    ) -> None:
        """PReLU(BN2(conv(sign(BN1(x)))) + residual) with channels `part` of BN2 and PReLU, or RPReLU."""
        threshold, inverted = sign_thresholds(unit.bn1, self.offset(x))
        weight = conv.effective_weight()
        weight_scale = weight[:, 0, 0, 0].abs()
        if not (weight.abs() == weight_scale.view(-1, 1, 1, 1)).all():
            raise InputError(f"{self.names[conv]}: the weights of a filter are not +s and -s")
        scale, shift = (values[part] for values in _affine(unit.bn2))
        if residual is not None:
            shift = shift + self.offset(residual)
        if isinstance(unit.prelu, RPReLU):
            self.offset(target).add_(unit.prelu.shift[part])
        affine = torch.stack([scale * weight_scale.double(), shift, unit.prelu.weight[part].double()])
        self.steps.append(
            Step(
                "binary",
                x,
                target,
                {
                    "threshold": threshold,
                    "bits": _packed_bits(weight > 0, inverted, conv.groups),
                    "affine": _array(affine),
                },
                residual=residual,
                add=add,
                kernel=conv.kernel_size[0],
                stride=conv.stride[0],
                padding=conv.padding[0] if padding is None else padding,
                dilation=conv.dilation[0],
                groups=conv.groups,
                name=self.names[unit],
            )
        )


def sign_thresholds(bn: nn.BatchNorm2d, offset: Tensor | float = 0.0) -> tuple[np.ndarray, np.ndarray]:
    """sign(BN(x + offset)) as a comparison of x: (thresholds float32, inverted bool), both (channels,).

    The sign is +1 where x >= threshold, or where x < threshold if inverted. A threshold is that of the exact
    BN, worked out in float64 and rounded up to the next float32, so that no float32 x changes sides.
    """
    scale, shift = (values.numpy() for values in _affine(bn))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        zero = -shift / scale - np.asarray(offset)
        threshold = zero.astype(np.float32)
        # scale > 0: the least x >= zero; scale < 0: the least x > zero, and the sign is -1 from there on
        below = (threshold < zero) | ((scale < 0) & (threshold == zero))
        threshold = np.where(below, np.nextafter(threshold, np.float32(np.inf)), threshold)
    inverted = scale < 0
    constant = (scale == 0) | ~(threshold < np.inf)  # also a zero that no float32 reaches from below
    negative = np.where(scale == 0, shift < 0, ~inverted)
    threshold = np.where(constant, np.float32(-np.inf), threshold)
    return threshold, np.where(constant, negative, inverted)


def _packed_bits(positive: Tensor, inverted: np.ndarray, groups: int) -> np.ndarray:
    """Bits of weights (out, in / groups, k, k), uint8 (out, k * k, bytes): channel 8 * byte + i in bit i.

    A weight on an input whose sign is inverted is inverted instead.
    """
    filters, channels = positive.shape[:2]
    bits = positive.numpy().reshape(groups, filters // groups, channels, -1)
    bits = (bits ^ inverted.reshape(groups, 1, channels, 1)).reshape(filters, channels, -1)
    return np.packbits(bits.transpose(0, 2, 1), axis=2, bitorder="little")


def _affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """A BN in evaluation mode as scale * x + shift, float64 (channels,)."""
    scale = bn.weight.detach().double() / (bn.running_var.double() + bn.eps).sqrt()
    return scale, bn.bias.detach().double() - bn.running_mean.double() * scale


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()
