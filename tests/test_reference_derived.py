"""The derived networks compute what the original program computes: float64, to 1e-9 relative."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from genotypes import genotype_from_dict
from model import ModelConfig, build_model

REFERENCE = Path(__file__).parent / "reference"
RELATIVE = 1e-9


def original_name(name: str) -> str:
    """This program's parameter name -> the original's."""
    name = name.replace(".operations.", "._ops.")
    # the original keeps the auxiliary pool as features.0
    return re.sub(
        r"auxiliary_head\.features\.(\d+)", lambda m: f"auxiliary_head.features.{int(m[1]) + 1}", name
    )


def assert_close(ours: torch.Tensor, reference: np.ndarray, what: str) -> None:
    reference = torch.from_numpy(np.asarray(reference))
    error = (ours.detach() - reference).norm() / reference.norm().clamp_min(1e-300)
    assert error <= RELATIVE, f"{what}: relative error {error:.2e}"


def load_state(network: torch.nn.Module, values, rename) -> None:
    """Every reference value is used, and every tensor of the network is set, the step counters apart."""
    state = network.state_dict()
    unused = {key.removeprefix("state.") for key in values.files if key.startswith("state.")}
    for name, tensor in state.items():
        if name.endswith("num_batches_tracked"):
            continue
        source = rename(name)
        tensor.copy_(torch.from_numpy(values[f"state.{source}"].astype(np.float64)))
        unused.discard(source)
    assert not unused
    network.load_state_dict(state)


@pytest.mark.parametrize(
    ("file", "family", "bits"),
    [("cifar_w1a1", "cifar", (1, 1)), ("cifar_w32a1", "cifar", (32, 1)), ("imagenet_w1a1", "imagenet", (1, 1))],
)
def test_network_equals_the_original(file, family, bits):
    values = np.load(REFERENCE / f"{file}.npz")
    config = ModelConfig(
        genotype=genotype_from_dict(json.loads(str(values["genotype"]))),
        family=family,
        init_channels=int(values["init_channels"]),
        layers=int(values["layers"]),
        groups=int(values["groups"]),
        auxiliary="aux_train" in values,
        weight_bits=bits[0],
        activation_bits=bits[1],
    )
    network = build_model(config).double()
    load_state(network, values, original_name)
    images = np.random.RandomState(int(values["input_seed"])).randn(*values["input_shape"])
    images, target = torch.from_numpy(images), torch.from_numpy(values["target"])

    logits, auxiliary = network(images)
    loss = F.cross_entropy(logits, target)
    assert_close(logits, values["logits_train"], "logits in training mode")
    if config.auxiliary:
        assert_close(auxiliary, values["aux_train"], "auxiliary logits")
        loss = loss + 0.4 * F.cross_entropy(auxiliary, target)
    assert_close(loss, values["loss"], "loss")

    loss.backward()
    for name, parameter in network.named_parameters():
        source = original_name(name)
        if f"grad.{source}" in values:
            assert_close(parameter.grad, values[f"grad.{source}"], f"gradient of {name}")
        else:
            assert_close(parameter.grad.norm(), values[f"gradnorm.{source}"], f"gradient norm of {name}")

    network.eval()
    with torch.no_grad():
        logits, auxiliary = network(images)
    assert auxiliary is None
    assert_close(logits, values["logits_eval"], "logits in evaluation mode")
