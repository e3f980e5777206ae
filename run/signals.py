"""Whether to stop: a signal that this process was sent, or another process of the run."""

from __future__ import annotations

import signal
import time

from run.distributed import Vote, World

STOP_FREQ = 8
"""Steps after which several processes ask one another whether to stop, and after as many more each reads the
answer, so that nobody waits for it."""


STOPPING = (signal.SIGINT, signal.SIGTERM, *filter(None, [getattr(signal, "SIGBREAK", None)]))
"""What asks a run to stop; SIGBREAK (Ctrl-Break) is Windows' own."""


class Interrupted(Exception):
    """A signal asked to stop, and the checkpoint to go on from is written."""


class StopSignal:
    """A context in which the signals of STOPPING are noted, not obeyed: `received` is one's number or 0.

    A second Ctrl-C stops at once, but not while `held` (a checkpoint is written), and not within a second of
    the first: a terminal's Ctrl-C reaches a worker twice, from the terminal and from torchrun.
    """

    def __init__(self, world: World):
        self.world = world
        self.received, self.at, self.held = 0, 0.0, False
        self.vote: Vote | None = None  # that has been asked for, and not read

    def __enter__(self) -> StopSignal:
        self._previous = {s: signal.signal(s, self._note) for s in STOPPING}
        return self

    def _note(self, signum: int, _frame) -> None:
        if self.received and signum == signal.SIGINT and not self.held and time.monotonic() > self.at + 1:
            raise KeyboardInterrupt
        if not self.received:
            self.received, self.at = signum, time.monotonic()

    def __exit__(self, *_exception) -> None:
        for signum, handler in self._previous.items():
            signal.signal(signum, handler)

    def after_step(self, step: int) -> bool:
        """Whether to stop. All processes learn of it at the same step, within 2 * STOP_FREQ."""
        if self.world.size == 1:
            return self.received > 0
        if step % STOP_FREQ:
            return False
        asked, self.vote = self.vote, self.world.vote(self.received > 0)
        return asked is not None and self._says_stop(asked)

    def after_epoch(self) -> bool:
        """Whether to stop. All processes wait here for one another."""
        self.vote = None  # what it would have told, this one does
        return self._says_stop(self.world.vote(self.received > 0))

    def _says_stop(self, vote: Vote) -> bool:
        stopping = vote.result()
        if stopping and not self.received:  # another process was told
            self.received = signal.SIGTERM
        return stopping
