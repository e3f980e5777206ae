"""binary_cpu.c: compiled at first use, called through ctypes, and a program laid out in its memory."""

from __future__ import annotations

import ctypes
import functools
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .compiler import NoCompiler, cache_folder, compile_library, shared_library_flags
from .program import Program, Step, View

KERNELS = ("c", "avx2", "avx512", "neon")  # the C file's paths, by number
LARGEST_IMAGE = 1 << 24  # pixels
CHUNK = 4_000  # of a step's work (see `_work`): what threads take at once
LEAST_SHARED = 1_000_000  # work of an image in steps of two chunks or more: with less, one thread computes it
LARGEST_PLAN = 1 << 31  # bytes of buffers, scratch memory and constants, for one image at a time

_SOURCE = Path(__file__).with_name("binary_cpu.c")
_FLAGS = ("-O3", "-fno-trapping-math", *shared_library_flags())


class _CStep(ctypes.Structure):
    """`struct step` of binary_cpu.c."""

    _integers = (
        "op source target residual scratch channels_in channels_out groups kernel stride padding "
        "height_in width_in height_out width_out add average relu chunks terms slack"
    ).split()
    _pointers = ("term", "masks", "valid", "threshold", "bits", "weight", "scale", "bias", "slope")
    _fields_ = [(name, ctypes.c_int64) for name in _integers]
    _fields_ += [(name, ctypes.c_void_p) for name in _pointers]


_OPS = ("binary", "float", "pool", "linear")  # the C file's enum


def compile_kernel(folder: Path) -> Path:
    """The compiled binary_cpu.c in `folder`: see compile_library."""
    return compile_library(_SOURCE, _FLAGS, folder)


@functools.cache
def library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(compile_kernel(cache_folder())))
    except (OSError, RuntimeError):  # no place to keep it: build it for this process alone
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            library = ctypes.CDLL(str(compile_kernel(Path(folder))))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.encode_weights.argtypes = [ctypes.c_int, pointer, number, number, number, pointer]
    library.encode_weights.restype = None
    library.run_steps.argtypes = [ctypes.c_int, pointer, number, pointer]
    library.run_steps.restype = None
    library.share_steps.argtypes = [*library.run_steps.argtypes, number, pointer]
    library.share_steps.restype = number
    library.run_network.argtypes = [*library.run_steps.argtypes, pointer, number, number, number, pointer]
    library.run_network.restype = None
    return library


def available_kernels() -> tuple[str, ...]:
    """The paths that this machine can run, the fastest last: c, avx2 and avx512, or c and neon. Compiles."""
    best = library().best_path()
    return ("c", "neon") if KERNELS[best] == "neon" else KERNELS[: best + 1]


def _has_torch() -> bool:
    try:
        import torch  # noqa: F401
    except ImportError:
        return False
    return True


def choose_kernel(wanted: str | None) -> str:
    """The path to run: `wanted`, or $EBNAS_KERNEL, or the best; without a compiler `torch`, with a warning.

    Raises ValueError where the one that is asked for is unknown or cannot run, and NoCompiler where there is
    no PyTorch either.
    """
    wanted = wanted or os.environ.get("EBNAS_KERNEL") or None
    if wanted not in (None, "torch", *KERNELS):
        raise ValueError(f"unknown kernel {wanted!r}; choose from {(*KERNELS, 'torch')}")
    if wanted == "torch":
        if not _has_torch():
            raise ValueError("the kernel 'torch' is PyTorch, which is not installed")
        return wanted
    try:
        available = available_kernels()
    except (NoCompiler, OSError) as error:
        if wanted is not None:
            raise ValueError(f"the kernel {wanted!r} cannot be built: {error}") from None
        if not _has_torch():
            needs = "a packed network needs a C compiler or PyTorch, which is not installed"
            raise NoCompiler(f"{needs}: {error}") from None
        warnings.warn(f"packed networks run in float, slowly: {error}", RuntimeWarning, stacklevel=4)
        return "torch"
    if wanted is not None and wanted not in available:
        raise ValueError(f"this processor cannot run the kernel {wanted!r}; it can run {available}")
    return wanted or available[-1]


def _padded(n: int) -> int:
    return -(-n // 64) * 64


class _Constants(NamedTuple):
    """The constants of a step: what makes them, of what, and how many bytes they will have."""

    make: Callable[..., dict[str, np.ndarray]]
    arguments: tuple
    bytes: int


def _taps(kernel: int, stride: int, dilation: int, padding: int, channels: int, height: int, width: int):
    """The constants of a 1-bit convolution with `channels` channels a group on height x width pixels.

    term: where in the byte planes of a group each byte of weights finds its input, and in which mask plane;
    masks (taps, plane); valid (plane,), the number of weights inside the image.
    """
    height_out, width_out = -(-height // stride), -(-width // stride)
    pixels, plane = height_out * width_out, _padded(height_out * width_out)
    terms, masks, valid = [], np.zeros((kernel**2, plane), np.uint8), np.zeros(plane, np.int16)
    for tap in range(kernel**2):
        dy, dx = (d * dilation - padding for d in divmod(tap, kernel))
        rows, columns = np.arange(height_out) * stride + dy, np.arange(width_out) * stride + dx
        inside = np.outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width)).ravel()
        masks[tap, :pixels] = inside * np.uint8(255)
        valid[:pixels] += inside * np.int16(channels)
        phase, shift = dy % stride * stride + dx % stride, dy // stride * width_out + dx // stride
        for byte in range(-(-channels // 8)):
            terms.append(((byte * stride**2 + phase) * plane + shift, tap * plane))
    return {"term": np.array(terms, np.int32), "masks": masks, "valid": valid}


def _slack(step: Step, width_out: int) -> int:
    """How many bytes outside of its planes the taps of a 1-bit convolution may touch."""
    ends = (-step.padding, (step.kernel - 1) * step.dilation - step.padding)
    return _padded(max(abs(end // step.stride) for end in ends) * (width_out + 1)) + 64


def _borders(kernel: int, padding: int, average: bool, height: int, width: int):
    """The constants of a pool.

    weight (kernel, plane): whether a column of a window is inside, a factor of 1 or 0 for an average, a limit
    of +inf or -inf for a maximum; scale (plane,): 1 / the window's pixels inside.
    """
    taps, plane = np.arange(kernel)[:, None] - padding, _padded(height * width)
    rows, columns = (((n := np.arange(size) + taps) >= 0) & (n < size) for size in (height, width))
    inside = np.zeros((kernel, plane), np.float32)
    inside[:, : height * width] = np.tile(columns, height)
    if not average:
        inside = np.where(inside, np.float32(np.inf), np.float32(-np.inf))
    scale = np.ones(plane, np.float32)
    scale[: height * width] /= np.outer(rows.sum(0), columns.sum(0)).ravel()
    return {"weight": inside, "scale": scale}


def _work(c_step: _CStep) -> int:
    """About how many nanoseconds a step takes a core with AVX2."""
    vectors = _padded(c_step.height_out * c_step.width_out) // 64
    if c_step.op == _OPS.index("binary"):
        packing = c_step.channels_in * c_step.stride**2 * 6
        return vectors * (c_step.channels_out * (c_step.terms + 16) + packing)
    if c_step.op == _OPS.index("float"):
        return vectors * c_step.channels_out * c_step.channels_in // c_step.groups * c_step.kernel**2 * 3
    return _padded(c_step.height_in * c_step.width_in) // 64 * c_step.channels_in * 40


class Plan:
    """A program laid out for one image size: the C file's steps and the size of their arena (in floats).

    `shared`: whether threads gain by sharing one image.
    """

    def __init__(self, program: Program, weights: list[dict[str, np.ndarray]], height: int, width: int):
        self.sizes = []  # (channels, height, width) of each buffer
        for channels, level in program.buffers:
            self.sizes.append((channels, -(-height // 2**level), -(-width // 2**level)))
        self.offsets, scratch = self._place(program)
        self.c_steps = (_CStep * sum(step.shuffle for step in program.steps))()
        self.c_steps_of: list[slice] = []  # of each step
        floats, constants = [], []
        for step, tensors in zip(program.steps, weights, strict=True):
            first = len(floats)
            self.c_steps_of.append(slice(first, first + step.shuffle))
            for part in range(step.shuffle):
                c_step = self.c_steps[first + part]
                c_step.scratch = scratch
                needs = self._fill(c_step, step, tensors)
                if step.shuffle > 1:
                    self._spread(c_step, step.shuffle, part)
                floats.append(needs[0])
                constants.append(needs[1])
        self.scratch = _padded(max(floats))
        self.result = self.c_steps[-1].target = scratch + self.scratch
        work = [_work(c_step) for c_step in self.c_steps[:-1]]
        for c_step, each in zip(self.c_steps, [*work, 0], strict=True):
            c_step.chunks = min(max(each // CHUNK, 1), 16)
        self.shared = sum(each for each in work if each >= 2 * CHUNK) >= LEAST_SHARED
        self.floats = self.result + _padded(len(program.classes)) + 64
        size = 4 * self.floats + sum(each.bytes for each in set(constants) if each)
        if height * width > LARGEST_IMAGE or size > LARGEST_PLAN:
            raise ValueError(f"images of {height} x {width} are too large for this network")

        made = {each: each.make(*each.arguments) for each in set(constants) if each}
        for c_step, each in zip(self.c_steps, constants, strict=True):
            _point(c_step, made[each] if each else {})
        self._kept = weights, made  # the c_steps point into these

    def _place(self, program: Program) -> tuple[list[int], int]:
        """Offsets of the buffers, two of which share memory if no step needs both; and the end of them."""
        first, last = {0: -1}, {0: 0}
        for i, step in enumerate(program.steps):
            for view in filter(None, (step.source, step.residual, step.target)):
                first.setdefault(view.buffer, i)
                last[view.buffer] = i
        offsets, placed, end = [0] * len(self.sizes), [], 0
        for buffer in sorted(first, key=first.get):
            channels, height, width = self.sizes[buffer]
            size, start = channels * _padded(height * width), 0
            for other_start, other_end, other in sorted(placed):
                if last[other] >= first[buffer] and start + size > other_start:
                    start = max(start, other_end)
            placed.append((start, start + size, buffer))
            offsets[buffer], end = start, max(end, start + size)
        return offsets, end

    def new_arena(self, threads: int = 1) -> np.ndarray:
        """Memory for one image, float32; zeros, so that what lies beside pixels is never a slow number."""
        memory = np.zeros(self.floats + (threads - 1) * self.scratch + 16, np.float32)
        return memory[-memory.ctypes.data % 64 // 4 :]

    def channels_of(self, arena: np.ndarray, view: View) -> np.ndarray:
        """The pixels of a view, (channels, height * width), where they lie in the arena."""
        _, height, width = self.sizes[view.buffer]
        planes = arena[self._address(view) :][: view.channels * _padded(height * width)]
        return planes.reshape(view.channels, -1)[:, : height * width]

    def scratch_of(self, thread: int) -> int:
        """Where the scratch memory of a thread lies in an arena, in floats after that of thread 0."""
        behind = self.floats - self.c_steps[0].scratch
        return behind + (thread - 1) * self.scratch if thread else 0

    def _address(self, view: View) -> int:
        _, height, width = self.sizes[view.buffer]
        return self.offsets[view.buffer] + view.first * _padded(height * width)

    def _spread(self, c_step: _CStep, parts: int, part: int) -> None:
        """Let a step that copies take part `part` of its channels, to every `parts`-th of the target's.

        A c_step's result advances from channel to channel by its padded height_out * width_out.
        """
        plane = _padded(c_step.height_in * c_step.width_in)
        c_step.channels_in = c_step.channels_out = c_step.channels_in // parts
        c_step.source += part * c_step.channels_in * plane
        c_step.target += part * plane
        c_step.height_out, c_step.width_out = parts, plane

    def _fill(
        self, c_step: _CStep, step: Step, tensors: dict[str, np.ndarray]
    ) -> tuple[int, _Constants | None]:
        """Describe a step to the C file. Returns the floats of scratch memory and the constants it needs."""
        c_step.op = _OPS.index(step.op)
        c_step.source, c_step.channels_in = self._address(step.source), step.source.channels
        _, c_step.height_in, c_step.width_in = self.sizes[step.source.buffer]
        _point(c_step, tensors)
        if step.op == "linear":
            c_step.channels_out = len(tensors["bias"])
            return _padded(c_step.channels_in), None
        c_step.target, c_step.channels_out = self._address(step.target), step.target.channels
        c_step.residual = -1 if step.residual is None else self._address(step.residual)
        _, c_step.height_out, c_step.width_out = self.sizes[step.target.buffer]
        for name in ("groups", "kernel", "stride", "padding", "add"):
            setattr(c_step, name, getattr(step, name))
        c_step.average, c_step.relu = step.average, step.relu
        size, plane = (c_step.height_in, c_step.width_in), _padded(c_step.height_in * c_step.width_in)
        if step.op == "pool":
            arguments = (step.kernel, step.padding, step.average, *size)
            borders = _Constants(_borders, arguments, 4 * (step.kernel + 1) * plane)
            return 3 * plane + 4 * (_padded(c_step.width_in) + 64), borders
        channels = c_step.channels_in // step.groups
        if step.op == "float":
            border = (step.kernel - 1) // step.stride
            height, width = c_step.height_out + border, c_step.width_out + border
            phases = _padded(channels * step.stride**2 * height * width) + 128
            return phases + 4 * _padded(c_step.height_out * width), None
        c_step.slack = _slack(step, c_step.width_out)
        c_step.terms = step.kernel**2 * -(-channels // 8)
        plane_out = _padded(c_step.height_out * c_step.width_out)
        arguments = (step.kernel, step.stride, step.dilation, step.padding, channels, *size)
        taps = _Constants(_taps, arguments, (step.kernel**2 + 2) * plane_out + 8 * c_step.terms)
        planes = step.groups * (-(-channels // 8) * step.stride**2 * plane_out + c_step.slack)
        return (planes + c_step.slack + plane) // 4, taps


def _point(c_step: _CStep, arrays: dict[str, np.ndarray]) -> None:
    """Let the step's pointers of these names point to the arrays."""
    for name, array in arrays.items():
        setattr(c_step, name, array.ctypes.data)


def kernel_weights(step: Step, path: int) -> dict[str, np.ndarray]:
    """The tensors of a step as the C file wants them, by the names of its `struct step`."""
    tensors = step.tensors
    if step.op == "binary":
        bits = tensors["bits"]
        encoded = np.empty(bits.size, np.uint32)
        filters, terms = bits.shape[0] // step.groups, bits.shape[1] * bits.shape[2]
        library().encode_weights(path, bits.ctypes.data, step.groups, filters, terms, encoded.ctypes.data)
        affine = dict(zip(("scale", "bias", "slope"), tensors["affine"], strict=True))
        return {"threshold": tensors["threshold"], "bits": encoded, **affine}
    if step.op == "float":
        weight = tensors["weight"].reshape(step.groups, -1, tensors["weight"][0].size)
        weight = np.pad(weight, ((0, 0), (0, -weight.shape[1] % 4), (0, 0)))
        weight = weight.reshape(step.groups, -1, 4, weight.shape[2]).transpose(0, 1, 3, 2)
        return {"weight": np.ascontiguousarray(weight), "bias": tensors["bias"]}
    if step.op == "linear":
        weight = np.pad(tensors["weight"], ((0, 0), (0, -step.source.channels % 64)))
        return {"weight": weight, "bias": tensors["bias"]}
    return {}
