"""The picture of a network without cells: its stages from left to right, with their widths and sizes."""

from __future__ import annotations

from typing import NamedTuple

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from pictures.canvas import GREY, INK, PALE, new_figure

BOX_WIDTH, BOX_HEIGHT, GAP, MARGIN, TITLE_HEIGHT = 1.55, 0.85, 0.35, 0.2, 0.5  # inches


class Stage(NamedTuple):
    name: str
    what: str
    output: str  # channels and size


def layers_figure(title: str, stages: list[Stage]) -> Figure:
    """A box for each stage: its name, what it is, and what it gives."""
    width = 2 * MARGIN + len(stages) * BOX_WIDTH + (len(stages) - 1) * GAP
    height = TITLE_HEIGHT + BOX_HEIGHT + MARGIN
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))  # data units are inches
    axes.set_axis_off()
    axes.text(MARGIN, 0.27, title, fontsize=13, color=INK, va="center_baseline", weight="bold")
    middle = TITLE_HEIGHT + BOX_HEIGHT / 2
    for number, stage in enumerate(stages):
        left = MARGIN + number * (BOX_WIDTH + GAP)
        look = {"fc": PALE, "ec": INK, "lw": 1.2}
        corner = (left, TITLE_HEIGHT)
        axes.add_artist(
            FancyBboxPatch(corner, BOX_WIDTH, BOX_HEIGHT, "round,pad=0,rounding_size=0.1", **look)
        )
        for row, (text, size) in enumerate(((stage.name, 11), (stage.what, 9), (stage.output, 9))):
            y = TITLE_HEIGHT + BOX_HEIGHT * (row + 1) / 4
            center = {"ha": "center", "va": "center_baseline"}
            axes.text(left + BOX_WIDTH / 2, y, text, fontsize=size, color=INK, **center)
        if number:
            ends = (left - GAP, middle), (left, middle)
            axes.add_artist(FancyArrowPatch(*ends, color=GREY, lw=1.4, arrowstyle="-|>", mutation_scale=12))
    return figure
