"""Derived networks on a CPU, in C: the functions of fused.py, the same computation.

Each is an autograd function on two operators of torch.library, forward and backward, which have a fake form:
torch.compile, torch.export and the count of memory see them as they see torch's own. What is kept for the
backward pass is what fused.py keeps: the input and the convolution's result. The result is the same to the
bit for any number of threads; they are as many as torch is told to use.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from binary_ops import RPReLU
from kernels.fused import FusedCell, FusedReduce, FusedUnit, Geometry, count_batches
from kernels.library import library
from model import Cell
from operations import BinaryUnit, FactorizedReduce, Pool, drop_factor

NO_RESIDUAL, INPUT, HALVED_INPUT, TENSOR = range(4)
"""`enum residual_kind` of source/unit.h: what is added before PReLU."""


def unit(
    x: Tensor,
    residual: Tensor | None,
    weight: Tensor,
    convolution: Geometry,
    bn1: nn.BatchNorm2d,
    bn2: nn.BatchNorm2d,
    prelu: nn.PReLU,
    *,
    halved: bool = False,
    factor: Tensor | None = None,
    count: bool = True,
) -> Tensor:
    """fused.unit; but `residual` may also be x with `halved`, for the 2x2 averages of x (halving_pool), which
    are then computed inside; and sample i of the result is multiplied by factor[i], a tensor (n,)."""
    if count:
        count_batches([bn1, bn2])
    kind = NO_RESIDUAL if residual is None else TENSOR
    if residual is x:
        residual, kind = None, HALVED_INPUT if halved else INPUT
    shift = prelu.shift if isinstance(prelu, RPReLU) else None
    settings = [*convolution.stride, *convolution.padding, *convolution.dilation]
    settings += [convolution.groups, convolution.signs, kind, bn1.training]
    affine = bn1.weight, bn1.bias, bn2.weight, bn2.bias
    running = None, None, None, None
    if not bn1.training:
        running = bn1.running_mean, bn1.running_var, bn2.running_mean, bn2.running_var
    y, moments1, moments2 = _Unit.apply(
        settings, bn1.eps, running, factor, x, residual, weight, prelu.weight, shift, *affine
    )
    if bn1.training:
        of_batch = moments1[0], moments1[2], moments2[0], moments2[2]
        with torch.no_grad():
            running = [bn1.running_mean, bn1.running_var, bn2.running_mean, bn2.running_var]
            torch._foreach_lerp_(running, of_batch, bn1.momentum)
    return y


def conv_norm(x: Tensor, conv: nn.Conv2d, bn: nn.BatchNorm2d, *, relu: bool) -> Tensor:
    """[ReLU](BN(conv(x))) of a full-precision convolution without bias. Keeps x and the convolution's result.
    Running statistics are updated, and the batch is counted."""
    count_batches([bn])
    settings = [*conv.stride, *conv.padding, *conv.dilation, conv.groups, bn.training, relu]
    running = (None, None) if bn.training else (bn.running_mean, bn.running_var)
    y, moments = _ConvNorm.apply(settings, bn.eps, running, x, conv.weight, bn.weight, bn.bias)
    if bn.training:
        with torch.no_grad():
            running = [bn.running_mean, bn.running_var]
            torch._foreach_lerp_(running, [moments[0], moments[2]], bn.momentum)
    return y


class _ConvNorm(Function):
    @staticmethod
    def forward(ctx, settings, eps, running, x, weight, w, b):
        out, y, moments = torch.ops.ebnas.conv_norm(x, weight, w, b, *running, settings, eps)
        ctx.settings = settings
        ctx.save_for_backward(x, weight, w, b, y, moments)
        ctx.mark_non_differentiable(moments)
        return out, moments

    @staticmethod
    def backward(ctx, grad, _):
        wanted = ctx.needs_input_grad[3]
        of_x, *gradients = torch.ops.ebnas.conv_norm_backward(grad, *ctx.saved_tensors, wanted, ctx.settings)
        return None, None, None, of_x if wanted else None, *gradients


class _Unit(Function):
    @staticmethod
    def forward(ctx, settings, eps, running, factor, x, residual, weight, slope, shift, *affine):
        out, y, moments1, moments2 = torch.ops.ebnas.unit(
            x, residual, weight, slope, shift, factor, *affine, *running, settings, eps
        )
        ctx.settings, ctx.shifts = settings, shift is not None
        ctx.save_for_backward(x, residual, weight, slope, factor, *affine, y, moments1, moments2)
        ctx.mark_non_differentiable(moments1, moments2)
        return out, moments1, moments2

    @staticmethod
    def backward(ctx, grad, *_):
        gradients = torch.ops.ebnas.unit_backward(grad, *ctx.saved_tensors, ctx.shifts, ctx.settings)
        x, residual, weight, slope, shift, *affine = gradients
        residual = None if ctx.saved_tensors[1] is None else residual
        return None, None, None, None, x, residual, weight, slope, shift if ctx.shifts else None, *affine


def max_pool(x: Tensor, stride: int) -> Tensor:
    """3x3 maximum, padding 1; the gradient goes to the first of equal pixels, row by row. Keeps x."""
    return _Pool.apply(x, stride, False)


def avg_pool(x: Tensor, stride: int) -> Tensor:
    """3x3 average, padding 1, which is not counted. Keeps nothing."""
    return _Pool.apply(x, stride, True)


class _Pool(Function):
    @staticmethod
    def forward(ctx, x, stride, average):
        ctx.stride, ctx.average, ctx.shape = stride, average, x.shape
        if not average:
            ctx.save_for_backward(x)
        return torch.ops.ebnas.pool(x, stride, average)

    @staticmethod
    def backward(ctx, grad):
        x = None if ctx.average else ctx.saved_tensors[0]
        return torch.ops.ebnas.pool_backward(grad, x, ctx.shape, ctx.stride, ctx.average), None, None


def pointwise(
    x: Tensor,
    weights: Sequence[Tensor],
    norm1: nn.BatchNorm2d | None,
    norm2: nn.BatchNorm2d,
    prelu: nn.PReLU | None,
    *,
    signs: bool,
) -> Tensor:
    """PReLU(BN2(conv(sign(BN1(x))))) of a 1x1 convolution of all channels; of two `weights`, each (out / 2,
    in, 1, 1), a factorised reduction: at stride 2, the second reading one pixel further right and down.

    (n, in, h, w) -> (n, out, h', w'). Without BN1 and PReLU, and where BN2 has no affine parameters, these
    are left out. Running statistics are updated; counting the batches is left to the caller.
    """
    affine = None if norm1 is None else norm1.weight, None if norm1 is None else norm1.bias
    affine += norm2.weight, norm2.bias
    training = norm2.training
    running = [norm1.running_mean, norm1.running_var] if norm1 is not None else [None, None]
    running += [norm2.running_mean, norm2.running_var]
    slope = None if prelu is None else prelu.weight
    shift = prelu.shift if isinstance(prelu, RPReLU) else None
    odd = weights[1] if len(weights) == 2 else None
    settings = [signs, training]
    out, moments1, moments2 = _Pointwise.apply(
        settings, norm2.eps, [None] * 4 if training else running, x, weights[0], odd, slope, shift, *affine
    )
    if training:
        with torch.no_grad():
            moved = [(running[2], moments2[0]), (running[3], moments2[2])]
            if norm1 is not None:
                moved += [(running[0], moments1[0]), (running[1], moments1[2])]
            running, of_batch = zip(*moved, strict=True)
            torch._foreach_lerp_(list(running), list(of_batch), norm2.momentum)
    return out


class _Pointwise(Function):
    @staticmethod
    def forward(ctx, settings, eps, running, x, weight, odd, slope, shift, *affine):
        out, y, moments1, moments2 = torch.ops.ebnas.pointwise(
            x, weight, odd, slope, shift, *affine, *running, settings, eps
        )
        ctx.settings, ctx.shifts, ctx.odd = settings, shift is not None, odd is not None
        kept = out if slope is None else y  # without PReLU y is normalised in place
        ctx.save_for_backward(x, weight, odd, slope, *affine, kept, moments1, moments2)
        ctx.mark_non_differentiable(moments1, moments2)
        return out, moments1, moments2

    @staticmethod
    def backward(ctx, grad, *_):
        x, weight, odd, slope, *affine, y, moments1, moments2 = ctx.saved_tensors
        wanted = [ctx.needs_input_grad[3], ctx.needs_input_grad[4]]
        gradients = torch.ops.ebnas.pointwise_backward(
            grad, x, weight, odd, slope, *affine, y, moments1, moments2, ctx.shifts, wanted, ctx.settings
        )
        present = [*wanted, wanted[1] and ctx.odd, slope is not None, ctx.shifts]
        present += [parameter is not None for parameter in affine]
        return None, None, None, *(g if p else None for g, p in zip(gradients, present, strict=True))


# The operators. `settings`: stride, padding and dilation (two each), groups; of a unit signs, residual kind,
# training, of conv_norm training, relu.

_LIBRARY = torch.library.Library("ebnas", "FRAGMENT")
_LIBRARY.define(
    "unit(Tensor x, Tensor? residual, Tensor weight, Tensor slope, Tensor? shift, Tensor? factor, "
    "Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
    "Tensor? mean1, Tensor? var1, Tensor? mean2, Tensor? var2, int[] settings, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "unit_backward(Tensor grad, Tensor x, Tensor? residual, Tensor weight, Tensor slope, Tensor? factor, "
    "Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
    "Tensor y, Tensor moments1, Tensor moments2, bool shifts, int[] settings) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "pointwise(Tensor x, Tensor weight, Tensor? odd, Tensor? slope, Tensor? shift, "
    "Tensor? weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2, "
    "Tensor? mean1, Tensor? var1, Tensor? mean2, Tensor? var2, bool[] settings, float eps) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "pointwise_backward(Tensor grad, Tensor x, Tensor weight, Tensor? odd, Tensor? slope, "
    "Tensor? weight1, Tensor? bias1, Tensor? weight2, Tensor? bias2, "
    "Tensor y, Tensor moments1, Tensor moments2, bool shifts, bool[] wanted, bool[] settings) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "conv_norm(Tensor x, Tensor weight, Tensor weight2, Tensor bias2, Tensor? mean2, Tensor? var2, "
    "int[] settings, float eps) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "conv_norm_backward(Tensor grad, Tensor x, Tensor weight, Tensor weight2, Tensor bias2, Tensor y, "
    "Tensor moments2, bool wanted, int[] settings) -> (Tensor, Tensor, Tensor, Tensor)"
)
_LIBRARY.define("pool(Tensor x, int stride, bool average) -> Tensor")
_LIBRARY.define("pool_backward(Tensor grad, Tensor? x, SymInt[] size, int stride, bool average) -> Tensor")


class _PoolCall(ctypes.Structure):
    """`struct pool_call` of source/pool.h."""

    _integers = (
        "planes height width height_out width_out stride average threads channels grad_image"
    ).split()
    _fields_ = [(name, ctypes.c_int64) for name in _integers]
    _fields_ += [(name, ctypes.c_void_p) for name in ("x", "grad", "out", "grad_x")]
    _fields_ += [("failed", ctypes.c_int64)]


class PointwiseCall(ctypes.Structure):
    """`struct pointwise` of source/pointwise.h."""

    _integers = (
        "n channels_in channels_out height width height_out width_out halves signs training normalized "
        "adds_input threads"
    ).split()
    _pointers = (
        "x residual weight_even weight_odd weight1 bias1 weight2 bias2 slope shift factor mean1 var1 "
        "mean2 var2 statistics1 statistics2 y out grad"
    ).split()
    _gradients = (
        "grad_x grad_residual grad_weight_even grad_weight_odd grad_weight1 grad_bias1 grad_weight2 "
        "grad_bias2 grad_slope grad_shift"
    ).split()
    _fields_ = [(name, ctypes.c_int64) for name in _integers]
    _fields_ += [("eps", ctypes.c_double)]
    _fields_ += [(name, ctypes.c_void_p) for name in _pointers]
    _fields_ += [("grad_image", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in _gradients]
    _fields_ += [("parts", ctypes.c_int64), ("part_channels", ctypes.c_int64 * 3)]
    _fields_ += [("part_grad", ctypes.c_void_p * 3)]


class _UnitCall(ctypes.Structure):
    """`struct unit` of source/unit.h."""

    _integers = (
        "n channels_in channels_out groups height_in width_in height_out width_out kernel_h kernel_w "
        "stride_h stride_w padding_h padding_w dilation_h dilation_w signs residual_kind training threads "
        "relu"
    ).split()
    _pointers = (
        "x residual weight slope shift factor weight1 bias1 mean1 var1 weight2 bias2 mean2 var2 "
        "statistics1 statistics2 y out grad"
    ).split()
    _gradients = (
        "grad_x grad_residual grad_weight grad_slope grad_shift grad_weight1 grad_bias1 grad_weight2 "
        "grad_bias2"
    ).split()
    _fields_ = [(name, ctypes.c_int64) for name in _integers]
    _fields_ += [("eps", ctypes.c_double)]
    _fields_ += [(name, ctypes.c_void_p) for name in _pointers]
    _fields_ += [("grad_image", ctypes.c_int64)]
    _fields_ += [(name, ctypes.c_void_p) for name in _gradients]
    _fields_ += [("plan", ctypes.c_void_p), ("tasks", ctypes.c_int64), ("failed", ctypes.c_int64)]


@functools.lru_cache(maxsize=4096)
def _result_size(size: torch.Size, kernel: torch.Size, settings: tuple[int, ...]) -> tuple[int, int]:
    """(height, width) of a convolution's result."""
    stride, padding, dilation = settings[:2], settings[2:4], settings[4:6]
    return tuple(
        (size[i] + 2 * padding[i] - dilation[i] * (kernel[i] - 1) - 1) // stride[i] + 1 for i in (0, 1)
    )


def _call(
    x: Tensor, weight: Tensor, settings: Sequence[int], size: torch.Size, **pointers: Tensor
) -> _UnitCall:
    groups, signs, kind, training = settings[6:]
    n, channels, height, width = x.shape
    call = _UnitCall(n, channels, weight.shape[0], groups, height, width, *size[2:], *weight.shape[2:])
    call.stride_h, call.stride_w, call.padding_h, call.padding_w = settings[:4]
    call.dilation_h, call.dilation_w = settings[4:6]
    call.signs, call.residual_kind, call.training = signs, kind, training
    call.threads = torch.get_num_threads()
    call.x, call.weight = x.data_ptr(), weight.data_ptr()
    for name, tensor in pointers.items():
        if tensor is not None:
            setattr(call, name, tensor.data_ptr())
    return call


def _contiguous(*tensors: Tensor | None) -> list[Tensor | None]:
    return [None if tensor is None else tensor.contiguous() for tensor in tensors]


def _images_together(grad: Tensor) -> Tensor:
    """`grad` where each of its images lies in one piece, as in a slice of a concatenation; else a copy."""
    return grad if grad[0].is_contiguous() else grad.contiguous()


def run(function, call: ctypes.Structure) -> None:
    if function(ctypes.byref(call)):
        raise MemoryError("the memory does not suffice for the scratch space of a convolution")


def _unit(x, residual, weight, slope, shift, factor, w1, b1, w2, b2, mean1, var1, mean2, var2, settings, eps):
    out, y, moments1, moments2 = _unit_fake(
        x, residual, weight, slope, shift, factor, w1, b1, w2, b2, mean1, var1, mean2, var2, settings, eps
    )
    x, residual, weight, factor = _contiguous(x, residual, weight, factor)
    call = _call(
        x,
        weight,
        settings,
        out.shape,
        residual=residual,
        slope=slope,
        shift=shift,
        factor=factor,
        weight1=w1,
        bias1=b1,
        weight2=w2,
        bias2=b2,
        mean1=mean1,
        var1=var1,
        mean2=mean2,
        var2=var2,
        statistics1=moments1,
        statistics2=moments2,
        y=y,
        out=out,
    )
    call.eps = eps
    run(library(x.dtype).unit_forward, call)
    return out, y, moments1, moments2


def _unit_fake(
    x, residual, weight, slope, shift, factor, w1, b1, w2, b2, mean1, var1, mean2, var2, settings, eps
):
    size = _result_size(x.shape[2:], weight.shape[2:], tuple(settings[:6]))
    shape = x.shape[0], weight.shape[0], *size
    moments = x.new_empty((3, x.shape[1])), x.new_empty((3, weight.shape[0]))
    return x.new_empty(shape), x.new_empty(shape), *moments


def _unit_backward(
    grad, x, residual, weight, slope, factor, w1, b1, w2, b2, y, moments1, moments2, shifts, settings
):
    gradients = _unit_backward_fake(
        grad, x, residual, weight, slope, factor, w1, b1, w2, b2, y, moments1, moments2, shifts, settings
    )
    grad = _images_together(grad)
    x, residual, weight, factor = _contiguous(x, residual, weight, factor)
    grad_x, grad_residual, grad_weight, grad_slope, grad_shift, *affine = gradients
    call = _call(
        x,
        weight,
        settings,
        y.shape,
        residual=residual,
        slope=slope,
        factor=factor,
        weight1=w1,
        bias1=b1,
        weight2=w2,
        bias2=b2,
        statistics1=moments1,
        statistics2=moments2,
        y=y,
        grad=grad,
        grad_x=grad_x,
        grad_residual=None if residual is None else grad_residual,
        grad_weight=grad_weight,
        grad_slope=grad_slope,
        grad_shift=grad_shift if shifts else None,
        grad_weight1=affine[0],
        grad_bias1=affine[1],
        grad_weight2=affine[2],
        grad_bias2=affine[3],
    )
    call.grad_image = grad.stride(0)
    run(library(x.dtype).unit_backward, call)
    return gradients


def _unit_backward_fake(
    grad, x, residual, weight, slope, factor, w1, b1, w2, b2, y, moments1, moments2, shifts, settings
):
    return (
        x.new_empty(x.shape),
        grad.new_empty(grad.shape if residual is not None else 0),
        weight.new_empty(weight.shape),
        torch.empty_like(slope),
        slope.new_empty(slope.shape if shifts else 0),
        *(torch.empty_like(tensor) for tensor in (w1, b1, w2, b2)),
    )


def _conv_norm_call(x: Tensor, weight: Tensor, settings: Sequence[int], size: torch.Size, **pointers):
    *geometry, training, relu = settings
    call = _call(x, weight, [*geometry, False, NO_RESIDUAL, training], size, **pointers)
    call.relu = relu
    return call


def _conv_norm(x, weight, w2, b2, mean2, var2, settings, eps):
    out, y, moments = _conv_norm_fake(x, weight, w2, b2, mean2, var2, settings, eps)
    x, weight = _contiguous(x, weight)
    call = _conv_norm_call(x, weight, settings, out.shape, weight2=w2, bias2=b2, mean2=mean2, var2=var2)
    _point(call, statistics2=moments, y=y, out=out)
    call.eps = eps
    run(library(x.dtype).unit_forward, call)
    return out, y, moments


def _conv_norm_fake(x, weight, w2, b2, mean2, var2, settings, eps):
    size = _result_size(x.shape[2:], weight.shape[2:], tuple(settings[:6]))
    shape = x.shape[0], weight.shape[0], *size
    return x.new_empty(shape), x.new_empty(shape), x.new_empty((3, weight.shape[0]))


def _conv_norm_backward(grad, x, weight, w2, b2, y, moments2, wanted, settings):
    gradients = _conv_norm_backward_fake(grad, x, weight, w2, b2, y, moments2, wanted, settings)
    grad = _images_together(grad)
    x, weight = _contiguous(x, weight)
    call = _conv_norm_call(
        x, weight, settings, y.shape, weight2=w2, bias2=b2, statistics2=moments2, y=y, grad=grad
    )
    call.grad_image = grad.stride(0)
    of_x, of_weight, of_w2, of_b2 = gradients
    _point(call, grad_x=of_x if wanted else None, grad_weight=of_weight, grad_weight2=of_w2, grad_bias2=of_b2)
    run(library(x.dtype).unit_backward, call)
    return gradients


def _conv_norm_backward_fake(grad, x, weight, w2, b2, y, moments2, wanted, settings):
    contiguous = weight.new_empty(weight.shape)
    return x.new_empty(x.shape if wanted else 0), contiguous, torch.empty_like(w2), torch.empty_like(b2)


def _pointwise(x, weight, odd, slope, shift, w1, b1, w2, b2, mean1, var1, mean2, var2, settings, eps):
    out, y, moments1, moments2 = _pointwise_fake(
        x, weight, odd, slope, shift, w1, b1, w2, b2, mean1, var1, mean2, var2, settings, eps
    )
    x, weight, odd = _contiguous(x, weight, odd)
    call = _pointwise_call(
        x, out.shape, settings, weight_even=weight, weight_odd=odd, slope=slope, shift=shift
    )
    _point(call, weight1=w1, bias1=b1, weight2=w2, bias2=b2, mean1=mean1, var1=var1, mean2=mean2, var2=var2)
    _point(call, statistics1=moments1, statistics2=moments2, out=out, y=out if slope is None else y)
    call.eps = eps
    run(library(x.dtype).pointwise_forward, call)
    return out, y, moments1, moments2


def _pointwise_fake(x, weight, odd, slope, shift, w1, b1, w2, b2, mean1, var1, mean2, var2, settings, eps):
    n, channels_in, height, width = x.shape
    if odd is None:
        shape = n, weight.shape[0], height, width
    else:
        shape = n, 2 * weight.shape[0], -(-height // 2), -(-width // 2)
    moments = x.new_empty((3, channels_in if w1 is not None else 0)), x.new_empty((3, shape[1]))
    return x.new_empty(shape), x.new_empty(0 if slope is None else shape), *moments


def _pointwise_call(
    x: Tensor, size: torch.Size, settings: Sequence[bool], **pointers: Tensor
) -> PointwiseCall:
    n, channels, height, width = x.shape
    call = PointwiseCall(n, channels, size[1], height, width, *size[2:])
    call.halves = 1 if pointers["weight_odd"] is None else 2
    call.signs, call.training = settings
    call.threads = torch.get_num_threads()
    _point(call, x=x, **pointers)
    return call


def _point(call: ctypes.Structure, **pointers: Tensor | None) -> None:
    for name, tensor in pointers.items():
        if tensor is not None:
            setattr(call, name, tensor.data_ptr())


def _pointwise_backward(
    grad, x, weight, odd, slope, w1, b1, w2, b2, y, moments1, moments2, shifts, wanted, settings
):
    gradients = _pointwise_backward_fake(
        grad, x, weight, odd, slope, w1, b1, w2, b2, y, moments1, moments2, shifts, wanted, settings
    )
    grad = _images_together(grad)
    x, weight, odd = _contiguous(x, weight, odd)
    call = _pointwise_call(x, y.shape, settings, weight_even=weight, weight_odd=odd, slope=slope)
    _point(call, weight1=w1, bias1=b1, weight2=w2, bias2=b2, statistics1=moments1, statistics2=moments2)
    names = "grad_x", "grad_weight_even", "grad_weight_odd", "grad_slope", "grad_shift"
    names += "grad_weight1", "grad_bias1", "grad_weight2", "grad_bias2"
    _point(call, y=y, grad=grad, **{name: g for name, g in zip(names, gradients, strict=True) if g.numel()})
    call.normalized, call.grad_image = slope is None, grad.stride(0)
    run(library(x.dtype).pointwise_backward, call)
    return gradients


def _pointwise_backward_fake(
    grad, x, weight, odd, slope, w1, b1, w2, b2, y, moments1, moments2, shifts, wanted, settings
):
    of_x, of_weight = wanted
    none = x.new_empty
    return (
        x.new_empty(x.shape if of_x or w1 is not None else 0),
        weight.new_empty(weight.shape if of_weight else 0),
        weight.new_empty(weight.shape if of_weight and odd is not None else 0),
        none(0) if slope is None else torch.empty_like(slope),
        none(slope.shape if shifts else 0),
        *(none(0) if tensor is None else torch.empty_like(tensor) for tensor in (w1, b1, w2, b2)),
    )


def _pool(x, stride, average):
    out, x = _pool_fake(x, stride, average), x.contiguous()
    n, c, height, width = x.shape
    call = _PoolCall(n * c, height, width, *out.shape[2:], stride, average, torch.get_num_threads())
    call.x, call.out = x.data_ptr(), out.data_ptr()
    run(library(x.dtype).pool_forward, call)
    return out


def _pool_fake(x, stride, average):
    n, c, height, width = x.shape
    return x.new_empty((n, c, -(-height // stride), -(-width // stride)))


def _pool_backward(grad, x, size, stride, average):
    grad_x, grad = _pool_backward_fake(grad, x, size, stride, average), _images_together(grad)
    x = None if x is None else x.contiguous()
    n, c, height, width = size
    call = _PoolCall(n * c, height, width, *grad.shape[2:], stride, average, torch.get_num_threads())
    call.x = None if x is None else x.data_ptr()
    call.channels, call.grad_image = c, grad.stride(0)
    call.grad, call.grad_x = grad.data_ptr(), grad_x.data_ptr()
    run(library(grad.dtype).pool_backward, call)
    return grad_x


def _pool_backward_fake(grad, x, size, stride, average):
    return grad.new_empty(size)


for _name, _real, _fake in (
    ("unit", _unit, _unit_fake),
    ("unit_backward", _unit_backward, _unit_backward_fake),
    ("pointwise", _pointwise, _pointwise_fake),
    ("pointwise_backward", _pointwise_backward, _pointwise_backward_fake),
    ("conv_norm", _conv_norm, _conv_norm_fake),
    ("conv_norm_backward", _conv_norm_backward, _conv_norm_backward_fake),
    ("pool", _pool, _pool_fake),
    ("pool_backward", _pool_backward, _pool_backward_fake),
):
    _LIBRARY.impl(_name, _real, "CPU")
    torch.library.register_fake(f"ebnas::{_name}", _fake, lib=_LIBRARY)


class NativeUnit(FusedUnit):
    def forward(self, x: Tensor, factor: Tensor | None = None) -> Tensor:
        """`factor` (n,) multiplies each sample of the result: drop-path, without another pass."""
        alone = self.weights is None
        weight = self.conv.effective_weight() if alone else self.weights[0]
        residual = None if self.shortcut is None else x
        return unit(
            x,
            residual,
            weight,
            Geometry.of(self.conv),
            self.bn1,
            self.bn2,
            self.prelu,
            halved=isinstance(self.shortcut, nn.AvgPool2d),
            factor=factor,
            count=alone,
        )


class NativeReduce(FusedReduce):
    def forward(self, x: Tensor) -> Tensor:
        alone = self.weights is None
        weights = [conv.effective_weight() for conv in self.convolutions] if alone else self.weights
        if alone:
            count_batches([self.bn1, self.bn2])
        signs = self.conv_1.activation_bits == 1
        return pointwise(x, weights, self.bn1, self.bn2, self.prelu, signs=signs)


class NativePool(Pool):
    def forward(self, x: Tensor) -> Tensor:
        return (max_pool if self.kind == "max" else avg_pool)(x, self.stride)


class NativeCell(FusedCell):
    def dropped(self, edge: int, states: list[Tensor], keep: Tensor) -> Tensor:
        operation, x = self.operations[edge], states[self.sources[edge]]
        if not isinstance(operation, NativeUnit):
            return super().dropped(edge, states, keep)
        return operation(x, drop_factor(x, keep).flatten().to(x.dtype))


class NativeSequential(nn.Sequential):
    """Stems and the like: a convolution with its BN, and a ReLU after it, are one operator."""

    def forward(self, x: Tensor) -> Tensor:
        modules = list(self)
        while modules:
            module, *modules = modules
            if not isinstance(module, nn.Conv2d) or not modules or not _may_join(module, modules[0]):
                x = module(x)
            elif module.padding == (0, 0) and x.shape[2:] == module.kernel_size and module.groups == 1:
                x = F.linear(x.flatten(1), module.weight.flatten(1))[:, :, None, None]  # one pixel each
            else:
                bn, *modules = modules
                relu = bool(modules) and type(modules[0]) is nn.ReLU
                x = conv_norm(x, module, bn, relu=relu)
                modules = modules[relu:]
        return x


def _may_join(conv: nn.Conv2d, bn: nn.Module) -> bool:
    """Whether a convolution larger than 1x1 and the BN after it are what `conv_norm` computes."""
    usual = type(conv) is nn.Conv2d and conv.padding_mode == "zeros" and not isinstance(conv.padding, str)
    usual = usual and type(bn) is nn.BatchNorm2d and bn.affine and bn.track_running_stats
    return usual and conv.bias is None and conv.kernel_size != (1, 1) and bn.momentum is not None


NATIVE = {
    nn.Sequential: NativeSequential,
    BinaryUnit: NativeUnit,
    FactorizedReduce: NativeReduce,
    Pool: NativePool,
    Cell: NativeCell,
}
"""By plain class, the one whose instances compute the same in C."""
