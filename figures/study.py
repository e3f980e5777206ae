"""A study's pictures: every run a point, means with their intervals; accuracy against cost."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from evidence.plan import Study
from evidence.report import test_accuracies
from evidence.statistics import Summary
from figures.canvas import GREY, INK, new_figure

HUES = ("#1f3f8f", "#d1495b", "#2e8b57", "#e08e1b", "#6a1b9a", "#4a90d9", "#c05fc9", "#7f5539")


def study_figures(study: Study, content: Mapping[str, Any]) -> dict[str, Figure]:
    """By file name; none where no run is finished."""
    accuracies = {name: values for name, values in test_accuracies(study, content).items() if values}
    if not accuracies:
        return {}
    hues = {arm.name: HUES[i % len(HUES)] for i, arm in enumerate(study.arms)}
    return {
        f"{study.name}.png": _points(study, accuracies, hues),
        f"{study.name}-cost.png": _against_cost(study, content, hues),
    }


def _points(study: Study, accuracies: Mapping[str, Mapping[int, float]], hues: Mapping[str, str]) -> Figure:
    figure = new_figure(7, 1.1 + 0.45 * len(accuracies), layout="constrained")
    axes = figure.subplots()
    for row, (name, values) in enumerate(accuracies.items()):
        summary = Summary.of(list(values.values()))
        axes.plot(list(values.values()), [row] * len(values), "o", color=hues[name], alpha=0.45, markersize=5)
        if summary.n > 1:
            axes.errorbar(
                summary.mean,
                row + 0.22,
                xerr=summary.half_width,
                fmt="D",
                color=hues[name],
                capsize=3,
                markersize=4,
            )
    axes.set_yticks(range(len(accuracies)), [f"{name}  (n = {len(v)})" for name, v in accuracies.items()])
    axes.set_ylim(len(accuracies) - 0.4, -0.5)
    axes.set_xlabel("test top-1, %    (circles: runs; diamonds: means with 95 % intervals)")
    axes.set_title(study.question, fontsize=10, color=INK, loc="left")
    _plain(axes)
    return figure


def _against_cost(study: Study, content: Mapping[str, Any], hues: Mapping[str, str]) -> Figure:
    figure = new_figure(9, 3.6, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    jobs = content["jobs"]
    for axes, (name, scale, label) in zip(
        panels, (("ops", 1e6, "OPs of an image, millions"), ("bytes", 1e3, "stored weights, kB")), strict=True
    ):
        for arm in study.arms:
            records = [jobs[job.key] for job in arm.jobs.values() if job.key in jobs]
            axes.plot(
                [record["cost"][name] / scale for record in records],
                [record["figures"]["test"]["top1"] for record in records],
                "o",
                color=hues[arm.name],
                alpha=0.7,
                markersize=5,
                label=arm.name,
            )
        axes.set_xlabel(label)
        _plain(axes)
    panels[0].set_ylabel("test top-1, %")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False)
    return figure


def _plain(axes) -> None:
    axes.grid(axis="x", color=GREY, alpha=0.3)
    axes.spines[["top", "right", "left"]].set_visible(False)
