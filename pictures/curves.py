"""The curves of a run, and how a search's alpha and beta moved, from its metrics.jsonl."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from genotypes import EDGES, NODES, Genotype, genotype_from_dict
from model_search import edge_weights
from pictures.canvas import GREY, INK, PALE, STATES, TITLES, color_of, label_of, new_figure
from run.runs import operations_of_run, read_args, read_metrics
from utils import InputError

TRAINING_SHAPES = dict.fromkeys(("epoch", "train_loss", "train_top1", "valid_loss", "valid_top1"), ())
SEARCH_SHAPES = {
    **dict.fromkeys(TRAINING_SHAPES, ()),
    **dict.fromkeys(("path_regularizer", "edge_regularizer", "alpha_entropy", "changed"), ()),
    "betas_normal": (len(EDGES) - 2,),
    "betas_reduce": (len(EDGES) - 2,),
}
"""The metrics that the pictures are made of, and their shapes in the record of one epoch; with
alpha, of a column for each operation of the search."""

LARGEST = float(np.finfo(np.float32).max)
"""Of a metric, which torch measured in single precision; no axis can show the largest doubles."""

STATE_COLORS = ("#1f3f8f", "#e08e1b", "#2e8b57", "#c05fc9", "#d1495b")
TRAIN, VALID = "#e08e1b", "#1f3f8f"


def curve_figures(run: Path) -> dict[str, Figure]:
    """The pictures of draw_curves by file name. Raises InputError: which file, line and field is damaged."""
    columns, kept = _read_columns(run)
    if kept is None:
        return {"curves.png": _training_figure(columns)}
    start, operations = _arch_start_epoch(run), operations_of_run(run)
    return {
        "curves.png": _search_figure(columns, start, len(operations)),
        "arch-alpha.png": _alpha_figure(columns, kept, operations),
        "arch-beta.png": _beta_figure(columns, kept),
    }


def _read_columns(run: Path) -> tuple[dict[str, np.ndarray], Genotype | None]:
    """The metrics of a run by name, epochs first; and the last genotype, where the run is a search.

    Raises InputError that names the line and the field.
    """
    path, records = run / "metrics.jsonl", read_metrics(run)
    if not records:
        raise InputError(f"{path} holds no epoch")
    search = "arch" in records[0]
    shapes = TRAINING_SHAPES
    if search:
        alpha = len(EDGES), len(operations_of_run(run))
        shapes = {**SEARCH_SHAPES, "alphas_normal": alpha, "alphas_reduce": alpha}
    columns: dict[str, list] = {name: [] for name in shapes}
    for number, record in enumerate(records, 1):
        where = f"{path}, line {number}"
        if search and not isinstance(record.get("arch"), dict):
            raise InputError(f"{where}: field 'arch' must be an object with alpha and beta")
        flat = {**record, **record["arch"]} if search else record
        for name, shape in shapes.items():
            columns[name].append(_numbers(flat, name, shape, where))
        if number > 1 and columns["epoch"][-1] <= columns["epoch"][-2]:
            raise InputError(f"{where}: field 'epoch' does not follow the one before")
    arrays = {name: np.stack(column) for name, column in columns.items()}
    return arrays, genotype_from_dict(records[-1].get("genotype"), origin=where) if search else None


def _numbers(record: dict[str, Any], name: str, shape: tuple[int, ...], where: str) -> np.ndarray:
    if name not in record:
        raise InputError(f"{where}: field {name!r} is missing")
    try:
        values = np.asarray(record[name])
        values = values.astype(np.float64) if values.dtype.kind in "iuf" else None  # no text, no booleans
    except ValueError:  # lists of different lengths
        values = None
    if values is None or values.shape != shape or not (np.abs(values) <= LARGEST).all():
        wanted = f"{' x '.join(map(str, shape))} finite numbers" if shape else "a finite number"
        raise InputError(f"{where}: field {name!r} must be {wanted}")
    return values


def _arch_start_epoch(run: Path) -> int | None:
    """The first epoch with architecture steps; None where the metrics stand alone, without an args.json.

    Raises InputError that names the field.
    """
    if not (run / "args.json").exists():
        return None
    start = read_args(run).get("arch_start_epoch")
    if type(start) is not int:
        raise InputError(f"{run / 'args.json'}: field 'arch_start_epoch' must be a whole number")
    return start


def _style(axes: Axes, epochs: np.ndarray, *, title: str, unit: str = "", least: float = 0.0) -> None:
    """The look of all panels; the vertical axis spans `least` at least, so that noise does not fill it."""
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


def _figure(width: float, height: float) -> Figure:
    """One for panels, with room for the title of each: `h_pad` is in inches."""
    return new_figure(width, height, layout=ConstrainedLayoutEngine(h_pad=0.1))


def _training_figure(columns: dict[str, np.ndarray]) -> Figure:
    figure = _figure(10, 3.9)
    panels = figure.subplots(1, 2)
    _loss_and_accuracy(panels, columns, ("train", "validation"))
    figure.supxlabel("epoch", fontsize=10, color=INK)
    return figure


def _search_figure(columns: dict[str, np.ndarray], start: int | None, operations: int) -> Figure:
    figure = _figure(12, 7)
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
            uniform = math.log(operations)
            axes.axhline(uniform, color=GREY, lw=1, ls="--", zorder=1, label="all operations equal")
            _legend(axes)
        _style(axes, epochs, title=title, unit=unit, least=least)
        _shade(axes, epochs, start)
    figure.supxlabel("epoch", fontsize=10, color=INK)
    return figure


def _alpha_figure(columns: dict[str, np.ndarray], kept: Genotype, operations: tuple[str, ...]) -> Figure:
    """softmax(alpha) of each edge: for each cell a row per node and a column per input state."""
    figure, epochs = _figure(11, 13), columns["epoch"]
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
            _alpha_panel(axes, epochs, softmax[kind][:, edge], _chosen(kept, kind, node, source), operations)
            title = f"{STATES[source]} → {STATES[2 + node]}"
            _style(axes, epochs, title=title)
            axes.set_ylim(low - margin, high + margin)
        part.suptitle(TITLES[kind], fontsize=13, weight="bold", color=INK, x=0.01, ha="left")
        part.supylabel("softmax(alpha)", fontsize=10, color=INK)
        part.supxlabel("epoch", fontsize=10, color=INK)
    lines = [Line2D([], [], color=color_of(name), lw=2, label=label_of(name)) for name in operations]
    lines.append(Line2D([], [], color=GREY, lw=1, ls="--", label="all operations equal"))
    note = "bold and named: in the genotype\nshaded: edge not kept"
    figure.legend(
        handles=lines,
        title=note,
        alignment="left",
        loc=(0.62, 0.855),
        ncols=2,
        fontsize=10,
        frameon=False,
        labelcolor=INK,
    )
    return figure


def _chosen(genotype: Genotype, kind: str, node: int, source: int) -> list[str]:
    """The operations that the genotype has from `source` to `node`; none where the edge was not kept."""
    return [name for name, state in getattr(genotype, kind)[2 * node : 2 * node + 2] if state == source]


def _alpha_panel(
    axes: Axes, epochs: np.ndarray, values: np.ndarray, chosen: list[str], operations: tuple[str, ...]
) -> None:
    """An edge: values (epochs, operations). A kept one names its operation, the others are shaded."""
    axes.axhline(1 / len(operations), color=GREY, lw=0.8, ls="--", zorder=1)
    for name, line in zip(operations, values.T, strict=True):
        width = 2.6 if name in chosen else 1.2
        axes.plot(epochs, line, color=color_of(name), lw=width, **_marker(epochs))
    if chosen:
        axes.set_title(
            label_of(chosen[0]), fontsize=10, loc="right", color=color_of(chosen[0]), weight="bold"
        )
    else:
        axes.set_facecolor(PALE)


def _beta_figure(columns: dict[str, np.ndarray], kept: Genotype) -> Figure:
    """The weights of the edges into each node that has to choose: a row per cell, a column per node."""
    figure, epochs = _figure(11, 6.6), columns["epoch"]
    weights = {
        kind: torch.stack([edge_weights(beta) for beta in torch.from_numpy(columns[f"betas_{kind}"])]).numpy()
        for kind in TITLES
    }
    starts = np.array([2 / (2 + node) for node, _ in EDGES])
    # one scale in all panels
    reach = max(0.01, *(1.08 * abs(each - starts).max() for each in weights.values()))
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
    sources = (*STATES[:2], *(f"node {node}" for node in range(NODES - 1)))
    lines = [
        Line2D([], [], color=color, lw=2, label=f"from {name}")
        for color, name in zip(STATE_COLORS, sources, strict=True)
    ]
    lines.append(Line2D([], [], color=INK, lw=2.4, label="edge kept"))
    lines.append(Line2D([], [], color=INK, lw=1.2, ls="--", label="edge not kept"))
    lines.append(Line2D([], [], color=GREY, lw=1, ls=":", label="start: 2 / inputs"))
    figure.legend(handles=lines, loc="outside right upper", fontsize=10, frameon=False, labelcolor=INK)
    figure.supxlabel("epoch", fontsize=10, color=INK)
    return figure
