"""A study's pictures: every run a point, means with their intervals; accuracy against cost."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from evidence.plan import Study
from evidence.report import top1_by_arm
from evidence.statistics import Summary, rank_correlation
from pictures import draw
from pictures.canvas import GREY, INK, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

HUES = ("#1f3f8f", "#d1495b", "#2e8b57", "#e08e1b", "#6a1b9a", "#4a90d9", "#c05fc9", "#7f5539", "#5c6770")


def draw_study(study: Study, content: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write NAME.png and NAME-cost.png into `folder`; nothing where no run is finished. Raises as draw."""
    accuracies = top1_by_arm(study, content["jobs"])
    if not any(accuracies.values()):
        return []
    return draw(partial(_figures, study, content["jobs"], accuracies), folder)


def _figures(study: Study, records: Mapping, accuracies: Mapping) -> dict[str, Figure]:
    hues = {arm.name: HUES[i % len(HUES)] for i, arm in enumerate(study.arms)}
    shown = {name: values for name, values in accuracies.items() if values}
    picture = _ranks if study.analysis in ("ranks", "ways") else _points
    return {
        f"{study.name}.png": picture(study, shown, hues),
        f"{study.name}-cost.png": _against_cost(study, records, hues),
    }


def _points(study: Study, accuracies: Mapping[str, Mapping[int, float]], hues: Mapping[str, str]) -> Figure:
    figure = new_figure(7.5, 1.2 + 0.5 * len(accuracies), layout="constrained")
    axes = figure.subplots()
    for row, (name, values) in enumerate(accuracies.items()):
        summary = Summary.of(list(values.values()))
        axes.plot(list(values.values()), [row] * len(values), "o", color=hues[name], alpha=0.45, markersize=5)
        if summary.n > 1:
            style = {"fmt": "D", "color": hues[name], "capsize": 3, "markersize": 4}
            interval = summary.half_width if summary.n > 2 else None  # of two runs it says nothing
            axes.errorbar(summary.mean, row + 0.25, xerr=interval, **style)
    axes.set_yticks(range(len(accuracies)), [f"{name}  (n = {len(v)})" for name, v in accuracies.items()])
    axes.set_ylim(len(accuracies) - 0.4, -0.5)
    axes.set_xlabel("top-1, %")
    caption = "Circles: runs. Diamonds: their means, of three and more with 95 % intervals."
    figure.supxlabel(caption, fontsize=8, color=INK)
    figure.suptitle(study.question, fontsize=10, color=INK)
    plain(axes)
    return figure


def _ranks(study: Study, accuracies: Mapping[str, Mapping[int, float]], hues: Mapping[str, str]) -> Figure:
    """Draw a panel for each other arm: its accuracy of a cell against the reference's."""
    reference = accuracies.get(study.reference.name, {})
    others = [name for name in accuracies if name != study.reference.name]
    figure = new_figure(9, 3.6, layout="constrained")
    panels = figure.subplots(1, max(len(others), 1), squeeze=False)[0]
    for axes, name in zip(panels, others, strict=False):
        cells = sorted(reference.keys() & accuracies[name].keys())
        x, y = ([values[cell] for cell in cells] for values in (reference, accuracies[name]))
        axes.plot(x, y, "o", color=hues[name], alpha=0.7, markersize=5)
        found = rank_correlation(accuracies[name], reference)
        axes.set_title(f"{name}\nrho = {found.rho:.2f}, p = {found.p:.2f}", fontsize=9, color=INK)
        plain(axes)
    panels[0].set_ylabel("top-1, %")
    figure.supxlabel(f"{study.reference.name}: top-1, %   (a circle: a cell)", fontsize=10, color=INK)
    figure.suptitle(study.question, fontsize=10, color=INK)
    return figure


def _against_cost(study: Study, records: Mapping[str, Any], hues: Mapping[str, str]) -> Figure:
    figure = new_figure(9, 3.8, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (name, unit, label) in zip(
        panels, (("ops", 1e6, "OPs of an image, millions"), ("bytes", 1e3, "stored weights, kB")), strict=True
    ):
        for arm in study.arms:
            done = [(seed, records[job.key]) for seed, job in arm.jobs.items() if job.key in records]
            done = [(seed, record) for seed, record in done if "cost" in record]  # else a supernet
            if done:
                x = [record["cost"][name] / unit for _, record in done]
                y = [arm.accuracy(record["figures"], seed) for seed, record in done]
                axes.plot(x, y, "o", color=hues[arm.name], alpha=0.7, markersize=5, label=arm.name)
        axes.set_xlabel(label)
        plain(axes)
    panels[0].set_ylabel("test top-1, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    return figure


def plain(axes: Axes) -> None:
    axes.grid(color=GREY, alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
