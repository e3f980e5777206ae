"""The supernet in fewer tensor operations: those of all edges that leave a state together, a node's channel
shuffle once, on the sum (it is linear), and the signs of a cell's output once for both cells that read it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F

from binary_ops import binary_sign
from genotypes import NODES
from kernels.fused import count_batches
from model_search import LEAVING, SearchCell, Supernet, edge_weights, stride_of
from operations import SearchPreprocess, SourceOperations, reduced_halves


class _NormalizedMixture(Function):
    """sum_p coefficient[p, m] * BN(y[:, p, m]), y (n, p, m, c, h, w), coefficient (p, m) -> (n, m, c, h, w).

    BN without affine parameters is linear but for its statistics, so normalising and mixing are one sum of
    scaled y: no normalised copy of y is made, and none is kept for the backward pass.
    """

    @staticmethod
    def forward(ctx, y, coefficient, mean, inverse_std, batch_statistics):
        # (p, m, c, 1, 1), in this order also in memory, and so the gradient of y, which else is copied
        scale = inverse_std * _per_channel(coefficient)
        mixed = torch.addcmul((mean * scale).sum(0).neg_(), y[:, 0], scale[0])
        for p in range(1, y.shape[1]):
            mixed.addcmul_(y[:, p], scale[p])
        ctx.save_for_backward(y, scale, mean, inverse_std)
        ctx.batch_statistics = batch_statistics
        return mixed

    @staticmethod
    def backward(ctx, grad):
        y, scale, mean, inverse_std = ctx.saved_tensors
        grad = grad.contiguous()  # the sums' last bits depend on the layout
        total = grad.sum((0, 3, 4), keepdim=True)[0]  # (m, c, 1, 1)
        grad = grad.unsqueeze(1)
        along = (grad * y).sum((0, 4, 5), keepdim=True)[0]
        # the sum of grad times normalised y, (p, m, c, 1, 1)
        along = torch.addcmul(along, mean, total, value=-1).mul_(inverse_std)
        grad_y = grad_coefficient = None
        if ctx.needs_input_grad[0]:
            if ctx.batch_statistics:
                of_each = scale / -(grad.numel() // total.numel())  # of the pixels that give the statistics
                slope = of_each * inverse_std * along
                offset = torch.addcmul(of_each * total, slope, mean, value=-1)
                grad_y = torch.addcmul(offset, y, slope).addcmul_(grad, scale)
            else:
                grad_y = grad * scale
        if ctx.needs_input_grad[1]:
            grad_coefficient = along.sum((2, 3, 4))
        return grad_y, grad_coefficient, None, None, None


def _per_channel(coefficient: Tensor) -> Tensor:
    return coefficient[:, :, None, None, None]


def coefficients(mixing: Tensor, stride: int) -> tuple[Tensor, Tensor]:
    """mixing (m, 7), by edge and operation of PRIMITIVES -> the arguments of SourceOperations.

    `convolving` (p, m) multiplies the convolutions' normalised results, p = 4, or 5 at stride 2, where the
    skip connection is one of them; `of_shared` (m, 3) what the edges share: max-pool, average-pool, residual.
    """
    skip, pooling, convolving = mixing.split((1, 2, 4), dim=1)
    residual = convolving.sum(1, keepdim=True)
    if stride == 1:
        residual = residual + skip
    else:
        convolving = torch.cat([convolving, skip], 1)
    return convolving.t(), torch.cat([pooling, residual], 1)


Statistics = tuple[Tensor, Tensor, int]
"""Mean and biased variance (channels,) of a batch, and of how many values."""


@torch.no_grad()
def moments_of(y: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and biased variance of each channel of y (n, channels, h, w), in float32 at least (as
    nn.BatchNorm2d does under autocast)."""
    wide = torch.promote_types(y.dtype, torch.float32)
    if y.device.type == "cuda":  # one kernel, where the passes below are six
        var, mean = torch.var_mean(y.to(wide), (0, 2, 3), correction=0)
        return mean, var
    mean = y.mean((0, 2, 3), keepdim=True, dtype=wide)
    var = (y - mean).square_().mean((0, 2, 3))  # on a CPU 8 times faster than torch.var_mean
    return mean.flatten(), var


class FusedSourceOperations(SourceOperations):
    """SourceOperations with a kind of convolution for all edges, of its two kernel sizes at once.

    x (n, c, h, w) and the `coefficients` of the edges' mixing (m, 7) -> (n, m, c, h', w').
    """

    def forward(
        self, x: Tensor, convolving: Tensor, of_shared: Tensor, kernels: Sequence[Tensor]
    ) -> tuple[Tensor, Statistics | None]:
        """`kernels`: see joined_kernels. Also the statistics of the batch in training, for update_running."""
        signs = binary_sign(x)
        pairs = zip(kernels, self.convolutions[1::2], strict=True)
        outputs = [F.conv2d(signs, kernel, None, c.stride, c.padding, c.dilation) for kernel, c in pairs]
        if self.stride == 2:
            outputs.append(self._reduced(signs, len(of_shared)))
        pools = [
            F.max_pool2d(x, 3, self.stride, 1),
            F.avg_pool2d(x, 3, self.stride, 1, count_include_pad=False),
        ]
        pools = normalized(self.pool_norm, torch.cat(pools, 1))
        mixed, statistics = self._normalized_mixture(torch.cat(outputs, 1), convolving)
        # what all edges share: both pools and the residual, (n, 3, c * h' * w')
        shared = torch.cat([pools, self.shortcut(x)], 1).unflatten(1, (3, -1)).flatten(2)
        # not matmul, which folds and copies `shared` where `of_shared` needs a gradient
        of_shared = of_shared.to(shared.dtype).expand(len(x), -1, -1)
        return mixed + torch.bmm(of_shared, shared).view_as(mixed), statistics

    def _normalized_mixture(self, y: Tensor, coefficient: Tensor) -> tuple[Tensor, Statistics | None]:
        """BN, then the mixture of the convolutions: y (n, p * m * c, h, w), coefficient (p, m)."""
        norm, statistics = self.norm, None
        if self.training:
            mean, var = moments_of(y)
            statistics = mean, var, y.numel() // y.shape[1]
        else:
            var, mean = norm.running_var, norm.running_mean
        layout = (*coefficient.shape, -1, 1, 1)
        y = y.unflatten(1, (*coefficient.shape, -1))
        moments = mean.view(layout), (var + norm.eps).rsqrt().view(layout)
        return _NormalizedMixture.apply(y, coefficient, *moments, self.training), statistics

    def _reduced(self, signs: Tensor, edges: int) -> Tensor:
        """The skip connection at stride 2, a factorised reduction before its BN: (n, m * c, h', w')."""
        halves = [half.unflatten(1, (edges, -1)) for half in reduced_halves(signs, self.skip)]
        return torch.cat(halves, 2).flatten(1, 2)


def joined_kernels(sources: Iterable[SourceOperations]) -> dict[SourceOperations, Sequence[Tensor]]:
    """By dilation, the kernels of a source's 3x3 and 5x5 convolutions as those of one, (2 * m * c, c, 5, 5),
    the 3x3 ones with a border of zeros. Of all sources of one width at once, in few operations."""
    joined, alike = {}, defaultdict(list)
    for source in sources:
        alike[source.convolutions[0].in_channels].append(source)
    for group in alike.values():
        small, large = ([c.weight for s in group for c in s.convolutions[size::2]] for size in (0, 1))
        lengths = [len(weight) for weight in small]
        small = F.pad(torch.cat(small), (1, 1, 1, 1)).split(lengths)
        kernels = torch.cat([weight for pair in zip(small, large, strict=True) for weight in pair])
        parts = kernels.split([2 * length for length in lengths])
        for i, source in enumerate(group):
            joined[source] = parts[2 * i : 2 * i + 2]
    return joined


@torch.no_grad()
def update_running(norms: Sequence[nn.BatchNorm2d], statistics: Sequence[Statistics]) -> None:
    """Move the running statistics of BNs of one momentum towards those of their batches. Their batches are
    not counted, for the momentum is fixed."""
    means, variances, counts = zip(*statistics, strict=True)
    unbiased = torch._foreach_mul(variances, [count / (count - 1) for count in counts])
    momentum = norms[0].momentum
    torch._foreach_lerp_([norm.running_mean for norm in norms], means, momentum)
    torch._foreach_lerp_([norm.running_var for norm in norms], unbiased, momentum)


def normalized(norm: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """norm(x), but that the batch is not counted: the network does that for all (`count_batches`)."""
    running = norm.running_mean, norm.running_var
    return F.batch_norm(x, *running, norm.weight, norm.bias, norm.training, norm.momentum, norm.eps)


class FusedSearchPreprocess(SearchPreprocess):
    """SearchPreprocess, given the signs of its input: two cells read each cell's output."""

    def forward(self, signs: Tensor) -> Tensor:
        if len(self.convolutions) == 2:
            return normalized(self.norm, torch.cat(reduced_halves(signs, self.convolutions), 1))
        return normalized(self.norm, self.convolutions[0](signs))


def shuffled(first: Tensor, others: Tensor, groups: int) -> Tensor:
    """Channel shuffle, for a network of `groups` groups of c channels: the first group (n, c, h, w) and the
    others (n, (groups - 1) * c, h, w) interleaved; channel j of group i goes to j * groups + i."""
    others = others.unflatten(1, (groups - 1, -1)).transpose(1, 2)  # (n, c, groups - 1, h, w)
    return torch.cat([first.unsqueeze(2), others], 2).flatten(1, 2)


def weighted(x: Tensor, weights: Tensor, total: Tensor | None = None) -> Tensor:
    """x (n, c, h, w) times each of the weights (m, 1), added to `total` if given: (n, m, c, h, w)."""
    if weights.requires_grad:  # in an architecture step, where a product would sum in another order
        x, weights = x.unsqueeze(1), weights[:, :, None, None]
        return weights * x if total is None else torch.addcmul(total, weights, x)
    weights = weights.to(x.dtype).expand(len(x), -1, -1)
    flat = x.flatten(1).unsqueeze(1)
    product = torch.bmm(weights, flat) if total is None else torch.baddbmm(total.flatten(2), weights, flat)
    return product.view(len(x), -1, *x.shape[1:])


class FusedSearchCell(SearchCell):
    """SearchCell, given the signs of its two inputs: s0, s1 -> (n, 4 * channels, h', w').

    By source, for the m edges that leave it: `mixing` holds the `coefficients` of their weight times
    softmax(alpha), `weights` (m, 1) their weights, for the channels that bypass the operations.
    """

    @property
    def counted(self) -> list[nn.BatchNorm2d]:
        """The BNs that count their batches, as the original's do."""
        return [
            self.preprocess0.norm,
            self.preprocess1.norm,
            *(source.pool_norm for source in self.sources),
        ]

    def forward(
        self,
        s0: Tensor,
        s1: Tensor,
        mixing: list[tuple[Tensor, Tensor]],
        weights: list[Tensor],
        kernels: Mapping[SourceOperations, Sequence[Tensor]],
        statistics: dict[nn.BatchNorm2d, Statistics],
    ) -> Tensor:
        """Adds to `statistics` those of the batch, in training."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for source, operations in enumerate(self.sources):
            sampled, rest = states[source].split([self.sampled, (self.k - 1) * self.sampled], 1)
            if stride_of(source, self.reduction) == 2:
                rest = F.max_pool2d(rest, 2, 2, ceil_mode=True)
            outputs, of_batch = operations(sampled, *mixing[source], kernels[operations])
            if of_batch is not None:
                statistics[operations.norm] = of_batch
            # sums over the edges into the nodes still to come, (n, nodes, c / k or the rest of c, h', w')
            if source == 0:
                mixed, bypassed = outputs, weighted(rest, weights[source])
                continue
            mixed, bypassed = mixed + outputs, weighted(rest, weights[source], bypassed)
            # the first of these nodes now has all its edges
            first_mixed, first_bypassed = mixed, bypassed
            if source < NODES:
                first_mixed, mixed = mixed.split([1, NODES - source], 1)
                first_bypassed, bypassed = bypassed.split([1, NODES - source], 1)
            states.append(shuffled(first_mixed.squeeze(1), first_bypassed.squeeze(1), self.k))
        return torch.cat(states[2:], 1)


class FusedSupernet(Supernet):
    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        weights, mixing = {}, {}
        by_source = [edge for edges in LEAVING for edge in edges]
        leaving = [len(edges) for edges in LEAVING]
        for reduction, alpha, beta in (
            (False, self.alphas_normal, self.betas_normal),
            (True, self.alphas_reduce, self.betas_reduce),
        ):
            of_edges = edge_weights(beta)[by_source].unsqueeze(1)  # (14, 1)
            of_operations = of_edges * alpha.softmax(1)[by_source]  # (14, 7)
            weights[reduction] = of_edges.split(leaving)
            mixing[reduction] = [
                coefficients(part, stride_of(source, reduction))
                for source, part in enumerate(of_operations.split(leaving))
            ]
        kernels = joined_kernels(source for cell in self.cells for source in cell.sources)
        statistics: dict[nn.BatchNorm2d, Statistics] = {}
        older, newer = self.stems(x)
        s1 = binary_sign(newer)
        s0 = s1 if older is newer else binary_sign(older)
        for cell in self.cells:
            x = cell(s0, s1, mixing[cell.reduction], weights[cell.reduction], kernels, statistics)
            s0, s1 = s1, binary_sign(x)
        if statistics:
            update_running(list(statistics), list(statistics.values()))
        count_batches(norm for cell in self.cells for norm in cell.counted)
        return self.classifier(x.mean((2, 3))), None


FUSED_SEARCH = {
    SourceOperations: FusedSourceOperations,
    SearchPreprocess: FusedSearchPreprocess,
    SearchCell: FusedSearchCell,
    Supernet: FusedSupernet,
}
"""By plain class, the one whose instances compute the same in fewer operations. All go together."""
