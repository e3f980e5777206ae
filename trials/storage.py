"""The trials of a search in an Optuna storage: one process, or several on several machines, work on it.

An Optuna trial is one job: its parameters are the candidate's choices, its value the held-out accuracy, its
intermediate values the curve, so that Optuna's pages and plots show what they should. Optuna only keeps the
trials and hands them out (ask and tell); what to train next is said by a strategy. Only its public functions
are used.
"""

from __future__ import annotations

import os
import re
import secrets
import socket
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

from run.processes import Stopped, claimed
from trials.cells import Candidate, Space
from trials.strategies import Epoch, Job, Trial
from utils import InputError, one_line

HERE = socket.gethostname()
UNCLAIMED = timedelta(minutes=1)
"""How long a process may take from being given a trial to putting its name to it."""


def require_optuna() -> Any:
    """The module. Raises InputError where it is not installed."""
    try:
        import optuna
        from optuna.storages import journal
    except ImportError:
        raise InputError("a search by trials needs Optuna, 4.0 or newer: pip install optuna") from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna, journal


@dataclass(frozen=True)
class Taken:
    """A trial that this process is to train."""

    handle: Any  # Optuna's
    trial: Trial

    @property
    def number(self) -> int:
        return self.handle.number


class Ledger:
    """The study `name` in `storage`: a journal file's path, or the URL of a database that Optuna knows."""

    def __init__(self, storage: str, name: str | None, space: Space | None = None):
        """Raises InputError where it cannot be opened. Without a name, that of its only study, or EXP."""
        self.optuna, journal = require_optuna()
        self.url, self.space = storage, space
        self.shown = re.sub("//[^@/]*@", "//...@", storage)  # without a password
        try:
            if storage.startswith("redis"):
                self.storage = self.optuna.storages.JournalStorage(journal.JournalRedisBackend(storage))
            elif "://" in storage:
                self.storage = self.optuna.storages.get_storage(storage)
            else:
                self.storage = self.optuna.storages.JournalStorage(_journal(journal, storage))
            names = self.optuna.study.get_all_study_names(self.storage)
        except Exception as error:  # of any driver of any database
            raise InputError(f"--storage {self.shown} cannot be used: {one_line(error)}") from None
        self.name = name or (names[0] if len(names) == 1 else "EXP")
        self.study = None
        if self.name in names:
            self.study = self.optuna.load_study(study_name=self.name, storage=self.storage)

    @property
    def settings(self) -> dict[str, Any] | None:
        """The flags that all who work on this search share, and its budget; None where it has not begun."""
        attributes = {} if self.study is None else self.study.user_attrs
        if "settings" not in attributes:
            return None
        return {**attributes["settings"], "budget": attributes["budget"]}

    def open(self, settings: Mapping[str, Any], budget: int, space: Space, objectives: Sequence[str]) -> None:
        """Begin the study, or join it. `objectives` beside accuracy are to be small."""
        self.space, self.several = space, bool(objectives)
        self.study = self.optuna.create_study(
            study_name=self.name,
            storage=self.storage,
            directions=["maximize", *("minimize" for _ in objectives)],
            load_if_exists=True,
        )
        if self.study.user_attrs.get("budget") != budget:
            self.study.set_user_attr("budget", budget)
        if "settings" not in self.study.user_attrs:
            self.study.set_user_attr("settings", dict(settings))

    def trials(self) -> list[Trial]:
        """All but those that were given up for another trial of the same job."""
        return [trial for _, trial in self._numbered()]

    def _numbered(self) -> list[tuple[Any, Trial]]:
        state = self.optuna.trial.TrialState
        found = []
        for frozen in self.study.get_trials(deepcopy=False):
            attributes = frozen.user_attrs
            failed = "failed" in attributes
            if frozen.state == state.PRUNED or (frozen.state == state.FAIL and not failed):
                continue
            if "candidate" in attributes:
                found.append((frozen, _trial(attributes, done=frozen.state == state.COMPLETE, failed=failed)))
        return found

    def begin(self, job: Job, costs: Mapping[str, float]) -> Taken | None:
        """Take a job, or another one that waits; None where another process has just taken the same."""
        attributes = {
            "candidate": job.candidate.to_dict(),
            "from epoch": job.start,
            "to epoch": job.epochs,
            "costs": dict(costs),
        }
        self.study.enqueue_trial(job.candidate.choices, user_attrs=attributes)
        return self.take_waiting()

    def waits(self) -> bool:
        """Whether a trial waits that a process noted and did not come to take."""
        waiting = (self.optuna.trial.TrialState.WAITING,)
        return bool(self.study.get_trials(deepcopy=False, states=waiting))

    def take_waiting(self) -> Taken | None:
        handle = self.study.ask()
        if "candidate" not in handle.user_attrs:  # nothing waited any more
            self.give_up(handle.number)
            return None
        trial = _trial(handle.user_attrs, done=False, failed=False)
        same = [
            frozen.number
            for frozen, other in self._numbered()
            if (other.key, other.job.epochs) == (trial.key, trial.job.epochs)
        ]
        if min(same) < handle.number:
            self.give_up(handle.number)
            return None
        handle.set_user_attr("process", f"{HERE}:{os.getpid()}")
        for name, values in self.space.alternatives.items():
            handle.suggest_categorical(name, values)
        return Taken(handle, trial)

    def give_up(self, number: int) -> None:
        """Mark a trial that does not count, because another one has the same job."""
        with suppress(ValueError, RuntimeError):  # another process was faster
            self.study.tell(number, state=self.optuna.trial.TrialState.PRUNED)

    def finish(self, taken: Taken, curve: Sequence[Epoch], values: Sequence[float]) -> None:
        """Keep what has come of a trial; `values` are the accuracy and the objectives beside it."""
        taken.handle.set_user_attr("curve", [list(epoch) for epoch in curve])
        if not self.several:
            for number, epoch in enumerate(curve, 1):
                taken.handle.report(epoch.valid_top1, step=number)
        self.study.tell(taken.number, list(values))

    def fail(self, taken: Taken, reason: str) -> None:
        taken.handle.set_user_attr("failed", reason)
        self.study.tell(taken.number, state=self.optuna.trial.TrialState.FAIL)

    def take_orphan(self) -> Taken | None:
        """A trial whose process has gone, to go on with: under a new number, for the old one is closed."""
        running = self.optuna.trial.TrialState.RUNNING
        for frozen, trial in self._numbered():
            if frozen.state == running and _is_orphan(frozen):
                try:
                    self.study.tell(frozen.number, state=self.optuna.trial.TrialState.FAIL)
                except (ValueError, RuntimeError):  # another process was faster
                    continue
                if (taken := self.begin(trial.job, trial.costs)) is not None:
                    return taken
        return None

    def others(self) -> list[str]:
        """The processes that are at work, as `HOST:PID`."""
        running = self.optuna.trial.TrialState.RUNNING
        return [
            frozen.user_attrs.get("process", "?")
            for frozen, _ in self._numbered()
            if frozen.state == running and not _is_orphan(frozen)
        ]


def _journal(journal: Any, path: str) -> Any:
    """Optuna's file of trials. Its usual lock is a symbolic link; where none can be made (on Windows, on file
    systems without links) it gets the other kind, which excludes the first as well."""
    trial = Path(f"{path}.{secrets.token_hex(4)}")
    try:
        trial.symlink_to(Path(path).name)
    except OSError:
        return journal.JournalFileBackend(path, lock_obj=journal.JournalFileOpenLock(path))
    trial.unlink()
    return journal.JournalFileBackend(path)


def _is_orphan(frozen: Any) -> bool:
    """Whether a running trial's process is gone. Of another machine we know it by its lock alone, and only
    where the machines share runs/ (and the lock's file is there)."""
    process = frozen.user_attrs.get("process")
    if process is None:
        return datetime.now() - frozen.datetime_start > UNCLAIMED
    if process == f"{HERE}:{os.getpid()}":  # we are asking, so at work on none
        return True
    lock = worker_lock(process)
    if not Path("runs", f".{lock}").exists():
        return process.startswith(f"{HERE}:")
    try:
        with claimed(lock, wait=False):
            return True
    except Stopped:
        return False


def worker_lock(process: str) -> str:
    """The name of the lock that a process holds for as long as it works on trials."""
    return f"trials-{re.sub('[^A-Za-z0-9.-]', '-', process)}"


def own_lock() -> str:
    return worker_lock(f"{HERE}:{os.getpid()}")


def _trial(attributes: Mapping[str, Any], *, done: bool, failed: bool) -> Trial:
    job = Job(Candidate.from_dict(attributes["candidate"]), attributes["from epoch"], attributes["to epoch"])
    curve = tuple(Epoch(*epoch) for epoch in attributes["curve"]) if done else None
    return Trial(job, curve, failed=failed, costs=attributes["costs"])
