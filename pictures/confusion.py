"""The pictures of what a network confuses: the counts as a map, and the pictures that it gets wrong."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.figure import Figure

from pictures.canvas import GREY, INK, new_figure

if TYPE_CHECKING:  # it brings torch
    from training.confusion import Confusion, Mistake

MOST_CLASSES = 100
LONGEST_NAME = 18
COLUMNS = 6
WITH_NUMBERS = 20
"""Classes up to which each field of the map has its number."""


def confusion_figure(confusion: Confusion) -> Figure:
    """Rows: the true class; columns: the answer; the darker, the larger the part of the row."""
    count = len(confusion.classes)
    side = min(max(0.45 * count, 3), 16) + 2.2
    figure = new_figure(side, side, layout="constrained")
    axes = figure.add_subplot()
    parts = confusion.counts / np.maximum(confusion.images, 1)[:, None]
    axes.imshow(parts, cmap="Blues", vmin=0, vmax=1)
    names, size = [shortened(name) for name in confusion.classes], 8 if count <= 40 else 4
    axes.set_xticks(range(count), names, rotation=90, fontsize=size, parse_math=False)
    axes.set_yticks(range(count), names, fontsize=size, parse_math=False)
    axes.set_xlabel("answer", color=INK)
    axes.set_ylabel("truth", color=INK)
    title = f"top-1 {confusion.top1:.2f} %, balanced accuracy {confusion.balanced_accuracy:.2f} %"
    axes.set_title(title, fontsize=10, color=INK)
    for spine in axes.spines.values():
        spine.set_color(GREY)
    if count <= WITH_NUMBERS:
        for (row, column), number in np.ndenumerate(confusion.counts):
            if number:
                color = "white" if parts[row, column] > 0.5 else INK
                axes.text(column, row, str(number), ha="center", va="center", fontsize=8, color=color)
    return figure


def mistakes_figure(mistakes: Sequence[Mistake], classes: Sequence[str]) -> Figure:
    """The pictures that are wrong with most confidence: class, answer and probability of each."""
    rows = -(-len(mistakes) // COLUMNS)
    figure = new_figure(1.9 * COLUMNS, 2.4 * rows, layout="constrained")
    for position, mistake in enumerate(mistakes, 1):
        axes = figure.add_subplot(rows, COLUMNS, position)
        axes.imshow(mistake.picture)
        axes.set_axis_off()
        truth, answer = (shortened(classes[label]) for label in (mistake.truth, mistake.answer))
        title = f"{truth}\ncalled {answer}, {100 * mistake.probability:.0f} %"
        axes.set_title(title, fontsize=8, color=INK, parse_math=False)
    return figure


def shortened(name: str) -> str:
    name = "".join(c if c.isprintable() else "?" for c in name)
    return name if len(name) <= LONGEST_NAME else name[: LONGEST_NAME - 3] + "..."
