"""A packed network: images in, logits out."""

from __future__ import annotations

import ctypes
import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np

from .kernel import KERNELS, Plan, choose_kernel, kernel_weights, library
from .picture import central_square, read_rgb
from .program import LARGEST_PIXEL, Program, View, read_program

Picture = str | os.PathLike | np.ndarray
"""A file, or RGB as uint8 (h, w, 3)."""

MOST_SHARING = 4  # threads of one image: to wake one takes some 15 microseconds


class PackedNetwork:
    """A packed network. Calls from several Python threads at once are safe, as are forks between calls.

    `classes`, `image_size`, `config` (of the exported network), `kernel` (the path that runs). `threads`
    images of a batch run at once, and up to four threads share a single image that is large enough; by
    default as many as this process may use cores. `any_size` lets it compute images of other sizes than it
    was trained on.
    """

    def __init__(
        self,
        program: Program,
        *,
        threads: int | None = None,
        kernel: str | None = None,
        any_size: bool = True,
    ):
        self.program, self.any_size = program, any_size
        self.classes, self.image_size, self.config = program.classes, program.image_size, program.config
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        self.threads = threads or _usable_cores()
        self.kernel = choose_kernel(kernel)
        self._plans: dict[tuple[int, int], tuple[Plan, deque]] = {}
        self._lock = threading.Lock()
        self._helpers = _Helpers(min(self.threads, MOST_SHARING) - 1)
        if self.kernel == "torch":
            from .float_form import FloatForm  # imports torch

            self._float_form = FloatForm(program)
        else:
            self._path = KERNELS.index(self.kernel)
            self._weights = [kernel_weights(step, self._path) for step in program.steps]

    def preprocess(self, pictures: Picture | Iterable[Picture]) -> np.ndarray:
        """Pictures of any size, as training evaluated them: float32 (n, 3, image_size, image_size).

        `pictures` is one or several, each a file or an array of RGB, uint8 (h, w, 3): the shorter side is
        resized, the centre cut out, and the result normalised. Files need Pillow; arrays become the same
        bytes without it. Raises ValueError for what is no picture; for a file, what `read_rgb` raises.
        """
        one = isinstance(pictures, (str, os.PathLike)) or getattr(pictures, "ndim", 0) == 3
        squares = [self.square(picture) for picture in ([pictures] if one else pictures)]
        size, channels = self.image_size, len(self.program.mean)
        return self.normalize(np.reshape(squares, (-1, size, size, channels)).astype(np.uint8, copy=False))

    def square(self, picture: Picture) -> np.ndarray:
        """A file or uint8 (h, w, 3) of any size, resized and cut as in training: uint8 (size, size, 3)."""
        program = self.program
        if isinstance(picture, (str, os.PathLike)):
            picture = read_rgb(picture, value_range=program.value_range)
        picture, channels = np.asarray(picture), len(program.mean)
        if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != channels:
            raise ValueError(f"expected uint8 (h, w, {channels}), not {picture.dtype} {picture.shape}")
        return central_square(picture, resize=program.resize, size=program.image_size)

    def normalize(self, squares: np.ndarray) -> np.ndarray:
        """uint8 (n, h, w, 3) -> float32 (n, 3, h, w), normalised as in training. Sizes are kept."""
        squares, channels = np.asarray(squares), len(self.program.mean)
        if squares.dtype != np.uint8 or squares.ndim != 4 or squares.shape[3] != channels:
            raise ValueError(f"expected uint8 (n, h, w, {channels}), not {squares.dtype} {squares.shape}")
        scaled = (squares / np.float32(255) - np.float32(self.program.mean)) / np.float32(self.program.std)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def __call__(self, images: Any) -> Any:
        """Logits (n, classes) of float32 images (n, 3, h, w): an array, or a tensor for a tensor.

        Raises ValueError for other types, for pixels that are not finite, and, but with `any_size`, for other
        sizes than image_size.
        """
        torch = sys.modules.get("torch")
        if torch is not None and isinstance(images, torch.Tensor):
            return torch.from_numpy(self(images.detach().cpu().numpy())).to(images.device)
        images = np.ascontiguousarray(images)
        channels = self.program.buffers[0][0]
        fits = images.ndim == 4 and images.shape[1] == channels and 0 not in images.shape[2:]
        if images.dtype != np.float32 or not fits:
            hint = ": see preprocess()" if images.dtype == np.uint8 else ""
            expected = f"expected float32 images (n, {channels}, h, w)"
            raise ValueError(f"{expected}, not {images.dtype} {images.shape}{hint}")
        size = self.image_size
        if not self.any_size and images.shape[2:] != (size, size):
            raise ValueError(
                f"the network was trained on images of {size} x {size}, and these are {images.shape[2]} x "
                f"{images.shape[3]}: preprocess() makes them of pictures; load(..., any_size=True) takes them"
            )
        if not (images.min(initial=0) >= -LARGEST_PIXEL and images.max(initial=0) <= LARGEST_PIXEL):
            limit = f"images must be finite and within {LARGEST_PIXEL:g}"
            raise ValueError(f"{limit}: there are NaN, infinite or larger pixels")
        if self.kernel == "torch":
            return self._float_form.logits(images)
        plan, arenas = self._plan(*images.shape[2:])
        logits = np.empty((len(images), len(self.classes)), np.float32)
        if len(images) == 1 and plan.shared and self._helpers.ready():
            self._run_shared(plan, arenas, images[0], logits[0])
            return logits
        each = -(-len(images) // self.threads) or 1
        parts = [slice(start, start + each) for start in range(0, len(images), each)]
        with ThreadPoolExecutor(self.threads) as pool:  # starts a thread a job; the first part needs none
            jobs = [pool.submit(self._run, plan, arenas, images[part], logits[part]) for part in parts[1:]]
            self._run(plan, arenas, images[:each], logits[:each])
            for job in jobs:
                job.result()  # raises what it raised
        return logits

    def _plan(self, height: int, width: int) -> tuple[Plan, deque[np.ndarray]]:
        """The plan for a size and its idle arenas. The last few sizes are kept."""
        with self._lock:
            if (height, width) not in self._plans:
                if len(self._plans) == 4:
                    del self._plans[next(iter(self._plans))]
                self._plans[height, width] = (Plan(self.program, self._weights, height, width), deque())
            return self._plans[height, width]

    def _run(self, plan: Plan, arenas: deque[np.ndarray], images: np.ndarray, logits: np.ndarray) -> None:
        """Fill `logits` in one call of the kernel, with an arena that no other call has meanwhile."""
        arena = self._arena(plan, arenas)
        count, channels, height, width = images.shape
        program = (self._path, plan.c_steps, len(plan.c_steps), arena.ctypes.data)
        sizes = (count, channels, height * width)
        library().run_network(*program, images.ctypes.data, *sizes, logits.ctypes.data)
        arenas.append(arena)

    def _run_shared(self, plan: Plan, arenas: deque, image: np.ndarray, logits: np.ndarray) -> None:
        """The same for one image and its logits, by all threads: this one, and the helpers as they come."""
        arena = self._arena(plan, arenas)
        plan.channels_of(arena, View(0, 0, len(image)))[:] = image.reshape(len(image), -1)
        counters = np.zeros(4 * len(plan.c_steps), np.int32)

        def share(thread: int) -> int:
            # a helper that is late may find all done, and another image in the arena: it touches neither
            program = (self._path, plan.c_steps, len(plan.c_steps), arena.ctypes.data)
            return library().share_steps(*program, plan.scratch_of(thread), counters.ctypes.data)

        self._helpers.run(share)
        logits[:] = arena[plan.result :][: len(logits)]
        arenas.append(arena)

    def _arena(self, plan: Plan, arenas: deque) -> np.ndarray:
        try:
            return arenas.pop()
        except IndexError:
            return plan.new_arena(self._helpers.count + 1 if plan.shared else 1)

    def trace(self, image: np.ndarray) -> list[np.ndarray]:
        """The tensor (channels, h, w) that each step wrote, for one image (3, h, w): to look into a
        network."""
        image = np.ascontiguousarray(image, np.float32)
        if self.kernel == "torch":
            return self._float_form.trace(image)
        plan = Plan(self.program, self._weights, *image.shape[1:])
        arena, outputs = plan.new_arena(), []
        plan.channels_of(arena, View(0, 0, len(image)))[:] = image.reshape(len(image), -1)
        for i, step in enumerate(self.program.steps):
            for c_step in plan.c_steps[plan.c_steps_of[i]]:
                library().run_steps(self._path, ctypes.addressof(c_step), 1, arena.ctypes.data)
            if step.target is None:
                outputs.append(arena[plan.result :][: len(self.classes), None, None].copy())
            else:
                planes = plan.channels_of(arena, step.target)
                outputs.append(planes.reshape(-1, *plan.sizes[step.target.buffer][1:]).copy())
        return outputs


class _Helpers:
    """Threads that sleep until there is an image to share.

    Where other programs take the cores, a helper that is interrupted keeps the others waiting for its chunk:
    after an image with long waits, the next ones are computed without help.
    """

    LONG = 8  # sleeps: about half a millisecond

    def __init__(self, count: int):
        self.count = count
        self._pool: ThreadPoolExecutor | None = None
        self._process, self._jobs, self._alone = 0, [], 0

    def ready(self) -> bool:
        """Whether to ask them for the next image: there are some, and all idle."""
        if self._process != os.getpid():  # the first image, or the first after a fork
            self._pool, self._process, self._jobs = None, os.getpid(), []
        self._alone = max(self._alone - 1, 0)
        return self.count > 0 and self._alone == 0 and all(job.done() for job in self._jobs)

    def run(self, job: Callable[[int], int]) -> None:
        """job(0) here and job(1) to job(count) on the threads: each does what the others leave.

        A job returns how often it slept to wait. When job(0) has ended, the rest may not even have begun.
        """
        self._pool = self._pool or ThreadPoolExecutor(self.count)
        self._jobs = [self._pool.submit(job, thread) for thread in range(1, self.count + 1)]
        if job(0) > self.LONG:
            self._alone = 30


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(
    path: str | os.PathLike,
    *,
    threads: int | None = None,
    kernel: str | None = None,
    any_size: bool = False,
) -> PackedNetwork:
    """The network of a file. `kernel`: one of avx512, avx2, neon, c, torch, not the best that runs here.
    Images of another size than it was trained on are refused, but with `any_size`.

    Raises PackedFileError (a ValueError) for a file that is not a whole and consistent packed network.
    """
    return PackedNetwork(read_program(path), threads=threads, kernel=kernel, any_size=any_size)
