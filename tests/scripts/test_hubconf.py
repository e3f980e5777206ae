"""Networks through torch.hub."""

import numpy as np
import pytest
import torch
from support.scripts import ROOT

from model import build_model
from networks.registry import make_config
from networks.rows import ROWS
from packed import load
from run.checkpoint import load_checkpoint
from utils import InputError


def hub(*arguments, **config):
    return torch.hub.load(str(ROOT), "ebnas", *arguments, source="local", **config)


def test_untrained_trained_and_packed_networks(interrupted):
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    untrained = hub(init_channels=4, groups=2, layers=3, num_classes=7)
    assert untrained.training and untrained(images)[0].shape == (2, 7)

    trained, saved = hub(str(interrupted)), load_checkpoint(interrupted)["model"]
    assert not trained.training
    assert all(torch.equal(value, saved[name]) for name, value in trained.state_dict().items())

    shipped = hub("shapes")
    expected = load(ROOT / "models" / "shapes.ebnas", kernel="torch")(images.numpy())
    np.testing.assert_array_equal(shipped(images).numpy(), expected)
    assert shipped.program.classes[-2:] == ("star", "triangle")


@pytest.mark.parametrize("arch", ROWS)
def test_rows(arch):
    (family, *_) = ROWS[arch].sizes
    with torch.device("meta"):
        ours, expected = hub(arch=arch, family=family), build_model(make_config(arch, family=family))
    assert ours.config == expected.config and type(ours) is type(expected)


@pytest.mark.parametrize(
    ("arguments", "config", "message"),
    [
        (["nowhere"], {}, "no checkpoint nowhere"),
        (["nowhere.ebnas"], {}, "nowhere.ebnas: no such file"),
        ([3], {}, "source is 3"),
        ([], {"arch": 5}, "arch is 5"),
        ([], {"arch": "DARTS"}, "choose from EBNAS"),
        ([], {"foo": 0}, "EBNAS has no foo; it has activation, "),
        ([], {"family": "mars"}, "family is 'mars'"),
        ([], {"arch": "ResNet18", "weight_bits": 1}, "ResNet18 has no weight_bits"),
        (["shapes"], {"arch": "BNAS-A", "layers": 3}, "leave out arch, layers"),
    ],
)
def test_what_is_no_network(arguments, config, message):
    with pytest.raises(InputError, match=message):
        hub(*arguments, **config)
