"""The fused forms equal the modules they stand for, decide as the forward pass did, keep what they say."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from binary_ops import BinaryConv2d
from flags.choices import WEIGHT_BINARIZATIONS
from genotypes import GENOTYPES, PRIMITIVES
from kernels import accelerate, fused
from kernels.fused import effective_weights
from model import ModelConfig, build_model
from networks.registry import make_config
from operations import CONVOLUTIONS, BinaryUnit, FactorizedReduce, Pool, make_operation

BITS = [(1, 1), (1, 32), (32, 1), (32, 32)]
UNITS = [
    *((name, stride) for name in CONVOLUTIONS for stride in (1, 2)),
    ("preprocess", 1),
    ("factorized reduction", 2),
]
FORMATS = [torch.contiguous_format, torch.channels_last]
EVERY_OPERATION = tuple((name, index % 2) for index, name in enumerate((*PRIMITIVES, "max_pool_3x3")))


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def assert_close(ours, theirs, relative):
    assert ours.dtype == theirs.dtype
    ours, theirs = ours.double(), theirs.double()  # counted batches are integers
    # where a BN follows, gradients of what shifts its input are 0 but for rounding
    assert (ours - theirs).norm() <= relative * theirs.norm() + 1e-12


def make_unit(name, stride, bits=(1, 1), method="plain", activation="prelu"):
    kind = {"activation": activation}
    kind["bits"] = {"weight_bits": bits[0], "activation_bits": bits[1], "weight_binarization": method}
    if name == "preprocess":
        unit = BinaryUnit(8, 4, 1, **kind)
    elif name == "factorized reduction":
        unit = FactorizedReduce(8, 4, **kind)
    else:
        unit = make_operation(name, 8, stride, groups=2, **kind)
    for parameter in unit.parameters():
        if parameter.dim() == 1:  # BN and PReLU: slopes on both sides of 0 and above 1/2
            nn.init.normal_(parameter)
    for bn in (unit.bn1, unit.bn2):
        nn.init.normal_(bn.running_mean)
        nn.init.uniform_(bn.running_var, 0.5, 2)
    return unit


def outcomes(unit, x, *, autocast=False):
    """Results, gradients and buffers of the fused form, and of the modules on a copy."""
    results = []
    for module in (accelerate(unit), accelerate(copy.deepcopy(unit), "plain")):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = module(x)
        torch.manual_seed(1)
        gradients = torch.autograd.grad(y, (x, *module.parameters()), torch.randn(y.shape).to(y))
        results.append((y.detach(), *gradients, *module.buffers()))
    return zip(*results, strict=True)


@pytest.mark.parametrize("method", WEIGHT_BINARIZATIONS)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "stride"), UNITS)
def test_units_equal_their_modules(name, stride, bits, training, method):
    unit = make_unit(name, stride, bits, method).double().train(training)
    for size in ((6, 8), (9, 7)):
        x = (2 * torch.randn(3, 8, *size, dtype=torch.float64) + 1).requires_grad_()
        for ours, theirs in outcomes(unit, x):
            assert_close(ours, theirs, 1e-9)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("name", "stride"), UNITS)
def test_units_under_autocast(name, stride, bits):
    """The same types, and as near as two sums in bfloat16 are, in its eps."""
    x = (2 * torch.randn(3, 8, 9, 7).bfloat16().float() + 1).requires_grad_()
    for ours, theirs in outcomes(make_unit(name, stride, bits), x, autocast=True):
        assert_close(ours, theirs, 4 * torch.finfo(torch.bfloat16).eps)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "stride"), UNITS)
def test_units_with_rprelu(name, stride, training):
    """In float64 ReActNet's RPReLU, x - gamma + zeta above gamma, else slope * (x - gamma) + zeta, where
    BN2's bias is -gamma; under autocast as near as bfloat16 is."""
    unit = make_unit(name, stride, activation="rprelu").train(training)
    x = (2 * torch.randn(3, 8, 9, 7).bfloat16().float() + 1).requires_grad_()
    for ours, theirs in outcomes(unit, x, autocast=True):
        assert_close(ours, theirs, 4 * torch.finfo(torch.bfloat16).eps)

    unit.double()
    x = x.detach().double().requires_grad_()
    for ours, theirs in outcomes(unit, x):
        assert_close(ours, theirs, 1e-9)
    with torch.no_grad():
        gamma, slope, zeta = (v.view(-1, 1, 1) for v in (-unit.bn2.bias, unit.prelu.weight, unit.prelu.shift))
        forward, unit.prelu.forward = unit.prelu.forward, lambda y: y + gamma  # what is given to RPReLU
        z = unit.eval()(x)
        unit.prelu.forward = forward
        expected = torch.where(z > gamma, z - gamma + zeta, slope * (z - gamma) + zeta)
        assert_close(unit(x), expected, 1e-12)


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("name", "stride"), UNITS)
def test_the_backward_pass_sees_the_values_of_the_forward_pass(
    name, stride, training, dtype, memory_format, monkeypatch
):
    """To the bit, where a third of the signs are rounding's: of x = 1, BN1 gives 0 but for a few ulps."""
    unit = accelerate(make_unit(name, stride)).train(training)
    x = torch.randint(0, 3, (4, 8, 9, 7)).to(dtype).to(memory_format=memory_format).requires_grad_()
    bn = unit.bn1
    mean, var = bn.running_mean, bn.running_var
    if training:
        mean, var = x.detach().float().mean((0, 2, 3)), x.detach().float().var((0, 2, 3), unbiased=False)
    with torch.no_grad():
        bn.bias.copy_((mean - 1) * (bn.weight * (var + bn.eps).rsqrt()) + torch.linspace(-1e-6, 1e-6, 8))
    normalised = []

    def recorded(norm, *arguments, forward=fused.Norm.forward):
        result = forward(norm, *arguments)
        normalised.append(result[0].clone())
        return result

    monkeypatch.setattr(fused.Norm, "forward", recorded)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
        total = unit(x).sum()
    total.backward()
    a, z, z_again, a_again = normalised
    assert torch.equal(a, a_again) and torch.equal(z, z_again)
    ties = a[x == 1]
    assert ties.abs().max() < 4e-6 and (ties < 0).any() and (ties >= 0).any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("size", [(8, 8), (7, 10), (2, 3)])
@pytest.mark.parametrize("stride", [1, 2])
def test_max_pool_equals_torchs_on_ties(stride, size, memory_format, dtype):
    x = torch.randint(-1, 2, (2, 4, *size)).to(dtype).to(memory_format=memory_format).requires_grad_()
    expected = F.max_pool2d(x, 3, stride, 1)
    actual = fused.max_pool(x, stride)
    assert torch.equal(actual, expected)
    grad = torch.randn_like(expected)
    (ours,), (theirs,) = (torch.autograd.grad(y, x, grad) for y in (actual, expected))
    assert torch.equal(ours, theirs) and theirs.any()


def kept(run):
    """The shapes of the feature maps that autograd keeps for `run`, each storage once."""
    found = {}

    def pack(tensor):
        if tensor.dim() == 4 and tensor.shape[0] == 5:
            found[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        result = run()
    del result
    return sorted(found.values())


@pytest.mark.parametrize(("name", "stride"), UNITS)
def test_a_unit_keeps_its_input_and_its_convolutions_result(name, stride):
    unit = accelerate(make_unit(name, stride))
    x = torch.randn(5, 8, 12, 12, requires_grad=True)
    y_shape = tuple(unit(x).shape)
    halved = [(5, 8, 6, 6)] if name in CONVOLUTIONS and stride == 2 else []  # the residual
    assert kept(lambda: unit(x)) == sorted([(5, 8, 12, 12), y_shape, *halved])


def test_a_max_pool_keeps_its_input():
    x = torch.randn(5, 8, 12, 12, requires_grad=True)
    assert kept(lambda: accelerate(Pool("max", 1))(x)) == [tuple(x.shape)]


@pytest.mark.parametrize("memory_format", FORMATS)
@pytest.mark.parametrize("method", WEIGHT_BINARIZATIONS)
def test_weights_binarised_together_are_those_of_each(method, memory_format):
    """To the bit, and so their gradients."""
    shapes = [(4, 6, 1), (8, 6, 1), (4, 6, 3), (6, 54, 1), (4, 2, 5), (3, 1, 1)]
    options = {"weight_binarization": method}
    convolutions = [BinaryConv2d(c_in, c_out, size, **options) for c_out, c_in, size in shapes]
    convolutions.append(BinaryConv2d(6, 8, 3, weight_bits=32))
    for conv in convolutions:
        conv.to(memory_format=memory_format)
        nn.init.normal_(conv.weight, 0.3)
    together = effective_weights(convolutions)
    for conv in convolutions:
        alone = conv.effective_weight()
        assert torch.equal(together[conv], alone)
        grad = torch.randn_like(alone)
        (ours,), (theirs,) = (
            torch.autograd.grad(weight, conv.weight, grad, retain_graph=True)
            for weight in (together[conv], alone)
        )
        assert torch.equal(ours, theirs) and ours.is_contiguous(memory_format=memory_format)


def small_network(**fields):
    genotype = GENOTYPES["EBNAS"]._replace(normal=EVERY_OPERATION, reduce=EVERY_OPERATION)
    network = build_model(ModelConfig(genotype, init_channels=4, layers=3, groups=2, **fields))
    network.drop_path_prob = 0.2
    return network


def training_step(network, forward, images):
    torch.manual_seed(2)  # drop-path's samples
    logits, _ = forward(images)
    F.cross_entropy(logits, torch.arange(len(images))).backward()
    return [logits.detach(), *(p.grad for p in network.parameters()), *network.buffers()]


def test_a_network_equals_its_modules():
    """Activations of 32 bits: with 1 bit rounding would decide which of equal pixels a max pool picks."""
    plain = small_network(activation_bits=32).double()
    network = accelerate(copy.deepcopy(plain))
    images = torch.randn(4, 3, 17, 17, dtype=torch.float64)
    steps = [training_step(form, form, images) for form in (network, plain)]
    for ours, theirs in zip(*steps, strict=True):
        assert_close(ours, theirs, 1e-9)


@pytest.mark.parametrize("form", ["torch", "native"])
@pytest.mark.parametrize("family", ["cifar", "imagenet"])
@pytest.mark.parametrize("arch", ["BATS", "BNAS-A", "DCP-NAS-L"])
def test_the_other_systems_equal_their_modules(arch, family, form):
    """All that a fast form has of them, and that it leaves the rest alone: values, gradients, all buffers."""
    plain = build_model(make_config(arch, family=family, init_channels=24, layers=3, num_classes=4)).double()
    network = accelerate(copy.deepcopy(plain), form)
    size = 16 if family == "cifar" else 64
    images = torch.randn(4, 3, size, size, dtype=torch.float64)
    steps = [training_step(each, each, images) for each in (network, plain)]
    for ours, theirs in zip(*steps, strict=True):
        assert (ours is None) == (theirs is None)  # a weight behind a zero operation has no gradient
        if ours is not None:
            assert_close(ours, theirs, 1e-9)


def test_a_network_is_one_graph():
    network = accelerate(small_network())
    images = torch.randn(4, 3, 16, 16)
    network.drop_path_prob = 0.0  # eager and compiled code draw different numbers
    compiled = copy.deepcopy(network)
    forward = torch.compile(compiled, backend="aot_eager", fullgraph=True)
    steps = [training_step(network, network, images), training_step(compiled, forward, images)]
    for ours, theirs in zip(*steps, strict=True):
        torch.testing.assert_close(ours, theirs)
