"""The analysis of a table of trained cells, which may be half filled: numbers, and a page in Markdown.

Everything is over the random cells unless it says otherwise. Intervals are of 95 %, by bootstrap over cells.
A cell's accuracy is the mean test accuracy of its runs; what chose anything was measured on held-out images.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
from scipy import stats

from evidence.cells import Table
from evidence.report import markdown_table, number
from evidence.statistics import Estimate, Spread, holm, spread
from genotypes import NODES, PRIMITIVES, Genotype
from trials.regression import Ridge
from utils import InputError

SAMPLES = 2_000
"""Of each bootstrap."""

ENOUGH = 10
"""Cells, for figures that are of the differences between cells."""

FOLDS = 10


@dataclass(frozen=True)
class Cells:
    """The random cells of a table as arrays over cells; of curves the run with the first seed of each."""

    table: Table

    @cached_property
    def first(self) -> list[dict]:
        return [self.table.runs[cell][0] for cell in self.table.random]

    @cached_property
    def accuracy(self) -> np.ndarray:
        return np.array([self.table.test_top1(cell) for cell in self.table.random])

    @cached_property
    def last_test(self) -> np.ndarray:
        """The last test accuracy of each run whose curve is given."""
        return self.of("test_top1")

    def of(self, name: str) -> np.ndarray:
        return np.array([row[name] for row in self.first])

    def curve(self, name: str) -> np.ndarray:
        """(cells, epochs)"""
        return np.array([row[name][: self.table.epochs] for row in self.first])

    @cached_property
    def spread(self) -> Spread | None:
        """How much the cells that have several runs differ, and their runs."""
        return spread([[row["test_top1"] for row in self.table.runs[cell]] for cell in self.table.random])


def bootstrap_correlation(x: np.ndarray, y: np.ndarray, *, ranks: bool) -> Estimate:
    """Pearson's r of two figures of each cell, with `ranks` Spearman's rho; nan where one has no spread."""
    drawn = np.random.default_rng(0).integers(len(x), size=(SAMPLES, len(x)))
    a, b = (np.vstack([figure, figure[drawn]]).astype(float) for figure in (x, y))  # (1 + samples, cells)
    if ranks:
        a, b = stats.rankdata(a, axis=1), stats.rankdata(b, axis=1)
    a, b = (each - each.mean(1, keepdims=True) for each in (a, b))
    scale = np.sqrt((a**2).sum(1) * (b**2).sum(1))
    values = np.divide((a * b).sum(1), scale, out=np.full(len(scale), math.nan), where=scale > 1e-9)
    return Estimate.of(float(values[0]), values[1:])


def rho(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Spearman's, of two figures of each cell."""
    return bootstrap_correlation(x, y, ranks=True)


# Where named cells stand


@dataclass(frozen=True)
class Standing:
    """A cell, or several, among the random ones: runs, mean test accuracy, and the percentile of it with its
    interval, which is of the cells drawn and of the seeds. `p`: how likely a percentile of at most 50 is."""

    runs: int
    mean: float
    percentile: Estimate
    p: float


def standing(cells: Cells, groups: Sequence[Sequence[float]]) -> Standing:
    """The standing of the mean over cells of their mean figures. Random cells are drawn with repetition; so
    are the named ones, where there are several; a mean over runs varies by the deviation between seeds."""
    rng = np.random.default_rng(0)
    means, sizes = (np.array([f(group) for group in groups], float) for f in (np.mean, len))
    noise = cells.spread.seeds if cells.spread else math.nan
    n = len(cells.first)
    runs = cells.last_test  # single runs, as noisy as those of few seeds can be
    value = percentile(runs, float(means.mean()))
    samples = []
    for _ in range(SAMPLES):
        chosen = rng.integers(len(groups), size=len(groups))
        mean = (means[chosen] + rng.normal(size=len(groups)) * noise / np.sqrt(sizes[chosen])).mean()
        samples.append(percentile(runs[rng.integers(n, size=n)], mean))
    samples = np.array(samples)
    p = float((1 + (samples <= 50).sum()) / (1 + len(samples))) if math.isfinite(noise) else math.nan
    return Standing(int(sizes.sum()), float(means.mean()), Estimate.of(value, samples), p)


def percentile(values: np.ndarray, value: float) -> float:
    """How many percent of the values are below, and half of those that are equal; nan of nan."""
    if math.isnan(value):
        return math.nan
    return 100 * float((values < value).mean() + (values == value).mean() / 2)


def standings(cells: Cells) -> dict[str, Standing]:
    """The standing of each named cell, and of the cells of the published search (EBNAS_R0, ...) together."""
    runs = {name: [row["test_top1"] for row in cells.table.runs[c]] for name, c in cells.table.named.items()}
    found = [values for name, values in runs.items() if name.startswith("EBNAS_R")]
    result = {name: standing(cells, [values]) for name, values in runs.items()}
    if len(found) > 1:
        result[f"the published search ({len(found)} cells)"] = standing(cells, found)
    return result


# What in a cell counts


FEATURES = (
    *(f"{kind}: {name}" for kind in ("normal", "reduce") for name in PRIMITIVES),
    *(f"{kind}: {what}" for kind in ("normal", "reduce") for what in ("depth", "width")),
)


def features(cell: Genotype) -> list[float]:
    """How often each operation occurs, for each kind of cell; then the cell's depth, the edges of the longest
    path from an input, and its width, the edges that read an input of the cell."""
    counts, shape = [], []
    for pairs in (cell.normal, cell.reduce):
        operations = Counter(name for name, _ in pairs)
        counts += [operations[name] for name in PRIMITIVES]
        depth = [0, 0]
        for node in range(NODES):
            depth.append(1 + max(depth[source] for _, source in pairs[2 * node : 2 * node + 2]))
        shape += [max(depth), sum(source < 2 for _, source in pairs)]
    return [*counts, *shape]


def left_out_predictions(cells: Cells) -> np.ndarray:
    """Each cell's figure, predicted by a ridge regression on the cells of other folds."""
    x = np.array([features(cell) for cell in cells.table.random], float)
    y = cells.accuracy
    order = np.random.default_rng(0).permutation(len(y))
    predictions = np.empty(len(y))
    for fold in range(FOLDS):
        out = order[fold::FOLDS]
        kept = np.setdiff1d(order, out)
        predictions[out] = Ridge.fit(x[kept], y[kept]).predict(x[out])
    return predictions


def correlation(x: np.ndarray, y: np.ndarray) -> Estimate:
    """Pearson's r."""
    return bootstrap_correlation(x, y, ranks=False)


def feature_correlations(cells: Cells) -> dict[str, Estimate]:
    """Spearman's rho of each feature with the accuracy; nan where all cells are alike in it."""
    x = np.array([features(cell) for cell in cells.table.random], float)
    return {name: rho(x[:, column], cells.accuracy) for column, name in enumerate(FEATURES)}


# How well a curve ranks


def predictors(cells: Cells) -> dict[str, np.ndarray]:
    """By name (cells, epochs), what is known after each epoch; higher is to be better.

    The sum of training losses is that of Ru et al. (Speedy performance estimation, NeurIPS 2021). OPs are
    known before the first epoch: fewer are taken for better, as the first scale suggested.
    """
    losses = np.cumsum(cells.curve("train_loss"), 1)
    ops = np.repeat(cells.of("ops")[:, None].astype(float), losses.shape[1], 1)
    ranks = stats.rankdata(losses, axis=0) + stats.rankdata(ops, axis=0)
    return {
        "held-out accuracy": cells.curve("valid_top1"),
        "held-out loss": -cells.curve("valid_loss"),
        "sum of training losses": -losses,
        "OPs": -ops,
        "ranks of training losses and OPs": -ranks,
    }


def rankings(cells: Cells) -> dict[str, list[Estimate]]:
    """By predictor, after each epoch: rho with the last test accuracy of the same run."""
    return {
        name: [rho(values[:, epoch], cells.last_test) for epoch in range(values.shape[1])]
        for name, values in predictors(cells).items()
    }


# Cost


def front(costs: Sequence[float], accuracies: Sequence[float]) -> list[int]:
    """Indices of what nothing else beats in both, the cheapest first."""
    found, best = [], -math.inf
    for index in sorted(range(len(costs)), key=lambda i: (costs[i], -accuracies[i])):
        if accuracies[index] > best:
            found.append(index)
            best = accuracies[index]
    return found


# Other measures of the same cells


def scores_of(folder: Path) -> dict[str, dict[str, float]]:
    """By name what scores/NAME.json in the folder of a table say of its cells, higher being better: a
    supernet cut down to each, a measure that trains nothing. Raises InputError."""
    found = {}
    for path in sorted((folder / "scores").glob("*.json")):
        try:
            found[path.stem] = {cell: float(score) for cell, score in json.loads(path.read_text()).items()}
        except (ValueError, TypeError, AttributeError):
            raise InputError(f"{path} holds no numbers by the name of a cell") from None
    return found


def score_rankings(
    cells: Cells, scores: Mapping[str, Mapping[str, float]]
) -> dict[str, tuple[int, Estimate]]:
    """By name of a score: how many random cells it has, and rho with their accuracy."""
    names = [row["cell"] for row in cells.first]
    result = {}
    for name, score in scores.items():
        known = [i for i, cell in enumerate(names) if cell in score]
        if len(known) >= ENOUGH:
            values = np.array([score[names[i]] for i in known])
            result[name] = len(known), rho(values, cells.accuracy[known])
    return result


# In words


def what_it_shows(table: Table, scores: Mapping[str, Mapping[str, float]]) -> str:
    cells = Cells(table)
    n = len(cells.first)
    several = sum(len(table.runs[cell]) > 1 for cell in table.random)
    hours = sum(sum(row["cpu_seconds"]) for row in table.rows) / 3600
    lines = [
        f"{len(table.rows)} runs of {len(table.cells)} different cells, {n} of them random, {several} of "
        f"these with several seeds; {table.epochs} epochs; {hours:.1f} CPU hours. Test top-1 in percent; "
        "[a, b] is a 95 % interval by bootstrap over cells.",
    ]
    if n < 2:
        return "\n".join(lines) + "\n"
    values = cells.last_test
    lines += [
        "",
        f"**Distribution.** Of single runs the mean is {values.mean():.2f}, the standard deviation "
        f"{values.std(ddof=1):.2f}, the range {values.min():.2f} to {values.max():.2f}.",
    ]
    if apart := cells.spread:
        lines[-1] += (
            f" Of the {several} cells with several runs, the standard deviation between cells is "
            f"{apart.cells:.2f}, between seeds {apart.seeds:.2f}: a ratio of {apart.ratio:.2f} "
            f"[{apart.low:.2f}, {apart.high:.2f}] (by that of F)."
        )
    if named := standings(cells):
        corrected = holm(
            {name: found.p for name, found in named.items() if _is_primary(name) and found.p == found.p}
        )
        rows = [["cell", "runs", "mean", "percentile [95 %]", "p of 50 or less", "by Holm"]]
        for name, s in named.items():
            corrected_p = number(corrected[name], 3) if name in corrected else ""
            rows.append(
                [name, str(s.runs), f"{s.mean:.2f}", _words(s.percentile, 0), number(s.p, 3), corrected_p]
            )
        lines += ["", "**Named cells**, among single runs of random ones.", "", *markdown_table(rows)]
    if n >= ENOUGH:
        lines += _more_words(cells, scores)
    return "\n".join(lines) + "\n"


def _is_primary(name: str) -> bool:
    """Whether results/PLAN.md calls it so."""
    return name == "EBNAS" or name.startswith(("EBNAS = ", "the published search"))


def _more_words(cells: Cells, scores: Mapping[str, Mapping[str, float]]) -> list[str]:
    predicted = correlation(left_out_predictions(cells), cells.accuracy)
    rows = [["of a cell", "rho with accuracy [95 %]"]]
    rows += [[name, _words(found)] for name, found in feature_correlations(cells).items()]
    by_predictor = rankings(cells)
    epochs = cells.table.epochs
    ranks = [["after epoch", *(str(epoch + 1) for epoch in range(epochs))]]
    ranks += [[name, *map(_words, found)] for name, found in by_predictor.items()]
    lines = [
        "",
        f"**What counts.** A ridge regression on the counts of operations, depth and width predicts left-out "
        f"cells ({FOLDS} folds) with r = {_words(predicted)}.",
        "",
        *markdown_table(rows),
        "",
        "**What ranks.** Spearman's rho with the last test accuracy of the same run.",
        "",
        *markdown_table(ranks),
    ]
    for what, label in (("ops", "OPs"), ("parameters", "parameters"), ("packed_bytes", "packed bytes")):
        costs = cells.of(what)
        best = ", ".join(f"{costs[i]:,.0f} ({cells.accuracy[i]:.1f} %)" for i in front(costs, cells.accuracy))
        lines += [
            "",
            f"**{label}**: rho with accuracy {_words(rho(costs, cells.accuracy))}. The front: {best}.",
        ]
    if found := score_rankings(cells, scores):
        rows = [["score", "cells", "rho [95 %]"]]
        rows += [[name, str(count), _words(estimate)] for name, (count, estimate) in found.items()]
        lines += ["", "**Other measures**, of the same cells.", "", *markdown_table(rows)]
    return lines


def _words(found: Estimate, digits: int = 2) -> str:
    return f"{number(found.value, digits)} [{number(found.low, digits)}, {number(found.high, digits)}]"
