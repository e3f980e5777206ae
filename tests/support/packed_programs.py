"""Small programs and networks for the tests of the packed form."""

from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from binary_ops import RPReLU
from genotypes import Genotype
from model import ModelConfig, Network, build_model
from networks import lowering
from networks.bats import BatsConv2d, BatsFactorizedReduce, BatsUnit
from networks.bnas import BnasUnit
from operations import BinaryUnit, FactorizedReduce
from packed import KERNELS, PackedNetwork, Program, Step, View, available_kernels

UNITS = BinaryUnit | FactorizedReduce | BnasUnit | BatsUnit | BatsFactorizedReduce

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
            shuffles = [n for n in (2, 3, 4) if source.channels % n == 0]
            if kernel == 1 and shuffles:
                fields["shuffle"] = int(rng.choice(shuffles))
            channels, tensors = source.channels, {}
        else:
            divisors = [n for n in range(1, source.channels + 1) if source.channels % n == 0]
            groups = int(rng.choice(divisors))
            channels, per_group = groups * int(rng.integers(1, 6)), source.channels // groups
            kernel = int(rng.choice((1, 3, 5, 7)))
            if op == "float":
                if stride == 2 and rng.random() < 0.3:
                    kernel = 2
                padding, fields = (kernel - 1) // 2, {"relu": bool(rng.integers(2))}
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
    return spread(build_model(ModelConfig(**fields)))


def spread(model: nn.Module, size: int = 32) -> nn.Module:
    """`model` in evaluation mode, with parameters and statistics as spread as those of a trained one."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            nn.init.uniform_(module.weight, -0.3, 1.0)
            nn.init.normal_(module.bias, 0, 0.3)
        elif isinstance(module, nn.PReLU):
            nn.init.uniform_(module.weight, -0.2, 0.5)
            if isinstance(module, RPReLU):
                nn.init.normal_(module.shift, 0, 0.3)
        elif isinstance(module, BatsConv2d):
            nn.init.normal_(module.alpha, 0.05, 0.02)
    with torch.no_grad():
        for _ in range(2):
            model.train()(torch.randn(8, 3, size, size))
    return model.eval()


def float_logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)[0]


def assert_only_rounding(model: nn.Module, net: PackedNetwork, image: torch.Tensor) -> None:
    """That the first signs in which the two forms differ are of values that rounding took across a threshold.

    Up to there, all values agree; after it, the forms compute different things.
    """
    lowered = lowering._Lowering(model)
    with torch.no_grad():
        lowered.network(model)
    signed = {}  # name of a unit: what its convolution takes the sign of, in the float form
    hooks = [
        norm_of(module).register_forward_hook(lambda _, __, y, name=name: signed.update({name: y[0]}))
        for name, module in model.named_modules()
        if isinstance(module, UNITS)
    ]
    float_logits(model, image[None])
    for hook in hooks:
        hook.remove()

    buffers = {0: image.numpy()}
    for step, result in zip(net.program.steps, net.trace(image.numpy()), strict=True):
        if step.op == "binary" and step.name in signed:
            bn = norm_of(model.get_submodule(step.name))
            scale, shift = (values.view(-1, 1, 1) for values in lowering._affine(bn))
            x = torch.from_numpy(buffers[step.source.buffer][step.source.slice].copy())
            x = x.double() + lowered.offset(step.source).view(-1, 1, 1)
            ours, theirs = x * scale + shift, signed[step.name].double()
            assert (ours - theirs).abs().max() < 1e-4, f"{step.name}: values differ before any sign does"
            differing = ours.sign() != theirs.sign()
            if differing.any():
                assert theirs[differing].abs().max() < 1e-5
                return
        if step.target is not None:
            channels = net.program.buffers[step.target.buffer][0]
            buffer = buffers.setdefault(
                step.target.buffer, np.zeros((channels, *result.shape[1:]), np.float32)
            )
            buffer[step.target.slice] = result
    pytest.fail("the logits differ, but no sign does")


def norm_of(unit: nn.Module) -> nn.BatchNorm2d:
    """What gives a unit's convolution its input."""
    return unit.bn1 if hasattr(unit, "bn1") else unit.bn


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
