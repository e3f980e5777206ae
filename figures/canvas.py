"""What the pictures share: names and colours, and a figure to draw on."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from genotypes import NODES

LABELS = {
    "skip_connect": "skip",
    "max_pool_3x3": "3x3 max pool",
    "avg_pool_3x3": "3x3 avg pool",
    "bin_conv_3x3": "3x3 conv",
    "bin_conv_5x5": "5x5 conv",
    "bin_dil_conv_3x3": "3x3 dil. conv",
    "bin_dil_conv_5x5": "5x5 dil. conv",
    "none": "zero",
    "sep_conv_3x3": "3x3 sep. conv",
    "sep_conv_5x5": "5x5 sep. conv",
    "sep_conv_7x7": "7x7 sep. conv",
    "dil_conv_3x3": "3x3 dilated",
    "dil_conv_5x5": "5x5 dilated",
}
COLORS = {
    "skip_connect": "#2e8b57",
    "max_pool_3x3": "#d1495b",
    "avg_pool_3x3": "#e08e1b",
    "bin_conv_3x3": "#4a90d9",
    "bin_conv_5x5": "#1f3f8f",
    "bin_dil_conv_3x3": "#c05fc9",
    "bin_dil_conv_5x5": "#6a1b9a",
    "none": "#5f6b7a",
    "sep_conv_3x3": "#4a90d9",
    "sep_conv_5x5": "#1f3f8f",
    "sep_conv_7x7": "#0b1f4d",
    "dil_conv_3x3": "#c05fc9",
    "dil_conv_5x5": "#6a1b9a",
}
"""One colour per operation, the same in every picture, and for the same kind in each system."""

TITLES = {"normal": "normal cell", "reduce": "reduction cell"}

STATES = ("$c_{k-2}$", "$c_{k-1}$", *map(str, range(NODES)))
"""Names of the states: the two inputs, the older first, and the nodes."""

INK, GREY, PALE = "#1f2933", "#9aa5b1", "#eef1f5"


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """A figure, in inches, outside pyplot: a program that uses matplotlib keeps its backend and figures."""
    figure = Figure(figsize=(width, height), facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure
