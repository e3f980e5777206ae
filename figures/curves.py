"""Pictures: the two cells of a genotype, the curves of a run, and how a search's alpha and beta moved."""

from __future__ import annotations

import io
import json
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise, permutations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch

from genotypes import EDGES, NODES, PRIMITIVES, Genotype, genotype_from_dict
from logger import read_metrics
from model_search import edge_weights
from utils import InputError, write_atomically

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 200

LABELS = {
    "skip_connect": "skip",
    "max_pool_3x3": "3x3 max pool",
    "avg_pool_3x3": "3x3 avg pool",
    "bin_conv_3x3": "3x3 conv",
    "bin_conv_5x5": "5x5 conv",
    "bin_dil_conv_3x3": "3x3 dil. conv",
    "bin_dil_conv_5x5": "5x5 dil. conv",
}
COLORS = {
    "skip_connect": "#2e8b57",
    "max_pool_3x3": "#d1495b",
    "avg_pool_3x3": "#e08e1b",
    "bin_conv_3x3": "#4a90d9",
    "bin_conv_5x5": "#1f3f8f",
    "bin_dil_conv_3x3": "#c05fc9",
    "bin_dil_conv_5x5": "#6a1b9a",
}
"""One colour per operation, the same in every picture."""

TITLES = {"normal": "normal cell", "reduce": "reduction cell"}
TRAINING_SHAPES = dict.fromkeys(("epoch", "train_loss", "train_top1", "valid_loss", "valid_top1"), ())
SEARCH_SHAPES = {
    **dict.fromkeys(TRAINING_SHAPES, ()),
    **dict.fromkeys(("path_regularizer", "edge_regularizer", "alpha_entropy", "changed"), ()),
    "alphas_normal": (len(EDGES), len(PRIMITIVES)),
    "alphas_reduce": (len(EDGES), len(PRIMITIVES)),
    "betas_normal": (len(EDGES) - 2,),
    "betas_reduce": (len(EDGES) - 2,),
}
"""The metrics that the pictures are made of, and their shapes in the record of one epoch."""

STATES = ("$c_{k-2}$", "$c_{k-1}$", *map(str, range(NODES)))
"""Names of the states: the two inputs, the older first, and the nodes."""

STATE_COLORS = ("#1f3f8f", "#e08e1b", "#2e8b57", "#c05fc9", "#d1495b")

OUTPUT = 2 + NODES
INK, GREY, PALE = "#1f2933", "#9aa5b1", "#eef1f5"
TRAIN, VALID = "#e08e1b", "#1f3f8f"

# Inches in the picture of a cell.
PILL_WIDTH, PILL_HEIGHT, PILL_STEP = 1.3, 0.34, 0.48
NODE_RADIUS, NODE_GAP, BADGE = 0.22, 0.26, 0.26
INPUT_SIZE, OUTPUT_WIDTH = (0.78, 0.5), 0.6
ARROW = {"arrowstyle": "-|>,head_length=5,head_width=2.5", "mutation_scale": 1, "shrinkA": 0, "shrinkB": 0}
LANE, MARGIN, TITLE, GAP, MIN_WIDTH = 0.3, 0.2, 0.4, 0.55, 8.0


def draw_genotype(genotype: Genotype, folder: Path, *, name: str = "genotype") -> list[Path]:
    """Write {name}-normal.png and {name}-reduce.png into `folder`. Raises InputError where it cannot."""
    with _default_look():
        return _write({f"{name}-{kind}.png": cell_figure(genotype, kind) for kind in TITLES}, folder)


def draw_curves(run: Path, *, folder: Path | None = None) -> list[Path]:
    """Write curves.png, and for a search arch-alpha.png and arch-beta.png, from run/metrics.jsonl into
    `folder`, by default the run's own.

    Raises InputError: no metrics, malformed ones (which line and field), or pictures that cannot be written.
    """
    with _default_look():
        return _write(curve_figures(Path(run)), run if folder is None else folder)


def curve_figures(run: Path) -> dict[str, Figure]:
    """The pictures of draw_curves by file name."""
    columns, kept = _read_columns(run)
    if kept is None:
        return {"curves.png": _training_figure(columns)}
    start = _arch_start_epoch(run)
    return {
        "curves.png": _search_figure(columns, start),
        "arch-alpha.png": _alpha_figure(columns, kept),
        "arch-beta.png": _beta_figure(columns, kept),
    }


@contextmanager
def _default_look() -> Iterator[None]:
    """matplotlib's own defaults, not a user's settings, which come back afterwards."""
    try:
        import matplotlib  # takes a while to import, and not every user of this module draws
    except ImportError as error:
        raise InputError(f"pictures need matplotlib ({error}): pip install -r requirements.txt") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def _figure(width: float, height: float, **options: Any) -> Figure:
    """A figure outside pyplot: a program that uses matplotlib itself keeps its backend and its figures."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure


def _write(figures: dict[str, Figure], folder: Path) -> list[Path]:
    paths = []
    for name, figure in figures.items():
        buffer, path = io.BytesIO(), Path(folder) / name
        figure.savefig(buffer, format="png", dpi=DPI)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            raise InputError(f"cannot write {path}: {error.strerror}") from None
        paths.append(path)
    return paths


# The picture of a cell: layers from left to right (Sugiyama's method). A node stands behind the layers of all
# its inputs, its two operations as labels before it. An edge crosses the layers between in a lane of its own
# and bends only in the gaps between layers, so that no edge ever runs through a label or a node.


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
    y = _heights(edges, orders, into, out)
    height = max(y[slot] + _size(slot) / 2 for slot in y) + MARGIN
    figure = _figure(width, height)
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


def _heights(
    edges: list[Edge], orders: list[tuple[Slot, ...]], into: list[float], out: list[float]
) -> dict[Slot, float]:
    """The middle of each slot, downwards: near the middle of what it is linked to, and apart in its layer."""
    wishes: dict[Slot, list[tuple[Slot, float, int]]] = {slot: [] for order in orders for slot in order}
    for number, edge in enumerate(edges):
        for a, b in pairwise(edge.path):
            shift = (into[number] if b == edge.path[-1] else 0) - (out[number] if a == edge.path[0] else 0)
            straight = (1, 3, 6)[a.is_lane + b.is_lane]  # bends in the middle of an edge disturb most
            wishes[a].append((b, shift, straight))
            wishes[b].append((a, -shift, straight))
    y = {slot: 0.0 for slot in wishes}
    for order in [*orders, *reversed(orders)] * 40:
        wanted = [_weighted_mean(wishes[slot], y) if wishes[slot] else y[slot] for slot in order]
        y.update(zip(order, _keep_apart(wanted, [_size(slot) for slot in order]), strict=True))
    top = min(y[slot] - _size(slot) / 2 for slot in y)
    return {slot: value - top + TITLE for slot, value in y.items()}


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
    from matplotlib.patches import FancyArrowPatch, PathPatch
    from matplotlib.path import Path as Curve

    right = columns[edge.path[0].layer][1]
    vertices, codes = [(right - NODE_RADIUS, ys[0]), (right, ys[0])], [Curve.MOVETO, Curve.LINETO]
    for slot, y in zip(edge.path[1:], ys[1:], strict=True):
        (x0, y0), (left, right) = vertices[-1], columns[slot.layer]
        middle = (x0 + left) / 2
        vertices += [(middle, y0), (middle, y), (left, y)]
        codes += [Curve.CURVE4] * 3
        if slot.is_lane:
            vertices.append((right, y))
            codes.append(Curve.LINETO)
    curve = Curve(vertices, codes)
    if edge.operation is None:
        axes.add_artist(FancyArrowPatch(path=curve, color=GREY, lw=1, zorder=1, **ARROW))
    else:
        axes.add_artist(
            PathPatch(curve, fc="none", ec="white", lw=4.5, zorder=1.9)
        )  # a gap where it crosses others
        axes.add_artist(PathPatch(curve, fc="none", ec=COLORS[edge.operation], lw=2, zorder=2))


def _draw_state(axes: Axes, slot: Slot, left: float, right: float, y: float) -> None:
    from matplotlib.patches import Circle, FancyBboxPatch

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
    from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
    from matplotlib.path import Path as Curve

    color = COLORS[edge.operation]
    corner, style = (left, y - PILL_HEIGHT / 2), "round,pad=0,rounding_size=0.12"
    axes.add_artist(
        FancyBboxPatch(corner, PILL_WIDTH, PILL_HEIGHT, style, fc="white", ec=color, lw=1.6, zorder=3)
    )
    x, label = left + PILL_WIDTH / 2, LABELS[edge.operation]
    axes.text(x, y, label, fontsize=11, color=INK, ha="center", va="center_baseline", zorder=4)

    start, angle = left + PILL_WIDTH, math.copysign(0.6, y - node[1])
    end = (node[0] - NODE_RADIUS * math.cos(angle), node[1] + NODE_RADIUS * math.sin(angle))
    curve = Curve([(start, y), ((start + end[0]) / 2, y), end], [Curve.MOVETO, Curve.CURVE3, Curve.CURVE3])
    axes.add_artist(FancyArrowPatch(path=curve, color=color, lw=1.6, zorder=3, **ARROW))


def _draw_stride(axes: Axes, edge: Edge, left: float, y: float) -> None:
    """The mark of stride 2 before an operation on an input of the cell; before another, the edge goes on."""
    axes.plot([left, left + BADGE], [y, y], color=COLORS[edge.operation], lw=2, zorder=2)
    if edge.source < 2:
        _draw_badge(axes, left + 0.125, y, COLORS[edge.operation])


def _draw_badge(axes: Axes, x: float, y: float, color: str) -> None:
    from matplotlib.patches import Circle

    axes.add_artist(Circle((x, y), 0.125, fc=color, ec="none", zorder=3))
    axes.text(x, y, "/2", fontsize=8, color="white", ha="center", va="center_baseline", zorder=4)


# The curves of a run.


def _read_columns(run: Path) -> tuple[dict[str, np.ndarray], Genotype | None]:
    """The metrics of a run by name, epochs first; and the last genotype, where the run is a search.

    Raises InputError that names the line and the field.
    """
    path = run / "metrics.jsonl"
    try:
        lines = path.read_text().splitlines()
        records = read_metrics(run)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read {path}: {getattr(error, 'strerror', 'not text')}") from None
    if len(records) < len(lines) - 1:  # a crash cuts short only the last one
        raise InputError(f"{path}, line {len(records) + 1}: not JSON")
    if not records:
        raise InputError(f"{path} holds no epoch")
    search = isinstance(records[0], dict) and "arch" in records[0]
    shapes = SEARCH_SHAPES if search else TRAINING_SHAPES
    columns: dict[str, list] = {name: [] for name in shapes}
    for number, record in enumerate(records, 1):
        where = f"{path}, line {number}"
        flat = {**record, **record["arch"]} if search and _has_arch(record) else record
        for name, shape in shapes.items():
            columns[name].append(_numbers(flat, name, shape, where))
        if number > 1 and columns["epoch"][-1] <= columns["epoch"][-2]:
            raise InputError(f"{where}: field 'epoch' does not follow the one before")
    arrays = {name: np.stack(column) for name, column in columns.items()}
    return arrays, genotype_from_dict(records[-1].get("genotype"), origin=where) if search else None


def _has_arch(record: Any) -> bool:
    return isinstance(record, dict) and isinstance(record.get("arch"), dict)


def _numbers(record: Any, name: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    if not isinstance(record, dict) or name not in record:
        raise InputError(f"{where}: field {name!r} is missing")
    try:
        values = np.asarray(record[name], dtype=np.float64)
    except (TypeError, ValueError, OverflowError):
        values = None
    if values is None or values.shape != shape or not np.isfinite(values).all():
        wanted = f"{' x '.join(map(str, shape))} finite numbers" if shape else "a finite number"
        raise InputError(f"{where}: field {name!r} must be {wanted}")
    return values


def _arch_start_epoch(run: Path) -> int | None:
    """The first epoch with architecture steps, where the run's args.json tells it."""
    try:
        start = json.loads((run / "args.json").read_text())["arch_start_epoch"]
    except (OSError, ValueError, KeyError, TypeError):  # the pictures do without
        return None
    return start if isinstance(start, int) else None


def _style(axes: Axes, epochs: np.ndarray, *, title: str, unit: str = "", least: float = 0.0) -> None:
    """The look of all panels; the vertical axis spans `least` at least, so that noise does not fill it."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, fontsize=11, loc="left", color=INK)
    axes.set_ylabel(unit, fontsize=10, color=INK)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True, min_n_ticks=1))
    axes.set_xlim(*_span(epochs))
    low, high = axes.get_ylim()
    missing = max(0.0, least - (high - low)) / 2
    axes.set_ylim(low - missing, high + missing)
    axes.ticklabel_format(axis="y", useOffset=False)
    axes.grid(color="#e4e7eb", lw=0.7)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(labelsize=9, color=GREY, labelcolor=INK)


def _span(epochs: np.ndarray) -> tuple[float, float]:
    margin = max(0.03 * (epochs[-1] - epochs[0]), 0.25)
    return epochs[0] - margin, epochs[-1] + margin


def _marker(epochs: np.ndarray) -> dict[str, Any]:
    """Points too where there are few: a single epoch makes no line."""
    return {"marker": "o", "markersize": 3.5} if len(epochs) <= 25 else {}


def _legend(axes: Axes) -> None:
    axes.legend(fontsize=9, framealpha=0.85, edgecolor="none", labelcolor=INK)


def _shade(axes: Axes, epochs: np.ndarray, start: int | None) -> None:
    """Shade the epochs before the architecture steps started, if they start within the picture."""
    if start is not None and epochs[0] < start <= epochs[-1]:
        axes.axvspan(_span(epochs)[0], start, color=PALE, lw=0, zorder=0, label="weights only")


def _loss_and_accuracy(
    panels: Iterable[Axes], columns: dict[str, np.ndarray], names: tuple[str, str], start: int | None = None
) -> None:
    """Both parts of the data, and the best epoch, by the second part's accuracy."""
    epochs, accuracy = columns["epoch"], columns["valid_top1"]
    best = int(accuracy.argmax())
    looks = (("loss", "loss", "nats", 0.2), ("top1", "top-1 accuracy", "%", 5.0))
    for axes, (metric, title, unit, least) in zip(panels, looks, strict=True):
        for part, name, color in zip(("train", "valid"), names, (TRAIN, VALID), strict=True):
            values = columns[f"{part}_{metric}"]
            label = f"{name}, last {values[-1]:.2f}" + " %" * (unit == "%")
            axes.plot(epochs, values, color=color, lw=1.8, label=label, **_marker(epochs))
        label = f"best: {accuracy[best]:.2f} %, epoch {epochs[best]:.0f}" if unit == "%" else None
        at_best = columns[f"valid_{metric}"][best]
        axes.axvline(epochs[best], color=VALID, lw=0.8, ls=":", zorder=1)
        axes.plot(
            epochs[best], at_best, "o", ms=9, mfc="none", mec=VALID, mew=1.6, ls="", label=label, zorder=4
        )
        _shade(axes, epochs, start)
        _style(axes, epochs, title=title, unit=unit, least=least)
        _legend(axes)


def _training_figure(columns: dict[str, np.ndarray]) -> Figure:
    figure = _figure(10, 3.9, layout="constrained")
    panels = figure.subplots(1, 2)
    _loss_and_accuracy(panels, columns, ("train", "validation"))
    figure.supxlabel("epoch", fontsize=10, color=INK)
    return figure


def _search_figure(columns: dict[str, np.ndarray], start: int | None) -> Figure:
    figure = _figure(12, 7, layout="constrained")
    panels, epochs = figure.subplots(2, 3), columns["epoch"]
    _loss_and_accuracy(panels[0, :2], columns, ("weight half", "arch. half"), start)
    for axes, name, title, unit, least in (
        (panels[0, 2], "alpha_entropy", "entropy of softmax(alpha)", "nats, mean of all edges", 0.02),
        (panels[1, 0], "path_regularizer", "path regulariser", "$L_{path}$, without its weight", 0.2),
        (panels[1, 1], "edge_regularizer", "edge regulariser", "$L_{edge}$, without its weight", 0.02),
        (panels[1, 2], "changed", "operations changed", f"of {4 * NODES}, since the epoch before", 4.0),
    ):
        axes.plot(epochs, columns[name], color=VALID, lw=1.8, **_marker(epochs))
        if name == "changed":
            axes.set_ylim(-0.2, max(4.0, columns[name].max()) + 0.2)
            axes.yaxis.get_major_locator().set_params(integer=True)
        if name == "alpha_entropy":
            uniform = math.log(len(PRIMITIVES))
            axes.axhline(uniform, color=GREY, lw=1, ls="--", zorder=1, label="all operations equal")
            _legend(axes)
        _style(axes, epochs, title=title, unit=unit, least=least)
        _shade(axes, epochs, start)
    figure.supxlabel("epoch", fontsize=10, color=INK)
    return figure


def _alpha_figure(columns: dict[str, np.ndarray], kept: Genotype) -> Figure:
    """softmax(alpha) of each edge: for each cell a row per node and a column per input state."""
    from matplotlib.lines import Line2D

    figure, epochs = _figure(11, 13, layout="constrained"), columns["epoch"]
    softmax = {kind: torch.from_numpy(columns[f"alphas_{kind}"]).softmax(-1).numpy() for kind in TITLES}
    low, high = min(each.min() for each in softmax.values()), max(each.max() for each in softmax.values())
    margin = max(0.05 * (high - low), 0.01)
    for part, kind in zip(figure.subfigures(2, 1, hspace=0.03), TITLES, strict=True):
        grid = part.subplots(NODES, 1 + NODES, sharex=True, sharey=True)
        for axes in grid.flat:
            axes.set_axis_off()
        for edge, (node, source) in enumerate(EDGES):
            axes = grid[node, source]
            axes.set_axis_on()
            _alpha_panel(axes, epochs, softmax[kind][:, edge], _chosen(kept, kind, node, source))
            title = f"{STATES[source]} → {STATES[2 + node]}"
            _style(axes, epochs, title=title)
            axes.set_ylim(low - margin, high + margin)
        part.suptitle(TITLES[kind], fontsize=13, weight="bold", color=INK, x=0.01, ha="left")
        part.supylabel("softmax(alpha)", fontsize=10, color=INK)
        part.supxlabel("epoch", fontsize=10, color=INK)
    lines = [Line2D([], [], color=COLORS[name], lw=2, label=LABELS[name]) for name in PRIMITIVES]
    lines.append(Line2D([], [], color=GREY, lw=1, ls="--", label="all operations equal"))
    note = "bold and named: in the genotype\nshaded: edge not kept"
    figure.legend(
        handles=lines, title=note, loc=(0.62, 0.855), ncols=2, fontsize=10, frameon=False, labelcolor=INK
    )
    return figure


def _chosen(genotype: Genotype, kind: str, node: int, source: int) -> list[str]:
    """The operations that the genotype has from `source` to `node`; none where the edge was not kept."""
    return [name for name, state in getattr(genotype, kind)[2 * node : 2 * node + 2] if state == source]


def _alpha_panel(axes: Axes, epochs: np.ndarray, values: np.ndarray, chosen: list[str]) -> None:
    """An edge: values (epochs, 7). A kept one names its operation, the others are shaded."""
    axes.axhline(1 / len(PRIMITIVES), color=GREY, lw=0.8, ls="--", zorder=1)
    for name, line in zip(PRIMITIVES, values.T, strict=True):
        width = 2.6 if name in chosen else 1.2
        axes.plot(epochs, line, color=COLORS[name], lw=width, **_marker(epochs))
    if chosen:
        axes.set_title(LABELS[chosen[0]], fontsize=10, loc="right", color=COLORS[chosen[0]], weight="bold")
    else:
        axes.set_facecolor(PALE)


def _beta_figure(columns: dict[str, np.ndarray], kept: Genotype) -> Figure:
    """The weights of the edges into each node that has to choose: a row per cell, a column per node."""
    from matplotlib.lines import Line2D

    figure, epochs = _figure(11, 6.6, layout="constrained"), columns["epoch"]
    weights = {
        kind: torch.stack([edge_weights(beta) for beta in torch.from_numpy(columns[f"betas_{kind}"])]).numpy()
        for kind in TITLES
    }
    starts = np.array([2 / (2 + node) for node, _ in EDGES])
    reach = max(
        0.01, *(1.08 * abs(each - starts).max() for each in weights.values())
    )  # one scale in all panels
    grid = figure.subplots(2, NODES - 1, sharex=True, sharey="col")
    for row, kind in zip(grid, TITLES, strict=True):
        for node, axes in enumerate(row, 1):
            axes.axhline(2 / (2 + node), color=GREY, lw=1, ls=":", zorder=1)
            for edge, (target, source) in enumerate(EDGES):
                if target == node:
                    look = {"lw": 2.4} if _chosen(kept, kind, node, source) else {"lw": 1.2, "ls": "--"}
                    look |= {"color": STATE_COLORS[source], **_marker(epochs)}
                    axes.plot(epochs, weights[kind][:, edge], **look)
            unit = "edge weight" if node == 1 else ""
            _style(axes, epochs, title=f"{TITLES[kind]}, node {node}", unit=unit)
            axes.set_ylim(2 / (2 + node) - reach, 2 / (2 + node) + reach)
    sources = zip(STATE_COLORS, ("$c_{k-2}$", "$c_{k-1}$", "node 0", "node 1", "node 2"), strict=True)
    lines = [Line2D([], [], color=color, lw=2, label=f"from {name}") for color, name in sources]
    lines.append(Line2D([], [], color=INK, lw=2.4, label="edge kept"))
    lines.append(Line2D([], [], color=INK, lw=1.2, ls="--", label="edge not kept"))
    lines.append(Line2D([], [], color=GREY, lw=1, ls=":", label="start: 2 / inputs"))
    figure.legend(handles=lines, loc="outside right upper", fontsize=10, frameon=False, labelcolor=INK)
    figure.supxlabel("epoch", fontsize=10, color=INK)
    return figure
