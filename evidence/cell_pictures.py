"""Pictures of a table of trained cells: what analysis.py says in numbers."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from evidence.analysis import (
    ENOUGH,
    Cells,
    correlation,
    front,
    left_out_predictions,
    rankings,
    score_rankings,
    scores_of,
    standings,
)
from evidence.cells import Table
from evidence.pictures import HUES, plain
from pictures import draw
from pictures.canvas import GREY, INK, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_cells(table: Table, folder: Path) -> list[Path]:
    """Write the pictures that the table has enough cells for. Raises as draw."""
    return draw(partial(_figures, Cells(table), folder), folder)


def _figures(cells: Cells, folder: Path) -> dict[str, Figure]:
    drawn = {}
    if len(cells.first) > 1:
        drawn["distribution.png"] = _distribution(cells)
        drawn["cost.png"] = _cost(cells)
    if len(cells.first) >= ENOUGH:
        drawn["ranking.png"] = _ranking(cells)
        drawn["prediction.png"] = _prediction(cells)
        if score_rankings(cells, scores := scores_of(folder)):
            drawn["scores.png"] = _scores(cells, scores)
    return drawn


def _distribution(cells: Cells) -> Figure:
    figure = new_figure(7.5, 3.8, layout="constrained")
    axes = figure.subplots()
    axes.hist(cells.last_test, bins="auto", color=GREY, alpha=0.6, label=f"{len(cells.first)} random cells")
    top = axes.get_ylim()[1]
    for hue, (name, found) in zip(HUES * 9, standings(cells).items(), strict=False):
        interval = f"[{found.percentile.low:.0f}, {found.percentile.high:.0f}]"
        where = f"percentile {found.percentile.value:.0f} {interval if found.p == found.p else ''}"
        axes.axvline(found.mean, color=hue, linewidth=1.5, label=f"{name}, {found.runs} runs: {where}")
    axes.set_ylim(0, top)
    axes.set_xlabel("test top-1, %")
    axes.set_ylabel("cells")
    figure.legend(loc="outside lower center", ncols=1, frameon=False, fontsize=8)
    plain(axes)
    return figure


def _cost(cells: Cells) -> Figure:
    figure = new_figure(9, 3.9, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    named = cells.table.named
    for axes, (what, unit, label) in zip(
        panels,
        (("ops", 1e6, "OPs of an image, millions"), ("packed_bytes", 1e3, "packed file, kB")),
        strict=True,
    ):
        costs = cells.of(what) / unit
        axes.plot(costs, cells.accuracy, "o", color=GREY, alpha=0.6, markersize=4, label="random cells")
        best = front(costs, cells.accuracy)
        axes.plot(costs[best], cells.accuracy[best], "-", color=INK, linewidth=1, label="their front")
        for hue, (name, cell) in zip(HUES * 9, named.items(), strict=False):
            cost = cells.table.runs[cell][0][what] / unit
            axes.plot(cost, cells.table.test_top1(cell), "D", color=hue, markersize=6, label=name)
        axes.set_xlabel(label)
        plain(axes)
    panels[0].set_ylabel("test top-1, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _ranking(cells: Cells) -> Figure:
    figure = new_figure(7.5, 4.2, layout="constrained")
    axes = figure.subplots()
    epochs = np.arange(1, cells.table.epochs + 1)
    found = rankings(cells)
    for shift, (hue, (name, estimates)) in enumerate(zip(HUES, found.items(), strict=False)):
        values, low, high = (
            np.array([getattr(e, end) for e in estimates]) for end in ("value", "low", "high")
        )
        bars = np.array([values - low, high - values])
        x = epochs + (shift - len(found) / 2) * 0.06
        axes.errorbar(x, values, yerr=bars, color=hue, marker="o", markersize=4, capsize=2, label=name)
    axes.axhline(0, color=INK, linewidth=0.8)
    axes.set_xticks(epochs)
    axes.set_xlabel("epochs trained")
    axes.set_ylabel("Spearman's rho with\nthe last test accuracy")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=8)
    plain(axes)
    return figure


def _prediction(cells: Cells) -> Figure:
    predictions = left_out_predictions(cells)
    figure = new_figure(4.6, 4.4, layout="constrained")
    axes = figure.subplots()
    axes.plot(predictions, cells.accuracy, "o", color=HUES[0], alpha=0.6, markersize=4)
    ends = [min(predictions.min(), cells.accuracy.min()), max(predictions.max(), cells.accuracy.max())]
    axes.plot(ends, ends, color=GREY, linewidth=1)
    r = correlation(predictions, cells.accuracy)
    axes.set_title(f"r = {r.value:.2f} [{r.low:.2f}, {r.high:.2f}]", fontsize=10, color=INK)
    axes.set_xlabel("predicted of a cell that was left out, %")
    axes.set_ylabel("test top-1, %")
    plain(axes)
    return figure


def _scores(cells: Cells, scores: dict[str, dict[str, float]]) -> Figure:
    found = score_rankings(cells, scores)
    columns = min(len(found), 3)
    rows = math.ceil(len(found) / columns)
    figure = new_figure(3.2 * columns + 0.6, 3.2 * rows, layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False)
    for axes in panels.flat[len(found) :]:
        axes.axis("off")
    for axes, hue, (name, (_, r)) in zip(panels.flat, HUES * 9, found.items(), strict=False):
        known = [i for i, row in enumerate(cells.first) if row["cell"] in scores[name]]
        x = [scores[name][cells.first[i]["cell"]] for i in known]
        axes.plot(x, cells.accuracy[known], "o", color=hue, alpha=0.6, markersize=4)
        axes.set_title(f"{name}\nrho = {r.value:.2f} [{r.low:.2f}, {r.high:.2f}]", fontsize=9, color=INK)
        plain(axes)
    panels[0, 0].set_ylabel("test top-1, %")
    return figure
