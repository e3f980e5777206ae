"""Errors a user can act on, atomic files, seeding, and the formatting of numbers."""

from __future__ import annotations

import math
import os
import random
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch


class InputError(ValueError):
    """Something the user gave is wrong. A script prints the message as one line and exits with code 2."""


class RunFailed(RuntimeError):
    """A run cannot go on. A script prints the message as one line and exits with code 1."""


def run_main(main: Callable[[], None]) -> None:
    """Run a script's main: an InputError, RunFailed or OSError becomes one line on stderr."""
    try:
        main()
    except (InputError, RunFailed) as error:
        sys.stdout.flush()
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 1)
    except OSError as error:  # a full disk, a file that is not ours: the environment's fault, not a bug
        print(f"error: {error}", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all: aside in the same folder, synced, then renamed over `path`."""
    path = Path(path)
    descriptor, aside = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(aside, 0o644)
        os.replace(aside, path)
    except BaseException:
        Path(aside).unlink(missing_ok=True)
        raise


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, on all devices."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def nearest_multiples(value: int, divisor: int) -> str:
    """The multiples of `divisor` around `value`, for an error message: `84 or 98`."""
    below = value // divisor * divisor
    return f"{below} or {below + divisor}" if below else f"{divisor}"


def human(number: float) -> str:
    """1496678400 -> `1.50G`: three digits and a decimal prefix."""
    if abs(number) < 1000:
        return f"{number:.3g}"
    power = min(int(math.log10(abs(number)) // 3), 4)
    return f"{number / 1000**power:.2f}{' kMGT'[power]}"
