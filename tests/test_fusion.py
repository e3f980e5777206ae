"""The fused supernet equals the per-edge one: logits, all gradients, BN statistics, in float64."""

import pytest
import torch
from per_edge_supernet import PerEdgeSupernet, pairs
from torch.nn import functional as F

from model_search import SearchConfig, Supernet


def close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    ("channels", "layers", "size"),
    [(8, 4, (10, 13)), (16, 3, (9, 13)), (24, 3, (8, 8))],
)
def test_fused_equals_per_edge(channels, layers, size):
    torch.manual_seed(channels + layers)
    fused = Supernet(SearchConfig(channels, layers, 7)).double()
    for parameter in fused.arch_parameters():
        torch.nn.init.normal_(parameter)
    reference = PerEdgeSupernet(fused)
    images, targets = torch.randn(3, 3, *size, dtype=torch.float64), torch.tensor([0, 3, 6])

    for training in (True, False):  # the second sees the statistics that the first has left
        gradients = []
        for network in (fused, reference):
            network.train(training).zero_grad()
            logits, _ = network(images)
            F.cross_entropy(logits, targets).backward()
            arch = torch.cat([parameter.grad.flatten() for parameter in fused.arch_parameters()])
            gradients.append((logits.detach(), arch))
        close(*(logits for logits, _ in gradients))
        close(*(arch for _, arch in gradients))
        compared = 0
        for ours, rows, theirs in pairs(fused, reference):
            close(ours[rows].detach(), theirs.detach())
            if theirs.requires_grad:
                close(ours.grad[rows], theirs.grad)
                assert theirs.grad.any()
                compared += theirs.numel()
        assert compared == sum(p.numel() for p in fused.weight_parameters())


def test_a_supernet_is_one_graph():
    """Nothing in it waits for the host, or makes torch.compile give up."""
    network = Supernet(SearchConfig(8, 3))
    images = torch.randn(2, 3, 8, 8)
    expected, _ = network(images)
    network.compile(backend="eager", fullgraph=True)
    actual, _ = network(images)
    torch.testing.assert_close(actual, expected)
