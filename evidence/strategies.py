"""Strategies of searches by trials, on a table of trained cells: many searches that train nothing.

The strategies are those of search_trials.py, the same code; what they would train is looked up. Two limits of
that, which the figures carry:

- On the table itself a search can choose among its cells alone, 160 say, of some 10^18. That evolution and
  predictor make cells of their own can be shown only in part: a mutation is here a step to one of the nearest
  cells of the table, which are far apart (of two random cells about 13 of 16 edges differ), and the predictor
  proposes the best of 160, not of thousands. So these figures are too low for both, and no strategy can pass
  the best cell of the table.
- On a surrogate, a regression that was fitted on the table and stands for every cell, they make cells freely.
  There the figures are right as far as the surrogate is. What it does not explain of the differences between
  cells it draws at random, cell by cell, in the amount that left-out cells show: a landscape without that
  would be as smooth as the predictor supposes, and flatter it.

The first is a fact of the table and the primary figure; the second says what to expect beyond it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from tqdm import tqdm

from evidence.cells import Table as CellTable
from evidence.cells import distance
from pictures import draw
from pictures.canvas import GREY, INK, new_figure
from trials.cells import Candidate, Space
from trials.strategies import STRATEGIES, Epoch, Judge, Strategy, Trial
from utils import write_atomically

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BUDGETS = (2, 5, 10, 20)
"""In full trainings."""

SIMULATED = {"simulations": 1_000, "tables": 100, "each": 20}
"""Searches of each strategy at each cost; tables drawn for the intervals, and searches on each."""

NEARNESS = 0.2
"""Probability that a mutation on a table takes the nearest cell; else the next nearest with the same, ..."""

HUES = {"random": GREY, "halving": "#1f3f8f", "evolution": "#2e8b57", "predictor": "#d1495b"}


@dataclass(frozen=True)
class TrainedCell:
    """A row of a table: the curve that a search sees, the OPs, and the test accuracies in percent of all
    seeds, of which the first is that of the curve's run."""

    candidate: Candidate
    curve: tuple[Epoch, ...]
    tests: tuple[float, ...]
    ops: float

    @property
    def truth(self) -> float:
        return float(np.mean(self.tests))


def trained_cells(table: CellTable) -> list[TrainedCell]:
    """The random cells of a table, whose networks are all of one size."""
    found = []
    for genotype in table.random:
        rows = table.runs[genotype]
        first = rows[0]
        curve = zip(first["train_loss"], first["valid_loss"], first["valid_top1"], strict=True)
        found.append(
            TrainedCell(
                Candidate.of(genotype, init_channels=1, layers=1),  # of what size does not matter to a search
                tuple(Epoch(*epoch) for epoch in curve)[: table.epochs],
                tuple(row["test_top1"] for row in rows),
                first["ops"],
            )
        )
    return found


@dataclass(frozen=True)
class Choice:
    """A row as a strategy sees it. Rows that a bootstrap drew twice are two choices."""

    row: int
    features: np.ndarray = field(compare=False)

    @property
    def key(self) -> str:
        return str(self.row)


def distances(cells: Sequence[TrainedCell]) -> np.ndarray:
    """How many edges each pair of cells differs in: (cells, cells)."""
    far = np.zeros((len(cells), len(cells)), int)
    for (i, a), (j, b) in combinations(enumerate(cells), 2):
        far[i, j] = far[j, i] = distance(a.candidate.genotype, b.candidate.genotype)
    return far


class Table:
    """Trained cells as what a search chooses from and trains; `far` are the distances between them."""

    def __init__(self, cells: Sequence[TrainedCell], far: np.ndarray | None = None):
        self.cells = list(cells)
        self.far = distances(self.cells) if far is None else far
        self.choices = [Choice(row, cell.candidate.features) for row, cell in enumerate(self.cells)]
        truths = np.array([cell.truth for cell in self.cells])
        self.mean, self.std = float(truths.mean()), float(truths.std(ddof=1))

    def redrawn(self, rng: np.random.Generator) -> Table:
        """A table of as many cells, drawn from this one with repetition."""
        rows = rng.integers(len(self.cells), size=len(self.cells))
        return Table([self.cells[row] for row in rows], self.far[np.ix_(rows, rows)])

    @cached_property
    def neighbours(self) -> np.ndarray:
        """For each row all other rows, the nearest first."""
        far = self.far.copy()
        np.fill_diagonal(far, -1)
        return np.argsort(far, axis=1, kind="stable")[:, 1:]

    def draw(self, rng: np.random.Generator) -> Choice:
        return self.choices[int(rng.integers(len(self.choices)))]

    def mutate(self, parent: Choice, rng: np.random.Generator) -> Choice:
        rank = min(int(rng.geometric(NEARNESS)) - 1, len(self.choices) - 2)
        return self.choices[self.neighbours[parent.row, rank]]

    def pool(self, _best: Sequence[Choice], _count: int, _rng: np.random.Generator) -> list[Choice]:
        return self.choices

    def train(self, choice: Choice) -> tuple[Epoch, ...]:
        return self.cells[choice.row].curve

    def ops(self, choice: Choice) -> float:
        return self.cells[choice.row].ops

    def reached(self, choice: Choice) -> float:
        """Standard deviations of the table's cells above their mean."""
        return (self.cells[choice.row].truth - self.mean) / self.std


class Surrogate(Space):
    """Any cell, with figures that a regression on a table gives it and noise that is the cell's own.

    The regression is that of a Gaussian process: a smooth function of the features, of the length and noise
    that predict left-out rows best. The cell's own part has the variance that is left. A cell's curve
    is the line of each epoch's figure over the truth, and the deviations from it of a row of the table.
    """

    def __init__(self, cells: Sequence[TrainedCell]):
        one = cells[0].candidate
        super().__init__((one.init_channels,), (one.layers,))
        own = object.__setattr__  # Space is frozen
        truths = np.array([cell.truth for cell in cells])
        own(self, "mean", float(truths.mean()))
        own(self, "std", float(truths.std(ddof=1)))
        x = np.array([cell.candidate.features for cell in cells])
        own(self, "centre", x.mean(0))
        own(self, "spread", np.where(x.std(0) > 0, x.std(0), np.inf))
        own(self, "x", (x - self.centre) / self.spread)
        y = (truths - self.mean) / self.std
        best = min(
            (self._left_out(length, noise, y) for length in (2, 4, 8, 16) for noise in (0.1, 0.3, 1, 3)),
            key=lambda found: found[0],
        )
        own(self, "error", min(best[0], 1.0))
        own(self, "length", best[1])
        own(self, "weights", best[2])
        figures = np.array([[list(epoch) for epoch in cell.curve] for cell in cells])  # (cells, epochs, 3)
        slope = np.einsum("c,cef->ef", y - y.mean(), figures) / ((y - y.mean()) ** 2).sum()
        own(self, "slope", slope)
        own(self, "level", figures.mean(0))
        own(self, "deviations", figures - self.level - y[:, None, None] * slope)
        own(self, "costs", np.array([cell.ops for cell in cells]))

    def _left_out(self, length: float, noise: float, y: np.ndarray) -> tuple[float, float, np.ndarray]:
        """Mean squared error of predictions of left-out rows; the length, and the kernel's weights."""
        inverse = np.linalg.inv(self._kernel(self.x, length) + noise * np.eye(len(y)))
        weights = inverse @ y
        return float(np.mean((weights / np.diag(inverse)) ** 2)), length, weights

    def _kernel(self, x: np.ndarray, length: float) -> np.ndarray:
        square = ((x[:, None] - self.x[None]) ** 2).sum(2)
        return np.exp(-square / (2 * length**2))

    def reached(self, cell: Candidate) -> float:
        smooth = self._kernel(((cell.features - self.centre) / self.spread)[None], self.length) @ self.weights
        own = np.random.default_rng([int(cell.key, 16), 0]).normal()
        return float(smooth[0] + math.sqrt(self.error) * own)

    def train(self, cell: Candidate) -> tuple[Epoch, ...]:
        row = int(np.random.default_rng([int(cell.key, 16), 1]).integers(len(self.x)))
        return tuple(
            Epoch(*epoch) for epoch in self.level + self.reached(cell) * self.slope + self.deviations[row]
        )

    def ops(self, cell: Candidate) -> float:
        """The OPs of the row that is nearest in its features."""
        near = ((self.x - (cell.features - self.centre) / self.spread) ** 2).sum(1)
        return float(self.costs[np.argmin(near)])


def search(strategy: Strategy, where: Table | Surrogate, seed: int) -> Trial:
    """The choice of one search, which takes its figures from `where`."""
    trials: list[Trial] = []
    while job := strategy.next(trials, np.random.default_rng([seed, len(trials)])):
        curve = where.train(job.candidate)[: job.epochs]
        trials.append(Trial(job, curve, costs={"ops": where.ops(job.candidate)}))
    return strategy.best(trials)


class Reached(NamedTuple):
    """What the searches of a strategy reach at a cost: the mean and its 95 % interval, in standard deviations
    of random cells above their mean. `gain`: less random search's at that cost, with its interval. `fresh`:
    the mean again, by test accuracies of runs that no search saw (see `luck`)."""

    n: int
    mean: float
    low: float
    high: float
    gain: float
    gain_low: float
    gain_high: float
    fresh: float


def luck(cells: Sequence[TrainedCell]) -> float:
    """How much of a chosen run's lead another seed's run of that cell keeps, 1 where nothing says otherwise.

    A search sees the run that it is scored by: its held-out accuracy has that run's luck. Of the cells with
    two seeds, the covariance of one run's held-out accuracy with the other run's test accuracy, over that
    with its own, is the part that is the cell's.
    """
    twice = [cell for cell in cells if len(cell.tests) > 1]
    if len(twice) < 3:
        return 1.0
    seen = np.array([cell.curve[-1].valid_top1 for cell in twice])
    own, other = (np.array([cell.tests[i] for cell in twice]) for i in (0, 1))
    return float(np.clip(np.cov(seen, other)[0, 1] / np.cov(seen, own)[0, 1], 0, 1))


def strategies_of(
    where: Table | Surrogate, epochs: int, budget: int, judge: Judge, **settings: Any
) -> dict[str, Strategy]:
    """All of them, for a budget in full trainings. `settings` where a strategy has them."""
    made = {}
    for name, kind in STRATEGIES.items():
        own = {key: value for key, value in settings.items() if key in kind.__dataclass_fields__}
        made[name] = kind(where, judge, epochs, budget * epochs, **own)
    return made


def simulate(
    cells: Sequence[TrainedCell],
    *,
    judge: Judge | None = None,
    simulations: int,
    tables: int,
    each: int,
    budgets: Sequence[int] = BUDGETS,
    progress: Callable[[], None] = lambda: None,
    **settings: Any,
) -> dict[tuple[str, int], Reached]:
    """`simulations` searches of each strategy at each cost, on the table.

    Intervals are of the cells: `tables` times as many rows are drawn with repetition, and `each` searches run
    on them (see `_half_width`). `progress` is called once a cost of the table, and of each drawn one.
    """
    judge, epochs = judge or Judge(), len(cells[0].curve)
    rng = np.random.default_rng(0)
    whole, kept = Table(cells), luck(cells)
    drawn = [whole.redrawn(rng) for _ in range(tables)]
    found = {}
    for budget in budgets:
        chosen = {
            name: [search(strategy, whole, seed).job.candidate for seed in range(simulations)]
            for name, strategy in strategies_of(whole, epochs, budget, judge, **settings).items()
        }
        progress()
        again = {name: np.empty((tables, each)) for name in STRATEGIES}
        for number, table in enumerate(drawn):
            for name, strategy in strategies_of(table, epochs, budget, judge, **settings).items():
                seeds = range(number * each, (number + 1) * each)
                again[name][number] = [table.reached(search(strategy, table, s).job.candidate) for s in seeds]
            progress()
        means = {name: np.mean([whole.reached(choice) for choice in chosen[name]]) for name in chosen}
        for name in STRATEGIES:
            half = _half_width(again[name], simulations)
            gain = float(means[name] - means["random"])
            half_gain = _half_width(again[name] - again["random"], simulations)
            found[name, budget] = Reached(
                simulations,
                *(float(means[name] + shift) for shift in (0, -half, half)),
                *(gain + shift if name != "random" else 0.0 for shift in (0, -half_gain, half_gain)),
                float(np.mean([_fresh(whole, choice.row, kept) for choice in chosen[name]])),
            )
    return found


def _half_width(reached: np.ndarray, searches: int) -> float:
    """Half the width of the 95 % interval of `searches` searches' mean; `reached` is (tables, searches).

    The variance between tables is that of their means less what few searches add to it. This difference is
    known no better than to its own standard error, and is taken to be no smaller than that: it may come out
    as 0 or below by chance. What `searches` leave uncertain is added.
    """
    tables, each = reached.shape
    if tables < 2 or each < 2:
        return math.nan
    within, means = reached.var(1, ddof=1).mean(), reached.mean(1).var(ddof=1)
    between = max(means - within / each, means * math.sqrt(2 / (tables - 1)))
    return 1.96 * math.sqrt(between + within / searches)


def _fresh(table: Table, row: int, kept: float) -> float:
    """What a row reaches by a run that searches did not see, or as much as such a run is expected to keep."""
    cell = table.cells[row]
    own = (cell.tests[0] - table.mean) / table.std
    return (cell.tests[1] - table.mean) / table.std if len(cell.tests) > 1 else kept * own


def simulate_beyond(
    cells: Sequence[TrainedCell],
    *,
    judge: Judge | None = None,
    simulations: int = 100,
    budgets: Sequence[int] = BUDGETS,
    progress: Callable[[], None] = lambda: None,
    **settings: Any,
) -> dict[tuple[str, int], tuple[float, float]]:
    """On the surrogate: mean of `simulations` searches, and its standard error, of the surrogate as it is."""
    judge, epochs, where = judge or Judge(), len(cells[0].curve), Surrogate(cells)
    found = {}
    for budget in budgets:
        for name, strategy in strategies_of(
            where, epochs, budget, judge, **{"pool": 200, **settings}
        ).items():
            seeds = range(simulations)
            reached = [where.reached(search(strategy, where, seed).job.candidate) for seed in seeds]
            error = float(np.std(reached, ddof=1) / math.sqrt(simulations)) if simulations > 1 else math.nan
            found[name, budget] = (float(np.mean(reached)), error)
        progress()
    return found


def run(cells: Sequence[TrainedCell], folder: Path, **settings: Any) -> list[Path]:
    """Simulate all, and write strategies.json, strategies.md and strategies.png into `folder`. `settings` as
    of `simulate`; with the defaults it takes about an hour of a core."""
    settings = {"budgets": BUDGETS, **SIMULATED, **settings}
    count = len(settings["budgets"]) * (2 + settings["tables"])
    with tqdm(total=count, desc="strategies", dynamic_ncols=True, disable=None) as bar:
        reached = simulate(cells, progress=bar.update, **settings)
        some = max(settings["simulations"] // 10, 2)  # each makes thousands of cells
        beyond = simulate_beyond(cells, simulations=some, budgets=settings["budgets"], progress=bar.update)
    rows = [
        {"strategy": name, "trainings": budget, **each._asdict(), "surrogate": beyond[name, budget]}
        for (name, budget), each in reached.items()
    ]
    text = {
        "strategies.json": json.dumps(rows, indent=1),
        "strategies.md": report(reached, beyond, float(np.std([cell.truth for cell in cells], ddof=1))),
    }
    for name, content in text.items():
        write_atomically(folder / name, content.encode())
    pictures = draw(lambda: {"strategies.png": strategies_figure(reached, beyond)}, folder)
    return [*(folder / name for name in text), *pictures]


def report(
    reached: Mapping[tuple[str, int], Reached],
    beyond: Mapping[tuple[str, int], tuple[float, float]],
    std: float,
) -> str:
    """A Markdown table; `std` of random cells in points."""
    lines = [
        f"Standard deviations of random cells ({std:.2f} points) above their mean, with 95 % intervals by "
        "bootstrap over cells. Surrogate: with the standard error of its searches.",
        "",
        "| strategy | trainings | n | reached | points | less random search | by unseen runs | surrogate |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for (name, budget), r in reached.items():
        gain = "" if name == "random" else f"{r.gain:+.2f} [{r.gain_low:+.2f}, {r.gain_high:+.2f}]"
        other = "{:.2f} ± {:.2f}".format(*beyond[name, budget]) if (name, budget) in beyond else ""
        lines.append(
            f"| {name} | {budget} | {r.n} | {r.mean:.2f} [{r.low:.2f}, {r.high:.2f}] | {r.mean * std:+.2f} | "
            f"{gain} | {r.fresh:.2f} | {other} |"
        )
    return "\n".join(lines) + "\n"


def strategies_figure(
    reached: Mapping[tuple[str, int], Reached], beyond: Mapping[tuple[str, int], tuple[float, float]]
) -> Figure:
    """The accuracy that each strategy reaches over its cost: on the table, and on the surrogate."""
    figure = new_figure(8.5, 3.8, layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for name, hue in HUES.items():
        costs = [budget for each, budget in reached if each == name]
        ours = [reached[name, cost] for cost in costs]
        bars = np.array([[r.mean - r.low for r in ours], [r.high - r.mean for r in ours]])
        style = {"color": hue, "marker": "o", "markersize": 4, "label": name, "capsize": 3}
        panels[0].errorbar(costs, [r.mean for r in ours], yerr=bars, **style)
        there = [(cost, *beyond[name, cost]) for cost in costs if (name, cost) in beyond]
        if there:
            x, y, error = zip(*there, strict=True)
            panels[1].errorbar(x, y, yerr=1.96 * np.array(error), **style)
    for axes, title in zip(panels, ("on the cells of the table", "on a surrogate of all cells"), strict=True):
        axes.set_title(title, fontsize=10, color=INK)
        axes.set_xlabel("cost, full trainings")
        axes.set_xscale("log")
        costs = sorted({budget for _, budget in reached})
        axes.set_xticks(costs, map(str, costs))
        axes.minorticks_off()
    panels[0].set_ylabel("standard deviations above\nthe mean of random cells")
    panels[0].legend(fontsize=8, frameon=False)
    return figure
