"""Reading the original program's values (tests/reference), and comparing with them in float64."""

import copy
import zlib
from pathlib import Path

import numpy as np
import torch
from plain_forms import use_plain_convolutions
from torch import Tensor, nn
from torch.nn import functional as F

REFERENCE = Path(__file__).parent / "reference"
RELATIVE = 1e-9


def load(name: str) -> np.lib.npyio.NpzFile:
    return np.load(REFERENCE / f"{name}.npz")


def assert_close(ours: Tensor, reference, what: str, relative: float = RELATIVE) -> None:
    """Norm of the difference within `relative` of the reference's norm."""
    reference = torch.as_tensor(reference)
    assert ours.shape == reference.shape, what
    error = (ours.detach() - reference).norm() / reference.norm().clamp_min(1e-300)
    assert error <= relative, f"{what}: relative error {error:.2e}"


def assert_gradient(gradient: Tensor, values, name: str) -> None:
    """Against the reference's gradient of its parameter `name`, or the norm, where only that is kept."""
    if f"grad.{name}" in values:
        assert_close(gradient, values[f"grad.{name}"], f"gradient of {name}")
    else:
        assert_close(gradient.norm(), values[f"gradnorm.{name}"], f"gradient norm of {name}")


def picked_pixels(network: nn.Module, images: Tensor) -> int:
    """A checksum of the pixels that the max pools of `network`, with plain convolutions, pick here.

    Many pixels of a 1-bit convolution are equal up to rounding, which differs from one torch and processor to
    another: the gradients are the reference's only where it decides for the same pixels.
    """
    checksum = 0

    def add(pool: nn.MaxPool2d, inputs: tuple[Tensor], _output: Tensor) -> None:
        nonlocal checksum
        _, picked = F.max_pool2d(*inputs, pool.kernel_size, pool.stride, pool.padding, return_indices=True)
        checksum = zlib.crc32(picked.numpy().tobytes(), checksum)

    plain = use_plain_convolutions(copy.deepcopy(network))
    for module in plain.modules():
        if isinstance(module, nn.MaxPool2d):
            module.register_forward_hook(add)
    with torch.no_grad():
        plain(images)
    return checksum


def float64(values, name: str) -> Tensor:
    return torch.from_numpy(values[name].astype(np.float64))
