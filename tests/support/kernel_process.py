"""The packed kernel in a process of its own, in the place of this one's library.

`pytest -p support.kernel_process` has all tests use it.
It is ARM's kernel under qemu; or with EBNAS_MACHINE=native this machine's, for the thread sanitizer.
Everything else of a test runs here: the program, its layout in memory, PyTorch. What the kernel is given goes
through a pipe to kernel_process.c, what it computes comes back.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shlex
import shutil
import subprocess
import tempfile
import threading
from pathlib import Path

import numpy as np

import packed.kernel
import packed.network
from packed.kernel import _FLAGS, _SOURCE, Plan, _CStep, available_kernels

NATIVE = os.environ.get("EBNAS_MACHINE") == "native"
COMPILER = "gcc" if NATIVE else "aarch64-linux-gnu-gcc"
EMULATOR = () if NATIVE else ("qemu-aarch64", "-L", "/usr/aarch64-linux-gnu")
PACKAGES = "gcc-aarch64-linux-gnu libc6-dev-arm64-cross qemu-user"  # Debian's
DRIVER = (Path(__file__).with_name("kernel_process.c"), _SOURCE)


def missing() -> str | None:
    """Why ARM code cannot be built and run here, or None."""
    absent = [tool for tool in (COMPILER, *EMULATOR[:1]) if shutil.which(tool) is None]
    return f"{' and '.join(absent)} not installed (Debian: apt-get install {PACKAGES})" if absent else None


def build(program: Path, *sources: Path) -> None:
    """A program, with the kernel's flags and $EBNAS_CFLAGS."""
    integers, words = len(_CStep._integers), len(_CStep._fields_)
    flags = [*(flag for flag in _FLAGS if flag != "-shared"), "-Wall", "-Wextra", "-Werror"]
    flags += [f"-DWORDS={words}", f"-DFIRST_POINTER={integers}"]
    flags += shlex.split(os.environ.get("EBNAS_CFLAGS", ""))
    subprocess.run([COMPILER, *flags, *sources, "-o", program, "-lpthread"], check=True)


class Library:
    """Stands for the loaded library: the same functions, run by the process."""

    def __init__(self, program: Path, *flags: str, stderr: int | None = None):
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([*EMULATOR, *flags, program], stdin=pipe, stdout=pipe, stderr=stderr)
        self._lock = threading.Lock()
        self.sizes: dict[int, int] = {}  # bytes of the arrays that steps point to, and of arenas, by address

    def _ask(self, head: tuple[int, ...], *contents: bytes, answers: list[tuple[int, int]]) -> None:
        """Send a request, and write the answer to `answers`, (address, bytes) each."""
        with self._lock:
            for content in (np.array(head, np.int64).tobytes(), *contents):
                self._process.stdin.write(content)
            self._process.stdin.flush()
            for address, size in answers:
                answer = self._process.stdout.read(size)
                assert len(answer) == size, f"the process ended with {self._process.wait()}"
                ctypes.memmove(address, answer, size)

    def end(self) -> str:
        """End the process; what it printed as an error, if that is kept."""
        return self._process.communicate()[1].decode()

    def best_path(self) -> int:
        path = ctypes.c_int32()
        self._ask((0,) * 8, answers=[(ctypes.addressof(path), 4)])
        return path.value

    def encode_weights(self, path, bits, groups, filters, terms, encoded) -> None:
        size = groups * filters * terms
        content = ctypes.string_at(bits, size)
        self._ask((1, path, 0, 0, groups, filters, terms, 0), content, answers=[(encoded, 4 * size)])

    def run_steps(self, path, steps, n, arena) -> None:
        self._run(2, path, steps, n, arena)

    def share_steps(self, path, steps, n, arena, own, counters) -> int:
        """The threads are those of the process: a thread of this one that helps has nothing to do."""
        if own == 0:
            self._run(4, path, steps, n, arena)
        return 0

    def run_network(self, path, steps, n, arena, images, count, channels, pixels, logits) -> None:
        self._run(3, path, steps, n, arena, images, count, channels, pixels, logits)

    def _run(self, function, path, steps, n, arena, images=None, count=0, channels=0, pixels=0, logits=None):
        steps = (_CStep * n).from_address(steps if isinstance(steps, int) else ctypes.addressof(steps))
        copies, contents = (_CStep * n).from_buffer_copy(steps), []
        for step in copies:
            for name in _CStep._pointers:
                if address := getattr(step, name):
                    contents.append(ctypes.string_at(address, self.sizes[address]))
                    setattr(step, name, self.sizes[address])
        contents.append(ctypes.string_at(arena, self.sizes[arena]))
        contents.append(ctypes.string_at(images, 4 * count * channels * pixels) if images else b"")
        classes = steps[n - 1].channels_out
        head = (function, path, n, self.sizes[arena], count, channels, pixels, classes)
        answers = [(arena, self.sizes[arena]), (logits, 4 * count * classes)]
        self._ask(head, bytes(copies), *contents, answers=answers if count else answers[:1])


def pytest_configure() -> None:
    if reason := missing():
        raise SystemExit(reason)
    with tempfile.TemporaryDirectory() as folder:
        build(Path(folder) / "driver", *DRIVER)
        install(Library(Path(folder) / "driver"))
        kernels = available_kernels()  # it runs: the file is no longer needed
    assert NATIVE or kernels == ("c", "neon")


def install(library: Library) -> None:
    """Replace this machine's library, and note the sizes of what is handed to it."""
    point, new_arena = packed.kernel._point, Plan.new_arena

    def noted_point(step: _CStep, arrays: dict[str, np.ndarray]) -> None:
        library.sizes |= {array.ctypes.data: array.nbytes for array in arrays.values()}
        point(step, arrays)

    def noted_arena(plan: Plan, threads: int = 1) -> np.ndarray:
        arena = new_arena(plan)
        library.sizes[arena.ctypes.data] = arena.nbytes
        return arena

    packed.kernel._point, Plan.new_arena = noted_point, noted_arena
    for module in (packed.kernel, packed.network):
        module.library = functools.cache(lambda: library)
