"""The operations of EBNAS's cells, an entry each, in one place. No torch: flags are checked with it.

To add one, append an entry to `ENTRIES` and search with `train_search.py --operations` (docs/extending.md).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from utils import InputError


@dataclass(frozen=True)
class Operation:
    """A candidate for the edges of a cell: a binary convolution where it has a `kernel` (odd; its padding
    keeps the size), a pool where it has a `pool`, a module of its own where it has `search` and `derived`,
    else the skip connection.

    search(channels, stride) -> a module (n, channels, h, w) -> (n, channels, ceil(h / stride), ...), its BN
    and its residual included, one for each edge. derived(channels, stride, groups=, bits=, activation=) ->
    the same, for the network. Both import what they need inside, because parsers need no torch.
    `color`: of the pictures; without one it is GREY.
    """

    name: str
    label: str
    color: str | None = None
    kernel: int | None = None
    dilation: int = 1
    pool: str | None = None  # "max" or "avg"
    search: Callable[[int, int], Any] | None = None
    derived: Callable[..., Any] | None = None

    @property
    def kind(self) -> str:
        """`convolution`, `pool` or `skip`; a module of its own counts as a convolution."""
        if self.pool:
            return "pool"
        return "convolution" if self.kernel or self.search else "skip"

    @property
    def geometry(self) -> tuple[int, int, int]:
        """Kernel size, padding and dilation of a convolution."""
        return self.kernel, self.dilation * (self.kernel // 2), self.dilation


GREY = "#5f6b7a"

SEVEN = (
    Operation("skip_connect", "skip", "#2e8b57"),
    Operation("max_pool_3x3", "3x3 max pool", "#d1495b", pool="max"),
    Operation("avg_pool_3x3", "3x3 avg pool", "#e08e1b", pool="avg"),
    Operation("bin_conv_3x3", "3x3 conv", "#4a90d9", kernel=3),
    Operation("bin_conv_5x5", "5x5 conv", "#1f3f8f", kernel=5),
    Operation("bin_dil_conv_3x3", "3x3 dil. conv", "#c05fc9", kernel=3, dilation=2),
    Operation("bin_dil_conv_5x5", "5x5 dil. conv", "#6a1b9a", kernel=5, dilation=2),
)
"""The published search space, and the default, in the order of a row of alpha. `none` is left out, and
separable convolutions are replaced by binary ones: the search space made simple (EBNAS, section 3)."""

PRIMITIVES = tuple(entry.name for entry in SEVEN)

ENTRIES = {entry.name: entry for entry in SEVEN}
"""All operations by name. One that is added here can be searched, trained and drawn."""


def checked_operations(names: list[str] | tuple[str, ...]) -> tuple[str, ...]:
    """`names` as a search space. Raises InputError: fewer than two, one twice, or one without an entry."""
    if unknown := [name for name in names if name not in ENTRIES]:
        raise InputError(f"unknown operation {unknown[0]!r}; choose from {', '.join(ENTRIES)}")
    if len(set(names)) != len(names) or len(names) < 2:
        raise InputError(f"a search needs two or more different operations, not {', '.join(names) or 'none'}")
    return tuple(names)
