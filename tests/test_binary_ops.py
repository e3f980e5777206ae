"""Signs, straight-through estimators, weight scaling and BinaryConv2d, against their formulas."""

import math

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from binary_ops import BinaryConv2d, binarize_weight, binary_sign, sign
from flags.choices import WEIGHT_BINARIZATIONS
from utils import InputError

INFINITY = math.inf
# x, its sign, and the slope of the activations' estimator there: max(0, 2 - 2|x|)
POINTS = [
    (-INFINITY, -1, 0),
    (-2, -1, 0),
    (-1, -1, 0),
    (-0.75, -1, 0.5),
    (-0.25, -1, 1.5),
    (-0.0, 1, 2),
    (0.0, 1, 2),
    (0.25, 1, 1.5),
    (0.75, 1, 0.5),
    (1, 1, 0),
    (2, 1, 0),
    (INFINITY, 1, 0),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BITS = [(1, 1), (1, 32), (32, 1), (32, 32)]


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


# Binarisation as its formulas read, in float tensors, by autograd alone


def straight_through(value: Tensor, surrogate: Tensor) -> Tensor:
    """`value`, with the gradient of `surrogate`."""
    return value.detach() + (surrogate - surrogate.detach())


def plain_sign(x: Tensor) -> Tensor:
    """Bi-Real Net's sign: the gradient is that of the piecewise quadratic x (2 - |x|) on [-1, 1]."""
    inside = x.clamp(-1, 1)
    return straight_through(torch.where(x >= 0, 1.0, -1.0).to(x.dtype), inside * (2 - inside.abs()))


def plain_weight(weight: Tensor, method: str = "plain") -> Tensor:
    """Binary weights with one scale a filter; sign's gradient is that of its argument within (-1, 1)."""
    dims = (1, 2, 3)
    centred = weight - weight.mean(dims, keepdim=True)
    standardised = centred / centred.std(dims, keepdim=True)
    signed = standardised if method == "balanced" else weight
    value = torch.where(signed >= 0, 1.0, -1.0).to(weight.dtype)
    passed = torch.where(signed.abs() < 1, signed, signed.detach())
    return straight_through(value, passed) * standardised.detach().abs().mean(dims, keepdim=True)


def plain_convolution(conv: BinaryConv2d, x: Tensor) -> Tensor:
    """What `conv` computes."""
    if conv.activation_bits == 1:
        x = plain_sign(x)
    weight = plain_weight(conv.weight, conv.weight_binarization) if conv.weight_bits == 1 else conv.weight
    return F.conv2d(x, weight, None, conv.stride, conv.padding, conv.dilation, conv.groups)


@pytest.mark.parametrize("dtype", DTYPES)
def test_sign_of_activations(dtype):
    x = torch.tensor([point[0] for point in POINTS], dtype=dtype, requires_grad=True)
    y = binary_sign(x)
    assert y.dtype == dtype
    assert y.tolist() == sign(x).tolist() == [point[1] for point in POINTS]
    y.backward(torch.full_like(y, 3))
    assert x.grad.tolist() == [3 * point[2] for point in POINTS]


def test_sign_is_never_zero_and_never_minus_zero():
    for zero in (0.0, -0.0, 1e-45, -1e-45):
        assert sign(torch.tensor(zero)).item() == (-1 if zero < 0 else 1)


@pytest.mark.parametrize("dtype", DTYPES)
def test_nan_stays_nan_in_both_directions(dtype):
    x = torch.tensor([math.nan, 0.5], dtype=dtype, requires_grad=True)
    y = binary_sign(x)
    y.sum().backward()
    for values in (y, x.grad, sign(x)):
        assert values.isnan().tolist() == [True, False]
    assert binarize_weight(torch.tensor([[math.nan, 0.5, -0.5]], dtype=dtype))[0, 0].isnan()


def test_inputs_are_left_as_they_are():
    x = torch.linspace(-2, 2, 9)
    weight = torch.randn(3, 2, 3, 3)
    for tensor, operation in ((x, sign), (x, binary_sign), (weight, binarize_weight)):
        before = tensor.clone()
        operation(tensor)
        assert torch.equal(tensor, before)


def test_sign_of_weights_passes_gradients_inside_the_unit_interval():
    values = [-INFINITY, -1.5, -1.0, -0.99, -0.0, 0.0, 0.99, 1.0, 1.5, INFINITY]
    weight = torch.tensor(values).view(-1, 1)  # filters of one weight have scale 1
    weight.requires_grad_()
    y = binarize_weight(weight)
    assert y.flatten().tolist() == [-1, -1, -1, -1, 1, 1, 1, 1, 1, 1]
    y.backward(torch.full_like(y, 3))
    assert weight.grad.flatten().tolist() == [0, 0, 0, 3, 3, 3, 3, 0, 0, 0]


@pytest.mark.parametrize("method", WEIGHT_BINARIZATIONS)
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (4, 6, 1, 1), (2, 1, 5, 5), (3, 1, 1, 2)])
def test_weights_and_their_gradient_equal_the_formula(method, shape):
    weight = (1.2 * torch.randn(shape, dtype=torch.float64) + 0.3).requires_grad_()
    grad = torch.randn(shape, dtype=torch.float64)
    expected = plain_weight(weight, method)
    (expected_grad,) = torch.autograd.grad(expected, weight, grad)
    actual = binarize_weight(weight, method)
    (actual_grad,) = torch.autograd.grad(actual, weight, grad)
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(actual_grad, expected_grad)
    assert actual_grad.abs().sum() > 0


def test_balanced_filters_have_as_many_plus_as_minus():
    weight = torch.randn(8, 4, 5, 5) + 3  # far from zero mean
    assert (binarize_weight(weight) > 0).float().mean() > 0.99
    assert abs((binarize_weight(weight, "balanced") > 0).float().mean() - 0.5) < 0.05


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", WEIGHT_BINARIZATIONS)
@pytest.mark.parametrize("shape", [(2, 7, 3, 3), (2, 1, 1, 1)])
@pytest.mark.parametrize("value", [0.0, 0.1, -0.1, 1e-3, 3.0])
def test_filters_without_spread(value, shape, method, dtype):
    """0.1 is no binary fraction: its mean is off by rounding, and must not pass for a spread."""
    weight = torch.full(shape, value, dtype=dtype)
    weight[1, 0, 0, 0] *= -1  # a filter beside it has one, where it has more than one weight
    weight.requires_grad_()
    y = binarize_weight(weight, method)
    assert y.dtype == dtype
    assert torch.equal(y[0], torch.full_like(y[0], 1 if value >= 0 else -1))
    y.sum().backward()
    assert torch.equal(weight.grad[0], torch.full_like(weight[0], float(abs(value) < 1)))
    assert weight.grad.isfinite().all() and y.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", WEIGHT_BINARIZATIONS)
def test_half_precision_weights_are_scaled_in_single_precision(dtype, method):
    weight = torch.randn(6, 8, 3, 3).to(dtype)
    expected = binarize_weight(weight.double(), method).to(dtype)
    actual = binarize_weight(weight, method)
    assert actual.dtype == dtype
    torch.testing.assert_close(actual, expected, rtol=torch.finfo(dtype).eps, atol=0)


def test_unknown_method_names_the_choices():
    with pytest.raises(InputError, match=r"'xnor'; choose from .*plain.*balanced"):
        binarize_weight(torch.randn(1, 1, 1, 1), "xnor")
    with pytest.raises(InputError, match="1 or 32, not 2"):
        BinaryConv2d(4, 4, 3, weight_bits=2)


@pytest.mark.parametrize(
    "geometry",
    [
        {"kernel_size": 3, "padding": 1},
        {"kernel_size": 5, "stride": 2, "padding": 4, "dilation": 2, "groups": 2},
        {"kernel_size": 1, "stride": 2},
    ],
)
@pytest.mark.parametrize(("weight_bits", "activation_bits"), BITS)
@pytest.mark.parametrize("method", WEIGHT_BINARIZATIONS)
def test_convolution_equals_the_formula(method, weight_bits, activation_bits, geometry):
    conv = BinaryConv2d(
        4, 6, **geometry, weight_bits=weight_bits, activation_bits=activation_bits, weight_binarization=method
    ).double()
    x = torch.randn(3, 4, 9, 7, dtype=torch.float64, requires_grad=True)
    expected = plain_convolution(conv, x)
    actual = conv(x)
    torch.testing.assert_close(actual, expected)
    grad = torch.randn_like(actual)
    torch.testing.assert_close(
        torch.autograd.grad(actual, (x, conv.weight), grad),
        torch.autograd.grad(expected, (x, conv.weight), grad),
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("weight_bits", "activation_bits"), BITS)
def test_convolution_in_half_precision(dtype, weight_bits, activation_bits):
    """Under autocast and as a module of that type: ±1 is exact there, the scale and the sum are rounded."""
    conv = BinaryConv2d(8, 4, 3, padding=1, weight_bits=weight_bits, activation_bits=activation_bits)
    x = torch.randn(2, 8, 6, 6).to(dtype).float().requires_grad_()
    conv.weight.data = conv.weight.data.to(dtype).float()
    grad = torch.randn(2, 4, 6, 6).to(dtype)
    expected = conv(x)
    expected_grads = torch.autograd.grad(expected, (x, conv.weight), grad.float())
    with torch.autocast("cpu", dtype):
        actual = conv(x)
    assert actual.dtype == dtype
    close = {"rtol": 0.02, "atol": 0.04, "check_dtype": False}
    torch.testing.assert_close(actual, expected, **close)
    actual_grads = torch.autograd.grad(actual, (x, conv.weight), grad)
    assert [g.dtype for g in actual_grads] == [torch.float32] * 2
    for ours, theirs in zip(actual_grads, expected_grads, strict=True):
        assert (ours - theirs).norm() < 0.02 * theirs.norm()
    torch.testing.assert_close(conv.to(dtype)(x.to(dtype)), expected, **close)
