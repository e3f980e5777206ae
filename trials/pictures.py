"""Pictures of a search by trials: every trial's course, and the front where cost counts too."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from pictures import draw
from pictures.canvas import GREY, INK, new_figure
from trials.strategies import Judge, Trial, front

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HUE = "#1f3f8f"


def draw_search(trials: Sequence[Trial], judge: Judge, images: int, folder: Path) -> list[Path]:
    """Write search.png and, with objectives, front.png into `folder`. Raises as draw. An epoch has so many
    `images`."""
    return draw(partial(_figures, trials, judge, images), folder)


def _figures(trials: Sequence[Trial], judge: Judge, images: int) -> dict[str, Figure]:
    drawn = {"search.png": _course(trials, images)}
    if judge.objectives:
        drawn["front.png"] = _front(trials, judge)
    return drawn


def _course(trials: Sequence[Trial], images: int) -> Figure:
    """Accuracy over epochs of each candidate, as far as it was trained; the best one in colour."""
    figure = new_figure(6, 3.6, layout="constrained")
    axes = figure.subplots()
    curves = {trial.key: trial.curve for trial in sorted(_done(trials), key=lambda t: t.job.epochs)}
    longest = max(map(len, curves.values()))
    best = max((key for key in curves if len(curves[key]) == longest), key=lambda k: curves[k][-1].valid_top1)
    for key, curve in curves.items():
        hue, width = (HUE, 2) if key == best else (GREY, 0.8)
        accuracies = [epoch.valid_top1 for epoch in curve]
        axes.plot(range(1, len(curve) + 1), accuracies, "-o", color=hue, linewidth=width, markersize=2.5)
    spent = sum(trial.job.cost for trial in trials) * images
    axes.set_xlabel("epochs of both stages")
    axes.set_ylabel("held-out top-1, %")
    axes.set_title(f"{len(curves)} cells, {spent:,} images trained", fontsize=10, color=INK)
    return figure


def _front(trials: Sequence[Trial], judge: Judge) -> Figure:
    members = {trial.key for trial in front(trials, judge)}
    figure = new_figure(4.2 * len(judge.objectives), 3.6, layout="constrained")
    panels = figure.subplots(1, len(judge.objectives), squeeze=False)[0]
    for axes, name in zip(panels, judge.objectives, strict=True):
        for trial in _done(trials):
            hue = HUE if trial.key in members else GREY
            axes.plot(trial.costs[name], trial.curve[-1].valid_top1, "o", color=hue, markersize=4)
        axes.set_xlabel({"kilobytes": "packed, kB", "ram": "RAM, kB", "ops": "OPs"}[name])
        axes.set_ylabel("held-out top-1, %")
    return figure


def _done(trials: Sequence[Trial]) -> list[Trial]:
    return [trial for trial in trials if trial.curve is not None]
