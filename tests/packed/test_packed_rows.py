"""The packed form of the other rows: BNAS and BATS against their float form; what is refused."""

import pytest
import torch
from support.packed_programs import (
    KERNELS,
    assert_only_rounding,
    data_entry,
    float_logits,
    skip_without,
    spread,
)
from torch import nn

from binary_ops import BinaryConv2d
from genotypes import _genotype
from model import build_model
from networks import lowering
from networks.registry import make_config
from packed import PackedNetwork, parse_program, program_bytes
from packed.program import Program
from utils import InputError

BNAS_ALL = _genotype(  # zero nodes that are read, and every operation in both cells
    "none 0, none 1 | bin_conv_3x3 2, avg_pool_3x3 1 | bin_dil_conv_5x5 0, bin_conv_5x5 2 | "
    "none 3, bin_dil_conv_3x3 1",
    "none 0, none 1 | bin_conv_5x5 0, bin_conv_3x3 2 | avg_pool_3x3 1, bin_dil_conv_5x5 0 | "
    "max_pool_3x3 3, bin_dil_conv_3x3 1",
)
BATS_ALL = _genotype(  # two factorised reductions in a node
    "sep_conv_7x7 1, dil_conv_3x3 0 | skip_connect 0, sep_conv_3x3 2 | none 0, avg_pool_3x3 1 | "
    "none 2, none 3",
    "skip_connect 0, skip_connect 1 | sep_conv_7x7 1, dil_conv_5x5 0 | max_pool_3x3 3, sep_conv_5x5 0 | "
    "none 0, none 1",
)
NETWORKS = {  # fields of a configuration, and the image's size
    "bnas": ({"arch": "BNAS-A", "init_channels": 8, "layers": 6}, (32, 32)),
    "bnas, intended": ({"arch": "BNAS-A", "init_channels": 8, "layers": 6, "variant": "intended"}, (32, 20)),
    "bnas, every operation": (
        {"arch": BNAS_ALL, "system": "bnas", "init_channels": 6, "layers": 4},
        (32, 32),
    ),
    "bnas, imagenet": ({"arch": "BNAS-F", "family": "imagenet", "init_channels": 8, "layers": 4}, (64, 96)),
    "bats": ({"arch": "BATS", "init_channels": 24, "layers": 5}, (32, 27)),
    "bats, mean": (
        {"arch": "BATS", "init_channels": 12, "groups": 2, "layers": 3, "variant": "mean"},
        (19, 32),
    ),
    "bats, every operation": (
        {"arch": BATS_ALL, "system": "bats", "init_channels": 12, "groups": 3, "layers": 4},
        (33, 27),
    ),
    "bats, imagenet": (
        {"arch": "BATS", "family": "imagenet", "init_channels": 24, "groups": 6, "layers": 3},
        (64, 75),
    ),
}


def network(arch, system=None, **fields) -> nn.Module:
    """As trained, but with channels whose BN maps 0 to 0, which gives signs of 0; and with 1-bit weights of
    +1/4 and -1/4, as many of each, whose sums are exact: in the float form what should be 0 is 0."""
    torch.manual_seed(0)
    name = arch if isinstance(arch, str) else {"bnas": "BNAS-A", "bats": "BATS"}[system]
    config = make_config(name, **fields)
    if name != arch:
        config = type(config).from_dict({**config.to_dict(), "genotype": arch._asdict()})
    model = spread(build_model(config), 32 if config.family == "cifar" else 64)
    for module in model.cells.modules():
        if isinstance(module, BinaryConv2d) and module.weight_bits == 1:
            order = torch.rand_like(module.weight).argsort(1)
            module.weight.data = torch.where(order % 2 == 0, 0.25, -0.25)
        if isinstance(module, nn.BatchNorm2d) and module.affine:
            module.running_mean[::7] = 0
            nn.init.zeros_(module.bias[::7])
    return model


@pytest.fixture(scope="module")
def models() -> dict[str, nn.Module]:
    torch.set_num_threads(1)
    return {name: network(**fields) for name, (fields, _) in NETWORKS.items()}


def packed_program(model: nn.Module) -> Program:
    return parse_program(program_bytes(lowering.lower(model, data_entry())))


def images_of(name: str) -> torch.Tensor:
    return torch.randn(5, 3, *NETWORKS[name][1], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("kernel", [*KERNELS, "torch"])
@pytest.mark.parametrize("name", NETWORKS)
def test_logits_equal_the_float_form(name, kernel, models):
    if kernel != "torch":
        skip_without(kernel)
    images, net = images_of(name), PackedNetwork(packed_program(models[name]), kernel=kernel)
    expected = float_logits(models[name], images)
    difference = (net(images) - expected).abs().amax(1)
    for image in images[difference > 1e-3]:
        assert_only_rounding(models[name], net, image)
    assert (difference < 1e-3).sum() >= 3


@pytest.mark.parametrize("name", ["bnas", "bats"])
def test_a_sign_of_0_is_0(name, models, monkeypatch):
    """Taken as +1, as in EBNAS, it makes other logits."""
    images = images_of(name)
    expected = float_logits(models[name], images)
    monkeypatch.setattr(lowering._Lowering, "ternary", lowering._Lowering.convolve)
    wrong = PackedNetwork(packed_program(models[name]))(images)
    assert (wrong - expected).abs().amax(1).min() > 1e-3


def test_only_units_that_meet_a_sign_of_0_are_two_steps():
    """In BNAS-A as trained: of the preprocessing without biases, whose input has channels that are all 0."""
    torch.manual_seed(0)
    model = spread(build_model(make_config("BNAS-A", init_channels=8, layers=6)))
    steps = [step.name for step in packed_program(model).steps if step.residual]
    assert steps == ["cells.3.preprocess0"]


def test_classes_agree():
    for arch, channels in (("BNAS-A", 8), ("BATS", 12)):
        torch.manual_seed(0)
        model = spread(build_model(make_config(arch, init_channels=channels, layers=4)))
        images = torch.randn(500, 3, 16, 16, generator=torch.Generator().manual_seed(2))
        same = PackedNetwork(packed_program(model))(images).argmax(1) == float_logits(model, images).argmax(1)
        assert same.float().mean() >= 0.998


@pytest.mark.parametrize(
    ("arch", "message"),
    [
        ("ResNet18", "conv1 is in full precision, as is all of resnet"),
        ("DCP-NAS-L", "cells.0.preprocess0.conv convolves real activations"),
    ],
)
def test_refused(arch, message):
    size = {"init_channels": 8} if arch == "ResNet18" else {"init_channels": 4, "layers": 3}
    with pytest.raises(InputError) as error:
        lowering.lower(build_model(make_config(arch, **size)).eval(), data_entry())
    assert message in str(error.value) and "\n" not in str(error.value)


def test_a_large_dilated_convolution_with_real_weights_is_refused():
    genotype = BNAS_ALL._replace(normal=(*BNAS_ALL.normal[:-1], ("bin_dil_conv_5x5", 1)))
    fields = {"arch": genotype, "system": "bnas", "init_channels": 4, "layers": 3}
    with pytest.raises(InputError, match=r"cells\.2\.operations\.5 is dilated, 9 x 9 pixels, and has real"):
        packed_program(network(**fields))
    packed_program(network(**fields, variant="intended"))
