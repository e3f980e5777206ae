"""The rows: costs, to the integer of their descriptions; ResNet18 beside torchvision's; labels."""

import json
import re

import pytest
import torch
import torchvision
from support.reference_values import REFERENCE
from support.scripts import ROOT
from torch.nn import functional as F

from genotypes import GENOTYPES
from model import build_model
from networks.cost import measure_cost
from networks.registry import config_from_dict, label, make_config, trained_network
from networks.rows import ROWS
from utils import InputError

COSTS = json.loads((REFERENCE / "baselines" / "costs.json").read_text())

BNAS = {
    (f"BNAS-{name}", "cifar" if name in "AC" else "imagenet", ()): f"BNAS-{name}, as the code runs"
    for name in "ACDEFGH"
} | {("BNAS-A", "cifar", (("variant", "intended"),)): "BNAS-A, as intended"}
BATS = {
    ("BATS", family, (("init_channels", channels), ("layers", layers))): (
        f"BATS stand-in {family} C {channels}, {layers} cells, groups 12"
    )
    for family, channels, layers in (("cifar", 60, 20), ("imagenet", 72, 14), ("imagenet", 120, 14))
}
RESNET = {
    ("ResNet18", "imagenet", ()): "ResNet18 ImageNet",
    ("ResNet18", "cifar", ()): "ResNet18 CIFAR-10",
    ("ResNet18", "cifar", (("num_classes", 100),)): "ResNet18 CIFAR-100",
}
DCP_NAS = {("DCP-NAS-L", "imagenet", ()): "DCP-NAS-L, as the code runs"}


@pytest.mark.parametrize(("network", "name"), (BNAS | BATS | RESNET | DCP_NAS).items())
def test_costs_to_the_integer(network, name):
    arch, family, settings = network
    size, classes = (32, 10) if family == "cifar" else (224, 1000)
    with torch.device("meta"):
        model = build_model(make_config(arch, **{"family": family, "num_classes": classes, **dict(settings)}))
    cost, theirs = measure_cost(model, size), COSTS[name]
    assert cost.parameters == theirs["params"] + theirs.get("alphas", 0)
    assert cost.binary_macs == theirs["binary"]
    assert cost.one_sided_macs == theirs["w1a32"] + theirs["w32a1"]
    assert cost.float_macs == theirs["fconv"] + theirs["lin"] + cost.one_sided_macs
    elements = (cost.bn_elements, cost.prelu_elements, cost.avg_pool_elements)
    assert elements == (theirs["bn"], theirs["prelu"], theirs["avg"])
    assert (cost.convolution_ops, cost.ops) == (theirs["simple"], theirs["ops"])
    for other in ("as intended", "every modulated conv 1-bit in and out"):  # one side more of these is binary
        if theirs := COSTS.get(f"{arch}, {other}"):
            assert cost.binary_macs + cost.one_sided_macs == theirs["binary"]


@pytest.mark.parametrize("family", ["cifar", "imagenet"])
def test_resnet18_is_torchvisions(family):
    """Values and gradients, with the same weights; for CIFAR another first layer, and no max pool."""
    ours = build_model(make_config("ResNet18", family=family)).double()
    theirs = torchvision.models.resnet18(num_classes=10).double()
    if family == "cifar":
        theirs.conv1 = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False).double()
        theirs.maxpool = torch.nn.Identity()
    theirs.load_state_dict(ours.state_dict())
    images, targets = torch.randn(2, 3, 32, 32, dtype=torch.float64), torch.tensor([1, 7])
    losses = [F.cross_entropy(logits, targets) for logits in (ours(images)[0], theirs(images))]
    assert torch.equal(*losses)
    gradients = [
        torch.autograd.grad(loss, m.parameters()) for loss, m in zip(losses, (ours, theirs), strict=True)
    ]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("arch", ROWS)
def test_a_row_is_rebuilt_from_its_checkpoint_alone(arch):
    family = next(iter(ROWS[arch].sizes))
    small = {"init_channels": 8 if arch == "ResNet18" else 24, "layers": 3, "groups": 2}
    own = {} if arch == "ResNet18" else {"layers": 3}
    own |= {"groups": 2} if ROWS[arch].system in ("ebnas", "bats") else {}
    config = make_config(arch, family=family, init_channels=small["init_channels"], **own)
    assert config_from_dict(json.loads(json.dumps(config.to_dict()))) == config
    model = build_model(config)
    rebuilt = trained_network({"kind": "stage1", "config": config.to_dict(), "model": model.state_dict()})
    images = torch.randn(1, 3, 32, 32)
    assert torch.equal(rebuilt(images)[0], model.eval()(images)[0])


def test_the_table_of_the_readme():
    """Parameters and OPs of its rows are those of the descriptions."""
    rows = re.findall(
        r"^\| (CIFAR-10|ImageNet) \| (.+?) \| ([\d,]+) \|(.*)$", (ROOT / "docs" / "rows.md").read_text(), re.M
    )
    checked = 0
    for images, network, parameters, numbers in rows:
        name = network.replace(", as run", ", as the code runs").replace(", intended", ", as intended")
        name = {"ResNet18 (full precision)": f"ResNet18 {images}", "BNAS-F": "BNAS-F, as the code runs"}.get(
            name, name
        )
        name = "DCP-NAS-L, as the code runs" if name.startswith("DCP") and images == "ImageNet" else name
        if name.startswith("BATS"):
            size = re.search(r"C \d+, \d+ cells", name)[0]
            name = f"BATS stand-in {'cifar' if images == 'CIFAR-10' else 'imagenet'} {size}, groups 12"
        if theirs := COSTS.get(name):
            assert int(parameters.replace(",", "")) == theirs["params"] + theirs.get("alphas", 0)
            assert f"| {theirs['ops'] / 1e8:.3f} | {theirs['simple'] / 1e8:.3f} |" in numbers
            checked += 1
    assert checked >= 11


def test_labels_say_what_is_a_stand_in():
    assert label(make_config("BATS")) == "BATS (stand-in: second-hand cell, C 60, 20 cells)"
    assert label(make_config("BATS-2x", family="imagenet")) == (
        "BATS-2x (stand-in: second-hand cell, C 120, 14 cells)"
    )
    assert label(make_config("DCP-NAS-L", family="imagenet")) == (
        "DCP-NAS-L (CP-NAS's successor; CP-NAS is not public)"
    )
    assert label(make_config("DCP-NAS-L")).endswith("CP-NAS is not public), CIFAR form ours")
    assert label(make_config("BNAS-C")) == "BNAS-C"
    assert label(make_config("BNAS-C", init_channels=8)) == "BNAS-A, C 8"  # they have one cell
    assert label(make_config("BATS", init_channels=24, layers=6)) == (
        "BATS (stand-in: second-hand cell, C 24, 6 cells)"
    )
    assert (
        label(make_config("EBNAS", "bats", init_channels=24))
        == "a cell of its own in the blocks of bats, C 24"
    )
    assert not any("CP-NAS" in arch for arch in ROWS if arch != "DCP-NAS-L")


def test_a_genotype_in_the_blocks_of_another_system():
    config = make_config("EBNAS", "bats", init_channels=24, layers=3)
    assert config.system == "bats"
    assert config.genotype.normal[0] == ("sep_conv_3x3", 0)
    assert config.genotype.normal[7] == ("dil_conv_3x3", 1)
    assert make_config("BATS", "ebnas", init_channels=28, layers=3).genotype.normal[0] == ("bin_conv_5x5", 0)
    assert make_config("EBNAS").genotype == GENOTYPES["EBNAS"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("BNAS-H",), "no published size for cifar images: choose BNAS-A or BNAS-C, or give "),
        (
            ("DCP-NAS-L", "bnas"),
            "DCP-NAS-L: the blocks of bnas have no skip_connect; choose from ('none', 'max",
        ),
        (("ResNet18", "bnas"), "is made of no cells"),
        (("BATS", None, {"init_channels": 50}), "is no multiple of 12, which 12 groups"),
        (("BNAS-A", None, {"groups": 7}), "bnas has no groups"),
        (("BNAS-A", None, {"auxiliary": True}), "bnas has no auxiliary"),
        (("BNAS-A", None, {"variant": "mean"}), "choose from ('as_run', 'intended')"),
        (("DCP-NAS-L", None, {"weight_bits": 1, "activation_bits": 32}), "no W1A32"),
    ],
)
def test_what_makes_no_network(flags, message):
    arch, system, settings = (*flags, None, {})[:3]
    with pytest.raises(InputError) as error:
        make_config(arch, system, **(settings if isinstance(settings, dict) else {}))
    assert message in str(error.value)
