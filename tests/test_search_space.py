"""An operation that a user adds as one entry: searched, trained, drawn (docs/extending.md)."""

import numpy as np
import pytest
import torch
from support.packed_programs import data_entry, float_logits, spread
from torch import nn
from torch.nn import functional as F

import search_space
from genotypes import GENOTYPES, genotype_from_dict, genotype_to_dict
from kernels import FORMS, accelerate
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet
from networks.lowering import lower
from packed import PackedNetwork
from pictures.canvas import color_of, label_of
from search_space import PRIMITIVES, Operation
from trials.cells import Space
from utils import InputError


class Asymmetric(nn.Module):
    """PReLU(BN(1x3 then 3x1 binary convolution) + x), or its search form without PReLU."""

    def __init__(self, channels, stride, *, groups=1, bits=None, activation=None):
        from binary_ops import BinaryConv2d
        from operations import halving_pool

        super().__init__()
        bits = bits or {"weight_bits": 32, "activation_bits": 1}
        self.across = BinaryConv2d(
            channels, channels, (1, 3), stride=(1, stride), padding=(0, 1), groups=groups, **bits
        )
        self.down = BinaryConv2d(
            channels, channels, (3, 1), stride=(stride, 1), padding=(1, 0), groups=groups, **bits
        )
        self.bn = nn.BatchNorm2d(channels, affine=activation is not None)
        self.prelu = nn.PReLU(channels) if activation else nn.Identity()
        self.shortcut = nn.Identity() if stride == 1 else halving_pool()

    def forward(self, x):
        return self.prelu(self.bn(self.down(self.across(x))) + self.shortcut(x))


WIDE = Operation("bin_conv_7x7", "7x7 conv", "#0b1f4d", kernel=7)
OWN = Operation("bin_conv_1x3_3x1", "1x3, 3x1 conv", search=Asymmetric, derived=Asymmetric)


@pytest.fixture(autouse=True)
def added(monkeypatch):
    for entry in (WIDE, OWN):
        monkeypatch.setitem(search_space.ENTRIES, entry.name, entry)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("names", [("bin_conv_7x7", "skip_connect"), (*PRIMITIVES, WIDE.name, OWN.name)])
def test_a_search_over_chosen_operations(form, names):
    """A step in every form has gradients everywhere, the values of the plain form, and derives a genotype."""
    torch.manual_seed(0)
    config = SearchConfig.from_dict(SearchConfig(8, 3, 4, operations=names).to_dict())
    assert config.operations == names
    plain = Supernet(config).double()
    model = Supernet(config).double()
    model.load_state_dict(plain.state_dict())
    images = torch.randn(3, 3, 11, 11, dtype=torch.float64)
    logits = accelerate(model, form)(images)[0]
    assert torch.equal(logits, plain(images)[0])
    F.cross_entropy(logits, torch.arange(3)).backward()
    assert model.alphas_reduce.shape == (14, len(names)) and model.alphas_reduce.grad.any()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    genotype = model.genotype()
    assert {name for name, _ in genotype.normal} <= set(names)
    assert genotype_from_dict(genotype_to_dict(genotype)) == genotype


@pytest.mark.parametrize("entry", [WIDE, OWN])
@pytest.mark.parametrize("activation_bits", [32, 1])
def test_a_network_of_an_added_operation(entry, activation_bits):
    """Both stages, each form: the values of the plain one; a label and a colour."""
    pairs = tuple((entry.name, source) for _, source in GENOTYPES["EBNAS"].normal)
    genotype = GENOTYPES["EBNAS"]._replace(normal=pairs, reduce=pairs)
    torch.manual_seed(0)
    config = ModelConfig(genotype, init_channels=4, layers=3, groups=2, activation_bits=activation_bits)
    plain, images = build_model(config).double(), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = plain(images)[0].detach()
    for form in FORMS:
        torch.manual_seed(0)
        network = accelerate(build_model(config), form).double()
        network.load_state_dict({**network.state_dict(), **dict(plain.named_parameters())})
        torch.testing.assert_close(network(images)[0], expected, rtol=1e-8, atol=1e-10)
    assert label_of(entry.name) == entry.label and color_of(entry.name).startswith("#")


def test_a_kernel_of_7_is_packed_and_a_module_of_its_own_is_refused():
    pairs = tuple((WIDE.name, source) for _, source in GENOTYPES["EBNAS"].normal)
    network = spread(network_of(pairs))
    images = torch.randn(5, 3, 16, 16)
    packed = PackedNetwork(lower(network, data_entry(image_size=16)))
    np.testing.assert_allclose(packed(images.numpy()), float_logits(network, images), rtol=1e-3, atol=1e-3)
    with pytest.raises(InputError, match="Asymmetric"):
        lower(network_of(((OWN.name, 0), *pairs[1:])), data_entry())


def network_of(pairs):
    genotype = GENOTYPES["EBNAS"]._replace(normal=pairs, reduce=pairs)
    return build_model(ModelConfig(genotype, init_channels=4, layers=3, groups=2)).eval()


def test_trials_draw_and_change_the_operations_that_were_chosen():
    rng = np.random.default_rng(0)
    names = (WIDE.name, OWN.name, "skip_connect")
    space = Space((4,), (3,), names)
    cells = [space.draw(rng)]
    for _ in range(40):
        cells.append(space.mutate(cells[-1], rng))
    assert {name for cell in cells for name, _ in cell.normal + cell.reduce} == set(names)
    assert {len(cell.features) for cell in cells} == {len(cells[0].features)}
    assert all(value in space.alternatives[name] for cell in cells for name, value in cell.choices.items())


def test_the_default_is_as_it_was():
    assert SearchConfig().operations == PRIMITIVES and "operations" not in SearchConfig().to_dict()


@pytest.mark.parametrize(
    "names", [("skip_connect",), ("skip_connect", "skip_connect"), ("no", "skip_connect")]
)
def test_a_search_space_that_is_none(names):
    with pytest.raises(InputError, match="operation"):
        SearchConfig(operations=names)
