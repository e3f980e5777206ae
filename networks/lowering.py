"""From a trained W1A1 network to the flat program that packed networks run: EBNAS's, BNAS's and BATS's. Needs
torch and the project's networks.
"""

from __future__ import annotations

from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from binary_ops import BinaryConv2d, RPReLU
from model import Cell, CellNetwork
from networks.bats import SHUFFLE_GROUPS, BatsFactorizedReduce, BatsUnit
from networks.bnas import BnasUnit
from operations import BinaryUnit, FactorizedReduce, Zero
from packed.picture import evaluation_resize
from packed.program import Program, Step, View
from utils import InputError

LARGEST_KERNEL = 7  # of a convolution of a program


def lower(model: nn.Module, data: dict) -> Program:
    """The flat program of a W1A1 network in evaluation mode; `data` is a checkpoint's entry of that name.

    Raises InputError for a network of other bits, with parameters that are not finite, or with a layer that
    a program has no step for.
    """
    config = model.config
    if not isinstance(model, CellNetwork):
        first = next(name for name, module in model.named_modules() if isinstance(module, nn.Conv2d))
        raise InputError(
            f"{first} is in full precision, as is all of {config.system}: there are no bits to pack"
        )
    if (config.weight_bits, config.activation_bits) != (1, 1):
        raise InputError(
            f"only a W1A1 network can be packed; this one is W{config.weight_bits}A{config.activation_bits}: "
            "train its second stage first (--binary)"
        )
    for name, module in model.named_modules():
        if isinstance(module, BinaryConv2d) and module.activation_bits != 1:
            raise InputError(
                f"{name} convolves real activations, not signs, as most layers of {config.system}: there "
                "is no packed form of it"
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
        value_range=tuple(data["value_range"]) if "value_range" in data else None,
    )


class _Lowering:
    """Walks a network in the order of its forward pass, and collects buffers and steps.

    RPReLU's shifts cost nothing and need no format of their own: a buffer holds what the network has less its
    `offsets`, a constant a channel. Sums and both kinds of pool carry it on, and who reads takes it up: a
    threshold, the bias of a unit whose residual it is, the bias of the classifier.
    """

    def __init__(self, model: nn.Module):
        self.buffers: list[tuple[int, int]] = []
        self.steps: list[Step] = []
        self.halves: dict[View, View] = {}
        self.offsets: dict[int, Tensor] = {}
        self.names = {module: name for name, module in model.named_modules()}

    def network(self, model: CellNetwork) -> None:
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

    def float_step(
        self, name: str, weight: Tensor, bias: Tensor, x: View, target: View, **fields: Any
    ) -> None:
        """A convolution in float: weight (out, in / groups, k, k), bias (out,)."""
        tensors = {"weight": _array(weight), "bias": _array(bias)}
        self.steps.append(Step("float", x, target, tensors, kernel=weight.shape[2], name=name, **fields))

    def stem(self, layers: nn.Sequential, x: View) -> View:
        """conv, perhaps BN and ReLU, as often as they come: BN is folded into the convolution. Before the
        first convolution BN or ReLU may stand; they are a 1x1 convolution of each channel."""
        layers = list(layers)
        for i, layer in enumerate(layers):
            name, bn = self.names[layer], next(iter(layers[i + 1 :]), None)
            if isinstance(layer, nn.Conv2d):
                scale, shift = _affine(bn) if isinstance(bn, nn.BatchNorm2d) else _identity(len(layer.weight))
                stride = layer.stride[0]
                y = self.buffer(layer.out_channels, self.level(x) + stride - 1)
                self.float_step(
                    name,
                    layer.weight.double() * scale.view(-1, 1, 1, 1),
                    shift,
                    x,
                    y,
                    stride=stride,
                    padding=layer.padding[0],
                    groups=layer.groups,
                    relu=any(isinstance(after, nn.ReLU) for after in layers[i + 1 : i + 3]),
                )
            elif i == 0:
                scale, shift = _affine(layer) if isinstance(layer, nn.BatchNorm2d) else _identity(x.channels)
                y = self.buffer(x.channels, self.level(x))
                relu = isinstance(layer, nn.ReLU)
                self.float_step(name, scale.view(-1, 1, 1, 1), shift, x, y, groups=x.channels, relu=relu)
            else:
                continue
            x = y
        return x

    def cell(self, cell: Cell, s0: View, s1: View, *, reduction: bool) -> View:
        states = []
        channels = cell.out_channels // len(cell.concat)
        for preprocess, x in ((cell.preprocess0, s0), (cell.preprocess1, s1)):
            states.append(self.buffer(channels, max(self.level(x), self.level(s1))))
            self.operation(preprocess, x, states[-1], add=False)
        level = self.level(states[1]) + reduction
        out = self.buffer(channels * len(cell.concat), level)
        for node in range(len(cell.operations) // 2):
            state = 2 + node
            if state in cell.concat:
                target = View(out.buffer, channels * cell.concat.index(state), channels)
            else:
                target = self.buffer(channels, level)
            written = False
            for i in (2 * node, 2 * node + 1):
                if not isinstance(cell.operations[i], Zero):
                    self.operation(cell.operations[i], states[cell.sources[i]], target, add=written)
                    written = True
            if not written:
                self.zeros(target, states[1], self.names[cell.operations[2 * node]])
            states.append(target)
        if (shortcut := getattr(cell, "shortcut", None)) is not None:
            self.pool(self.shortcut(shortcut, s1, out), out, self.names[shortcut], add=True)
        return out

    def zeros(self, target: View, like: View, name: str) -> None:
        """Write zeros: the sign of a channel of `like`, of the target's size or twice that, times 0."""
        tensors = {
            "threshold": np.full(1, -np.inf, np.float32),
            "bits": np.ones((target.channels, 1, 1), np.uint8),
            "affine": np.zeros((3, target.channels), np.float32),
        }
        stride = self.level(target) - self.level(like) + 1
        self.steps.append(
            Step("binary", like._replace(channels=1), target, tensors, stride=stride, name=name)
        )

    def shortcut(self, shortcut: nn.Module, s1: View, like: View) -> View:
        """What a cell of BNAS adds to its output: s1, or BN and a convolution of blocks of 2 x 2 pixels."""
        if isinstance(shortcut, nn.Identity):
            return s1
        bn, conv = shortcut
        scale, shift = _affine(bn)
        weight = conv.weight.double()
        bias = conv.bias.double() + (weight * shift.view(1, -1, 1, 1)).sum((1, 2, 3))
        y = self.buffer(like.channels, self.level(like))
        self.float_step(self.names[conv], weight * scale.view(1, -1, 1, 1), bias, s1, y, stride=2)
        return y

    def operation(self, operation: nn.Module, x: View, target: View, *, add: bool) -> None:
        name = self.names[operation]
        if add and isinstance(operation, FactorizedReduce | BatsFactorizedReduce | BnasUnit):
            whole = self.buffer(target.channels, self.level(target))
            self.operation(operation, x, whole, add=False)
            self.pool(whole, target, name, add=True)
        elif type(getattr(operation, "prelu", None)) not in (NoneType, nn.PReLU, RPReLU):
            activation = type(operation.prelu).__name__
            raise InputError(f"{name}: {activation} has no packed form, as PReLU and RPReLU have")
        elif isinstance(operation, BinaryUnit):
            residual = None
            if operation.shortcut is not None:
                residual = x if operation.conv.stride[0] == 1 else self.halved(x, name)
            self.binary(operation, operation.conv, x, target, slice(None), residual=residual, add=add)
        elif isinstance(operation, FactorizedReduce | BatsFactorizedReduce):
            half = target.channels // 2
            for i, conv in enumerate((operation.conv_1, operation.conv_2)):
                y, part = View(target.buffer, target.first + i * half, half), slice(i * half, (i + 1) * half)
                # the second reads from pixel (1, 1) on: a padding of -1
                if isinstance(operation, FactorizedReduce):
                    self.binary(operation, conv, x, y, part, padding=-i)
                else:
                    self.bats(operation, conv, x, y, part, padding=-i)
        elif isinstance(operation, BatsUnit):
            y = target
            if operation.shuffles:
                y = self.buffer(target.channels, self.level(target))
            self.bats(operation, operation.conv, x, y, slice(None))
            if operation.shuffles:
                self.pool(y, target, name, add=add, shuffle=SHUFFLE_GROUPS)
            if operation.residual:
                self.pool(x, target, name, add=True)
        elif isinstance(operation, BnasUnit):
            self.bnas(operation, x, target)
        elif isinstance(operation, nn.Identity):
            self.pool(x, target, name, add=add)
        elif not hasattr(operation, "pool"):
            raise InputError(f"{name}: {type(operation).__name__} has no packed form; it cannot be exported")
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
        scale, shift = (values[part] for values in _affine(unit.bn2))
        if residual is not None:
            shift = shift + self.offset(residual)
        if isinstance(unit.prelu, RPReLU):
            self.offset(target).add_(unit.prelu.shift[part])
        affine = scale, shift, unit.prelu.weight[part].double()
        fields = _geometry(conv, padding) | {"residual": residual, "add": add}
        self.convolve(self.names[unit], unit.bn1, conv.effective_weight(), x, target, affine, **fields)

    def bats(
        self,
        unit: BatsUnit | BatsFactorizedReduce,
        conv: BinaryConv2d,
        x: View,
        target: View,
        part: slice,
        *,
        padding: int | None = None,
    ) -> None:
        """PReLU(alpha * conv(sign(BN(x)))) with channels `part` of PReLU."""
        affine = conv.alpha.flatten().double(), 0, unit.prelu.weight[part].double()
        weight = conv.effective_weight()
        self.ternary(self.names[unit], unit.bn, weight, x, target, affine, **_geometry(conv, padding))

    def bnas(self, unit: BnasUnit, x: View, target: View) -> None:
        """ReLU(conv(sign(BN(x)))). A convolution with real weights takes its signs as floats."""
        name, conv = self.names[unit], unit.conv
        weight = conv.effective_weight()
        if conv.weight_bits == 1:
            self.ternary(name, unit.bn, weight, x, target, (1, 0, 0), **_geometry(conv))
            return
        signs = self.buffer(x.channels, self.level(x))
        alike = torch.ones(x.channels, 1, 1, 1)
        self.ternary(name, unit.bn, alike, x, signs, (1, 0, 1), groups=x.channels)
        if (dilation := conv.dilation[0]) > 1:  # zeros between the weights
            dilated = (weight.shape[2] - 1) * dilation + 1
            if dilated > LARGEST_KERNEL:
                raise InputError(
                    f"{name} is dilated, {dilated} x {dilated} pixels, and has real weights (the variant "
                    f"as_run): packed networks have float convolutions of up to {LARGEST_KERNEL} x "
                    f"{LARGEST_KERNEL}"
                )
            apart = weight.new_zeros(*weight.shape[:2], dilated, dilated)
            apart[:, :, ::dilation, ::dilation] = weight
            weight = apart
        fields = {"stride": conv.stride[0], "padding": conv.padding[0], "relu": True}
        self.float_step(self.names[conv], weight, torch.zeros(len(weight)), signs, target, **fields)

    def ternary(
        self,
        name: str,
        bn: nn.BatchNorm2d,
        weight: Tensor,
        x: View,
        target: View,
        affine: tuple[Tensor | float, ...],
        **fields: Any,
    ) -> None:
        """`convolve`, but a sign of 0 is 0: half the sum of two signs, of x >= 0 and of x > 0.

        Where no channel's BN maps 0 to 0 it is the one step that it is elsewhere, for nothing else that BN
        maps to 0 is met but by rounding. What is 0 is met often: ReLU's result, and a zero operation's.
        """
        if (_affine(bn)[1] != 0).all():
            self.convolve(name, bn, weight, x, target, affine, **fields)
            return
        scale, bias, slope = affine
        half = self.buffer(target.channels, self.level(target))
        self.convolve(name, bn, weight, x, half, (scale / 2, 0, 1), **fields)
        affine = (scale / 2, bias, slope)
        self.convolve(name, bn, weight, x, target, affine, residual=half, strict=True, **fields)

    def convolve(
        self,
        name: str,
        bn: nn.BatchNorm2d,
        weight: Tensor,
        x: View,
        target: View,
        affine: tuple[Tensor | float, ...],
        *,
        strict: bool = False,
        groups: int = 1,
        **fields: Any,
    ) -> None:
        """A 1-bit step: scale * conv(sign(BN(x)), weight) + bias [+ residual], times slope where below 0.

        A filter of `weight` is of +s and -s; `affine` is scale, bias, slope. `strict`: BN(x) = 0 gives -1.
        """
        threshold, inverted = sign_thresholds(bn, self.offset(x), strict=strict)
        weight_scale = weight[:, 0, 0, 0].abs()
        if not (weight.abs() == weight_scale.view(-1, 1, 1, 1)).all():
            raise InputError(f"{name}: the weights of a filter are not +s and -s")
        scale, *others = (torch.as_tensor(each).double().expand(len(weight)) for each in affine)
        tensors = {
            "threshold": threshold,
            "bits": _packed_bits(weight > 0, inverted, groups),
            "affine": _array(torch.stack([scale * weight_scale.double(), *others])),
        }
        shape = {"kernel": weight.shape[2], "groups": groups}
        self.steps.append(Step("binary", x, target, tensors, name=name, **shape, **fields))


def _geometry(conv: BinaryConv2d, padding: int | None = None) -> dict[str, int]:
    """The fields of a step that convolves as `conv`, or with another padding."""
    return {
        "stride": conv.stride[0],
        "padding": conv.padding[0] if padding is None else padding,
        "dilation": conv.dilation[0],
        "groups": conv.groups,
    }


def sign_thresholds(
    bn: nn.BatchNorm2d, offset: Tensor | float = 0.0, *, strict: bool = False
) -> tuple[np.ndarray, np.ndarray]:
    """sign(BN(x + offset)) as a comparison of x: (thresholds float32, inverted bool), both (channels,).

    The sign is +1 where x >= threshold, or where x < threshold if inverted. A threshold is that of the exact
    BN, worked out in float64 and rounded up to the next float32, so that no float32 x changes sides. A BN of
    0 has the sign +1, or -1 if `strict`.
    """
    scale, shift = (values.numpy() for values in _affine(bn))
    with np.errstate(divide="ignore", over="ignore", invalid="ignore"):
        zero = -shift / scale - np.asarray(offset)
        threshold = zero.astype(np.float32)
        # scale > 0: the least x >= zero; scale < 0: the least x > zero, and the sign is -1 from there on;
        # strict the other way round
        beyond = scale > 0 if strict else scale < 0
        below = (threshold < zero) | (beyond & (threshold == zero))
        threshold = np.where(below, np.nextafter(threshold, np.float32(np.inf)), threshold)
    inverted = scale < 0
    constant = (scale == 0) | ~(threshold < np.inf)  # also a zero that no float32 reaches from below
    negative = np.where(scale == 0, shift <= 0 if strict else shift < 0, ~inverted)
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
    weight, bias = (bn.weight.double(), bn.bias.double()) if bn.affine else _identity(bn.num_features)
    scale = weight.detach() / (bn.running_var.double() + bn.eps).sqrt()
    return scale, bias.detach() - bn.running_mean.double() * scale


def _identity(channels: int) -> tuple[Tensor, Tensor]:
    return torch.ones(channels, dtype=torch.float64), torch.zeros(channels, dtype=torch.float64)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().numpy()
