"""Strategies of a search by trials: each says, of what has been trained so far, what to train next. No torch.

A strategy knows nothing of how a trial is trained: `search_trials.py` trains it, the study `strategies` looks
it up in a table of trained cells. It keeps nothing either: its answer follows from the history and the random
numbers alone, so that a search that was killed goes on as if it had not been, and several processes can ask.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from typing import NamedTuple, Protocol

import numpy as np

from trials.cells import Candidate
from trials.regression import Ridge

MOST_TRIES = 200
"""Candidates that are looked at until one is new and within the limits. With limits, each look takes a part
of a second."""


class Epoch(NamedTuple):
    """What an epoch of a trial's training gave; losses in nats an image, accuracy in percent, both of the
    validation on held-out training images."""

    train_loss: float
    valid_loss: float
    valid_top1: float


class Source(Protocol):
    """Where candidates come from: `Space` of trials/cells.py, or a table of trained cells."""

    def draw(self, rng: np.random.Generator) -> Candidate: ...

    def mutate(self, parent: Candidate, rng: np.random.Generator) -> Candidate: ...

    def pool(self, best: Sequence[Candidate], count: int, rng: np.random.Generator) -> list[Candidate]: ...


@dataclass(frozen=True)
class Job:
    """Train a candidate until `epochs` are done, going on after the first `start`."""

    candidate: Candidate
    start: int
    epochs: int

    @property
    def cost(self) -> int:
        """The epochs that it costs."""
        return self.epochs - self.start


@dataclass(frozen=True)
class Trial:
    """A job and what has come of it: the curve of all epochs from the first on, None where it is at work or
    has failed. `costs` of the candidate's network by name, those that the search looks at."""

    job: Job
    curve: tuple[Epoch, ...] | None = None
    failed: bool = False
    costs: Mapping[str, float] = field(default_factory=dict)

    @property
    def key(self) -> str:
        return self.job.candidate.key


FIGURES: dict[str, Callable[[tuple[Epoch, ...]], float]] = {
    "accuracy": lambda curve: curve[-1].valid_top1,
    "training_loss": lambda curve: -float(sum(epoch.train_loss for epoch in curve)),
    "valid_loss": lambda curve: -curve[-1].valid_loss,
}
"""What a trial can be judged by, of its curve so far; higher is better. The sum of training losses is that of
Ru et al., Speedy performance estimation for NAS, NeurIPS 2021."""


@dataclass(frozen=True)
class Judge:
    """Ranks trials that were trained for equally long.

    By `figure`, one of FIGURES; with `cost_weight` W less W times the logarithm of the OPs, both in standard
    deviations over these trials; where `objectives` name costs to make small, by fronts: the trials that no
    other beats in all respects come first (Deb et al., NSGA-II, 2002), within a front the less crowded.
    """

    figure: str = "accuracy"
    cost_weight: float = 0.0
    objectives: tuple[str, ...] = ()

    def scores(self, trials: Sequence[Trial], epochs: int) -> np.ndarray:
        """The score of each trial: higher is better, and only these trials compare."""
        points = self.points(trials, epochs)
        return front_scores(points) if self.objectives and trials else points[:, 0]

    def points(self, trials: Sequence[Trial], epochs: int) -> np.ndarray:
        """(n, 1 + objectives): the figure, and less each cost."""
        values = np.array([FIGURES[self.figure](trial.curve[:epochs]) for trial in trials])
        if self.cost_weight and len(trials) > 1:
            ops = np.log([trial.costs["ops"] for trial in trials])
            values = _standardised(values) - self.cost_weight * _standardised(ops)
        costs = [np.array([trial.costs[name] for trial in trials]) for name in self.objectives]
        return np.column_stack([values, *(-each for each in costs)])


def _standardised(values: np.ndarray) -> np.ndarray:
    spread = values.std()
    return (values - values.mean()) / spread if spread > 0 else np.zeros_like(values)


def fronts(points: np.ndarray) -> np.ndarray:
    """The number of each point's front (n, objectives; all to be large): 0 where no point dominates it, 1
    where only points of front 0 do, and so on."""
    at_least = (points[:, None] >= points[None]).all(2)  # (n, n): i is at least as good as j in everything
    dominates = at_least & (points[:, None] > points[None]).any(2)
    number = np.full(len(points), -1)
    for front in range(len(points)):
        left = number < 0
        if not left.any():
            break
        number[left & ~dominates[left].any(0)] = front
    return number


def front_scores(points: np.ndarray) -> np.ndarray:
    """Less the number of a point's front; of one front, half a unit lies between the most crowded point and
    the ends, which have no neighbour on one side."""
    number = fronts(points)
    scores = -number.astype(float)
    for front in range(number.max() + 1):
        members = np.flatnonzero(number == front)
        space = np.zeros(len(members))
        for values in points[members].T:
            order, spread = np.argsort(values, kind="stable"), np.ptp(values) or 1.0
            gaps = np.full(len(members), np.inf)
            gaps[1:-1] = (values[order[2:]] - values[order[:-2]]) / spread
            space[order] += gaps
        rank = np.argsort(np.argsort(space, kind="stable"), kind="stable")
        scores[members] += 0.5 * rank / max(len(members), 1)
    return scores


def front(trials: Iterable[Trial], judge: Judge) -> list[Trial]:
    """The trials of most epochs that no other beats in figure and costs; the best figure first."""
    furthest = History(trials).furthest()
    if not furthest:
        return []
    values = judge.points(furthest, furthest[0].job.epochs)
    chosen = np.flatnonzero(fronts(values) == 0)
    return [furthest[i] for i in sorted(chosen, key=lambda i: -values[i, 0])]


def rungs(epochs: int, eta: int, least: int) -> tuple[int, ...]:
    """The epochs after which halving compares: `epochs`, and each an `eta`-th of the next, none below
    `least`. `rungs(8, 2, 1)` is 1, 2, 4, 8."""
    found = [epochs]
    while found[-1] > least and found[-1] > 1:
        found.append(max(round(found[-1] / eta), least))
    return tuple(sorted(set(found)))


class History:
    """The trials so far by the epochs that they were to be trained for, and by candidate."""

    def __init__(self, trials: Iterable[Trial]):
        self.trials = tuple(trials)
        self.at: dict[int, list[Trial]] = defaultdict(list)
        self.asked: dict[int, set[str]] = defaultdict(set)
        for trial in self.trials:
            self.asked[trial.job.epochs].add(trial.key)
            if trial.curve is not None:
                self.at[trial.job.epochs].append(trial)
        self.keys = {trial.key for trial in self.trials}

    @property
    def spent(self) -> int:
        """Epochs of all trials, those at work and those that failed included."""
        return sum(trial.job.cost for trial in self.trials)

    def furthest(self) -> list[Trial]:
        """The finished trials of most epochs."""
        done = [epochs for epochs, trials in self.at.items() if trials]
        return self.at[max(done)] if done else []


@dataclass(frozen=True)
class Strategy:
    """Random search: every candidate is drawn, and trained to the end. The other strategies build on it.

    `epochs` of a full training; `budget` in epochs of all trials together. `fits` says whether a candidate is
    within the limits that the user gave.
    """

    space: Source
    judge: Judge
    epochs: int
    budget: int
    fits: Callable[[Candidate], bool] = lambda _: True

    @property
    def shortest(self) -> int:
        """Epochs that a new candidate is trained for."""
        return self.epochs

    def next(self, trials: Iterable[Trial], rng: np.random.Generator) -> Job | None:
        """What to train next; None where nothing that is left of the budget pays for is worth it."""
        history = History(trials)
        return self.choose(history, self.budget - history.spent, rng)

    def choose(self, history: History, left: int, rng: np.random.Generator) -> Job | None:
        return self.begin(history, left, rng)

    def begin(self, history: History, left: int, rng: np.random.Generator) -> Job | None:
        """The `shortest` training of a new candidate."""
        if self.shortest > left:
            return None
        candidate = self.propose(history, rng)
        return None if candidate is None else Job(candidate, 0, self.shortest)

    def propose(self, history: History, rng: np.random.Generator) -> Candidate | None:
        """A candidate that has not been tried; None where none is found."""
        return self.first_new(history, (self.space.draw(rng) for _ in range(MOST_TRIES)))

    def first_new(self, history: History, candidates: Iterable[Candidate]) -> Candidate | None:
        new = (candidate for candidate in candidates if candidate.key not in history.keys)
        return next((candidate for candidate in islice(new, MOST_TRIES) if self.fits(candidate)), None)

    def best(self, trials: Iterable[Trial]) -> Trial | None:
        """The search's choice: the best figure of those trained for longest."""
        furthest = History(trials).furthest()
        if not furthest:
            return None
        return furthest[int(np.argmax(self.judge.points(furthest, furthest[0].job.epochs)[:, 0]))]

    def ranked(self, history: History, epochs: int) -> list[Trial]:
        """The trials that have reached `epochs`, the best first."""
        trials = history.at[epochs]
        return [trials[i] for i in np.argsort(-self.judge.scores(trials, epochs), kind="stable")]


@dataclass(frozen=True)
class Halving(Strategy):
    """Successive halving, asynchronous (ASHA; Li et al., A system for massively parallel hyperparameter
    tuning, MLSys 2020): of the candidates that have reached a rung the best `eta`-th go on to the next, where
    their training stopped, as soon as they are known; the highest rung first. Else a new one begins.
    """

    eta: int = 4
    least: int = 1

    @property
    def rungs(self) -> tuple[int, ...]:
        return rungs(self.epochs, self.eta, self.least)

    @property
    def shortest(self) -> int:
        return self.rungs[0]

    def choose(self, history: History, left: int, rng: np.random.Generator) -> Job | None:
        for rung, above in reversed(list(pairwise(self.rungs))):
            if above - rung > left:
                continue
            for trial in self.ranked(history, rung)[: len(history.at[rung]) // self.eta]:
                if trial.key not in history.asked[above]:
                    return Job(trial.job.candidate, rung, above)
        return self.begin(history, left, rng)


@dataclass(frozen=True)
class Evolution(Strategy):
    """Regularised evolution (Real et al., AAAI 2019): a child is the best of `sample` candidates of the
    population with one choice changed; the population are the `population` youngest, so that each dies of
    age, however good. All are trained for a part of a full training; then the last part of the budget
    trains the best to the end.
    """

    population: int = 12
    sample: int = 4
    part: float = 0.25
    last: float = 0.3

    @property
    def shortest(self) -> int:
        return max(round(self.part * self.epochs), 1)

    def choose(self, history: History, left: int, rng: np.random.Generator) -> Job | None:
        finish = self.epochs - self.shortest
        kept = max(self.last * self.budget, finish) if self.budget >= self.epochs else 0
        if left - self.shortest >= kept and (job := self.begin(history, left, rng)):
            return job
        if finish and finish <= left:
            for trial in self.ranked(history, self.shortest):
                if trial.key not in history.asked[self.epochs]:
                    return Job(trial.job.candidate, self.shortest, self.epochs)
        return None

    def propose(self, history: History, rng: np.random.Generator) -> Candidate | None:
        youngest = history.at[self.shortest][-self.population :]
        if len(youngest) < min(self.population, self.firsts):
            return super().propose(history, rng)
        scores = self.judge.scores(youngest, self.shortest)

        def children() -> Iterable[Candidate]:
            for _ in range(MOST_TRIES):
                some = rng.choice(len(youngest), min(self.sample, len(youngest)), replace=False)
                yield self.space.mutate(youngest[max(some, key=lambda i: scores[i])].job.candidate, rng)

        return self.first_new(history, children())

    @property
    def firsts(self) -> int:
        """Random candidates at the start: no more than a third of all that the budget pays for."""
        return max(int((1 - self.last) * self.budget / self.shortest / 3), 2)


@dataclass(frozen=True)
class Predictor(Halving):
    """Halving whose candidates a ridge regression proposes. Of `pool` candidates, half of them drawn and half
    mutations of the best so far, the one of highest prediction is taken. The first `firsts`, and then
    every fourth, are drawn: they keep the regression honest, and its cells apart.

    With objectives, figure and costs are weighed at random, anew each time (as Knowles, ParEGO, 2006): so the
    whole front is sought. `costs_of` then gives the costs of a candidate that is not trained yet.
    """

    pool: int = 2_000
    firsts: int = 8
    best_ones: int = 5
    costs_of: Callable[[Candidate], Mapping[str, float]] = lambda _: {}

    def propose(self, history: History, rng: np.random.Generator) -> Candidate | None:
        known = history.at[self.shortest]
        if len(known) < self.firsts or len(known) % 4 == 3:
            return super().propose(history, rng)
        scores = self.extrapolated(history)
        trained = [trial.job.candidate for trial in known]
        best = [trained[i] for i in np.argsort(-scores, kind="stable")[: self.best_ones]]
        ridge = Ridge.fit(np.array([c.features for c in trained]), scores)
        pool = self.space.pool(best, self.pool, rng)
        predicted = ridge.predict(np.array([c.features for c in pool]))
        order = np.argsort(-predicted, kind="stable")
        if self.judge.objectives:
            order = self._weighed(pool, predicted, order, rng)
        return self.first_new(history, (pool[i] for i in order)) or super().propose(history, rng)

    def extrapolated(self, history: History) -> np.ndarray:
        """Of each candidate of the lowest rung, the figure expected after all epochs: where it stopped, the
        next rung's figure is a line through those that went on, as far as three show one; else a rung later
        all are better by as much."""
        steps = self.rungs
        judge = Judge(self.judge.figure, self.judge.cost_weight)

        def at(rung: int) -> dict[str, float]:
            trials = history.at[rung]
            return dict(zip((t.key for t in trials), judge.scores(trials, rung).tolist(), strict=True))

        now = at(steps[0])
        for rung in steps[1:]:
            later = {key: score for key, score in at(rung).items() if key in now}
            if not later:
                break
            x, y = np.array([now[key] for key in later]), np.array(list(later.values()))
            slope = 1.0
            if len(x) >= 3 and x.std() > 0:
                slope = float(np.clip(np.cov(x, y)[0, 1] / x.var(ddof=1), 0.25, 2))
            now = {
                key: later.get(key, float(y.mean() + slope * (value - x.mean())))
                for key, value in now.items()
            }
        return np.array([now[trial.key] for trial in history.at[steps[0]]])

    def _weighed(
        self, pool: Sequence[Candidate], predicted: np.ndarray, order: np.ndarray, rng: np.random.Generator
    ) -> np.ndarray:
        """64 of the pool, by figure and costs with weights drawn for this once. Their costs are exact."""
        some = np.concatenate([order[:32], rng.choice(order[32:], min(32, len(order) - 32), replace=False)])
        costs = np.array([[self.costs_of(pool[i])[name] for name in self.judge.objectives] for i in some])
        weights = rng.dirichlet(np.ones(1 + costs.shape[1]))
        score = weights[0] * _standardised(predicted[some])
        for weight, values in zip(weights[1:], np.log(costs).T, strict=True):
            score = score - weight * _standardised(values)
        return some[np.argsort(-score, kind="stable")]


STRATEGIES: dict[str, type[Strategy]] = {
    "random": Strategy,
    "halving": Halving,
    "evolution": Evolution,
    "predictor": Predictor,
}
