"""Supernet and derived networks, in each form, equal the original: logits, all gradients, BN statistics."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from comparison.original_network import original_network
from comparison.original_search import OriginalSupernet, pairs
from genotypes import GENOTYPES, random_genotype
from kernels import FORMS, accelerate
from kernels.fused_search import moments_of
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet, edge_weights

UNTIED = (
    *(("bin_conv_3x3", 0), ("bin_dil_conv_3x3", 1), ("avg_pool_3x3", 2), ("bin_conv_5x5", 1)),
    *(("skip_connect", 0), ("bin_conv_3x3", 3), ("bin_dil_conv_5x5", 2), ("skip_connect", 1)),
)
"""A cell without a max pool: 1-bit convolutions give it pixels that are equal but for their rounding, and
the rounding then decides which of them gets the gradient."""


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("channels", "layers", "size"),
    [(8, 4, (10, 13)), (16, 3, (9, 13)), (24, 3, (8, 8))],
)
@pytest.mark.parametrize("k", [(8, 4), (4, 8)])
@pytest.mark.parametrize("form", FORMS)
def test_supernet_equals_the_originals(form, channels, layers, size, k):
    torch.manual_seed(channels + layers)
    ours = accelerate(Supernet(SearchConfig(channels, layers, 7, *k)), form).double()
    for parameter in ours.arch_parameters():
        torch.nn.init.normal_(parameter)
    original = OriginalSupernet(ours)
    images, targets = torch.randn(3, 3, *size, dtype=torch.float64), torch.tensor([0, 3, 6])

    for training in (True, False):  # the second sees the statistics that the first has left
        gradients = []
        for network in (ours, original):
            network.train(training).zero_grad()
            logits, _ = network(images)
            F.cross_entropy(logits, targets).backward()
            arch = torch.cat([parameter.grad.flatten() for parameter in ours.arch_parameters()])
            gradients.append((logits.detach(), arch))
        close(*(logits for logits, _ in gradients))
        close(*(arch for _, arch in gradients))
        compared = 0
        for tensor, rows, theirs in pairs(ours, original):
            close(tensor[rows].detach(), theirs.detach())
            if theirs.requires_grad:
                close(tensor.grad[rows], theirs.grad)
                assert theirs.grad.any()
                compared += theirs.numel()
        assert compared == sum(p.numel() for p in ours.weight_parameters())


@pytest.mark.parametrize(
    ("family", "size", "bits"),
    [
        ("cifar", (17, 22), (1, 1)),
        ("cifar", (16, 19), (32, 1)),
        ("cifar", (19, 16), (1, 32)),
        ("imagenet", (37, 50), (1, 1)),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_derived_network_equals_the_originals(form, family, size, bits):
    torch.manual_seed(0)
    config = ModelConfig(
        GENOTYPES["EBNAS"]._replace(normal=UNTIED, reduce=UNTIED),
        family,
        init_channels=8,
        layers=3,
        groups=2,
        num_classes=7,
        auxiliary=True,
        weight_bits=bits[0],
        activation_bits=bits[1],
    )
    ours = accelerate(build_model(config), form).double()
    for name, parameter in ours.named_parameters():
        if parameter.dim() == 1 and "cells" in name:  # else PReLU meets zeros, whose sign is rounding's
            torch.nn.init.normal_(parameter)
    original = original_network(ours)
    images, targets = torch.randn(3, 3, *size, dtype=torch.float64), torch.tensor([0, 3, 6])
    outcomes = []
    for network in (ours, original):
        logits = network(images)
        sum(F.cross_entropy(output, targets) for output in logits).backward()
        gradients = {name: parameter.grad for name, parameter in network.named_parameters()}
        assert all(gradient.any() for gradient in gradients.values())
        evaluated = network.eval()(images)[0]
        outcomes.append((logits, gradients, network.state_dict(), evaluated))
    close(*outcomes)


@pytest.mark.parametrize("drawn", [None, 1])
def test_a_discrete_supernet_is_its_genotype_alone(drawn):
    """The one that it stands for, and another."""
    torch.manual_seed(0)
    network = Supernet(SearchConfig(8, 3, 7)).double().eval()
    for parameter in network.arch_parameters():
        torch.nn.init.normal_(parameter)
    genotype = network.genotype() if drawn is None else random_genotype(drawn)
    images = torch.randn(2, 3, 9, 9, dtype=torch.float64)
    mixed, _ = network(images)
    network.make_discrete(genotype)
    for ours, theirs in zip(network.genotype()[::2], genotype[::2], strict=True):
        for node in range(0, 8, 2):  # the order within a node has no meaning
            assert set(ours[node : node + 2]) == set(theirs[node : node + 2])
    discrete, _ = network(images)
    assert not torch.allclose(mixed, discrete)
    for kind in ("normal", "reduce"):
        alpha, weights = getattr(network, f"alphas_{kind}"), edge_weights(getattr(network, f"betas_{kind}"))
        kept = weights > 0.5
        torch.testing.assert_close(weights, kept.double(), rtol=0, atol=1e-15)
        torch.testing.assert_close(alpha.softmax(1)[kept].amax(1), torch.ones(8).double())
        with torch.no_grad():
            alpha[~kept] = torch.randn(6, 7, dtype=torch.float64)
    close(network(images)[0], discrete)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_moments_of_a_gpu_and_of_a_cpu(dtype):
    """The GPU's, which are one kernel there, computed here."""
    y = (3 + 2 * torch.randn(4, 5, 7, 6)).to(dtype)

    class OnGpu(torch.Tensor):
        device = torch.device("cuda")

    ours, theirs = moments_of(y), moments_of(y.as_subclass(OnGpu))
    for one, other in zip(ours, theirs, strict=True):
        assert one.dtype == other.dtype == torch.float32 and one.shape == (5,)
        torch.testing.assert_close(one, other.as_subclass(torch.Tensor), rtol=1e-6, atol=1e-6)
    expected = nn.BatchNorm2d(5, momentum=1.0, affine=False)
    expected(y.float())
    torch.testing.assert_close(ours[1] * (4 * 42 / (4 * 42 - 1)), expected.running_var, rtol=1e-5, atol=0)


def test_a_supernet_is_one_graph():
    """Nothing in it waits for the host, or makes torch.compile give up."""
    network = accelerate(Supernet(SearchConfig(8, 3)))
    images = torch.randn(2, 3, 8, 8)
    expected, _ = network(images)
    network.compile(backend="eager", fullgraph=True)
    actual, _ = network(images)
    torch.testing.assert_close(actual, expected)
