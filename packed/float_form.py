"""The same program on PyTorch in float32: the form without a compiler, the kernel's reference, and what other
engines get."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .program import Program, Step, View, unpack_bits


class FloatForm(nn.Module):
    """A program with its bits as floats of +1 and -1; runs whatever `read_program` accepts.

    Images float32 (n, channels, h, w) -> logits (n, classes). Its tensors are buffers: there is nothing to
    train. `fold` puts the scales of a 1-bit convolution's filters into its weights, as a deployment in float
    would; its sums are then no longer exact.
    """

    def __init__(self, program: Program, *, fold: bool = False):
        super().__init__()
        self.program = program
        self.steps = nn.ModuleList(FloatStep(step, fold=fold) for step in program.steps)
        self.eval()

    def forward(self, images: Tensor) -> Tensor:
        return self._run(images)[-1]

    @torch.inference_mode()
    def logits(self, images: np.ndarray) -> np.ndarray:
        return self(torch.from_numpy(images)).numpy()

    @torch.inference_mode()
    def trace(self, image: np.ndarray) -> list[np.ndarray]:
        """The tensor (channels, h, w) that each step wrote, for one image (3, h, w)."""
        *features, logits = (output[0].numpy() for output in self._run(torch.from_numpy(image)[None]))
        return [*features, logits[:, None, None]]

    def _run(self, images: Tensor) -> list[Tensor]:
        """The target of every step, (n, channels, h, w); the logits (n, classes) last."""
        outputs, buffers = [], [Pieces() for _ in self.program.buffers]
        buffers[0].write(View(0, 0, images.shape[1]), images)
        for step, module in zip(self.program.steps, self.steps, strict=True):
            x, residual = (view and buffers[view.buffer].read(view) for view in (step.source, step.residual))
            y = module(x, residual)
            if step.target is not None:
                target = buffers[step.target.buffer]
                y = target.read(step.target) + y if step.add else y
                target.write(step.target, y)
            outputs.append(y)
        return outputs


class Pieces:
    """A buffer as the pieces that steps wrote: nothing is written in place, which exporters cannot follow.

    A piece has `channels`; pieces can be joined and cut along them.
    """

    def __init__(self):
        self.pieces: dict[int, Any] = {}  # by first channel; none overlaps another

    @staticmethod
    def channels(piece: Tensor) -> int:
        return piece.shape[1]

    def join(self, pieces: list[Tensor]) -> Tensor:
        return torch.cat(pieces, 1)

    def cut(self, piece: Tensor, first: int, end: int) -> Tensor:
        return piece[:, first:end]

    def read(self, view: View) -> Any:
        piece = self.pieces.get(view.first)
        if piece is not None and self.channels(piece) == view.channels:
            return piece
        between = self._between(view)
        start = view.first - between[0]
        return self.cut(self.join([self.pieces[first] for first in between]), start, start + view.channels)

    def write(self, view: View, y: Any) -> None:
        end = view.first + view.channels
        for first in self._between(view):
            piece = self.pieces.pop(first)
            channels = self.channels(piece)
            if first < view.first:
                self.pieces[first] = self.cut(piece, 0, view.first - first)
            if first + channels > end:
                self.pieces[end] = self.cut(piece, end - first, channels)
        self.pieces[view.first] = y

    def _between(self, view: View) -> list[int]:
        """The first channels of the pieces that overlap a view."""
        return sorted(
            first
            for first, piece in self.pieces.items()
            if first < view.first + view.channels and view.first < first + self.channels(piece)
        )


class FloatStep(nn.Module):
    """What a step computes from its source x (n, channels, h, w), before it is added to its target."""

    def __init__(self, step: Step, *, fold: bool = False):
        super().__init__()
        self.step, self.fold = step, fold
        tensors = {name: torch.from_numpy(tensor) for name, tensor in step.tensors.items()}
        if step.op == "binary":
            weight, (scale, bias, slope) = torch.from_numpy(unpack_bits(step)), tensors["affine"]
            if fold:
                weight = weight * scale.view(-1, 1, 1, 1)
            tensors = {"threshold": tensors["threshold"].view(-1, 1, 1), "weight": weight}
            tensors |= {"scale": scale.view(-1, 1, 1), "bias": bias, "slope": slope}
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    def forward(self, x: Tensor, residual: Tensor | None) -> Tensor:
        step = self.step
        if step.op == "linear":
            return x.mean((2, 3)) @ self.weight.T + self.bias
        if step.op == "pool":
            return _pool(step, x)
        if step.op == "float":
            if step.kernel == 2:  # blocks beyond an odd edge hold zeros
                x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
            y = F.conv2d(x, self.weight, self.bias, step.stride, step.padding, 1, step.groups)
            return y.relu() if step.relu else y
        x = torch.where(x >= self.threshold, 1.0, -1.0)
        before, left_out = max(step.padding, 0), max(-step.padding, 0)  # a padding of -1 leaves out a pixel
        after = max((step.kernel - 1) * step.dilation - step.padding, 0)
        height, width = (-(-size // step.stride) for size in x.shape[2:])
        x = F.pad(x, (before, after, before, after))[:, :, left_out:, left_out:]
        convolution = (step.stride, 0, step.dilation, step.groups)
        y = F.conv2d(x, self.weight, self.bias if self.fold else None, *convolution)[:, :, :height, :width]
        y = y if self.fold else y * self.scale + self.bias.view(-1, 1, 1)
        y = y if residual is None else y + residual
        return F.prelu(y, self.slope)


def _pool(step: Step, x: Tensor) -> Tensor:
    if step.shuffle > 1:
        return x.unflatten(1, (step.shuffle, -1)).transpose(1, 2).flatten(1, 2)
    if step.kernel == 1:
        return x
    if step.average:
        ceil = {"ceil_mode": step.kernel == 2, "count_include_pad": False}
        return F.avg_pool2d(x, step.kernel, step.stride, step.padding, **ceil)
    return F.max_pool2d(x, step.kernel, step.stride, step.padding)
