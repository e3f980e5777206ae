"""Supernet and derived networks equal the original's: logits, all gradients, BN statistics, in float64."""

import pytest
import torch
from torch.nn import functional as F

from comparison.original_network import original_network
from comparison.original_search import OriginalSupernet, pairs
from genotypes import GENOTYPES
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet

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
def test_supernet_equals_the_originals(channels, layers, size):
    torch.manual_seed(channels + layers)
    ours = Supernet(SearchConfig(channels, layers, 7)).double()
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
def test_derived_network_equals_the_originals(family, size, bits):
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
    ours = build_model(config).double()
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


def test_a_supernet_is_one_graph():
    """Nothing in it waits for the host, or makes torch.compile give up."""
    network = Supernet(SearchConfig(8, 3))
    images = torch.randn(2, 3, 8, 8)
    expected, _ = network(images)
    network.compile(backend="eager", fullgraph=True)
    actual, _ = network(images)
    torch.testing.assert_close(actual, expected)
