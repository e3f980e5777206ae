"""Costs, to the integer."""

import pytest

from genotypes import GENOTYPES
from model import ModelConfig, build_model
from networks.cost import measure_cost

COLUMNS = ("parameters", "binary_macs", "float_macs", "bn_elements", "prelu_elements", "avg_pool_elements")


@pytest.mark.parametrize(
    ("family", "channels", "layers", "classes", "size", "expected"),
    [
        ("cifar", 84, 16, 10, 32, (10048846, 1496678400, 6980736, 16450560, 5225472, 322560)),
        ("cifar", 56, 11, 10, 32, (3077378, 477102080, 4653824, 7870464, 2451456, 215040)),
        ("imagenet", 112, 14, 1000, 224, (17033568, 1747730432, 109268992, 15432256, 4675776, 331072)),
    ],
)
@pytest.mark.parametrize("auxiliary", [False, True])
def test_cost_of_the_published_networks(family, channels, layers, classes, size, expected, auxiliary):
    config = ModelConfig(
        GENOTYPES["EBNAS"],
        family=family,
        init_channels=channels,
        layers=layers,
        num_classes=classes,
        auxiliary=auxiliary,
    )
    cost = measure_cost(build_model(config), size)
    assert tuple(getattr(cost, column) for column in COLUMNS) == expected
    binary, float_macs, bn, prelu, pool = expected[1:]
    assert cost.ops == binary / 64 + float_macs + 2 * bn + prelu + pool
    assert cost.convolution_ops == binary / 64 + float_macs


def test_only_w1a1_counts_as_binary():
    config = ModelConfig(GENOTYPES["EBNAS"], init_channels=14, layers=3, activation_bits=32)
    stage1 = measure_cost(build_model(config), 32)
    assert stage1.binary_macs == 0
    assert stage1.binary_bytes > 0


def test_bytes_of_a_small_network_by_hand():
    model = build_model(ModelConfig(GENOTYPES["EBNAS"], init_channels=14, layers=3))
    cost = measure_cost(model, 32)
    binary = [p for name, p in model.named_parameters() if "cells" in name and "conv" in name]
    bits = sum(p.numel() for p in binary)
    floats = sum(t.numel() for t in model.state_dict().values() if t.is_floating_point()) - bits
    assert cost.binary_bytes == sum(-(-p.numel() // 8) for p in binary)
    assert cost.float_bytes == 4 * (floats + sum(p.shape[0] for p in binary))
