"""Every operation at both strides and odd sizes, networks at sizes no pool was made for, and drop-path."""

import copy
import math

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from genotypes import GENOTYPES, PRIMITIVES
from kernels import accelerate
from kernels.fused_search import FusedSourceOperations, coefficients, joined_kernels, update_running
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet
from operations import FactorizedReduce, SearchPreprocess, SourceOperations, drop_path, make_operation
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


def mixed(source, x, mixing):
    """What a SourceOperations gives alone, in either form; in training it moves its running statistics."""
    if not isinstance(source, FusedSourceOperations):
        return source(x, mixing)
    y, statistics = source(x, *coefficients(mixing, source.stride), joined_kernels([source])[source])
    if statistics is not None:
        update_running([source.norm], [statistics])
    return y


@pytest.mark.parametrize("size", [(8, 8), (33, 33), (7, 10)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", ["plain", "torch"])
def test_search_operations_give_the_size_of_their_edges(form, stride, size):
    operations = accelerate(SourceOperations(2, 3, stride), form)
    x = torch.randn(2, 2, *size)
    before = x.clone()
    for index in range(len(PRIMITIVES)):
        mixing = torch.zeros(3, len(PRIMITIVES))
        mixing[1, index] = 1.0
        y = mixed(operations, x, mixing)
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


def first_of_the_largest(x, stride):
    """3x3 max pool with padding 1, whose gradient goes to the first of equal pixels, row by row."""
    padded = F.pad(x, (1, 1, 1, 1), value=-math.inf)
    windows = padded.unfold(2, 3, stride).unfold(3, 3, stride).flatten(-2)  # (n, c, h', w', 9)
    return windows.max(-1).values  # the first, on a tie


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(8, 8), (7, 10)])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("form", ["plain", "torch"])
def test_max_pools_gradient_goes_to_the_first_of_equal_pixels(form, stride, size, memory_format):
    """In the derived form and, mixed alone, in the search form."""
    x = torch.randint(-1, 2, (2, 2, *size)).double().to(memory_format=memory_format).requires_grad_()
    source = accelerate(SourceOperations(2, 1, stride), form).double().eval()  # its BN divides by about 1
    mixing = torch.zeros(1, len(PRIMITIVES), dtype=torch.float64)
    mixing[0, PRIMITIVES.index("max_pool_3x3")] = (1 + source.pool_norm.eps) ** 0.5
    expected = first_of_the_largest(x, stride)
    grad = torch.randn_like(expected)
    (expected_grad,) = torch.autograd.grad(expected, x, grad)
    derived = accelerate(make_operation("max_pool_3x3", 2, stride, groups=1, bits=BITS), form)(x)
    for y in (derived, mixed(source, x, mixing)[:, 0]):
        torch.testing.assert_close(y, expected)
        torch.testing.assert_close(torch.autograd.grad(y, x, grad)[0], expected_grad)


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


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("stride", [1, 2])
def test_search_operations_under_autocast(stride, dtype):
    """Close to single precision: values, gradients and running statistics, which all stay in it.

    The narrow type holds the input exactly, for rounding must not turn its signs.
    """
    x = torch.randn(4, 2, 9, 9).to(dtype).float().requires_grad_()
    mixing = torch.randn(3, len(PRIMITIVES), requires_grad=True)
    narrow = accelerate(SourceOperations(2, 3, stride))
    wide = copy.deepcopy(narrow)
    outcomes = []
    for operations, autocast in ((narrow, True), (wide, False)):
        with torch.autocast("cpu", dtype, enabled=autocast):
            y = mixed(operations, x, mixing)
        torch.manual_seed(1)
        gradients = torch.autograd.grad(y, (x, mixing, *operations.parameters()), torch.randn_like(y))
        outcomes.append((y, *gradients, *(b for b in operations.buffers() if b.is_floating_point())))
    for actual, expected in zip(*outcomes, strict=True):
        assert actual.dtype == expected.dtype == torch.float32
        assert relative_error(actual, expected) < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_supernet_under_autocast(dtype):
    """Logits stay close to single precision's. Of its signs a few turn, and gradients with them: those of the
    classifier, behind the signs, stay close; all are finite and in single precision."""
    network = accelerate(Supernet(SearchConfig(8, 3, 7)))
    images, targets = torch.randn(8, 3, 16, 16), torch.arange(8) % 7
    outcomes = []
    for autocast in (True, False):
        network.zero_grad()
        with torch.autocast("cpu", dtype, enabled=autocast):
            logits = network(images)[0].float()
        F.cross_entropy(logits, targets).backward()
        gradients = [parameter.grad for parameter in network.parameters()]
        assert all(g.dtype == torch.float32 and g.isfinite().all() and g.any() for g in gradients)
        outcomes.append((logits, network.classifier.weight.grad, network.classifier.bias.grad))
    for actual, expected in zip(*outcomes, strict=True):
        assert relative_error(actual, expected) < 0.15


def test_imagenet_stem_says_which_widths_it_takes():
    with pytest.raises(InputError, match=r"is no multiple of 56, .* try 56 or 112"):
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
    y = drop_path(x, torch.tensor(0.75))
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
    source = accelerate(SourceOperations(2, 3, stride)).double().train(training)
    unit = accelerate(make_operation("bin_dil_conv_3x3", 4, stride, groups=2, bits=BITS)).double()
    unit.train(training)
    mixing = coefficients(torch.randn(3, len(PRIMITIVES), dtype=torch.float64, requires_grad=True), stride)
    kernels = [kernel.detach().requires_grad_() for kernel in joined_kernels([source])[source]]
    for module, inputs in (
        (source, (torch.randn(2, 2, 9, 9, dtype=torch.float64, requires_grad=True), *mixing, kernels)),
        (unit, (torch.randn(2, 4, 9, 9, dtype=torch.float64, requires_grad=True),)),
    ):
        compiled = torch.compile(copy.deepcopy(module), fullgraph=True, backend="aot_eager")
        outcomes = []
        for network in (module, compiled):
            y = network(*inputs)
            y = y if torch.is_tensor(y) else y[0]
            of = (*tree_leaves(inputs), *network.parameters())
            outcomes.append((y, *torch.autograd.grad(y.square().sum(), of, allow_unused=True)))
        torch.testing.assert_close(*outcomes)


def test_a_compiled_network_follows_drop_path_without_another_compilation():
    config = ModelConfig(GENOTYPES["EBNAS"], init_channels=4, layers=3, groups=2)
    network, images = accelerate(build_model(config)), torch.randn(4, 3, 16, 16)
    counter = CompileCounter()
    network.compile(backend=counter, fullgraph=True)
    for probability in (0.1, 0.2, 0.3):
        network.drop_path_prob = probability
        network(images)
    assert counter.frame_count == 1
