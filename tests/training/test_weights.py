"""Decay, clip and moving average of weights equal their formulas in float64, step by step."""

import pytest
import torch

from binary_ops import BinaryConv2d
from genotypes import GENOTYPES
from model import ModelConfig, build_model
from training.weights import clip_latent_weights, decaying_groups, moving_average


@pytest.fixture
def model():
    torch.manual_seed(0)
    fields = {"init_channels": 4, "layers": 3, "groups": 2, "auxiliary": True, "activation": "rprelu"}
    return build_model(ModelConfig(GENOTYPES["EBNAS"], **fields)).double()


def step(model, optimizer):
    """One on random images; the gradients of all parameters, by name."""
    optimizer.zero_grad()
    logits, auxiliary = model(torch.randn(4, 3, 16, 16, dtype=torch.float64))
    (logits.square().mean() + auxiliary.square().mean()).backward()
    optimizer.step()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def test_only_convolutions_and_linear_layers_decay(model):
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = torch.optim.SGD(decaying_groups(model, 0.3), lr=0.1)
    gradients = step(model, optimizer)
    decaying = {name for name, parameter in before.items() if parameter.dim() > 1}
    assert {name.split(".")[-2] for name in before.keys() - decaying} >= {"bn1", "bn2", "prelu", "classifier"}
    for name, after in model.named_parameters():
        gradient = gradients[name] + (0.3 * before[name] if name in decaying else 0)
        torch.testing.assert_close(after, before[name] - 0.1 * gradient, rtol=1e-12, atol=1e-14)


def test_latent_weights_are_clipped_and_no_others(model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(40)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    clip_latent_weights(model, optimizer)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    gradients = step(model, optimizer)
    end, clipped = 1 - 2.0**-53, 0
    for name, after in model.named_parameters():
        expected = before[name] - 1e-3 * gradients[name]
        if ".conv" in name:
            clipped += (expected.abs() > 1).sum().item()
            expected = expected.clamp(-end, end)
        torch.testing.assert_close(after.detach(), expected, rtol=1e-12, atol=0)
    assert clipped > 100


def test_clipped_weights_come_back():
    """At an end the estimator still passes a gradient."""
    conv = BinaryConv2d(2, 2, 3)
    optimizer = torch.optim.SGD(conv.parameters(), lr=10.0)
    clip_latent_weights(conv, optimizer)
    for direction in (-1, 1):
        optimizer.zero_grad()
        (direction * conv.effective_weight()).sum().backward()
        optimizer.step()
        assert (conv.weight == -direction * (1 - 2.0**-24)).all()


def test_the_average_follows_parameters_and_statistics(model):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    average = moving_average(model, optimizer, 0.8)
    expected = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for _ in range(3):
        step(model, optimizer)
        for name, tensor in model.state_dict().items():
            floats = tensor.is_floating_point()
            expected[name] = 0.8 * expected[name] + 0.2 * tensor if floats else tensor.clone()
    assert not average.training and model.training
    torch.testing.assert_close(dict(average.state_dict()), expected, rtol=1e-12, atol=1e-14)
    assert (average.classifier.weight != model.classifier.weight).all()
