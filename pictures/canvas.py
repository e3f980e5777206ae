"""Names and colours that all pictures share, and a figure to draw on."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from genotypes import NODES
from search_space import ENTRIES
from search_space import GREY as OTHER

LABELS = {
    "none": "zero",
    "sep_conv_3x3": "3x3 sep. conv",
    "sep_conv_5x5": "5x5 sep. conv",
    "sep_conv_7x7": "7x7 sep. conv",
    "dil_conv_3x3": "3x3 dilated",
    "dil_conv_5x5": "5x5 dilated",
}
COLORS = {
    "none": "#5f6b7a",
    "sep_conv_3x3": "#4a90d9",
    "sep_conv_5x5": "#1f3f8f",
    "sep_conv_7x7": "#0b1f4d",
    "dil_conv_3x3": "#c05fc9",
    "dil_conv_5x5": "#6a1b9a",
}
"""Of the operations of other systems; those of EBNAS are entries of search_space.py."""


def label_of(operation: str) -> str:
    return ENTRIES[operation].label if operation in ENTRIES else LABELS[operation]


def color_of(operation: str) -> str:
    """One colour per operation, the same in every picture, and for the same kind in each system."""
    return (ENTRIES[operation].color or OTHER) if operation in ENTRIES else COLORS[operation]


TITLES = {"normal": "normal cell", "reduce": "reduction cell"}

STATES = ("$c_{k-2}$", "$c_{k-1}$", *map(str, range(NODES)))
"""Names of the states: the two inputs, the older first, and the nodes."""

INK, GREY, PALE = "#1f2933", "#9aa5b1", "#eef1f5"


def new_figure(width: float, height: float, **options: Any) -> Figure:
    """A figure, in inches, outside pyplot: a program that uses matplotlib keeps its backend and figures."""
    figure = Figure(figsize=(width, height), facecolor="white", **options)
    FigureCanvasAgg(figure)
    return figure
