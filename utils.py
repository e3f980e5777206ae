"""Errors a user can act on, atomic files, seeding, and small formatting. No torch: infer.py does without."""

from __future__ import annotations

import errno
import hashlib
import math
import os
import random
import secrets
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

WINDOWS = os.name == "nt"


class InputError(ValueError):
    """Something the user gave is wrong. A script prints the message as one line and exits with code 2."""


class RunFailed(RuntimeError):
    """A run cannot go on. A script prints the message as one line and exits with code 1."""


USERS_FAULT = frozenset(
    (
        *(errno.ENOENT, errno.ENAMETOOLONG, errno.ENOTDIR, errno.EISDIR, errno.EEXIST),
        *(errno.EACCES, errno.EPERM, errno.ELOOP),
        errno.EINVAL,  # a character that Windows, or its file systems elsewhere, have in no name
    )
)
"""What the operating system answers to a wrong name: exit code 2. All else (a full disk, say) is 1."""

LONGEST_ASIDE = 60
"""Characters of a file's name that the name of its half-written copy repeats: at most 255 bytes in all."""


def run_main(main: Callable[[Any], None], parser: Callable[[], Any]) -> None:
    """Run a script's `main` on what its `parser` reads: what a user or the machine did wrong becomes one line
    on stderr.

    Exit codes: 2 for what was given (InputError), 1 for a run or a machine that cannot go on (RunFailed, a
    full disk, no memory), 130 for an interrupt. Anything else is a bug of ours and keeps its traceback.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever started us: go on in silence
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: SIM115 (for as long as the process lives)
        elif hasattr(getattr(sys, name), "reconfigure"):
            getattr(sys, name).reconfigure(errors="backslashreplace")  # a terminal that knows only ASCII
    try:
        signal.signal(signal.SIGINT, signal.default_int_handler)  # no longer that of `check_usage`
        main(parser().read())
        sys.stdout.flush()  # here, where a reader that has gone is still our business
    except (InputError, RunFailed) as error:
        _end(str(error), 2 if isinstance(error, InputError) else 1)
    except BrokenPipeError:
        _end("nobody reads standard output any more", 1)
    except OSError as error:
        _end(os_error_message(error), 2 if error.errno in USERS_FAULT else 1)
    except KeyboardInterrupt:
        _end("interrupted", 130)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        _end("there is not enough memory; smaller batches, images or networks need less", 1)


def check_usage(parser: Callable[[], Any]) -> None:
    """Before torch is imported, which takes seconds: --help and wrong flags end the script here. From here to
    `run_main` Ctrl-C ends it with one line.

    torch's threads are told to sleep while they wait. By default they spin, on the cores where the threads of
    the native kernels compute: a step on two threads took a third longer (docs/performance.md).
    """
    run_main(lambda _flags: None, parser)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

    def end(_signum, _frame) -> None:
        os.write(2, b"error: interrupted\n")
        os._exit(130)

    signal.signal(signal.SIGINT, end)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether Python, or torch, cuDNN or cuBLAS, could not allocate what it needs."""
    words = ("out of memory", "can't allocate memory", "not enough memory", "STATUS_ALLOC_FAILED")
    return isinstance(error, MemoryError) or any(part in str(error) for part in words)


def os_error_message(error: OSError) -> str:
    """`FILE: no space left on device`, in the words of the operating system."""
    reason = error.strerror or one_line(error)
    reason = reason[:1].lower() + reason[1:]
    return f"{os.fspath(error.filename)}: {reason}" if error.filename else reason


def one_line(error: BaseException | str, longest: int = 200) -> str:
    """An error's text (or else its type) on one line, cut where it is longer than `longest`."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= longest else text[: longest - 3] + "..."


def printable(text: str) -> str:
    """`text` with control characters, newlines and undecodable bytes escaped, for a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _end(message: str, code: int) -> None:
    for stream, text in ((sys.stdout, ""), (sys.stderr, f"error: {printable(message)}\n")):
        try:
            stream.write(text)
            stream.flush()
        except OSError:  # full, or nobody reads it any more; nor may what is left come up at the exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    sys.exit(code)


def write_atomically(path: str | Path, content: bytes) -> None:
    """Write a file whole or not at all: aside in the same folder, synced, then renamed over `path`.

    A link is followed. Permissions are those of the umask. Raises InputError where `path` is there and is not
    a regular file (a device, a folder), and OSError, with the name, where it cannot be written.
    """
    path = Path(os.path.realpath(path))
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file; give another name")
    aside = path.with_name(f".{path.name[:LONGEST_ASIDE]}.{secrets.token_hex(4)}")
    try:
        with open(aside, "xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        _replace(aside, path)
        if not WINDOWS:  # which opens no folder
            folder = os.open(path.parent, os.O_RDONLY)  # the new name, too, must survive a power cut
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
    except BaseException as error:
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            reason = (error.strerror or str(error)).lower()
            raise OSError(error.errno or errno.EIO, f"cannot write: {reason}", str(path)) from None
        raise


def _replace(aside: Path, path: Path) -> None:
    """Rename `aside` over `path`. Windows refuses while another process reads `path`, so there it is tried
    for two seconds."""
    for pause in (0.01, 0.1, 0.5, 1.5) if WINDOWS else ():
        try:
            os.replace(aside, path)
            return
        except PermissionError:
            time.sleep(pause)
    os.replace(aside, path)


def remove_asides(folder: Path) -> None:
    """Remove what killed processes left of a `write_atomically` to any file of `folder`."""
    for aside in folder.glob(f".*.{'[0-9a-f]' * 8}"):
        aside.unlink(missing_ok=True)


def check_output(path: Path, *inputs: str | os.PathLike) -> None:
    """Before long work: raise InputError where `path` cannot become a file, or is one of the `inputs`."""
    if not path.parent.is_dir():
        raise InputError(f"there is no folder {path.parent} to write {path.name} into")
    if path.exists() and not path.is_file():
        raise InputError(f"{path} is not a regular file; give another name")
    if any(path.exists() and os.path.exists(each) and os.path.samefile(path, each) for each in inputs):
        raise InputError(f"{path} is what is read; give another name to write")


def check_count(name: str, value: object, least: int, most: int) -> None:
    """Raise InputError where `value` is not a whole number from `least` to `most`."""
    if type(value) is not int or not least <= value <= most:
        raise InputError(f"{name} is {value!r}; it must be a whole number from {least} to {most}")


def command_text(words: Sequence[str]) -> str:
    """A command as it is typed here: quoted for a POSIX shell, or for Windows' own."""
    return subprocess.list2cmdline(words) if WINDOWS else shlex.join(words)


def seed_everything(seed: int) -> None:
    """Seed Python, NumPy and torch, on all devices."""
    import numpy as np
    import torch

    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def mixed_seed(*key: int | str) -> int:
    """A 64-bit seed of a key: near keys give unrelated seeds, on every platform."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


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
