"""Pictures, as PNG files: the cells of a genotype, the curves of a run, a search's alpha and beta."""

from __future__ import annotations

import errno
import io
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from genotypes import Genotype
from utils import USERS_FAULT, InputError, os_error_message, write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from training.confusion import Confusion

DPI = 200


def draw_genotype(genotype: Genotype, folder: Path, *, name: str = "genotype") -> list[Path]:
    """Write {name}-normal.png and {name}-reduce.png into `folder`. Raises as `_write`."""
    with _default_look():
        from pictures.cell import cell_figure

        figures = {f"{name}-{kind}.png": cell_figure(genotype, kind) for kind in ("normal", "reduce")}
        return _write(figures, folder)


def draw_layers(title: str, stages: list[tuple[str, str, str]], folder: Path, *, name: str) -> list[Path]:
    """Write {name}-layers.png into `folder`: of each stage its name, what it is, what it gives. Raises as
    `_write`."""
    with _default_look():
        from pictures.layers import Stage, layers_figure

        return _write({f"{name}-layers.png": layers_figure(title, [Stage(*s) for s in stages])}, folder)


def draw_curves(run: Path, *, folder: Path | None = None) -> list[Path]:
    """Write curves.png, and for a search arch-alpha.png and arch-beta.png, from run/metrics.jsonl into
    `folder`, by default the run's own.

    Raises InputError: no metrics, a damaged metrics.jsonl or args.json (line and field); and as `_write`.
    """
    with _default_look():
        from pictures.curves import curve_figures

        return _write(curve_figures(Path(run)), run if folder is None else folder)


def draw_confusion(confusion: Confusion, folder: Path, *, prefix: str = "") -> list[Path]:
    """Write confusion.png, for up to 100 classes, and mistakes.png, where there are mistakes, into `folder`,
    each behind `prefix`. Raises as `_write`."""
    with _default_look():
        from pictures.confusion import MOST_CLASSES, confusion_figure, mistakes_figure

        figures = {}
        if len(confusion.classes) <= MOST_CLASSES:
            figures[f"{prefix}confusion.png"] = confusion_figure(confusion)
        if confusion.mistakes:
            figures[f"{prefix}mistakes.png"] = mistakes_figure(confusion.mistakes, confusion.classes)
        return _write(figures, folder)


def draw(figures: Callable[[], Mapping[str, Figure]], folder: Path) -> list[Path]:
    """Write the figures that `figures` makes, by file name, into `folder`. Raises as `_write`."""
    with _default_look():
        return _write(figures(), folder)


@contextmanager
def _default_look() -> Iterator[None]:
    """matplotlib's own defaults, not a user's settings, which come back afterwards."""
    try:
        import matplotlib  # here: it takes a while, and a training script draws only at its end
    except ImportError as error:
        raise InputError(f"pictures need matplotlib ({error}): pip install -r requirements.txt") from None
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        yield


def _write(figures: Mapping[str, Figure], folder: Path) -> list[Path]:
    """Raises InputError where one may not write in `folder`, OSError where one cannot (a full disk)."""
    paths = []
    for name, figure in figures.items():
        buffer, path = io.BytesIO(), Path(folder) / name
        figure.savefig(buffer, format="png", dpi=DPI)
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, buffer.getvalue())
        except OSError as error:
            if error.errno not in USERS_FAULT | {errno.EEXIST}:  # EEXIST: the folder is a file
                raise
            raise InputError(f"cannot draw into {os_error_message(error)}") from None
        paths.append(path)
    return paths
