"""Reading the original program's values (tests/reference), and comparing with them in float64."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

REFERENCE = Path(__file__).parents[1] / "reference"
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


def float64(values, name: str) -> Tensor:
    return torch.from_numpy(values[name].astype(np.float64))
