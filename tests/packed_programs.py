"""Small programs and networks for the tests of the packed form."""

import numpy as np
import pytest
import torch
from torch import nn

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
