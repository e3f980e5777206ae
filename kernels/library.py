"""source/native.c: compiled at first use for this processor, and called through ctypes.

EBNAS_KERNEL = avx512, avx2, neon or c forces a path, and `torch` the form without C; EBNAS_CFLAGS adds flags
for the compiler.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import tempfile
from pathlib import Path

import torch

from packed.compiler import NoCompiler, cache_folder, compile_library, shared_library_flags

SOURCE = Path(__file__).parent / "source" / "native.c"

# no contraction: one expression gives the same bits wherever it is inlined
FLAGS = ("-O3", "-fno-trapping-math", "-fno-math-errno", "-ffp-contract=off", "-pthread")
_AVX512 = ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx2", "-mfma")
PATHS = {
    "c": ("-DPLAIN_C",),
    "avx2": ("-mavx2", "-mfma"),
    "avx512": (*_AVX512, "-mprefer-vector-width=512"),
    "neon": (),
}
"""Each instruction set, and the flags that the source is compiled with for it."""

DTYPES = {torch.float32: (), torch.float64: ("-DDOUBLE",)}
"""Each type of number, and the flags that the source is compiled with for it."""


def paths() -> tuple[str, ...]:
    """The paths that this machine can run, the fastest last: c, avx2 and avx512, or c and neon."""
    if platform.machine().lower() in ("aarch64", "arm64"):
        return ("c", "neon")
    best = torch.backends.cpu.get_cpu_capability()
    return ("c", "avx2", "avx512")[: 3 if "AVX512" in best else 2 if best == "AVX2" else 1]


def chosen_path() -> str:
    """$EBNAS_KERNEL, or the fastest path. Raises ValueError where the one that is asked for is unknown or
    cannot run here."""
    wanted = os.environ.get("EBNAS_KERNEL") or paths()[-1]
    if wanted not in (*PATHS, "torch"):
        raise ValueError(f"unknown kernel {wanted!r}; choose from {(*PATHS, 'torch')}")
    if wanted not in (*paths(), "torch"):
        raise ValueError(f"this processor cannot run the kernel {wanted!r}; it can run {paths()}")
    return wanted


@functools.cache
def load(path: str, dtype: torch.dtype) -> ctypes.CDLL:
    """The library of a path for one type of number, compiled if need be (seconds).

    Raises NoCompiler, or OSError where it cannot be written or loaded.
    """
    flags = (*FLAGS, *PATHS[path], *DTYPES[dtype], *shared_library_flags())
    try:
        return ctypes.CDLL(str(compile_library(SOURCE, flags, cache_folder())))
    except (OSError, RuntimeError):  # no place to keep it: build it for this process alone
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            return ctypes.CDLL(str(compile_library(SOURCE, flags, Path(folder))))


def library(dtype: torch.dtype) -> ctypes.CDLL:
    """The library of the chosen path for one type of number."""
    return load(chosen_path(), dtype)


@functools.cache
def unavailable() -> str | None:
    """Why the kernel cannot run here; None where it can. Compiles it."""
    try:
        if chosen_path() == "torch":
            return "EBNAS_KERNEL is torch"
        library(torch.float32)
    except (NoCompiler, OSError, ValueError) as error:
        return str(error)
    return None
