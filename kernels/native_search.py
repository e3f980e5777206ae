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
        statistics: list[tuple[nn.BatchNorm2d, Tensor]] = []
        older, newer = self.stems(x)
        if older is newer:
            states = preprocessed(newer, [*self.readers(-2), *self.readers(-1)], statistics)
        else:
            states = preprocessed(older, self.readers(-2), statistics)
            states |= preprocessed(newer, self.readers(-1), statistics)
        for index, module in enumerate(self.cells):
            inputs = states.pop(module.preprocess0), states.pop(module.preprocess1)
            x = cell(module, *inputs, *by_kind[module.reduction], statistics)
            states |= preprocessed(x, self.readers(index), statistics)
        if self.training:
            move_running(statistics)
            count_batches(norm for module in self.cells for norm in counted(module))
        return self.classifier(x.mean((2, 3))), None

    def readers(self, index: int) -> list[SearchPreprocess]:
        """The preprocessings that read the result of cell `index`; of the newer stem: -1, the older: -2."""
        newer = [self.cells[index + 1].preprocess1] if -1 <= index < len(self.cells) - 1 else []
        older = [self.cells[index + 2].preprocess0] if index < len(self.cells) - 2 else []
        return [*newer, *older]


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


def preprocessed(
    x: Tensor, modules: Sequence[SearchPreprocess], statistics: list
) -> dict[SearchPreprocess, Tensor]:
    """module(sign(x)) of each of `modules`. Those that keep the size of x are one convolution, so that x is
    read once. In training the statistics of the batch are added to `statistics`."""
    states = {}
    keeping = [module for module in modules if len(module.convolutions) == 1]
    for group in (keeping, *([module] for module in modules if module not in keeping)):
        if group:
            results = preprocess(
                x,
                [conv for module in group for conv in module.convolutions],
                [module.norm for module in group],
                statistics,
            )
            states |= zip(group, results, strict=True)
    return states


def preprocess(
    x: Tensor, convolutions: Sequence[nn.Conv2d], norms: Sequence[nn.BatchNorm2d], statistics: list
) -> tuple[Tensor, ...]:
    """The results of `norms` on the convolutions of sign(x), 1x1 and one for each norm, or the two of a
    factorised reduction for one norm."""
    training, reduces = norms[0].training, len(convolutions) > len(norms)
    running = None, None
    if not training:
        running = tuple(
            torch.cat([getattr(norm, name) for norm in norms]) for name in ("running_mean", "running_var")
        )
    widths = [norm.num_features for norm in norms]
    weights = [conv.weight for conv in convolutions]
    *states, of_batch = _Preprocess.apply(widths, reduces, training, norms[0].eps, *running, x, *weights)
    if training:
        statistics.extend(zip(norms, of_batch.split(widths, 1), strict=True))
    return states


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
    def forward(ctx, widths, reduces, training, eps, mean, var, x, *weights):
        state, statistics = torch.ops.ebnas.search_preprocess(x, weights, mean, var, reduces, training, eps)
        ctx.settings = reduces, training, eps
        ctx.save_for_backward(x, state, statistics, *weights)
        ctx.mark_non_differentiable(statistics)
        return *state.split(widths, 1), statistics

    @staticmethod
    def backward(ctx, *grads):
        x, state, statistics, *weights = ctx.saved_tensors
        wanted = ctx.needs_input_grad[6:8]
        gradients = torch.ops.ebnas.search_preprocess_backward(
            grads[:-1], x, state, statistics, weights, *ctx.settings, *wanted
        )
        return *(None,) * 6, *_where(gradients, [wanted[0]] + [wanted[1]] * len(weights))


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
    "search_preprocess(Tensor x, Tensor[] weights, Tensor? mean, Tensor? var, bool reduces, bool training, "
    "float eps) -> (Tensor, Tensor)"
)
_LIBRARY.define(
    "search_preprocess_backward(Tensor[] grads, Tensor x, Tensor state, Tensor statistics, Tensor[] weights, "
    "bool reduces, bool training, float eps, bool wants_x, bool wants_weights) -> Tensor[]"
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

    _integers = ("n channels k stride height width height_out width_out training threads").split()
    _fields_ = [(name, ctypes.c_int64) for name in _integers]
    _fields_ += [
        ("eps", ctypes.c_double),
        ("state", ctypes.c_void_p * 2),
        ("state_image", ctypes.c_int64 * 2),
    ]
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


def _preprocess_call(
    x: Tensor, weights: Sequence[Tensor], state: Tensor, reduces: bool, training: bool, eps: float
) -> PointwiseCall:
    """`weights`: both of a factorised reduction, or one."""
    call = PointwiseCall(*x.shape[:2], state.shape[1], *x.shape[2:], *state.shape[2:], 1 + reduces)
    call.signs, call.training, call.normalized, call.eps = True, training, True, eps
    call.threads = torch.get_num_threads()
    call.x, call.y, call.out = x.data_ptr(), state.data_ptr(), state.data_ptr()
    call.weight_even, call.weight_odd = weights[0].data_ptr(), weights[-1].data_ptr()
    return call


def _joined(weights: Sequence[Tensor], reduces: bool) -> list[Tensor]:
    return [weight.contiguous() for weight in weights] if reduces else [torch.cat(list(weights))]


def _search_preprocess(x, weights, mean, var, reduces, training, eps):
    state, statistics = _search_preprocess_fake(x, weights, mean, var, reduces, training, eps)
    x, weights = x.contiguous(), _joined(weights, reduces)
    call = _preprocess_call(x, weights, state, reduces, training, eps)
    call.normalized = False
    call.mean2, call.var2, call.statistics2 = _address(mean), _address(var), statistics.data_ptr()
    run(library(x.dtype).pointwise_forward, call)
    return state, statistics


def _search_preprocess_fake(x, weights, mean, var, reduces, training, eps):
    channels = sum(weight.shape[0] for weight in weights)
    sizes = (_half(size, 1 + reduces) for size in x.shape[2:])
    return x.new_empty((x.shape[0], channels, *sizes)), x.new_empty((3, channels))


def _search_preprocess_backward(
    grads, x, state, statistics, weights, reduces, training, eps, wants_x, wants_weights
):
    grads, x, joined = [grad.contiguous() for grad in grads], x.contiguous(), _joined(weights, reduces)
    call = _preprocess_call(x, joined, state, reduces, training, eps)
    call.parts, call.statistics2 = len(grads), statistics.data_ptr()
    for i, grad in enumerate(grads):
        call.part_channels[i], call.part_grad[i] = grad.shape[1], grad.data_ptr()
    grad_x = x.new_empty(x.shape if wants_x else 0)
    of_joined = [torch.empty_like(weight) for weight in joined]
    if wants_x:
        call.grad_x = grad_x.data_ptr()
    if wants_weights:
        call.grad_weight_even, call.grad_weight_odd = of_joined[0].data_ptr(), of_joined[-1].data_ptr()
    run(library(x.dtype).pointwise_backward, call)
    if not wants_weights:
        return [grad_x, *(weight.new_empty(0) for weight in weights)]
    if not reduces and len(weights) > 1:  # an operator's results are no views of each other
        of_joined = [part.clone() for part in of_joined[0].split([len(weight) for weight in weights])]
    return [grad_x, *of_joined]


def _search_preprocess_backward_fake(
    grads, x, state, statistics, weights, reduces, training, eps, wants_x, wants_weights
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
    call.state_image[:] = s0.stride(0), s1.stride(0)
    call.edges, call.operations = edges.data_ptr(), operations.data_ptr()
    call.kept, call.statistics, call.out = kept.data_ptr(), statistics.data_ptr(), out.data_ptr()
    call.weight[:] = _by_source(weights, stride)
    return call


def _channels(state: Tensor) -> Tensor:
    """`state` with the channels of an image together, as they are in some of the channels of a tensor."""
    return state if state[:1].is_contiguous() else state.contiguous()


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
    s0, s1, edges, operations = _channels(s0), _channels(s1), edges.contiguous(), operations.contiguous()
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
    grad, edges, operations = grad.contiguous(), edges.contiguous(), operations.contiguous()
    s0, s1 = _channels(s0), _channels(s1)
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
