"""The picture of a cell: its states from left to right, its operations as labels on the edges between.

Layers, as in Sugiyama's method: a node stands behind the layers of all its inputs, its two operations as
labels before it. An edge crosses the layers between in a lane of its own and bends only in the gaps between
layers, so that no edge ever runs through a label or a node.
"""

from __future__ import annotations

import math
from itertools import pairwise, permutations
from typing import NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Circle, FancyArrowPatch, FancyBboxPatch, PathPatch
from matplotlib.path import Path

from genotypes import NODES, Genotype
from pictures.canvas import GREY, INK, PALE, STATES, TITLES, color_of, label_of, new_figure

OUTPUT = 2 + NODES

# Inches.
PILL_WIDTH, PILL_HEIGHT, PILL_STEP = 1.3, 0.34, 0.48
NODE_RADIUS, NODE_GAP, BADGE, BADGE_RADIUS = 0.22, 0.26, 0.26, 0.125
INPUT_SIZE, OUTPUT_WIDTH = (0.78, 0.5), 0.6
ARROW = {"arrowstyle": "-|>,head_length=5,head_width=2.5", "mutation_scale": 1, "shrinkA": 0, "shrinkB": 0}
LANE, MARGIN, TITLE_HEIGHT, GAP, MIN_WIDTH = 0.3, 0.2, 0.4, 0.55, 8.0


class Slot(NamedTuple):
    """A place in a layer: of a state, or of the lane of an edge that passes by."""

    layer: int
    is_lane: bool
    number: int  # of the state or the edge


class Edge(NamedTuple):
    operation: str | None  # None: into the concatenation
    source: int
    path: tuple[Slot, ...]  # a slot in each layer from the source's to the target's


def cell_figure(genotype: Genotype, kind: str) -> Figure:
    """The cell `normal` or `reduce` as a graph. Both cells of a genotype have the same width."""
    width = max(_natural_width(genotype, each) for each in TITLES)
    edges = _edges(genotype, kind)
    orders = _order(edges)
    into, out = _ports(edges, orders)
    y = _middles(edges, orders, into, out)
    height = max(y[slot] + _size(slot) / 2 for slot in y) + MARGIN
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # data units are inches
    axes.set_axis_off()
    badge = BADGE if kind == "reduce" else 0.0
    columns = _columns(len(orders), width, badge)
    axes.text(MARGIN, 0.27, TITLES[kind], fontsize=13, color=INK, va="center_baseline", weight="bold")
    if kind == "reduce":
        axes.text(width - MARGIN, 0.27, "stride 2", fontsize=10, color=INK, ha="right", va="center_baseline")
        _draw_badge(axes, width - MARGIN - 0.78, 0.27, GREY)

    for number, edge in enumerate(edges):
        ys = [y[slot] for slot in edge.path]
        ys = [ys[0] + out[number], *ys[1:-1], ys[-1] + into[number]]
        _draw_edge(axes, edge, columns, ys)
        if edge.operation is not None:
            left, right = columns[edge.path[-1].layer]
            if kind == "reduce":
                _draw_stride(axes, edge, left, ys[-1])
            _draw_operation(axes, edge, left + badge, ys[-1], (right - NODE_RADIUS, y[edge.path[-1]]))
    for slot in (slot for order in orders for slot in order if not slot.is_lane):
        _draw_state(axes, slot, *columns[slot.layer], y[slot])
    return figure


def _depths(genotype: Genotype, kind: str) -> list[int]:
    """The layer of each state and, last, of the output: behind all that it reads."""
    depths, pairs = [0, 0], getattr(genotype, kind)
    for node in range(NODES):
        depths.append(1 + max(depths[source] for _, source in pairs[2 * node : 2 * node + 2]))
    return [*depths, 1 + max(depths)]


def _edges(genotype: Genotype, kind: str) -> list[Edge]:
    depths = _depths(genotype, kind)
    ends = [(name, source, 2 + i // 2) for i, (name, source) in enumerate(getattr(genotype, kind))]
    ends += [(None, source, OUTPUT) for source in getattr(genotype, f"{kind}_concat")]
    edges = []
    for number, (name, source, target) in enumerate(ends):
        lanes = [Slot(layer, True, number) for layer in range(depths[source] + 1, depths[target])]
        path = (Slot(depths[source], False, source), *lanes, Slot(depths[target], False, target))
        edges.append(Edge(name, source, path))
    return edges


def _order(edges: list[Edge]) -> list[tuple[Slot, ...]]:
    """The slots of each layer, top to bottom, with the fewest crossings, then the shortest edges.

    Exact, by dynamic programming over the permutations of each layer (it has few slots).
    """
    links = [link for edge in edges for link in pairwise(edge.path)]
    inputs = (Slot(0, False, 0), Slot(0, False, 1))
    slots = sorted({slot for edge in edges for slot in edge.path})
    best = {inputs: (0.0, [inputs])}
    for layer in range(1, 1 + slots[-1].layer):
        between = [link for link in links if link[1].layer == layer]
        best = {
            order: min(
                (cost + _disorder(before, order, between), [*orders, order])
                for before, (cost, orders) in best.items()
            )
            for order in permutations(slot for slot in slots if slot.layer == layer)
        }
    return min(best.values())[1]


def _disorder(before: tuple[Slot, ...], order: tuple[Slot, ...], links: list[tuple[Slot, Slot]]) -> float:
    """Crossings between two layers and, counting far less, the lengths of their links."""
    ends = [(before.index(a), order.index(b)) for a, b in links]
    crossings = sum((a - c) * (b - d) < 0 for i, (a, b) in enumerate(ends) for c, d in ends[:i])
    middle = (len(before) - len(order)) / 2
    return crossings + 0.01 * sum(abs(a - b - middle) for a, b in ends)


def _ports(edges: list[Edge], orders: list[tuple[Slot, ...]]) -> tuple[list[float], list[float]]:
    """How far below the middle of its target an edge ends, and of its source it begins."""

    def spread(step: float, end: int, key) -> list[float]:
        offsets = [0.0] * len(edges)
        for slot in {edge.path[end] for edge in edges}:
            group = sorted((n for n, edge in enumerate(edges) if edge.path[end] == slot), key=key)
            narrow = min(step, 0.36 / len(group)) if end == 0 or slot.number == OUTPUT else step
            for rank, number in enumerate(group):
                offsets[number] = (rank - (len(group) - 1) / 2) * narrow
        return offsets

    def rank(slot: Slot) -> int:
        return orders[slot.layer].index(slot)

    into = spread(PILL_STEP, -1, lambda n: (rank(edges[n].path[-2]), n))
    out = spread(0.09, 0, lambda n: (rank(edges[n].path[1]), into[n] if len(edges[n].path) == 2 else 0, n))
    return into, out


def _size(slot: Slot) -> float:
    """The height of a slot with the space around it."""
    if slot.is_lane:
        return LANE
    return PILL_STEP * 2 + 0.16 if 2 <= slot.number < OUTPUT else INPUT_SIZE[1] + 0.3


def _middles(
    edges: list[Edge], orders: list[tuple[Slot, ...]], into: list[float], out: list[float]
) -> dict[Slot, float]:
    """The middle of each slot, downwards: near the middle of what it is linked to, and apart in its layer."""
    wishes: dict[Slot, list[tuple[Slot, float, int]]] = {slot: [] for order in orders for slot in order}
    for number, edge in enumerate(edges):
        for a, b in pairwise(edge.path):
            shift = (into[number] if b == edge.path[-1] else 0) - (out[number] if a == edge.path[0] else 0)
            straight = (1, 3, 60)[a.is_lane + b.is_lane]  # bends in the middle of an edge disturb most
            wishes[a].append((b, shift, straight))
            wishes[b].append((a, -shift, straight))
    y = {slot: 0.0 for slot in wishes}
    for order in [*orders, *reversed(orders)] * 40:
        wanted = [_weighted_mean(wishes[slot], y) if wishes[slot] else y[slot] for slot in order]
        y.update(zip(order, _keep_apart(wanted, [_size(slot) for slot in order]), strict=True))
    top = min(y[slot] - _size(slot) / 2 for slot in y)
    return {slot: value - top + TITLE_HEIGHT for slot, value in y.items()}


def _weighted_mean(wishes: list[tuple[Slot, float, int]], y: dict[Slot, float]) -> float:
    return sum((y[other] + shift) * weight for other, shift, weight in wishes) / sum(w for *_, w in wishes)


def _keep_apart(wanted: list[float], sizes: list[float]) -> list[float]:
    """The nearest positions (least squares) to the wanted ones at which intervals of these sizes, in this
    order, do not overlap: isotonic regression, by pooling adjacent violators."""
    offsets = [sum(sizes[:i]) + size / 2 for i, size in enumerate(sizes)]
    blocks: list[tuple[float, int]] = []  # mean and number of what moves together
    for value, offset in zip(wanted, offsets, strict=True):
        mean, number = value - offset, 1
        while blocks and blocks[-1][0] > mean:
            before, more = blocks.pop()
            mean, number = (before * more + mean * number) / (more + number), more + number
        blocks.append((mean, number))
    means = [mean for mean, number in blocks for _ in range(number)]
    return [mean + offset for mean, offset in zip(means, offsets, strict=True)]


def _column_width(badge: float) -> float:
    return badge + PILL_WIDTH + NODE_GAP + 2 * NODE_RADIUS


def _natural_width(genotype: Genotype, kind: str) -> float:
    layers = _depths(genotype, kind)[-1] - 1
    column = _column_width(BADGE if kind == "reduce" else 0.0)
    return max(MIN_WIDTH, 2 * MARGIN + INPUT_SIZE[0] + layers * (GAP + column) + GAP + OUTPUT_WIDTH)


def _columns(layers: int, width: float, badge: float) -> list[tuple[float, float]]:
    """Left and right of each layer, with equal gaps between."""
    widths = [INPUT_SIZE[0], *[_column_width(badge)] * (layers - 2), OUTPUT_WIDTH]
    gap = (width - 2 * MARGIN - sum(widths)) / (layers - 1)
    lefts = [MARGIN + sum(widths[:layer]) + layer * gap for layer in range(layers)]
    return [(left, left + each) for left, each in zip(lefts, widths, strict=True)]


def _draw_edge(axes: Axes, edge: Edge, columns: list[tuple[float, float]], ys: list[float]) -> None:
    """The curve from the source to where the target's layer begins."""
    right = columns[edge.path[0].layer][1]
    vertices, codes = [(right - NODE_RADIUS, ys[0]), (right, ys[0])], [Path.MOVETO, Path.LINETO]
    for slot, y in zip(edge.path[1:], ys[1:], strict=True):
        (x0, y0), (left, right) = vertices[-1], columns[slot.layer]
        middle = (x0 + left) / 2
        vertices += [(middle, y0), (middle, y), (left, y)]
        codes += [Path.CURVE4] * 3
        if slot.is_lane:
            vertices.append((right, y))
            codes.append(Path.LINETO)
    curve = Path(vertices, codes)
    if edge.operation is None:
        axes.add_artist(FancyArrowPatch(path=curve, color=GREY, lw=1, zorder=1, **ARROW))
    else:
        gap = PathPatch(curve, fc="none", ec="white", lw=4.5, zorder=1.9)  # in the edges that it crosses
        axes.add_artist(gap)
        axes.add_artist(PathPatch(curve, fc="none", ec=color_of(edge.operation), lw=2, zorder=2))


def _draw_state(axes: Axes, slot: Slot, left: float, right: float, y: float) -> None:
    look = {"fc": PALE, "ec": INK, "lw": 1.2, "zorder": 3}
    if 2 <= slot.number < OUTPUT:
        x, name = right - NODE_RADIUS, STATES[slot.number]
        axes.add_artist(Circle((x, y), NODE_RADIUS, **look))
    else:
        x, name = (left + right) / 2, "$c_k$" if slot.number == OUTPUT else STATES[slot.number]
        corner, height = (left, y - INPUT_SIZE[1] / 2), INPUT_SIZE[1]
        axes.add_artist(FancyBboxPatch(corner, right - left, height, "round,pad=0,rounding_size=0.1", **look))
    axes.text(x, y, name, fontsize=12, color=INK, ha="center", va="center_baseline", zorder=4)


def _draw_operation(axes: Axes, edge: Edge, left: float, y: float, node: tuple[float, float]) -> None:
    """The label of an operation, beginning at `left`, and an arrow from it to the node."""
    color = color_of(edge.operation)
    corner, style = (left, y - PILL_HEIGHT / 2), "round,pad=0,rounding_size=0.12"
    axes.add_artist(
        FancyBboxPatch(corner, PILL_WIDTH, PILL_HEIGHT, style, fc="white", ec=color, lw=1.6, zorder=3)
    )
    x, label = left + PILL_WIDTH / 2, label_of(edge.operation)
    axes.text(x, y, label, fontsize=11, color=INK, ha="center", va="center_baseline", zorder=4)

    start, angle = left + PILL_WIDTH, math.copysign(0.6, y - node[1])
    end = (node[0] - NODE_RADIUS * math.cos(angle), node[1] + NODE_RADIUS * math.sin(angle))
    curve = Path([(start, y), ((start + end[0]) / 2, y), end], [Path.MOVETO, Path.CURVE3, Path.CURVE3])
    axes.add_artist(FancyArrowPatch(path=curve, color=color, lw=1.6, zorder=3, **ARROW))


def _draw_stride(axes: Axes, edge: Edge, left: float, y: float) -> None:
    """The mark of stride 2 before an operation on an input of the cell; before another, the edge goes on."""
    axes.plot([left, left + BADGE], [y, y], color=color_of(edge.operation), lw=2, zorder=2)
    if edge.source < 2:
        _draw_badge(axes, left + BADGE_RADIUS, y, color_of(edge.operation))


def _draw_badge(axes: Axes, x: float, y: float, color: str) -> None:
    axes.add_artist(Circle((x, y), BADGE_RADIUS, fc=color, ec="none", zorder=3))
    axes.text(x, y, "/2", fontsize=8, color="white", ha="center", va="center_baseline", zorder=4)
