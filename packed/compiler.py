"""A C source compiled at first use, and kept in the user's cache."""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path


class NoCompiler(Exception):
    """There is no C compiler, or it failed; the message says what it said."""


def cache_folder() -> Path:
    """Where compiled libraries are kept: $XDG_CACHE_HOME/ebnas, or ~/.cache/ebnas."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebnas"


def shared_library_flags() -> tuple[str, ...]:
    """The flags with which the compiler writes a shared library."""
    return ("-shared", *(() if os.name == "nt" else ("-fPIC",)))


def compile_library(source: Path, flags: Sequence[str], folder: Path) -> Path:
    """The shared library of a C file in `folder`, built if it is not there yet; two processes may do so at
    once. $EBNAS_CFLAGS adds flags, $CC names the compiler.

    Its name holds the hash of all that it was built from, and of what it contains: loading a damaged library
    would end the process. Raises NoCompiler, or OSError where the folder cannot be written.
    """
    flags = [*flags, *shlex.split(os.environ.get("EBNAS_CFLAGS", ""))]
    origin = f"{platform.system()}|{platform.machine()}|{' '.join(flags)}|".encode()
    origin += b"".join(file.read_bytes() for file in _sources(source))
    prefix = f"{source.stem}-{_digest(origin)}-"
    for library in folder.glob(f"{prefix}*.so"):
        if library.name == f"{prefix}{_digest(library.read_bytes())}.so":
            return library
    candidates = _compilers()
    compiler = next(filter(None, map(shutil.which, candidates)), None)
    if compiler is None:
        raise NoCompiler(f"no C compiler ({', '.join(candidates)}) is installed")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(descriptor)
    try:
        command = [compiler, *flags, "-o", aside, str(source)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        if done.returncode:
            raise NoCompiler(f"{compiler} failed: {' '.join(done.stderr.split())[-300:]}")
        library = folder / f"{prefix}{_digest(Path(aside).read_bytes())}.so"
        try:
            os.replace(aside, library)
        except PermissionError:  # Windows: another process has built the same, and loaded it
            if not library.exists():
                raise
    except subprocess.TimeoutExpired:
        raise NoCompiler(f"{compiler} took more than ten minutes") from None
    finally:
        Path(aside).unlink(missing_ok=True)
    return library


def _compilers() -> list[str]:
    """In the order in which they are tried. Windows' GCC keeps AVX values on a stack that is not aligned for
    them (GCC bug 54412), which ends the process."""
    own = [os.environ["CC"]] if os.environ.get("CC") else []
    return [*own, *(["clang"] if os.name == "nt" else ["cc", "gcc", "clang"])]


def _sources(source: Path) -> list[Path]:
    """A C file and the files beside it that it includes, each once."""
    found = [source]
    for file in found:  # which grows
        for name in re.findall(r'^#include "(.+)"', file.read_text(encoding="utf-8"), re.MULTILINE):
            if (included := file.parent / name) not in found:
                found.append(included)
    return found


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]
