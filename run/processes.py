"""Other scripts of this program as processes: who may start one, in which environment, and why it ended."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from run.runs import LOCK, RUNS
from utils import WINDOWS

PROGRAM = Path(__file__).parent.parent
PATIENCE = 1.0
"""Seconds between looks at a lock that another process has."""

ENDING = tuple(
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")  # the last two: not on Windows, only there
    if hasattr(signal, name)
)


class Stopped(Exception):
    """It was told to end before it had what it waited for."""


@contextmanager
def claimed(name: str, *, stopped: threading.Event | None = None, wait: bool = True) -> Iterator[None]:
    """Be the one process, of all that share the folder runs/, that works on `name`; and wait for the runs of
    that name that are still open, since a run may outlive the process that started it.

    Raises Stopped where the event is set before they are free, or where one is taken and `wait` is False.
    """

    @contextmanager
    def locked(path: Path) -> Iterator[None]:
        lock = FileLock(path)
        while True:
            try:
                lock.acquire(timeout=0)
                break
            except Timeout:
                if not wait or (stopped or threading.Event()).wait(PATIENCE):
                    raise Stopped from None
        try:
            yield
        finally:
            lock.release()

    RUNS.mkdir(exist_ok=True)
    with locked(RUNS / f".{name}"):
        for run in RUNS.glob(f"*-{name}-*/{LOCK}"):
            with locked(run):
                pass
        yield


def start(
    command: Sequence[str], *, env: Mapping[str, str], stderr: Any, ends_with_us: bool = False
) -> subprocess.Popen:
    """Start a script. A terminal's Ctrl-C comes to this process alone, which hands it on by `end`.

    `ends_with_us`: it is told to end where this process is killed; only Linux can do that.
    """
    options: dict[str, Any] = {"start_new_session": True}
    if WINDOWS:
        options = {"creationflags": subprocess.CREATE_NEW_PROCESS_GROUP}
    elif ends_with_us and sys.platform.startswith("linux"):
        prctl, set_death_signal = ctypes.CDLL(None).prctl, 1
        options["preexec_fn"] = lambda: prctl(set_death_signal, signal.SIGTERM)
    return subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=stderr, **options)


def end(process: subprocess.Popen) -> None:
    """Tell a script that `start` started to end with a checkpoint: by SIGTERM, or Ctrl-Break on Windows."""
    if process.poll() is None:
        process.send_signal(signal.CTRL_BREAK_EVENT if WINDOWS else signal.SIGTERM)


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


def last_word(errors: bytes) -> str:
    """The last line that a process wrote to stderr: the scripts end with the reason, on one line."""
    lines: Sequence[str] = errors.decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else "no word of why"
