"""Small programs and networks for the tests of the packed form."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from binary_ops import RPReLU
from genotypes import Genotype
from model import ModelConfig, Network, build_model
from packed import KERNELS, PackedNetwork, Program, Step, View, available_kernels

needs_kernel = pytest.mark.parametrize("kernel", KERNELS)

SEVEN = Genotype(
    normal=(
        *(("skip_connect", 0), ("bin_conv_5x5", 1)),
        *(("avg_pool_3x3", 0), ("bin_dil_conv_5x5", 2)),
        *(("max_pool_3x3", 1), ("skip_connect", 3)),
        *(("bin_conv_3x3", 2), ("bin_dil_conv_3x3", 0)),
    ),
    normal_concat=(5, 3, 4),
    reduce=(
        *(("skip_connect", 0), ("skip_connect", 1)),
        *(("avg_pool_3x3", 0), ("bin_dil_conv_5x5", 1)),
        *(("max_pool_3x3", 1), ("avg_pool_3x3", 3)),
        *(("bin_conv_5x5", 0), ("bin_conv_3x3", 2)),
    ),
    reduce_concat=(2, 3, 4, 5),
)
"""All seven operations in both cells, two factorised reductions in a node, states left out of the output."""


def skip_without(kernel: str) -> None:
    if kernel not in available_kernels():
        pytest.skip(f"this processor cannot run the {kernel} path")


def one_step(op: str, c_in: int, c_out: int, tensors: dict, *, add: bool = False, **fields) -> Program:
    """A program around one step on the image: buffer 0 is its source, buffer 1 its target.

    With `add`, the target already holds the image, or at stride 2 its 3x3 maxima.
    """
    stride = fields.get("stride", 1)
    source, target = View(0, 0, c_in), View(1, 0, c_out)
    steps = []
    if add:
        window = {"kernel": 3, "stride": 2, "padding": 1} if stride == 2 else {}
        steps.append(Step("pool", source, target, {}, **window))
    steps.append(Step(op, source, target, tensors, add=add, **fields))
    classifier = {"weight": np.eye(1, c_out, dtype=np.float32), "bias": np.zeros(1, np.float32)}
    steps.append(Step("linear", target, None, classifier))
    return Program(
        buffers=((c_in, 0), (c_out, stride - 1)),
        steps=tuple(steps),
        classes=("only",),
        mean=(0.0,) * c_in,
        std=(1.0,) * c_in,
        image_size=8,
        resize=8,
        config={},
    )


def result_of(program: Program, image: np.ndarray, kernel: str) -> np.ndarray:
    """What the last step before the classifier gives for an image (c, h, w)."""
    return PackedNetwork(program, kernel=kernel, threads=1).trace(image)[-2]


def random_program(rng: np.random.Generator) -> Program:
    """A valid program on images of 3 channels: up to nine steps of all kinds, on few and odd channels, with
    paddings up to the largest allowed, and buffers that are shared, added to and written again."""
    buffers, written, steps = [(3, 0)], [View(0, 0, 3)], []

    def find(level: int, channels: int, *apart: View) -> View | None:
        """`channels` channels at that level that hold something, in none of the views `apart`; or None."""
        views = [
            View(view.buffer, view.first + int(rng.integers(view.channels - channels + 1)), channels)
            for view in written
            if buffers[view.buffer][1] == level and view.channels >= channels
        ]
        views = [view for view in views if not any(map(partial(_overlap, view), apart))]
        return views[rng.integers(len(views))] if views else None

    for _ in range(rng.integers(1, 10)):
        whole = written[rng.integers(len(written))]
        level = buffers[whole.buffer][1]
        source = find(level, int(rng.integers(1, whole.channels + 1)))
        op, stride = rng.choice(("binary", "binary", "float", "pool")), int(rng.integers(1, 3))
        if op == "pool":
            windows = [(3, 1, False), (3, 1, True), (1, 0, False) if stride == 1 else (2, 0, True)]
            kernel, padding, average = windows[rng.integers(3)]
            fields = {"average": average}
            channels, tensors = source.channels, {}
        else:
            divisors = [n for n in range(1, source.channels + 1) if source.channels % n == 0]
            groups = int(rng.choice(divisors))
            channels, per_group = groups * int(rng.integers(1, 6)), source.channels // groups
            kernel = int(rng.choice((1, 3, 5, 7)))
            if op == "float":
                padding, fields = kernel // 2, {"relu": bool(rng.integers(2))}
                tensors = _float_tensors(rng, channels, per_group, kernel)
            else:
                padding = int(rng.integers(-1, 17 if rng.random() < 0.3 else 3))
                fields = {"dilation": int(rng.integers(1, 5))}
                tensors = _binary_tensors(rng, source.channels, channels, per_group, kernel)
                if rng.random() < 0.5:
                    fields["residual"] = find(level + stride - 1, channels)
            fields["groups"] = groups
        inputs = [view for view in (source, fields.get("residual")) if view]
        target = find(level + stride - 1, channels, View(0, 0, 3), *inputs) if rng.random() < 0.5 else None
        if target and ((op == "pool" and kernel != 2) or len(inputs) == 2):
            fields["add"] = bool(rng.integers(2))
        if target is None:
            first, more = (int(n) for n in rng.integers(0, 4, 2))
            target = View(len(buffers), first, channels)
            buffers.append((first + channels + more, level + stride - 1))
        written.append(target)
        shape = {"kernel": kernel, "stride": stride, "padding": padding}
        steps.append(Step(str(op), source, target, tensors, **shape, **fields))
    source = written[rng.integers(len(written))]
    classes = int(rng.integers(1, 5))
    tensors = {
        "weight": rng.standard_normal((classes, source.channels), np.float32),
        "bias": rng.standard_normal(classes, np.float32),
    }
    return Program(
        buffers=tuple(buffers),
        steps=(*steps, Step("linear", source, None, tensors)),
        classes=tuple(f"class {i}" for i in range(classes)),
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.25, 0.3),
        image_size=8,
        resize=8,
        config={},
    )


def _overlap(a: View, b: View) -> bool:
    return a.buffer == b.buffer and a.first < b.first + b.channels and b.first < a.first + a.channels


def _float_tensors(rng: np.random.Generator, filters: int, per_group: int, kernel: int) -> dict:
    return {
        "weight": rng.standard_normal((filters, per_group, kernel, kernel), np.float32) / kernel,
        "bias": rng.standard_normal(filters, np.float32),
    }


def _binary_tensors(
    rng: np.random.Generator, channels: int, filters: int, per_group: int, kernel: int
) -> dict:
    threshold = rng.standard_normal(channels, np.float32)
    threshold[rng.random(channels) < 0.1] = -np.inf
    bits = rng.integers(0, 2, (filters, kernel**2, per_group), np.uint8)
    affine = rng.standard_normal((3, filters), np.float32)
    return {
        "threshold": threshold,
        "bits": np.packbits(bits, axis=2, bitorder="little"),
        "affine": affine / np.array([[kernel], [1], [1]], np.float32),
    }


def network(*, seed: int = 0, **fields) -> Network:
    """A network in evaluation mode with parameters and statistics as spread as those of a trained one."""
    torch.manual_seed(seed)
    model = build_model(ModelConfig(**fields))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -0.3, 1.0)
            nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.2, 0.5)
            if isinstance(module, RPReLU):
                nn.init.normal_(module.shift, 0, 0.3)
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(8, 3, 32, 32))
    return model.eval()


def data_entry(classes: int = 10, *, image_size: int = 32) -> dict:
    """The `data` of a checkpoint."""
    return {
        "set": "cifar10",
        "root": "data",
        "image_size": image_size,
        "classes": [f"class {i}" for i in range(classes)],
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.3],
    }
