"""The supernet on a CPU, in C: the convolutions of a state's edges, their BN and mixture, preprocessing."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd import Function

from binary_ops import binary_sign
from kernels.fused_search import (
    FusedSearchPreprocess,
    FusedSourceOperations,
    FusedSupernet,
    Statistics,
    normalized,
)
from kernels.library import library
from kernels.native import avg_pool, max_pool, pointwise, run
from model_search import Supernet
from operations import CONVOLUTIONS, SearchPreprocess, SourceOperations

MOST_KINDS = 8
"""As in source/search.h."""


def convolutions(x: Tensor, weights: Sequence[Tensor], stride: int) -> Tensor:
    """The four kinds of CONVOLUTIONS of the signs of x (n, c, h, w), with `weights` (f, c, k, k) of each:
    (n, 4 * f, h', w'). The gradient of x is binary_sign's. Keeps x."""
    return _Convolutions.apply(x, stride, *weights)


class _Convolutions(Function):
    @staticmethod
    def forward(ctx, x, stride, *weights):
        x = x.contiguous()
        ctx.stride = stride
        ctx.save_for_backward(x, *weights)
        return torch.ops.ebnas.search_convolutions(x, weights, stride)

    @staticmethod
    def backward(ctx, grad):
        x, *weights = ctx.saved_tensors
        of_x, of_weights = ctx.needs_input_grad[0], ctx.needs_input_grad[2]
        grad_x, *grads = torch.ops.ebnas.search_convolutions_backward(
            grad, x, weights, ctx.stride, of_x, of_weights
        )
        return (grad_x if of_x else None), None, *(grads if of_weights else [None] * len(weights))


def mixture(
    y: Tensor, coefficient: Tensor, running: Sequence[Tensor] | None, eps: float
) -> tuple[Tensor, Tensor]:
    """sum_p coefficient[p, m] * BN(y[:, p, m]), y (n, p, m, c, h, w), coefficient (p, m) -> (n, m, c, h, w);
    and mean, 1 / std and unbiased variance of each channel, (3, p * m * c). `running`: mean and variance to
    use in place of the batch's."""
    return _Mixture.apply(y, coefficient, *(running or (None, None)), eps)


class _Mixture(Function):
    @staticmethod
    def forward(ctx, y, coefficient, mean, var, eps):
        out, statistics = torch.ops.ebnas.search_mixture(y, coefficient, mean, var, eps)
        ctx.training = mean is None
        ctx.save_for_backward(y, coefficient, statistics)
        ctx.mark_non_differentiable(statistics)
        return out, statistics

    @staticmethod
    def backward(ctx, grad, _):
        y, coefficient, statistics = ctx.saved_tensors
        grad_y, grad_coefficient = torch.ops.ebnas.search_mixture_backward(
            grad, y, coefficient, statistics, ctx.training, ctx.needs_input_grad[0]
        )
        return (grad_y if ctx.needs_input_grad[0] else None), grad_coefficient.sum(2), None, None, None


# The operators

_LIBRARY = torch.library.Library("ebnas", "FRAGMENT")
_LIBRARY.define("search_convolutions(Tensor x, Tensor[] weights, int stride) -> Tensor")
_LIBRARY.define(
    "search_convolutions_backward(Tensor grad, Tensor x, Tensor[] weights, int stride, bool of_x, "
    "bool of_weights) -> Tensor[]"
)
_LIBRARY.define(
    "search_mixture(Tensor y, Tensor coefficient, Tensor? mean, Tensor? var, float eps) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "search_mixture_backward(Tensor grad, Tensor y, Tensor coefficient, Tensor statistics, bool training, "
    "bool of_y) -> (Tensor, Tensor)"
)


class _SearchCall(ctypes.Structure):
    """`struct search_call` of source/search.h."""

    _integers = "n", "channels", "filters", "height", "width", "height_out", "width_out", "kinds", "threads"
    _fields_ = [(name, ctypes.c_int64) for name in _integers]
    _fields_ += [("size", ctypes.c_int64 * MOST_KINDS), ("dilation", ctypes.c_int64 * MOST_KINDS)]
    _fields_ += [("stride", ctypes.c_int64), ("x", ctypes.c_void_p), ("weight", ctypes.c_void_p * MOST_KINDS)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("y", "grad", "grad_x")]
    _fields_ += [("grad_weight", ctypes.c_void_p * MOST_KINDS)]
    _fields_ += [("plans", ctypes.c_void_p), ("partial", ctypes.c_void_p)]
    _fields_ += [("chunks", ctypes.c_int64), ("failed", ctypes.c_int64)]


class _MixtureCall(ctypes.Structure):
    """`struct mixture_call` of source/search.h."""

    _integers = "n", "kinds", "edges", "channels", "pixels", "training", "threads"
    _pointers = (
        *("y", "coefficient", "mean", "var", "statistics", "out"),
        *("grad", "grad_y", "grad_coefficient"),
    )
    _fields_ = [(name, ctypes.c_int64) for name in _integers]
    _fields_ += [("eps", ctypes.c_double)]
    _fields_ += [(name, ctypes.c_void_p) for name in _pointers]


def _search_call(x: Tensor, weights: Sequence[Tensor], stride: int) -> _SearchCall:
    n, channels, height, width = x.shape
    call = _SearchCall(n, channels, len(weights[0]), height, width, -(-height // stride), -(-width // stride))
    call.kinds, call.threads, call.stride = len(weights), torch.get_num_threads(), stride
    call.x = x.data_ptr()
    for kind, (weight, (size, _, dilation)) in enumerate(zip(weights, CONVOLUTIONS.values(), strict=True)):
        call.size[kind], call.dilation[kind], call.weight[kind] = size, dilation, weight.data_ptr()
    return call


def _convolutions(x, weights, stride):
    y, weights = _convolutions_fake(x, weights, stride), [weight.contiguous() for weight in weights]
    call = _search_call(x, weights, stride)
    call.y = y.data_ptr()
    run(library(x.dtype).search_convolutions, call)
    return y


def _convolutions_fake(x, weights, stride):
    n, _, height, width = x.shape
    return x.new_empty(n, len(weights) * len(weights[0]), -(-height // stride), -(-width // stride))


def _convolutions_backward(grad, x, weights, stride, of_x, of_weights):
    gradients = _convolutions_backward_fake(grad, x, weights, stride, of_x, of_weights)
    grad, weights = grad.contiguous(), [weight.contiguous() for weight in weights]
    call = _search_call(x, weights, stride)
    call.grad = grad.data_ptr()
    if of_x:
        call.grad_x = gradients[0].data_ptr()
    if of_weights:
        for kind, gradient in enumerate(gradients[1:]):
            call.grad_weight[kind] = gradient.data_ptr()
    run(library(x.dtype).search_convolutions_backward, call)
    return gradients


def _convolutions_backward_fake(grad, x, weights, stride, of_x, of_weights):
    grad_x = x.new_empty(x.shape if of_x else 0)
    return [grad_x, *(weight.new_empty(weight.shape if of_weights else 0) for weight in weights)]


def _mixture_call(y: Tensor, coefficient: Tensor, statistics: Tensor, training: bool) -> _MixtureCall:
    n, kinds, edges, channels, height, width = y.shape
    call = _MixtureCall(n, kinds, edges, channels, height * width, training, torch.get_num_threads())
    call.y, call.coefficient, call.statistics = (tensor.data_ptr() for tensor in (y, coefficient, statistics))
    return call


def _mixture(y, coefficient, mean, var, eps):
    out, statistics = _mixture_fake(y, coefficient, mean, var, eps)
    y, coefficient = y.contiguous(), coefficient.contiguous()
    call = _mixture_call(y, coefficient, statistics, mean is None)
    call.eps, call.out = eps, out.data_ptr()
    if mean is not None:
        call.mean, call.var = mean.data_ptr(), var.data_ptr()
    run(library(y.dtype).search_mixture, call)
    return out, statistics


def _mixture_fake(y, coefficient, mean, var, eps):
    n, kinds, edges, channels, height, width = y.shape
    return y.new_empty(n, edges, channels, height, width), y.new_empty(3, kinds * edges * channels)


def _mixture_backward(grad, y, coefficient, statistics, training, of_y):
    grad_y, grad_coefficient = _mixture_backward_fake(grad, y, coefficient, statistics, training, of_y)
    grad, y, coefficient = grad.contiguous(), y.contiguous(), coefficient.contiguous()
    call = _mixture_call(y, coefficient, statistics, training)
    call.grad, call.grad_coefficient = grad.data_ptr(), grad_coefficient.data_ptr()
    if of_y:
        call.grad_y = grad_y.data_ptr()
    run(library(y.dtype).search_mixture_backward, call)
    return grad_y, grad_coefficient


def _mixture_backward_fake(grad, y, coefficient, statistics, training, of_y):
    return y.new_empty(y.shape if of_y else 0), y.new_empty(y.shape[1:4])


for _name, _real, _fake in (
    ("search_convolutions", _convolutions, _convolutions_fake),
    ("search_convolutions_backward", _convolutions_backward, _convolutions_backward_fake),
    ("search_mixture", _mixture, _mixture_fake),
    ("search_mixture_backward", _mixture_backward, _mixture_backward_fake),
):
    _LIBRARY.impl(_name, _real, "CPU")
    torch.library.register_fake(f"ebnas::{_name}", _fake, lib=_LIBRARY)


class NativeSourceOperations(FusedSourceOperations):
    def forward(
        self, x: Tensor, convolving: Tensor, sharing: Tensor, kernels: None = None
    ) -> tuple[Tensor, Statistics | None]:
        """As FusedSourceOperations; `kernels` are its convolutions' own."""
        y = convolutions(x, [convolution.weight for convolution in self.convolutions], self.stride)
        if self.stride == 2:
            y = torch.cat([y, self._reduced(binary_sign(x), len(sharing))], 1)
        pools = [max_pool(x, self.stride), avg_pool(x, self.stride)]
        pools = normalized(self.pool_norm, torch.cat(pools, 1))
        mixed, statistics = self._normalized_mixture(y, convolving)
        shared = torch.cat([pools, self.shortcut(x)], 1).unflatten(1, (3, -1)).flatten(2)
        sharing = sharing.expand(len(x), -1, -1)
        return mixed + torch.bmm(sharing, shared).view_as(mixed), statistics

    def _normalized_mixture(self, y: Tensor, coefficient: Tensor) -> tuple[Tensor, Statistics | None]:
        norm = self.norm
        running = None if self.training else (norm.running_mean, norm.running_var)
        mixed, moments = mixture(y.unflatten(1, (*coefficient.shape, -1)), coefficient, running, norm.eps)
        if not self.training:
            return mixed, None
        count = y.numel() // y.shape[1]
        return mixed, (moments[0], moments[2] * ((count - 1) / count), count)


class NativeSearchPreprocess(FusedSearchPreprocess):
    def forward(self, signs: Tensor) -> Tensor:
        weights = [convolution.weight for convolution in self.convolutions]
        return pointwise(signs, weights, None, self.norm, None, signs=False)


class NativeSupernet(FusedSupernet):
    def joined_kernels(self) -> dict[SourceOperations, None]:
        return dict.fromkeys(source for cell in self.cells for source in cell.sources)


NATIVE_SEARCH = {
    SourceOperations: NativeSourceOperations,
    SearchPreprocess: NativeSearchPreprocess,
    Supernet: NativeSupernet,
}
"""By plain class, the one whose instances compute the same in C; a SearchCell stays in its fused form."""
