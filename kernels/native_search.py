"""The supernet on a CPU, in C: model_search.Supernet with two operators for each of its cells.

`preprocess` computes a SearchPreprocess, signs included; `cell` all of a SearchCell that comes after. Both
are autograd functions on operators of torch.library with fake forms. A cell keeps its input states, its
result and the results of its convolutions and pools; a preprocessing its input and its result. The signs, as
all else, are computed again in the backward pass by the same expressions. Of the architecture and the weights
only those gradients are computed that are asked for.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function

from genotypes import NODES
from kernels.fused import count_batches
from kernels.library import library
from kernels.native import PointwiseCall, run
from model_search import LEAVING, SearchCell, Supernet, edge_weights
from operations import CONVOLUTIONS, SearchPreprocess

_WEIGHTS = len(CONVOLUTIONS) + 2
"""Of a source: the convolutions', and those of both halves of a factorised reduction."""


class NativeSupernet(Supernet):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        by_source = [edge for edges in LEAVING for edge in edges]
        by_kind = {}
        for reduction, alpha, beta in (
            (False, self.alphas_normal, self.betas_normal),
            (True, self.alphas_reduce, self.betas_reduce),
        ):
            edges = edge_weights(beta)[by_source]  # (14,)
            by_kind[reduction] = edges, edges.unsqueeze(1) * alpha.softmax(1)[by_source]  # (14, 7)
        x = self.stem(x)
        older, newer = x, x
        statistics: list[tuple[nn.BatchNorm2d, Tensor]] = []
        for module in self.cells:
            states = [
                preprocess(module.preprocess0, older, statistics),
                preprocess(module.preprocess1, newer, statistics),
            ]
            older, newer = newer, cell(module, *states, *by_kind[module.reduction], statistics)
        if self.training:
            move_running(statistics)
            count_batches(norm for module in self.cells for norm in counted(module))
        return self.classifier(newer.mean((2, 3))), None


def counted(module: SearchCell) -> list[nn.BatchNorm2d]:
    """The BNs that count their batches, as the original's do."""
    preprocessed = module.preprocess0.norm, module.preprocess1.norm
    return [*preprocessed, *(source.pool_norm for source in module.sources)]


@torch.no_grad()
def move_running(statistics: Sequence[tuple[nn.BatchNorm2d, Tensor]]) -> None:
    """Running statistics towards those of a batch: of each BN (3, channels), mean, 1 / std, unbiased
    variance."""
    norms = [norm for norm, _ in statistics]
    running = [norm.running_mean for norm in norms] + [norm.running_var for norm in norms]
    batch = [rows[0] for _, rows in statistics] + [rows[2] for _, rows in statistics]
    torch._foreach_lerp_(running, batch, norms[0].momentum)


def preprocess(module: SearchPreprocess, x: Tensor, statistics: list) -> Tensor:
    """module(sign(x)); in training the statistics of the batch are added to `statistics`."""
    norm = module.norm
    running = (None, None) if module.training else (norm.running_mean, norm.running_var)
    weights = [conv.weight for conv in module.convolutions]
    state, of_batch = _Preprocess.apply(module.training, norm.eps, *running, x, *weights)
    if module.training:
        statistics.append((norm, of_batch))
    return state


def cell(
    module: SearchCell, s0: Tensor, s1: Tensor, edges: Tensor, operations: Tensor, statistics: list
) -> Tensor:
    """The nodes of a cell of its two preprocessed states (n, c, h, w): (n, 4 c, h', w').

    edges (14,) and operations (14, 7), by source: the weight of each edge, and that times its operations'. In
    training the statistics of the batch are added to `statistics`.
    """
    norms = [norm for source in module.sources for norm in (source.norm, source.pool_norm)]
    running = None, None
    if not module.training:
        running = tuple(
            torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var")
        )
    weights = [conv.weight for source in module.sources for conv in (*source.convolutions, *source.skip)]
    stride = module.sources[0].stride
    out, of_batch = _Cell.apply(
        module.k, stride, module.training, norms[0].eps, *running, s0, s1, edges, operations, *weights
    )
    if module.training:
        parts = of_batch.split([norm.num_features for norm in norms], 1)
        statistics.extend(zip(norms, parts, strict=True))
    return out


class _Preprocess(Function):
    @staticmethod
    def forward(ctx, training, eps, mean, var, x, *weights):
        state, statistics = torch.ops.ebnas.search_preprocess(x, weights, mean, var, training, eps)
        ctx.training, ctx.eps = training, eps
        ctx.save_for_backward(x, state, statistics, *weights)
        ctx.mark_non_differentiable(statistics)
        return state, statistics

    @staticmethod
    def backward(ctx, grad, _):
        x, state, statistics, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[4:6]
        gradients = torch.ops.ebnas.search_preprocess_backward(
            grad, x, state, statistics, weights, ctx.training, ctx.eps, *wanted
        )
        return None, None, None, None, *_where(gradients, [wanted[0]] + [wanted[1]] * len(weights))


class _Cell(Function):
    @staticmethod
    def forward(ctx, k, stride, training, eps, mean, var, s0, s1, edges, operations, *weights):
        out, kept, statistics = torch.ops.ebnas.search_cell(
            s0, s1, edges, operations, weights, mean, var, k, stride, training, eps
        )
        ctx.settings = k, stride, training, eps
        ctx.save_for_backward(s0, s1, edges, operations, out, kept, statistics, *weights)
        ctx.mark_non_differentiable(statistics)
        return out, statistics

    @staticmethod
    def backward(ctx, grad, _):
        *tensors, out, kept, statistics = ctx.saved_tensors[:7]
        weights = ctx.saved_tensors[7:]
        wanted = [*ctx.needs_input_grad[6:10], ctx.needs_input_grad[10]]
        gradients = torch.ops.ebnas.search_cell_backward(
            grad, *tensors, weights, out, kept, statistics, *ctx.settings, wanted
        )
        return *(None,) * 6, *_where(gradients, wanted[:4] + [wanted[4]] * len(weights))


def _where(gradients: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor | None]:
    return [gradient if is_wanted else None for gradient, is_wanted in zip(gradients, wanted, strict=True)]


# The operators

_LIBRARY = torch.library.Library("ebnas", "FRAGMENT")
_LIBRARY.define(
    "search_preprocess(Tensor x, Tensor[] weights, Tensor? mean, Tensor? var, bool training, float eps) "
    "-> (Tensor, Tensor)"
)
_LIBRARY.define(
    "search_preprocess_backward(Tensor grad, Tensor x, Tensor state, Tensor statistics, Tensor[] weights, "
    "bool training, float eps, bool wants_x, bool wants_weights) -> Tensor[]"
)
_LIBRARY.define(
    "search_cell(Tensor s0, Tensor s1, Tensor edges, Tensor operations, Tensor[] weights, Tensor? mean, "
    "Tensor? var, int k, int stride, bool training, float eps) -> (Tensor, Tensor, Tensor)"
)
_LIBRARY.define(
    "search_cell_backward(Tensor grad, Tensor s0, Tensor s1, Tensor edges, Tensor operations, "
    "Tensor[] weights, Tensor out, Tensor kept, Tensor statistics, int k, int stride, bool training, "
    "float eps, bool[] wanted) -> Tensor[]"
)


class _CellCall(ctypes.Structure):
    """`struct cell` of source/search.h."""

    _integers = (
        *("n", "channels", "k", "stride", "height", "width", "height_out", "width_out"),
        *("training", "threads"),
    )
    _fields_ = [(name, ctypes.c_int64) for name in _integers]
    _fields_ += [("eps", ctypes.c_double), ("state", ctypes.c_void_p * 2)]
    _fields_ += [(name, ctypes.c_void_p) for name in ("edges", "operations")]
    _fields_ += [("weight", ctypes.c_void_p * (_WEIGHTS * len(LEAVING)))]
    _fields_ += [(name, ctypes.c_void_p) for name in ("mean", "var", "statistics", "kept", "out", "grad")]
    _fields_ += [("grad_state", ctypes.c_void_p * 2)]
    _fields_ += [("grad_weight", ctypes.c_void_p * (_WEIGHTS * len(LEAVING)))]
    _fields_ += [(name, ctypes.c_void_p) for name in ("grad_edges", "grad_operations")]


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _half(size: int, stride: int) -> int:
    return -(-size // stride)


def _preprocess_call(x: Tensor, weights: Sequence[Tensor], state: Tensor, training: bool, eps: float):
    call = PointwiseCall(*x.shape[:2], state.shape[1], *x.shape[2:], *state.shape[2:], len(weights))
    call.signs, call.training, call.normalized, call.eps = True, training, True, eps
    call.threads = torch.get_num_threads()
    call.x, call.y, call.out = x.data_ptr(), state.data_ptr(), state.data_ptr()
    call.weight_even, call.weight_odd = weights[0].data_ptr(), weights[-1].data_ptr()
    return call


def _search_preprocess(x, weights, mean, var, training, eps):
    state, statistics = _search_preprocess_fake(x, weights, mean, var, training, eps)
    x, weights = x.contiguous(), [weight.contiguous() for weight in weights]
    call = _preprocess_call(x, weights, state, training, eps)
    call.normalized = False
    call.mean2, call.var2, call.statistics2 = _address(mean), _address(var), statistics.data_ptr()
    run(library(x.dtype).pointwise_forward, call)
    return state, statistics


def _search_preprocess_fake(x, weights, mean, var, training, eps):
    channels = sum(weight.shape[0] for weight in weights)
    sizes = (_half(size, len(weights)) for size in x.shape[2:])  # two convolutions halve the size
    return x.new_empty((x.shape[0], channels, *sizes)), x.new_empty((3, channels))


def _search_preprocess_backward(grad, x, state, statistics, weights, training, eps, wants_x, wants_weights):
    gradients = _search_preprocess_backward_fake(
        grad, x, state, statistics, weights, training, eps, wants_x, wants_weights
    )
    grad, x, weights = grad.contiguous(), x.contiguous(), [weight.contiguous() for weight in weights]
    call = _preprocess_call(x, weights, state, training, eps)
    call.grad, call.grad_image = grad.data_ptr(), grad.stride(0)
    call.statistics2 = statistics.data_ptr()
    if wants_x:
        call.grad_x = gradients[0].data_ptr()
    if wants_weights:
        call.grad_weight_even, call.grad_weight_odd = gradients[1].data_ptr(), gradients[-1].data_ptr()
    run(library(x.dtype).pointwise_backward, call)
    return gradients


def _search_preprocess_backward_fake(
    grad, x, state, statistics, weights, training, eps, wants_x, wants_weights
):
    of_weights = [weight.new_empty(weight.shape if wants_weights else 0) for weight in weights]
    return [x.new_empty(x.shape if wants_x else 0), *of_weights]


def _planes(channels: int, stride: int) -> list[tuple[int, int]]:
    """By source: how many planes it keeps of an image, and of how many it has statistics."""
    counts = []
    for source, edges in enumerate(LEAVING):
        halves = source < 2 and stride == 2
        convolved = (len(CONVOLUTIONS) + halves) * len(edges) * channels
        counts.append((convolved + (2 + halves) * channels, convolved + 2 * channels))
    return counts


def _cell_call(s0, s1, edges, operations, weights, out, kept, statistics, k, stride, training, eps):
    call = _CellCall(*s0.shape[:2], k, stride, *s0.shape[2:], *out.shape[2:], training)
    call.threads, call.eps = torch.get_num_threads(), eps
    call.state[:] = s0.data_ptr(), s1.data_ptr()
    call.edges, call.operations = edges.data_ptr(), operations.data_ptr()
    call.kept, call.statistics, call.out = kept.data_ptr(), statistics.data_ptr(), out.data_ptr()
    call.weight[:] = _by_source(weights, stride)
    return call


def _by_source(tensors: Sequence[Tensor], stride: int) -> list[int | None]:
    addresses, rest = [], list(tensors)
    for source in range(len(LEAVING)):
        number = len(CONVOLUTIONS) + 2 * (source < 2 and stride == 2)
        part, rest = rest[:number], rest[number:]
        addresses += [tensor.data_ptr() for tensor in part] + [None] * (_WEIGHTS - number)
    return addresses


def _search_cell(s0, s1, edges, operations, weights, mean, var, k, stride, training, eps):
    out, kept, statistics = _search_cell_fake(
        s0, s1, edges, operations, weights, mean, var, k, stride, training, eps
    )
    s0, s1, edges, operations = (tensor.contiguous() for tensor in (s0, s1, edges, operations))
    weights = [weight.contiguous() for weight in weights]
    call = _cell_call(s0, s1, edges, operations, weights, out, kept, statistics, k, stride, training, eps)
    call.mean, call.var = _address(mean), _address(var)
    run(library(s0.dtype).cell_forward, call)
    return out, kept, statistics


def _search_cell_fake(s0, s1, edges, operations, weights, mean, var, k, stride, training, eps):
    n, channels, *size = s0.shape
    height, width = (_half(length, stride) for length in size)
    kept, counted = (sum(counts) for counts in zip(*_planes(channels // k, stride), strict=True))
    return (
        s0.new_empty((n, NODES * channels, height, width)),
        s0.new_empty((n, kept, height, width)),
        s0.new_empty((3, counted)),
    )


def _search_cell_backward(
    grad, s0, s1, edges, operations, weights, out, kept, statistics, k, stride, training, eps, wanted
):
    gradients = _search_cell_backward_fake(
        grad, s0, s1, edges, operations, weights, out, kept, statistics, k, stride, training, eps, wanted
    )
    grad, s0, s1, edges, operations = (t.contiguous() for t in (grad, s0, s1, edges, operations))
    weights = [weight.contiguous() for weight in weights]
    call = _cell_call(s0, s1, edges, operations, weights, out, kept, statistics, k, stride, training, eps)
    call.grad = grad.data_ptr()
    call.grad_state[:] = [
        g.data_ptr() if is_wanted else None for g, is_wanted in zip(gradients, wanted[:2], strict=False)
    ]
    if wanted[2]:
        call.grad_edges = gradients[2].zero_().data_ptr()
    if wanted[3]:
        call.grad_operations = gradients[3].zero_().data_ptr()
    if wanted[4]:
        call.grad_weight[:] = _by_source(gradients[4:], stride)
    run(library(s0.dtype).cell_backward, call)
    return gradients


def _search_cell_backward_fake(
    grad, s0, s1, edges, operations, weights, out, kept, statistics, k, stride, training, eps, wanted
):
    tensors = s0, s1, edges, operations, *weights
    wanted = [*wanted[:4], *[wanted[4]] * len(weights)]
    return [
        tensor.new_empty(tensor.shape if is_wanted else 0)
        for tensor, is_wanted in zip(tensors, wanted, strict=True)
    ]


for _name, _real, _fake in (
    ("search_preprocess", _search_preprocess, _search_preprocess_fake),
    ("search_preprocess_backward", _search_preprocess_backward, _search_preprocess_backward_fake),
    ("search_cell", _search_cell, _search_cell_fake),
    ("search_cell_backward", _search_cell_backward, _search_cell_backward_fake),
):
    _LIBRARY.impl(_name, _real, "CPU")
    torch.library.register_fake(f"ebnas::{_name}", _fake, lib=_LIBRARY)


NATIVE_SEARCH = {Supernet: NativeSupernet}
"""By plain class, the one whose instances compute the same in C, with all that they are made of."""
