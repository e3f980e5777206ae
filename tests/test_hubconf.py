"""Networks through torch.hub."""

import numpy as np
import pytest
import torch
from conftest import ROOT

from checkpoint import load_checkpoint
from packed import load
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


def test_what_is_no_network():
    with pytest.raises(InputError, match="no checkpoint nowhere"):
        hub("nowhere")
