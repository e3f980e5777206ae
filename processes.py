"""Other scripts of this program as processes: who may start one, in which environment, and why it ended."""

from __future__ import annotations

import ctypes
import fcntl
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from runs import RUNS

PROGRAM = Path(__file__).parent
PATIENCE = 1.0
"""Seconds between looks at a lock that another process has."""

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(Exception):
    """It was told to end before it had what it waited for."""


@contextmanager
def claimed(name: str, *, stopped: threading.Event | None = None, wait: bool = True) -> Iterator[int]:
    """Be the one process, of all that share the folder runs/, that works on `name`: the descriptor of the
    lock, for a process that is started to inherit, since that may outlive the one that started it.

    Raises Stopped where the event is set before the lock is free, or where it is taken and `wait` is False.
    """
    RUNS.mkdir(exist_ok=True)
    with open(RUNS / f".{name}", "a") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if not wait or (stopped or threading.Event()).wait(PATIENCE):
                    raise Stopped from None
        yield file.fileno()


def environment(at_once: int = 1) -> dict[str, str]:
    """This process's, less what torchrun says to its own processes; a part of the cores for each of
    `at_once` runs."""
    theirs = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC")
    kept = {name: value for name, value in os.environ.items() if not any(t in name for t in theirs)}
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {"OMP_NUM_THREADS": str(max(1, cores // at_once)), **kept}


@contextmanager
def signals_to_interrupts() -> Iterator[None]:
    """Within it SIGTERM and SIGHUP (a terminal that goes) end what runs, as Ctrl-C does."""

    def interrupt(number: int, _frame: Any) -> None:
        raise KeyboardInterrupt if number == signal.SIGINT else SystemExit(128 + number)

    previous = {each: signal.signal(each, interrupt) for each in ENDING}
    try:
        yield
    finally:
        for each, handler in previous.items():
            signal.signal(each, handler)


def ends_with_us() -> Callable[[], None] | None:
    """What a started process calls first, so that it is told to end (SIGTERM) where this one is killed. None
    where the system has no such thing (all but Linux)."""
    if not sys.platform.startswith("linux"):
        return None
    prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
    return lambda: prctl(set_death_signal, signal.SIGTERM)


def last_word(errors: bytes) -> str:
    """The last line that a process wrote to stderr: the scripts end with the reason, on one line."""
    lines: Sequence[str] = errors.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no word of why"
