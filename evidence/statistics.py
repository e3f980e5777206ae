"""Statistics of a study: means, differences with their intervals, and whether cells differ."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Summary:
    """An arm's runs: their number, mean and standard deviation (percent; unbiased, nan for one run)."""

    n: int
    mean: float
    std: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Summary:
        std = float(np.std(values, ddof=1)) if len(values) > 1 else math.nan
        return cls(len(values), float(np.mean(values)), std)

    @property
    def half_width(self) -> float:
        """Half the width of the mean's 95 % interval, by Student's t."""
        return float(stats.t.ppf((1 + CONFIDENCE) / 2, self.n - 1)) * self.std / math.sqrt(self.n)


@dataclass(frozen=True)
class Difference:
    """How far an arm's mean is from the reference's: 95 % interval, and the probability of more than 0."""

    mean: float
    low: float
    high: float
    better: float
    pairs: int  # 0: the runs were not compared in pairs

    @property
    def verdict(self) -> str:
        if self.low == self.high == 0:
            return "the same"
        return "better" if self.low > 0 else "worse" if self.high < 0 else "undecided"


def difference(
    arm: Mapping[int, float], reference: Mapping[int, float], *, paired: bool
) -> Difference | None:
    """By SciPy's t test: of the pairs of runs that have a seed in common where these are to be `paired`, else
    Welch's, which takes neither equal variances nor equal numbers. Not a bootstrap: with three to ten runs
    its intervals are too narrow. `better` is one minus the one-sided p: the posterior probability under a
    flat prior. None where there are less than two runs, or pairs.
    """
    common = arm.keys() & reference.keys()
    ours, theirs = (
        np.array([values[seed] for seed in sorted(common if paired else values)])
        for values in (arm, reference)
    )
    if min(len(ours), len(theirs)) < 2:
        return None
    mean = float(ours.mean() - theirs.mean())
    if (np.ptp(ours - theirs) if paired else np.ptp(ours) + np.ptp(theirs)) == 0:  # no spread, no t
        return Difference(mean, mean, mean, 0.5 + 0.5 * float(np.sign(mean)), len(common) * paired)

    def test(alternative: str):
        if paired:
            return stats.ttest_rel(ours, theirs, alternative=alternative)
        return stats.ttest_ind(ours, theirs, equal_var=False, alternative=alternative)

    interval = test("two-sided").confidence_interval(CONFIDENCE)
    better = 1 - float(test("greater").pvalue)
    return Difference(mean, float(interval.low), float(interval.high), better, len(common) * paired)


@dataclass(frozen=True)
class RankCorrelation:
    """Spearman's rho over n runs, its 95 % interval by Fisher's transformation, its p of no correlation."""

    n: int
    rho: float = math.nan
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan


def rank_correlation(arm: Mapping[int, float], reference: Mapping[int, float]) -> RankCorrelation:
    """Between the runs of common seeds; nan where they are less than three or all equal."""
    common = sorted(arm.keys() & reference.keys())
    ours, theirs = (stats.rankdata([values[seed] for seed in common]) for values in (arm, reference))
    if len(common) < 3 or min(np.ptp(ours), np.ptp(theirs)) == 0:
        return RankCorrelation(len(common))
    found = stats.pearsonr(ours, theirs)  # of ranks: Spearman's, with an interval
    interval = found.confidence_interval(CONFIDENCE)
    return RankCorrelation(len(common), *map(float, (found.statistic, *interval, found.pvalue)))


@dataclass(frozen=True)
class Spread:
    """How cells with several seeds each spread, by one-way analysis of variance: standard deviations between
    cells and between the seeds of a cell, F, and the probability of such an F if all cells were equal."""

    cells: float
    seeds: float
    f: float
    p: float
    low: float = math.nan
    high: float = math.nan
    """The 95 % interval of the ratio of the two, by that of F; exact for normal distributions."""

    @property
    def ratio(self) -> float:
        return self.cells / self.seeds


def spread(cells: Sequence[Sequence[float]]) -> Spread | None:
    """None where less than two cells have two runs or more, or no two runs of a cell differ. Where chance
    makes the variance between cells negative, it is 0."""
    cells = [cell for cell in cells if len(cell) > 1]
    if len(cells) < 2:
        return None
    within = sum(np.var(cell, ddof=1) * (len(cell) - 1) for cell in cells) / sum(len(c) - 1 for c in cells)
    if within == 0:
        return None
    f, p = stats.f_oneway(*cells)
    n = np.mean([len(cell) for cell in cells])
    between = max(np.var([np.mean(cell) for cell in cells], ddof=1) - within / n, 0.0)
    freedom = len(cells) - 1, sum(len(cell) - 1 for cell in cells)
    ends = (f / stats.f.ppf(q, *freedom) for q in ((1 + CONFIDENCE) / 2, (1 - CONFIDENCE) / 2))
    low, high = (math.sqrt(max(float(end) - 1, 0.0) / n) for end in ends)
    return Spread(math.sqrt(between), math.sqrt(within), float(f), float(p), low, high)


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """P values of several comparisons, corrected for their number (Holm, 1979): those below 0.05 stand."""
    corrected, largest = {}, 0.0
    for rank, name in enumerate(sorted(p, key=p.__getitem__)):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        corrected[name] = largest
    return corrected


@dataclass(frozen=True)
class Estimate:
    """A figure, and its 95 % interval by bootstrap."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, value: float, samples: np.ndarray) -> Estimate:
        """The interval of bootstrap `samples`; those that are nan (all ranks equal) are left out."""
        samples = samples[np.isfinite(samples)]
        if not len(samples):
            return cls(value, math.nan, math.nan)
        low, high = np.quantile(samples, ((1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2))
        return cls(value, float(low), float(high))
