"""Run a packed 1-bit network on the CPU, from its file alone.

    from packed import load
    net = load("model.ebnas")                     # written by export.py
    logits = net(images)                          # float32 (n, 3, h, w), normalised as in training
    logits = net(net.preprocess(pictures))        # uint8 (n, h, w, 3)

Arrays in, arrays out; tensors in, tensors out. The file is one safetensors file: its tensors are the bits
and the folded floats, its metadata a flat program over them. The program runs in one call of binary_cpu.c,
which the system's C compiler builds at first use into the user's cache. Without a compiler one warning is
given and the float form of the same program runs on PyTorch, if that is installed.

This module and binary_cpu.c are all that is needed: NumPy and safetensors are its only dependencies.
EBNAS_KERNEL = avx512, avx2, c or torch forces a path; EBNAS_CFLAGS adds flags for the compiler.

A program is a list of steps over numbered buffers. A buffer is [channels, level]: its size is the image's,
halved `level` times and rounded up. A step reads and writes channels of buffers, [buffer, first, channels]:
  binary  sign(x >= threshold), 1-bit convolution, scale and bias, plus `residual`, PReLU
  float   convolution, bias, ReLU          pool    maximum or average; kernel 1 copies
  linear  mean over space, then a matrix: the logits, the last step
Its result is written to `target`, or added to it with `add`.

Not a number: images must be finite (ValueError), and so is every number of a file but the thresholds, which
may be -inf (a sign that is always +1).
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import hashlib
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import threading
import warnings
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

FORMAT = "ebnas packed network 1"
KERNELS = ("c", "avx2", "avx512")  # the C file's paths, by number
LARGEST_FILE = 1 << 30
LARGEST_IMAGE = 1 << 24  # pixels
LARGEST_ARENA = 1 << 31  # bytes of buffers for one image


class PackedFileError(ValueError):
    """The file is not a packed network, or not a whole and consistent one."""


# --------------------------------------------------------------------------------------------- the program


class View(NamedTuple):
    """`channels` channels of a buffer from `first` on."""

    buffer: int
    first: int
    channels: int

    @property
    def slice(self) -> slice:
        return slice(self.first, self.first + self.channels)


@dataclass(frozen=True)
class Step:
    """One step of a program and its tensors (shapes: see `_tensor_shapes`)."""

    op: str
    source: View
    target: View | None  # linear: None
    tensors: dict[str, np.ndarray]
    residual: View | None = None
    add: bool = False
    kernel: int = 1
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1
    average: bool = False
    relu: bool = False
    name: str = ""  # the module it comes from


@dataclass(frozen=True)
class Program:
    """What a file holds."""

    buffers: tuple[tuple[int, int], ...]  # (channels, level); the first is the image
    steps: tuple[Step, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    resize: int  # of the shorter side, before the central crop of image_size
    config: dict


_STEP_FIELDS = {  # beyond op, source and name
    "binary": {"target", "add", "residual", "kernel", "stride", "padding", "dilation", "groups"},
    "float": {"target", "kernel", "stride", "padding", "groups", "relu"},
    "pool": {"target", "add", "kernel", "stride", "padding", "average"},
    "linear": set(),
}
_STEP_RANGES = {
    "kernel": (1, 7),
    "stride": (1, 2),
    "padding": (-1, 16),
    "dilation": (1, 4),
    "groups": (1, 4096),
}
_POOLS = {  # kernel, stride, padding, average
    (1, 1, 0, False),
    (2, 2, 0, True),
    *((3, stride, 1, average) for stride in (1, 2) for average in (False, True)),
}


def read_program(path: str | os.PathLike) -> Program:
    """The validated program of a file. Raises PackedFileError, or OSError where it cannot be read."""
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        if size > LARGEST_FILE:
            raise PackedFileError(f"{path} has {size} bytes; a packed network has at most {LARGEST_FILE}")
        content = file.read()
    try:
        tensors = safetensors.numpy.load(content)
        # the library has checked the header, but hands out its metadata only for files on disk
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        return _checked_program(json.loads(header["__metadata__"]["network"]), tensors)
    except PackedFileError as error:
        raise PackedFileError(f"{path} is not a packed network: {error}") from None
    except Exception as error:  # the library and JSON have many, and all mean a damaged file
        raise PackedFileError(f"{path} is not a packed network: {type(error).__name__}: {error}") from None


def program_bytes(program: Program) -> bytes:
    """The content of a program's file: what `read_program` reads."""
    tensors, steps = {}, []
    for i, step in enumerate(program.steps):
        tensors |= {f"{i}.{name}": tensor for name, tensor in step.tensors.items()}
        fields = ("op", "source", "name", *sorted(_STEP_FIELDS[step.op]))
        steps.append({name: getattr(step, name) for name in fields})
    fields = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
    network = json.dumps({"format": FORMAT, **fields, "steps": steps}, separators=(",", ":"))
    return safetensors.numpy.save(tensors, {"network": network})


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PackedFileError(message)


def _integer(value: Any, low: int, high: int, what: str) -> int:
    ok = type(value) is int and low <= value <= high
    _require(ok, f"{what} is {value!r}, not a whole number from {low} to {high}")
    return value


def _numbers(value: Any, count: int, what: str, *, positive: bool = False) -> tuple[float, ...]:
    ok = isinstance(value, list) and len(value) == count
    ok = ok and all(type(v) in (int, float) and math.isfinite(v) and (v > 0 or not positive) for v in value)
    _require(ok, f"{what} is {value!r}, not {count} {'positive ' if positive else ''}numbers")
    return tuple(float(v) for v in value)


def _exact_fields(fields: Any, names: set[str], what: str) -> None:
    _require(isinstance(fields, dict), f"{what} is not an object")
    odd = sorted(names.symmetric_difference(fields))
    _require(not odd, f"{what} lacks, or should not have, {', '.join(odd)}")


def _checked_program(fields: Any, tensors: dict[str, np.ndarray]) -> Program:
    _exact_fields(fields, {"format"} | {field.name for field in dataclasses.fields(Program)}, "the network")
    _require(fields["format"] == FORMAT, f"its format is {fields['format']!r}, not {FORMAT!r}")
    _require(isinstance(fields["buffers"], list), "buffers is not a list")
    buffers = []
    for i, buffer in enumerate(fields["buffers"]):
        _require(isinstance(buffer, list) and len(buffer) == 2, f"buffer {i} is not [channels, level]")
        channels = _integer(buffer[0], 1, 1 << 16, f"channels of buffer {i}")
        buffers.append((channels, _integer(buffer[1], 0, 16, f"level of buffer {i}")))
    _require(bool(buffers) and buffers[0][1] == 0, "buffer 0 is not the image")

    steps, left = [], dict(tensors)
    written = [np.full(channels, i == 0) for i, (channels, _) in enumerate(buffers)]
    _require(isinstance(fields["steps"], list) and bool(fields["steps"]), "there are no steps")
    for i, step in enumerate(fields["steps"]):
        steps.append(_checked_step(i, step, buffers, written, left))
    _require(not left, f"no step uses the tensors {sorted(left)[:3]}")
    ops = [step.op for step in steps]
    _require(ops.count("linear") == 1 and ops[-1] == "linear", "the last step must be the only classifier")

    classes = fields["classes"]
    ok = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ok = ok and len(classes) == len(steps[-1].tensors["bias"])
    _require(ok, "the class names do not fit the classifier")
    _require(isinstance(fields["config"], dict), "config is not an object")
    image_size = _integer(fields["image_size"], 1, 4096, "image_size")
    return Program(
        buffers=tuple(buffers),
        steps=tuple(steps),
        classes=tuple(classes),
        mean=_numbers(fields["mean"], buffers[0][0], "mean"),
        std=_numbers(fields["std"], buffers[0][0], "std", positive=True),
        image_size=image_size,
        resize=_integer(fields["resize"], image_size, 8192, "resize"),
        config=fields["config"],
    )


def _checked_step(index: int, fields: Any, buffers: list, written: list, tensors: dict) -> Step:
    """The step, with its tensors taken out of `tensors` and its target marked in `written`."""
    what = f"step {index}"
    op = fields.get("op") if isinstance(fields, dict) else None
    _require(isinstance(op, str) and op in _STEP_FIELDS, f"{what}: unknown operation {op!r}")
    _exact_fields(fields, {"op", "source", "name"} | _STEP_FIELDS[op], what)
    values: dict[str, Any] = {"op": op, "target": None, "name": fields["name"]}
    _require(isinstance(fields["name"], str), f"{what}: its name is not a string")
    for name, value in fields.items():
        if name in ("source", "target", "residual"):
            values[name] = _checked_view(value, buffers, f"{what}: {name}", optional=name == "residual")
        elif name in _STEP_RANGES:
            values[name] = _integer(value, *_STEP_RANGES[name], f"{what}: {name}")
        elif name in ("add", "average", "relu"):
            _require(type(value) is bool, f"{what}: {name} is {value!r}, not true or false")
            values[name] = value
    step = Step(**values, tensors={})

    for view in (step.source, step.residual, step.target if step.add else None):
        _require(view is None or written[view.buffer][view.slice].all(), f"{what} reads what no step wrote")
    if step.target is not None:
        _check_sizes(step, buffers, what)
        written[step.target.buffer][step.target.slice] = True
    for name, (dtype, shape) in _tensor_shapes(step, tensors.get(f"{index}.bias")).items():
        tensor = tensors.pop(f"{index}.{name}", None)
        _require(tensor is not None, f"{what} lacks its tensor {name!r}")
        ok = tensor.dtype == dtype and tensor.shape == shape
        _require(ok, f"{what}: {name} is {tensor.dtype} {tensor.shape}, not {np.dtype(dtype)} {shape}")
        if name == "threshold":
            _require(bool((tensor < np.inf).all()), f"{what}: a threshold is not a number")
        elif dtype is np.float32:
            _require(bool(np.isfinite(tensor).all()), f"{what}: {name} is not finite")
        step.tensors[name] = np.array(tensor)  # aligned and writable, which a view of the file is not
    if op == "binary" and (spare := -(step.source.channels // step.groups) % 8):
        beyond = step.tensors["bits"][..., -1] >> (8 - spare)
        _require(not beyond.any(), f"{what}: there are bits past the last channel")
    return step


def _checked_view(value: Any, buffers: list, what: str, *, optional: bool) -> View | None:
    if optional and value is None:
        return None
    _require(isinstance(value, list) and len(value) == 3, f"{what} is not [buffer, first, channels]")
    buffer = _integer(value[0], 0, len(buffers) - 1, f"{what}: buffer")
    first = _integer(value[1], 0, buffers[buffer][0] - 1, f"{what}: first")
    return View(buffer, first, _integer(value[2], 1, buffers[buffer][0] - first, f"{what}: channels"))


def _check_sizes(step: Step, buffers: list, what: str) -> None:
    """That the views of a step fit each other and its kernel, and that its target overlaps no input."""
    target = step.target
    level = buffers[step.source.buffer][1] + step.stride - 1
    _require(target.buffer > 0 and buffers[target.buffer][1] == level, f"{what}: the target's size is wrong")
    for view in filter(None, (step.source, step.residual)):
        apart = view.first + view.channels <= target.first or target.first + target.channels <= view.first
        _require(view.buffer != target.buffer or apart, f"{what} writes over its own input")
    if step.residual is not None:
        ok = step.residual.channels == target.channels and buffers[step.residual.buffer][1] == level
        _require(ok, f"{what}: the residual does not fit the target")
    if step.op == "pool":
        _require(step.source.channels == target.channels, f"{what}: a pool keeps its channels")
        known = (step.kernel, step.stride, step.padding, step.average) in _POOLS
        _require(known and not (step.kernel == 2 and step.add), f"{what}: no such pool")
        return
    divides = step.source.channels % step.groups == 0 and target.channels % step.groups == 0
    _require(divides and step.kernel % 2 == 1, f"{what}: no such convolution")
    if step.op == "float":
        _require(step.padding == step.kernel // 2, f"{what}: padding is not half the kernel")
    else:
        # counts are 16 bits wide
        _require(step.source.channels // step.groups * step.kernel**2 < 1 << 15, f"{what}: too many weights")
        _require(step.residual is not None or not step.add, f"{what}: only a step with a residual adds")


def _tensor_shapes(step: Step, bias: np.ndarray | None) -> dict[str, tuple[type, tuple[int, ...]]]:
    """Name: (dtype, shape) of the tensors that a step has.

    Bits are [filter][tap][byte], channel 8 * byte + i in bit i, 1 for +1; bits past the last channel are 0.
    """
    inputs = step.source.channels
    if step.op == "pool":
        return {}
    if step.op == "linear":
        outputs = bias.shape[0] if bias is not None and bias.ndim == 1 else 1
        return {"weight": (np.float32, (outputs, inputs)), "bias": (np.float32, (outputs,))}
    outputs, per_group = step.target.channels, inputs // step.groups
    if step.op == "float":
        shape = (outputs, per_group, step.kernel, step.kernel)
        return {"weight": (np.float32, shape), "bias": (np.float32, (outputs,))}
    return {
        "threshold": (np.float32, (inputs,)),
        "bits": (np.uint8, (outputs, step.kernel**2, -(-per_group // 8))),
        "affine": (np.float32, (3, outputs)),  # scale, bias, slope
    }


# ---------------------------------------------------------------------------------------------- the kernel

_SOURCE = Path(__file__).with_name("binary_cpu.c")
_FLAGS = ("-O3", "-fno-trapping-math", "-shared", "-fPIC")


class _Term(ctypes.Structure):
    _fields_ = [("input", ctypes.c_int32), ("mask", ctypes.c_int32)]


class _Unit(ctypes.Structure):
    """`struct unit` of binary_cpu.c."""

    _integers = (
        *("op", "source", "target", "residual", "scratch"),
        *("channels_in", "channels_out", "groups", "kernel", "stride", "padding"),
        *("height_in", "width_in", "height_out", "width_out"),
        *("add", "flag", "terms", "slack"),
    )
    _pointers = ("term", "masks", "valid", "threshold", "bits", "weight", "scale", "bias", "slope")
    _fields_ = [(name, ctypes.c_int64) for name in _integers]
    _fields_ += [(name, ctypes.c_void_p) for name in _pointers]


_OPS = ("binary", "float", "pool", "linear")  # the C file's enum


def cache_folder() -> Path:
    """Where the compiled kernel is kept: $XDG_CACHE_HOME/ebnas, or ~/.cache/ebnas."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "ebnas"


class NoCompiler(Exception):
    """There is no C compiler, or it failed; the message says what it said."""


def compile_kernel(folder: Path) -> Path:
    """The compiled binary_cpu.c in `folder`, built if it is not there yet; two processes may do so at once.

    Its name holds the hash of all that it was built from, and of what it contains: loading a damaged library
    would end the process. Raises NoCompiler, or OSError where the folder cannot be written.
    """
    flags = [*_FLAGS, *shlex.split(os.environ.get("EBNAS_CFLAGS", ""))]
    origin = f"{platform.system()}|{platform.machine()}|{' '.join(flags)}|".encode() + _SOURCE.read_bytes()
    prefix = f"binary_cpu-{_digest(origin)}-"
    for library in folder.glob(f"{prefix}*.so"):
        if library.name == f"{prefix}{_digest(library.read_bytes())}.so":
            return library
    candidates = (os.environ.get("CC"), "cc", "gcc", "clang")
    compiler = next(filter(None, (shutil.which(name) for name in candidates if name)), None)
    if compiler is None:
        raise NoCompiler("no C compiler (cc, gcc, clang) is installed")
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor, aside = tempfile.mkstemp(dir=folder, suffix=".tmp")
    os.close(descriptor)
    try:
        command = [compiler, *flags, "-o", aside, str(_SOURCE), "-lm"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise NoCompiler(f"{compiler} failed: {' '.join(done.stderr.split())[-300:]}")
        library = folder / f"{prefix}{_digest(Path(aside).read_bytes())}.so"
        os.replace(aside, library)
    except subprocess.TimeoutExpired:
        raise NoCompiler(f"{compiler} took more than two minutes") from None
    finally:
        Path(aside).unlink(missing_ok=True)
    return library


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:20]


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        library = ctypes.CDLL(str(compile_kernel(cache_folder())))
    except (
        OSError,
        RuntimeError,
    ):  # no place to keep it: build it for this process alone
        with tempfile.TemporaryDirectory() as folder:
            library = ctypes.CDLL(str(compile_kernel(Path(folder))))
    number, pointer = ctypes.c_int64, ctypes.c_void_p
    library.encode_weights.argtypes = [ctypes.c_int, pointer, number, number, number, pointer]
    library.encode_weights.restype = None
    library.run_units.argtypes = [ctypes.c_int, pointer, number, pointer]
    library.run_units.restype = None
    library.run_network.argtypes = [*library.run_units.argtypes, pointer, number, number, number, pointer]
    library.run_network.restype = None
    return library


def available_kernels() -> tuple[str, ...]:
    """The paths that this machine can run, the fastest last: `c`, then `avx2` and `avx512`. Compiles."""
    return KERNELS[: _library().best_path() + 1]


def _choose_kernel(wanted: str | None) -> str:
    wanted = wanted or os.environ.get("EBNAS_KERNEL") or None
    if wanted not in (None, "torch", *KERNELS):
        raise ValueError(f"unknown kernel {wanted!r}; choose from {(*KERNELS, 'torch')}")
    if wanted == "torch":
        return wanted
    try:
        available = available_kernels()
    except (NoCompiler, OSError) as error:
        if wanted is not None:
            raise ValueError(f"the kernel {wanted!r} cannot be built: {error}") from None
        warnings.warn(f"packed networks run in float, slowly: {error}", RuntimeWarning, stacklevel=4)
        return "torch"
    if wanted is not None and wanted not in available:
        raise ValueError(f"this processor cannot run the kernel {wanted!r}; it can run {available}")
    return wanted or available[-1]


# ------------------------------------------------------------------------------------------------ the plan


def _padded(n: int) -> int:
    return -(-n // 64) * 64


@functools.lru_cache(maxsize=256)
def _taps(kernel: int, stride: int, dilation: int, padding: int, channels: int, height: int, width: int):
    """The constants of a 1-bit convolution with `channels` channels a group on height x width pixels.

    Returns (terms, masks, valid, slack): where in the byte planes of a group each byte of weights finds its
    input, the mask planes (taps, plane), the number of weights inside the image (plane,), and how many bytes
    outside of the planes a tap may touch.
    """
    height_out, width_out = -(-height // stride), -(-width // stride)
    plane, n_bytes = _padded(height_out * width_out), -(-channels // 8)
    terms, masks, reach = [], np.zeros((kernel**2, plane), np.uint8), 0
    for tap in range(kernel**2):
        dy, dx = (d * dilation - padding for d in divmod(tap, kernel))
        rows, columns = np.arange(height_out) * stride + dy, np.arange(width_out) * stride + dx
        inside = np.outer((rows >= 0) & (rows < height), (columns >= 0) & (columns < width))
        masks[tap, : inside.size] = np.where(inside, 255, 0).ravel()
        shift = dy // stride * width_out + dx // stride
        reach = max(reach, abs(shift))
        phase = dy % stride * stride + dx % stride
        for byte in range(n_bytes):
            terms.append(_Term((byte * stride**2 + phase) * plane + shift, tap * plane))
    valid = ((masks > 0).sum(0) * channels).astype(np.int16)
    return (_Term * len(terms))(*terms), masks, valid, _padded(reach) + 64


@functools.lru_cache(maxsize=64)
def _borders(kernel: int, padding: int, average: bool, height: int, width: int):
    """The constants of a pool: whether a column of a window is inside (kernel, plane), 1 / pixels (plane,).

    Inside is a factor of 1 or 0 for an average, a limit of +inf or -inf for a maximum.
    """
    taps, plane = np.arange(kernel)[:, None] - padding, _padded(height * width)
    rows, columns = (((n := np.arange(size) + taps) >= 0) & (n < size) for size in (height, width))
    inside = np.zeros((kernel, plane), np.float32)
    inside[:, : height * width] = np.tile(columns, height)
    if not average:
        inside = np.where(inside, np.float32(np.inf), np.float32(-np.inf))
    share = np.ones(plane, np.float32)
    share[: height * width] /= np.outer(rows.sum(0), columns.sum(0)).ravel()
    return inside, share


class _Plan:
    """A program laid out for one image size: the C file's units and the size of their arena (in floats)."""

    def __init__(self, program: Program, weights: list[dict[str, np.ndarray]], height: int, width: int):
        self.sizes = []  # (channels, height, width) of each buffer
        for channels, level in program.buffers:
            self.sizes.append((channels, -(-height // 2**level), -(-width // 2**level)))
        self.offsets, scratch = self._place(program)
        if height * width > LARGEST_IMAGE or scratch * 4 > LARGEST_ARENA:
            raise ValueError(f"images of {height} x {width} are too large for this network")
        self.units = (_Unit * len(program.steps))()
        self._kept: list[Any] = [weights]  # the units point into these
        needed = 0
        for unit, step, tensors in zip(self.units, program.steps, weights, strict=True):
            unit.scratch = scratch
            needed = max(needed, self._fill(unit, step, tensors))
        self.result = self.units[-1].target = scratch + _padded(needed)
        self.floats = self.result + _padded(len(program.classes)) + 64

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

    def new_arena(self) -> np.ndarray:
        """Memory for one image, float32; zeros, so that what lies beside pixels is never a slow number."""
        memory = np.zeros(self.floats + 16, np.float32)
        return memory[-memory.ctypes.data % 64 // 4 :]

    def channels_of(self, arena: np.ndarray, view: View) -> np.ndarray:
        """The pixels of a view, (channels, height * width), where they lie in the arena."""
        _, height, width = self.sizes[view.buffer]
        planes = arena[self._address(view) :][: view.channels * _padded(height * width)]
        return planes.reshape(view.channels, -1)[:, : height * width]

    def _address(self, view: View) -> int:
        _, height, width = self.sizes[view.buffer]
        return self.offsets[view.buffer] + view.first * _padded(height * width)

    def _fill(self, unit: _Unit, step: Step, tensors: dict[str, np.ndarray]) -> int:
        """Describe a step to the C file. Returns the floats of scratch memory that it needs."""
        unit.op = _OPS.index(step.op)
        unit.source, unit.channels_in = self._address(step.source), step.source.channels
        _, unit.height_in, unit.width_in = self.sizes[step.source.buffer]
        for name, tensor in tensors.items():
            setattr(unit, name, tensor.ctypes.data)
        if step.op == "linear":
            unit.channels_out = len(tensors["bias"])
            return _padded(unit.channels_in)
        unit.target, unit.channels_out = self._address(step.target), step.target.channels
        unit.residual = -1 if step.residual is None else self._address(step.residual)
        _, unit.height_out, unit.width_out = self.sizes[step.target.buffer]
        for name in ("groups", "kernel", "stride", "padding", "add"):
            setattr(unit, name, getattr(step, name))
        unit.flag = step.average or step.relu
        if step.op == "pool":
            borders = _borders(step.kernel, step.padding, step.average, unit.height_in, unit.width_in)
            self._kept.append(borders)
            unit.weight, unit.scale = (array.ctypes.data for array in borders)
            return 3 * _padded(unit.height_in * unit.width_in) + 4 * (_padded(unit.width_in) + 64)
        channels = unit.channels_in // step.groups
        if step.op == "float":
            border = (step.kernel - 1) // step.stride
            height, width = unit.height_out + border, unit.width_out + border
            phases = _padded(channels * step.stride**2 * height * width) + 128
            return phases + 4 * _padded(unit.height_out * width)
        size = (step.kernel, step.stride, step.dilation, step.padding)
        taps = _taps(*size, channels, unit.height_in, unit.width_in)
        self._kept.append(taps)
        terms, masks, valid, unit.slack = taps
        unit.term, unit.terms = ctypes.addressof(terms), len(terms)
        unit.masks, unit.valid = masks.ctypes.data, valid.ctypes.data
        planes = step.groups * -(-channels // 8) * step.stride**2 * masks.shape[1]
        return (planes + 2 * unit.slack + _padded(unit.height_in * unit.width_in)) // 4


def _kernel_weights(step: Step, path: int) -> dict[str, np.ndarray]:
    """The tensors of a step as the C file wants them, by the names of its `struct unit`."""
    tensors = step.tensors
    if step.op == "binary":
        bits = tensors["bits"]
        encoded = np.empty(bits.size, np.uint32)
        filters, terms = bits.shape[0] // step.groups, bits.shape[1] * bits.shape[2]
        _library().encode_weights(path, bits.ctypes.data, step.groups, filters, terms, encoded.ctypes.data)
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


# --------------------------------------------------------------------------------------------- the network


class PackedNetwork:
    """A packed network. Calls from several Python threads at once are safe, as are forks between calls.

    `classes`, `image_size`, `config` (of the exported network), `kernel` (the path that runs). `threads`
    images of a batch run at once; by default as many as this process may use cores.
    """

    def __init__(self, program: Program, *, threads: int | None = None, kernel: str | None = None):
        self.program = program
        self.classes, self.image_size, self.config = program.classes, program.image_size, program.config
        if threads is not None and threads < 1:
            raise ValueError(f"threads is {threads}; it must be at least 1")
        self.threads = threads or _usable_cores()
        self.kernel = _choose_kernel(kernel)
        self._plans: dict[tuple[int, int], tuple[_Plan, deque]] = {}
        self._lock = threading.Lock()
        if self.kernel == "torch":
            self._float_form = _FloatForm(program)
        else:
            self._path = KERNELS.index(self.kernel)
            self._weights = [_kernel_weights(step, self._path) for step in program.steps]

    def preprocess(self, pictures: np.ndarray) -> np.ndarray:
        """uint8 (n, h, w, 3) -> float32 (n, 3, h, w), normalised as in training. Sizes are kept."""
        pictures = np.asarray(pictures)
        if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[3] != len(self.program.mean):
            raise ValueError(f"expected uint8 (n, h, w, 3), not {pictures.dtype} {pictures.shape}")
        scaled = (pictures / np.float32(255) - np.float32(self.program.mean)) / np.float32(self.program.std)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2))

    def __call__(self, images: Any) -> Any:
        """Logits (n, classes) of finite float32 images (n, 3, h, w): an array, or a tensor for a tensor."""
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
        if not np.isfinite(images).all():
            raise ValueError("images must be finite: there are NaN or infinite pixels")
        if self.kernel == "torch":
            return self._float_form(images)
        plan, arenas = self._plan(*images.shape[2:])
        logits = np.empty((len(images), len(self.classes)), np.float32)
        share = -(-len(images) // self.threads) or 1
        parts = [slice(start, start + share) for start in range(0, len(images), share)]
        jobs = [(plan, arenas, images[part], logits[part]) for part in parts]
        threads = [threading.Thread(target=self._run, args=job) for job in jobs[1:]]
        for thread in threads:
            thread.start()
        for job in jobs[:1]:
            self._run(*job)
        for thread in threads:
            thread.join()
        return logits

    def _plan(self, height: int, width: int) -> tuple[_Plan, deque[np.ndarray]]:
        """The plan for a size and its idle arenas. The last few sizes are kept."""
        with self._lock:
            if (height, width) not in self._plans:
                if len(self._plans) == 4:
                    del self._plans[next(iter(self._plans))]
                self._plans[height, width] = (_Plan(self.program, self._weights, height, width), deque())
            return self._plans[height, width]

    def _run(self, plan: _Plan, arenas: deque[np.ndarray], images: np.ndarray, logits: np.ndarray) -> None:
        """Fill `logits` in one call of the kernel, with an arena that no other call has meanwhile."""
        try:
            arena = arenas.pop()
        except IndexError:
            arena = plan.new_arena()
        count, channels, height, width = images.shape
        program = (self._path, plan.units, len(plan.units), arena.ctypes.data)
        sizes = (count, channels, height * width)
        _library().run_network(*program, images.ctypes.data, *sizes, logits.ctypes.data)
        arenas.append(arena)

    def trace(self, image: np.ndarray) -> list[np.ndarray]:
        """What every step wrote, (channels, h, w), for one image (3, h, w): to look into a network."""
        image = np.ascontiguousarray(image, np.float32)
        if self.kernel == "torch":
            return self._float_form.trace(image)
        plan = _Plan(self.program, self._weights, *image.shape[1:])
        arena, outputs = plan.new_arena(), []
        plan.channels_of(arena, View(0, 0, len(image)))[:] = image.reshape(len(image), -1)
        for i, step in enumerate(self.program.steps):
            unit = plan.units[i]
            _library().run_units(self._path, ctypes.addressof(unit), 1, arena.ctypes.data)
            if step.target is None:
                outputs.append(arena[unit.target :][: len(self.classes), None, None].copy())
            else:
                planes = plan.channels_of(arena, step.target)
                outputs.append(planes.reshape(-1, unit.height_out, unit.width_out).copy())
        return outputs


def _usable_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def load(path: str | os.PathLike, *, threads: int | None = None, kernel: str | None = None) -> PackedNetwork:
    """The network of a file. `kernel`: one of avx512, avx2, c, torch instead of the best that runs here.

    Raises PackedFileError (a ValueError) for a file that is not a whole and consistent packed network.
    """
    return PackedNetwork(read_program(path), threads=threads, kernel=kernel)


class _FloatForm:
    """The same program on PyTorch in float32: the form without a compiler, and the kernel's reference."""

    def __init__(self, program: Program):
        try:
            import torch
        except ImportError:
            raise RuntimeError("a packed network needs a C compiler (gcc or clang), or PyTorch") from None
        self.torch, self.program = torch, program
        self.weights = []
        for step in program.steps:
            tensors = {name: torch.from_numpy(tensor) for name, tensor in step.tensors.items()}
            if step.op == "binary":
                tensors["weight"] = torch.from_numpy(unpack_bits(step))
            self.weights.append(tensors)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        return self._run(self.torch.from_numpy(images))[-1].numpy()

    def trace(self, image: np.ndarray) -> list[np.ndarray]:
        *features, logits = (output[0].numpy() for output in self._run(self.torch.from_numpy(image)[None]))
        return [*features, logits[:, None, None]]

    def _run(self, images: Any) -> list[Any]:
        """The target of every step, (n, channels, h, w); the logits (n, classes) last."""
        torch, outputs = self.torch, []
        with torch.inference_mode():
            buffers = {0: images}
            for step, tensors in zip(self.program.steps, self.weights, strict=True):
                x, residual = (self._read(buffers, view) for view in (step.source, step.residual))
                y = self.step(step, tensors, x, residual)
                if step.target is not None:
                    if step.target.buffer not in buffers:
                        channels = self.program.buffers[step.target.buffer][0]
                        buffers[step.target.buffer] = y.new_zeros((y.shape[0], channels, *y.shape[2:]))
                    y = self._read(buffers, step.target) + y if step.add else y
                    buffers[step.target.buffer][:, step.target.slice] = y
                outputs.append(y)
        return outputs

    @staticmethod
    def _read(buffers: dict, view: View | None) -> Any:
        return None if view is None else buffers[view.buffer][:, view.slice]

    def step(self, step: Step, tensors: dict[str, Any], x: Any, residual: Any = None) -> Any:
        torch, F = self.torch, self.torch.nn.functional
        if step.op == "linear":
            return x.mean((2, 3)) @ tensors["weight"].T + tensors["bias"]
        if step.op == "pool":
            if step.kernel == 1:
                return x
            if step.average:
                ceil = {"ceil_mode": step.kernel == 2, "count_include_pad": False}
                return F.avg_pool2d(x, step.kernel, step.stride, step.padding, **ceil)
            return F.max_pool2d(x, step.kernel, step.stride, step.padding)
        if step.op == "float":
            y = F.conv2d(x, tensors["weight"], tensors["bias"], step.stride, step.padding, 1, step.groups)
            return y.relu() if step.relu else y
        x = torch.where(x >= tensors["threshold"].view(-1, 1, 1), 1.0, -1.0)
        borders = []
        for size in (x.shape[3], x.shape[2]):
            reach = (-(-size // step.stride) - 1) * step.stride + (step.kernel - 1) * step.dilation + 1
            borders += [step.padding, reach - step.padding - size]
        dot = F.conv2d(F.pad(x, borders), tensors["weight"], None, step.stride, 0, step.dilation, step.groups)
        scale, bias, slope = tensors["affine"].view(3, -1, 1, 1)
        y = dot * scale + bias
        y = y if residual is None else y + residual
        return torch.where(y > 0, y, y * slope)


def unpack_bits(step: Step) -> np.ndarray:
    """The binary weights of a step, float32 (filters, channels per group, kernel, kernel) of +1 and -1."""
    bits = np.unpackbits(step.tensors["bits"], axis=2, bitorder="little")
    bits = bits[..., : step.source.channels // step.groups]
    weight = bits.transpose(0, 2, 1).astype(np.float32) * 2 - 1
    return np.ascontiguousarray(weight.reshape(*weight.shape[:2], step.kernel, step.kernel))
