"""The picture of this program's parts, and which imports which: `python -m pictures.layout`.

The parts are those of the table in docs/architecture.md, the imports those of the files. It draws
docs/layout.png.
"""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from pictures import draw
from pictures.canvas import GREY, INK, PALE, new_figure

ROOT = Path(__file__).parent.parent
BOX_WIDTH, BOX_HEIGHT, ACROSS, DOWN, MARGIN = 1.3, 0.42, 0.3, 0.45, 0.2  # inches


def parts() -> dict[str, list[str]]:
    """By name of a part, as the table has it from top to bottom, its files and folders (`kernels/`)."""
    found: dict[str, list[str]] = {}
    for line in (ROOT / "docs" / "architecture.md").read_text("utf-8").splitlines():
        if match := re.match(r"\| *(\w*) *\| (`.*?) \| ", line):
            name = match[1] or list(found)[-1]
            found.setdefault(name, []).extend(re.findall(r"`([\w/]+(?:\.py|/))`", match[2]))
    return found


@cache
def modules() -> tuple[str, ...]:
    """All Python files of the program, its tests left out, as paths from its folder."""
    folders = [ROOT, *(path.parent for path in ROOT.glob("*/__init__.py"))]
    return tuple(sorted(path.relative_to(ROOT).as_posix() for each in folders for path in each.glob("*.py")))


def imported(module: str) -> set[str]:
    """The program's own files that a module imports, anywhere but for type checking alone."""
    tree = ast.parse((ROOT / module).read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {name.replace(".", "/") for name in names}
    return {file for name in files for file in (f"{name}.py", f"{name}/__init__.py") if file in modules()}


def imports_of_parts() -> dict[str, set[str]]:
    """By part, those that it imports from; without those that it reaches through another part too."""
    owner = {file: part for part, files in parts().items() for file in files}

    def part_of(module: str) -> str | None:
        return owner.get(module) or owner.get(module.split("/")[0] + "/")

    reached = {part: set() for part in parts()}
    for module in modules():
        if part := part_of(module):
            reached[part] |= {part_of(other) for other in imported(module)} - {part, None}
    through: dict[str, set[str]] = {}
    for part, others in reached.items():  # those above come first
        through[part] = others.union(*(through[other] for other in others))
    return {
        part: {other for other in others if not any(other in through[third] for third in others)}
        for part, others in reached.items()
    }


def layout_figure() -> Figure:
    """A box a part, above all that it imports from; an arrow points to what is imported."""
    imports = imports_of_parts()
    level: dict[str, int] = {}
    for part, others in imports.items():
        level[part] = 1 + max((level[other] for other in others), default=-1)
    rows = [[part for part in level if level[part] == row] for row in range(max(level.values()) + 1)]
    widest = max(map(len, rows))
    width = 2 * MARGIN + widest * BOX_WIDTH + (widest - 1) * ACROSS
    height = 2 * MARGIN + len(rows) * BOX_HEIGHT + (len(rows) - 1) * DOWN
    figure = new_figure(width, height)
    axes = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(0, height))  # data units are inches
    axes.set_axis_off()
    centre = {}
    for number, row in enumerate(rows):
        left = (width - len(row) * BOX_WIDTH - (len(row) - 1) * ACROSS) / 2
        bottom = MARGIN + number * (BOX_HEIGHT + DOWN)
        for part in row:
            box = FancyBboxPatch((left, bottom), BOX_WIDTH, BOX_HEIGHT, "round,pad=0,rounding_size=0.1")
            box.set(fc=PALE, ec=INK, lw=1.2, zorder=2)
            axes.add_artist(box)
            centre[part] = left + BOX_WIDTH / 2, bottom + BOX_HEIGHT / 2
            axes.text(
                *centre[part], part, fontsize=11, color=INK, ha="center", va="center_baseline", zorder=3
            )
            left += BOX_WIDTH + ACROSS
    for part, others in imports.items():
        for other in others:
            (x, y), (end, top) = centre[part], centre[other]
            ends = (x, y - BOX_HEIGHT / 2), (end, top + BOX_HEIGHT / 2)
            bend = 0.5 if level[part] - level[other] > 2 else 0  # around the rows between
            look = {"arrowstyle": "-|>", "mutation_scale": 11, "connectionstyle": f"arc3,rad={-bend}"}
            axes.add_artist(FancyArrowPatch(*ends, color=GREY, lw=1.2, **look))
    return figure


if __name__ == "__main__":
    draw(lambda: {"layout.png": layout_figure()}, ROOT / "docs")
