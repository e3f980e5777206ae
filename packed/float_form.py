"""The same program on PyTorch in float32: the form without a compiler, and the kernel's reference."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .program import Program, Step, View, unpack_bits


class FloatForm:
    """A program with its bits as floats of +1 and -1; runs whatever `read_program` accepts."""

    def __init__(self, program: Program):
        self.program = program
        self.weights = []
        for step in program.steps:
            tensors = {name: torch.from_numpy(tensor) for name, tensor in step.tensors.items()}
            if step.op == "binary":
                tensors["weight"] = torch.from_numpy(unpack_bits(step))
            self.weights.append(tensors)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._run(torch.from_numpy(images))[-1].numpy()

    def trace(self, image: np.ndarray) -> list[np.ndarray]:
        *features, logits = (output[0].numpy() for output in self._run(torch.from_numpy(image)[None]))
        return [*features, logits[:, None, None]]

    def _run(self, images: Tensor) -> list[Tensor]:
        """The target of every step, (n, channels, h, w); the logits (n, classes) last."""
        outputs, buffers = [], {0: images}
        with torch.inference_mode():
            for step, tensors in zip(self.program.steps, self.weights, strict=True):
                x, residual = (_read(buffers, view) for view in (step.source, step.residual))
                y = run_step(step, tensors, x, residual)
                if step.target is not None:
                    if step.target.buffer not in buffers:
                        channels = self.program.buffers[step.target.buffer][0]
                        buffers[step.target.buffer] = y.new_zeros((y.shape[0], channels, *y.shape[2:]))
                    y = _read(buffers, step.target) + y if step.add else y
                    buffers[step.target.buffer][:, step.target.slice] = y
                outputs.append(y)
        return outputs


def _read(buffers: dict[int, Tensor], view: View | None) -> Tensor | None:
    return None if view is None else buffers[view.buffer][:, view.slice]


def run_step(step: Step, tensors: dict[str, Tensor], x: Tensor, residual: Tensor | None) -> Tensor:
    """What a step computes from its source x (n, channels, h, w), before it is added to its target."""
    if step.op == "linear":
        return x.mean((2, 3)) @ tensors["weight"].T + tensors["bias"]
    if step.op == "pool":
        if step.shuffle > 1:
            return x.unflatten(1, (step.shuffle, -1)).transpose(1, 2).flatten(1, 2)
        if step.kernel == 1:
            return x
        if step.average:
            ceil = {"ceil_mode": step.kernel == 2, "count_include_pad": False}
            return F.avg_pool2d(x, step.kernel, step.stride, step.padding, **ceil)
        return F.max_pool2d(x, step.kernel, step.stride, step.padding)
    if step.op == "float":
        if step.kernel == 2:  # blocks beyond an odd edge hold zeros
            x = F.pad(x, (0, x.shape[3] % 2, 0, x.shape[2] % 2))
        y = F.conv2d(x, tensors["weight"], tensors["bias"], step.stride, step.padding, 1, step.groups)
        return y.relu() if step.relu else y
    x = torch.where(x >= tensors["threshold"].view(-1, 1, 1), 1.0, -1.0)
    before, left_out = max(step.padding, 0), max(-step.padding, 0)  # a padding of -1 leaves out a pixel
    after = max((step.kernel - 1) * step.dilation - step.padding, 0)
    height, width = (-(-size // step.stride) for size in x.shape[2:])
    x = F.pad(x, (before, after, before, after))[:, :, left_out:, left_out:]
    dot = F.conv2d(x, tensors["weight"], None, step.stride, 0, step.dilation, step.groups)
    dot = dot[:, :, :height, :width]
    scale, bias, slope = tensors["affine"].view(3, -1, 1, 1)
    y = dot * scale + bias
    y = y if residual is None else y + residual
    return torch.where(y > 0, y, y * slope)
