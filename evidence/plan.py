"""A study as a value: runs of the project's own scripts, in arms, and what is asked of them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Container, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from genotypes import Genotype, describe


@dataclass(frozen=True)
class FolderOf:
    """A flag's value: the folder of an earlier job's run."""

    job: Job


@dataclass(frozen=True)
class BestOf:
    """A flag's value, of --arch: the cell of that one of the jobs which did best on its held-out images."""

    jobs: tuple[Job, ...]


@dataclass(frozen=True)
class CellOf:
    """A flag's value, of --arch: a genotype that no name stands for."""

    genotype: Genotype


@dataclass(frozen=True, eq=False)
class Job:
    """One run of `script`. `flags` map names to values; True is a switch, False and None leave a flag out.

    `key` names what is computed: jobs of two studies with one key are one run.
    """

    script: str
    flags: Mapping[str, Any]

    @cached_property
    def identity(self) -> dict[str, Any]:
        """The flags, with the keys of other jobs in place of what these will have made."""

        def plain(value: Any) -> Any:
            if isinstance(value, FolderOf):
                return {"folder_of": value.job.key}
            if isinstance(value, BestOf):
                return {"best_of": [job.key for job in value.jobs]}
            if isinstance(value, CellOf):
                return {"cell": describe(value.genotype)}
            return value

        flags = {name: plain(value) for name, value in sorted(self.flags.items())}
        return {"script": self.script, "flags": flags}

    @cached_property
    def key(self) -> str:
        return hashlib.sha256(json.dumps(self.identity).encode()).hexdigest()[:12]

    @property
    def needs(self) -> Iterator[Job]:
        """The jobs that must be done before."""
        for value in self.flags.values():
            if isinstance(value, FolderOf):
                yield value.job
            elif isinstance(value, BestOf):
                yield from value.jobs

    @cached_property
    def chain(self) -> tuple[Job, ...]:
        """All that it needs, directly or not, and itself, each once, in an order in which they can run."""
        jobs = {job.key: job for need in self.needs for job in need.chain}
        return (*jobs.values(), self)

    def missing(self, done: Container[str], has_weights: Callable[[Job], bool]) -> set[str]:
        """The keys of the jobs of the chain that are still to run: those that are not `done`, and those whose
        trained networks these start from, or learn from, where the figures are known and the weights are not.
        """
        missing, starting_points = set(), set()
        for job in reversed(self.chain):
            if job.key not in done or (job.key in starting_points and not has_weights(job)):
                missing.add(job.key)
                needs = (value.job for value in job.flags.values() if isinstance(value, FolderOf))
                starting_points |= {need.key for need in needs if need.script == "train.py"}
        return missing


def tested(figures: Mapping[str, Any], _seed: int) -> float:
    """Top-1 on the test images."""
    return figures["test"]["top1"]


def held_out(figures: Mapping[str, Any], _seed: int) -> float:
    """Top-1 on the held-out training images, after the epoch that is best on them."""
    return figures["best"]["score"]


@dataclass(frozen=True)
class Arm:
    """By seed the last job of a chain, and which of its figures counts: top-1 in percent.

    Arms of the same `way` train the same cells in the same way, with other seeds; of these, `jobs` are by the
    number of the cell.
    """

    name: str
    jobs: Mapping[int, Job]
    accuracy: Callable[[Mapping[str, Any], int], float] = tested
    way: str = ""


@dataclass(frozen=True)
class Study:
    """Arms, and what is asked of them: `analysis`

    - `differences`: of each arm from the first, the reference; in pairs of runs of one seed where the arms
      are `paired`, that is, where a seed makes all else equal;
    - `spread`: do arms differ by more than the runs of an arm do;
    - `ranks`: do the runs of each arm rank as those of the reference;
    - `ways`: `ranks`, and of each way to train, whether cells differ by more than seeds do;
    - `table`: the runs are rows of a table of trained cells (evidence/cells.py).
    """

    name: str
    question: str
    arms: tuple[Arm, ...]
    analysis: str = "differences"
    paired: bool = True

    @property
    def reference(self) -> Arm:
        return self.arms[0]

    def final_jobs(self) -> list[Job]:
        """The last jobs of all chains, each once, the seeds of all arms before the next seeds: a study that
        is cut short has compared something."""
        seeds = sorted({seed for arm in self.arms for seed in arm.jobs})
        finals = [arm.jobs[seed] for seed in seeds for arm in self.arms if seed in arm.jobs]
        return list({job.key: job for job in finals}.values())

    def jobs(self) -> dict[str, Job]:
        """All jobs by key."""
        return {job.key: job for final in self.final_jobs() for job in final.chain}
