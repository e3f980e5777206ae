"""A study as a value: runs of the project's own scripts, in arms, and which arms are compared with which."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class FolderOf:
    """A flag's value: the folder of an earlier job's run."""

    job: Job


@dataclass(frozen=True)
class BestOf:
    """A flag's value, of --arch: the cell of that one of the jobs which did best on its held-out images."""

    jobs: tuple[Job, ...]


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

    @property
    def chain(self) -> Iterator[Job]:
        """All that it needs, directly or not, and itself, in an order in which they can run."""
        for job in self.needs:
            yield from job.chain
        yield self


@dataclass(frozen=True)
class Arm:
    """Runs that differ in their seeds, or in the cells that are drawn, alone: by seed, the last of a chain,
    whose test accuracy is compared."""

    name: str
    jobs: Mapping[int, Job]


@dataclass(frozen=True)
class Study:
    """Arms, the first of which is the `reference` of the others. Two arms of the same seeds are compared in
    pairs where they are `paired`: where a seed makes all else equal."""

    name: str
    question: str
    arms: tuple[Arm, ...]
    paired: bool = True
    notes: tuple[str, ...] = field(default=())

    @property
    def reference(self) -> Arm:
        return self.arms[0]

    def jobs(self) -> list[Job]:
        """The last jobs of all chains, the seeds of all arms before the next seeds: a study that is cut short
        has compared something."""
        seeds = sorted({seed for arm in self.arms for seed in arm.jobs})
        return [arm.jobs[seed] for seed in seeds for arm in self.arms if seed in arm.jobs]
