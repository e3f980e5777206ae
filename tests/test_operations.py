"""Every operation at both strides and odd sizes, networks at sizes no pool was made for, and drop-path."""

import copy

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter

from genotypes import GENOTYPES, PRIMITIVES
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet
from operations import (
    FactorizedReduce,
    SearchPreprocess,
    SourceOperations,
    coefficients,
    drop_path,
    make_operation,
)
from utils import InputError

BITS = {"weight_bits": 1, "activation_bits": 1, "weight_binarization": "plain"}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.mark.parametrize("size", [(8, 8), (33, 33), (7, 10), (3, 2)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("name", PRIMITIVES)
def test_derived_operation_gives_the_size_of_its_edge(name, stride, size):
    operation = make_operation(name, 4, stride, groups=2, bits=BITS)
    x = torch.randn(2, 4, *size)
    before = x.clone()
    y = operation.eval()(x)
    assert y.shape == (2, 4, *(-(-n // stride) for n in size))
    assert y.isfinite().all() and torch.equal(x, before)


@pytest.mark.parametrize("size", [(8, 8), (33, 33), (7, 10)])
@pytest.mark.parametrize("stride", [1, 2])
def test_search_operations_give_the_size_of_their_edges(stride, size):
    operations = SourceOperations(2, 3, stride)
    x = torch.randn(2, 2, *size)
    before = x.clone()
    for index in range(len(PRIMITIVES)):
        mixing = torch.zeros(3, len(PRIMITIVES))
        mixing[1, index] = 1.0
        y = operations(x, *coefficients(mixing, stride))
        assert y.shape == (2, 3, 2, *(-(-n // stride) for n in size))
        assert y[:, 1].any() and not y[:, 0].any() and not y[:, 2].any()
    assert torch.equal(x, before)


@pytest.mark.parametrize("size", [6, 33])
def test_factorized_reduction_is_zero_where_its_shifted_half_has_no_pixel(size):
    real = {**BITS, "activation_bits": 32}  # whose sums are never zero by chance
    reduction = FactorizedReduce(4, 6, bits=real)
    reduction.bn2, reduction.prelu = nn.Identity(), nn.Identity()
    with torch.no_grad():
        y = reduction(torch.randn(2, 4, size, size))
    assert y.shape == (2, 6, -(-size // 2), -(-size // 2))
    assert y[:, :3].all()
    assert y[:, 3:, : size // 2, : size // 2].all()
    assert not y[:, 3:, size // 2 :].any() and not y[:, 3:, :, size // 2 :].any()
    preprocess = SearchPreprocess(4, 6, reduce=True)
    assert preprocess(torch.randn(2, 4, size, size)).shape == y.shape


def check_training_step(network, size, batch=2):
    logits, auxiliary = network(torch.randn(batch, 3, size, size))
    assert logits.shape == (batch, network.config.num_classes) and logits.isfinite().all()
    loss = logits.square().sum()
    if auxiliary is not None:
        assert auxiliary.shape == logits.shape and auxiliary.isfinite().all()
        loss = loss + auxiliary.square().sum()
    loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


@pytest.mark.parametrize("size", [16, 17, 31, 33, 40, 64])
def test_cifar_network_with_auxiliary_head(size):
    config = ModelConfig(
        GENOTYPES["EBNAS"], init_channels=4, layers=3, groups=2, num_classes=7, auxiliary=True
    )
    network = build_model(config)
    network.drop_path_prob = 0.2
    check_training_step(network, size)


@pytest.mark.parametrize("size", [32, 225])
def test_imagenet_network_with_auxiliary_head(size):
    config = ModelConfig(
        GENOTYPES["EBNAS"], "imagenet", init_channels=8, layers=3, groups=2, num_classes=7, auxiliary=True
    )
    check_training_step(build_model(config), size)


@pytest.mark.parametrize("size", [16, 33])
def test_supernet(size):
    check_training_step(Supernet(SearchConfig(8, 3, 7)), size)


def test_imagenet_stem_says_which_widths_it_takes():
    with pytest.raises(InputError, match=r"init_channels 84 .* by 8; .* 56 or 112"):
        ModelConfig(GENOTYPES["EBNAS"], "imagenet", init_channels=84, groups=14)


def test_every_operation_in_a_network():
    """The registered genotype has no skip connection and no average pool."""
    pairs = [(name, index % 2) for index, name in enumerate((*PRIMITIVES, PRIMITIVES[0]))]
    genotype = GENOTYPES["EBNAS"]._replace(normal=tuple(pairs), reduce=tuple(pairs))
    check_training_step(build_model(ModelConfig(genotype, init_channels=4, layers=3, groups=2)), 33)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_drop_path_zeroes_whole_samples_and_keeps_the_mean(dtype):
    x = torch.randn(4000, 2, 3, 1).abs().to(dtype) + 1
    before = x.clone()
    y = drop_path(x, 0.25)
    assert y.dtype == dtype and torch.equal(x, before)
    dropped = (y == 0).flatten(1)
    assert torch.equal(dropped.any(1), dropped.all(1))
    share = dropped.all(1).double().mean().item()
    assert abs(share - 0.25) < 4 * (0.25 * 0.75 / 4000) ** 0.5
    kept = ~dropped.all(1)
    torch.testing.assert_close(y[kept], x[kept] / 0.75, rtol=0.01, atol=0)


def test_drop_path_acts_in_training_alone_and_grows_with_its_probability():
    config = ModelConfig(GENOTYPES["EBNAS"], init_channels=4, layers=3, groups=2)
    network, images = build_model(config), torch.randn(4, 3, 16, 16)

    def differs() -> bool:
        return not torch.equal(network(images)[0], network(images)[0])

    assert not differs()
    network.drop_path_prob = 0.5
    assert differs()
    network.eval()
    assert not differs()


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("training", [True, False])
def test_compiled_operations_equal_eager_ones(stride, training):
    """Each is one graph: nothing in it waits for the host, or makes torch.compile give up."""
    source = SourceOperations(2, 3, stride).double().train(training)
    unit = make_operation("bin_dil_conv_3x3", 4, stride, groups=2, bits=BITS).double().train(training)
    mixing = coefficients(torch.randn(3, len(PRIMITIVES), dtype=torch.float64, requires_grad=True), stride)
    for module, inputs in (
        (source, (torch.randn(2, 2, 9, 9, dtype=torch.float64, requires_grad=True), *mixing)),
        (unit, (torch.randn(2, 4, 9, 9, dtype=torch.float64, requires_grad=True),)),
    ):
        compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
        outcomes = []
        for network in (module, compiled):
            y = network(*inputs)
            outcomes.append((y, *torch.autograd.grad(y.square().sum(), (*inputs, *network.parameters()))))
        torch.testing.assert_close(*outcomes)


def test_a_compiled_network_follows_drop_path_without_another_compilation():
    config = ModelConfig(GENOTYPES["EBNAS"], init_channels=4, layers=3, groups=2)
    network, images = build_model(config), torch.randn(4, 3, 16, 16)
    counter = CompileCounter()
    network.compile(backend=counter, fullgraph=True)
    for probability in (0.1, 0.2, 0.3):
        network.drop_path_prob = probability
        network(images)
    assert counter.frame_count <= 2  # for the first value, and for all others
