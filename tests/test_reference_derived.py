"""The derived networks compute what the original program computes: float64, to 1e-9 relative."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from support.reference_values import assert_close, assert_gradient, float64, load
from torch.nn import functional as F

from comparison.original_network import original_network
from genotypes import genotype_from_dict
from kernels import FORMS, accelerate
from model import ModelConfig, build_model
from run.originals import our_name


@pytest.mark.parametrize(
    "form", [*(partial(accelerate, form=name) for name in FORMS), original_network], ids=[*FORMS, "original"]
)
@pytest.mark.parametrize(
    ("file", "family", "bits"),
    [
        ("cifar_w1a1", "cifar", (1, 1)),
        ("cifar_w1a1_nomax", "cifar", (1, 1)),
        ("cifar_w32a1", "cifar", (32, 1)),
        ("imagenet_w1a1", "imagenet", (1, 1)),
        ("imagenet_w1a1_nomax", "imagenet", (1, 1)),
    ],
)
def test_network_equals_the_original(file, family, bits, form):
    """Logits, loss and, where rounding does not decide them, gradients.

    A convolution of 1-bit weights and activations gives many pixels one value up to rounding, which differs
    from one torch and processor to another: it decides which of them a max pool routes the gradient to.
    """
    values = load(file)
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
    network = form(build_model(config).double())
    state = {name: t for name, t in network.state_dict().items() if not name.endswith("num_batches_tracked")}
    theirs = {our_name("ebnas", k[6:]): k[6:] for k in values.files if k.startswith("state.")}
    assert set(state) == set(theirs)
    for name, tensor in state.items():
        tensor.copy_(float64(values, f"state.{theirs[name]}"))
    images = np.random.RandomState(int(values["input_seed"])).randn(*values["input_shape"])
    images, target = torch.from_numpy(images), torch.from_numpy(values["target"])

    logits, auxiliary = network(images)
    loss = F.cross_entropy(logits, target)
    assert_close(logits, values["logits_train"], "logits in training mode")
    if config.auxiliary:
        assert_close(auxiliary, values["aux_train"], "auxiliary logits")
        loss = loss + 0.4 * F.cross_entropy(auxiliary, target)
    assert_close(loss, values["loss"], "loss")
    pairs = config.genotype.normal + config.genotype.reduce
    if bits != (1, 1) or not any(name == "max_pool_3x3" for name, _ in pairs):
        loss.backward()
        for name, parameter in network.named_parameters():
            assert_gradient(parameter.grad, values, theirs[name])

    network.eval()
    with torch.no_grad():
        logits, auxiliary = network(images)
    assert auxiliary is None
    assert_close(logits, values["logits_eval"], "logits in evaluation mode")
