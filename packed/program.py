"""The flat program of a packed network: its steps, their validation, and the file that holds them.

A program is a list of steps over numbered buffers. A buffer is [channels, level]: its size is the image's,
halved `level` times and rounded up. A step reads and writes channels of buffers, [buffer, first, channels]:
  binary  sign(x >= threshold), 1-bit convolution, scale and bias, plus `residual`, PReLU
  float   convolution, bias, ReLU; kernel 2 at stride 2 convolves blocks of 2 x 2 pixels
  pool    maximum or average; kernel 1 copies, with `shuffle` n channel i * (channels / n) + j to j * n + i
  linear  mean over space, then a matrix: the logits, the last step
Its result is written to `target`, or added to it with `add`.

A file is one safetensors file: its tensors are the bits and the folded floats, its metadata is the program
in JSON, which begins with the format and a SHA-256 of all other bytes of the file: a file is refused in which
any byte has changed. Format 1, which had no checksum, is read with a warning. `value_range` and a field of
_OPTIONAL_FIELDS are written where they say something: who knows no such field refuses the file, and reads all
others.

Every number is finite, but a threshold may be -inf (a sign that is always +1). Nothing that a network
computes of images within LARGEST_PIXEL overflows float32: validation follows how large each channel can get.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import reprlib
import stat
import warnings
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

FORMAT = "ebnas packed network 2"
FORMAT_1 = "ebnas packed network 1"  # the same without a checksum
_SEAL = json.dumps(f'{{"format":"{FORMAT}","sha256":"')[1:-1].encode()  # in a file, the checksum follows it
LARGEST_FILE = 1 << 30
LARGEST_PIXEL = 1e6  # magnitude of the images' values
LARGEST_VALUE = 1e30  # and of all others: a mean's sum over 2^24 pixels must not overflow float32 either
MOST_CHANNELS = 1 << 22  # of all buffers together


class PackedFileError(ValueError):
    """The file is not a packed network, or not a whole and consistent one."""


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
    shuffle: int = 1
    name: str = ""  # the module it comes from


@dataclass(frozen=True)
class Program:
    """The content of a file."""

    buffers: tuple[tuple[int, int], ...]  # (channels, level); the first is the image
    steps: tuple[Step, ...]
    classes: tuple[str, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    resize: int  # of the shorter side, before the central crop of image_size
    config: dict
    value_range: tuple[float, float] | None = None  # black and white of pictures of more than 8 bits


_STEP_FIELDS = {  # beyond op, source and name
    "binary": {"target", "add", "residual", "kernel", "stride", "padding", "dilation", "groups"},
    "float": {"target", "kernel", "stride", "padding", "groups", "relu"},
    "pool": {"target", "add", "kernel", "stride", "padding", "average"},
    "linear": set(),
}
_OPTIONAL_FIELDS = {"pool": {"shuffle"}}
_STEP_RANGES = {
    "kernel": (1, 7),
    "stride": (1, 2),
    "padding": (-1, 16),
    "dilation": (1, 4),
    "groups": (1, 4096),
    "shuffle": (2, 64),
}
_POOLS = {  # kernel, stride, padding, average
    (1, 1, 0, False),
    (2, 2, 0, True),
    *((3, stride, 1, average) for stride in (1, 2) for average in (False, True)),
}


def read_program(path: str | os.PathLike) -> Program:
    """The validated program of a file. Raises PackedFileError, or OSError where it cannot be read."""
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):  # a pipe would be waited for, and a device has no end
        raise PackedFileError(f"{path} is not a regular file")
    if status.st_size > LARGEST_FILE:
        size = f"{status.st_size} bytes; a packed network has at most {LARGEST_FILE}"
        raise PackedFileError(f"{path} has {size}")
    with open(path, "rb") as file:
        content = file.read(status.st_size)
    try:
        program = parse_program(content)
    except PackedFileError as error:
        raise PackedFileError(f"{path} is not a packed network: {error}") from None
    if _SEAL not in content:
        warning = f"{path} is of format 1, in which damage can go unseen; export.py writes format 2"
        warnings.warn(warning, RuntimeWarning, stacklevel=3)
    return program


def parse_program(content: bytes) -> Program:
    """The validated program of a file's content. Raises PackedFileError."""
    whole = _SEAL not in content or sealed(content) == content
    _require(whole, "its bytes are not those that its checksum is of; it was damaged")
    try:
        tensors = safetensors.numpy.load(content)
        # the library has checked the header, but hands out its metadata only for files on disk
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        network = json.loads(header["__metadata__"]["network"])
        return _checked_program(network, tensors, FORMAT if _SEAL in content else FORMAT_1)
    except (PackedFileError, MemoryError):
        raise
    except Exception as error:  # the library and JSON have many
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:100]}"
        raise PackedFileError(f"it is damaged or of another program ({reason})") from None


def program_bytes(program: Program) -> bytes:
    """The content of a program's file: what `read_program` reads."""
    tensors, steps = {}, []
    for i, step in enumerate(program.steps):
        tensors |= {f"{i}.{name}": tensor for name, tensor in step.tensors.items()}
        fields = ["op", "source", "name", *sorted(_STEP_FIELDS[step.op])]
        if step.shuffle != 1:
            fields.append("shuffle")
        steps.append({name: getattr(step, name) for name in fields})
    fields = {field.name: getattr(program, field.name) for field in dataclasses.fields(program)}
    if program.value_range is None:
        del fields["value_range"]
    network = {"format": FORMAT, "sha256": "0" * 64, **fields, "steps": steps}
    return sealed(safetensors.numpy.save(tensors, {"network": json.dumps(network, separators=(",", ":"))}))


def sealed(content: bytes) -> bytes:
    """The content of a file of format 2 with the checksum that its other bytes give."""
    start = content.index(_SEAL) + len(_SEAL)
    digest = hashlib.sha256(content[:start])
    digest.update(memoryview(content)[start + 64 :])
    return content[:start] + digest.hexdigest().encode() + content[start + 64 :]


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise PackedFileError(message)


def _integer(value: Any, low: int, high: int, what: str) -> int:
    if type(value) is not int or not low <= value <= high:
        raise PackedFileError(f"{what} is {reprlib.repr(value)}, not a whole number from {low} to {high}")
    return value


def _numbers(value: Any, count: int, what: str) -> tuple[float, ...]:
    ok = isinstance(value, list) and len(value) == count
    ok = ok and all(type(v) in (int, float) and abs(v) <= LARGEST_VALUE for v in value)
    _require(ok, f"{what} is {reprlib.repr(value)}, not {count} numbers")
    return tuple(float(v) for v in value)


def _exact_fields(fields: Any, names: set[str], what: str) -> None:
    _require(isinstance(fields, dict), f"{what} is not an object")
    odd = sorted(names.symmetric_difference(fields))
    _require(not odd, f"{what} lacks, or should not have, {reprlib.repr(odd)}")


def _checked_program(fields: Any, tensors: dict[str, np.ndarray], file_format: str) -> Program:
    names = {"format", *(field.name for field in dataclasses.fields(Program))}
    if not isinstance(fields, dict) or "value_range" not in fields:
        names.remove("value_range")
    _exact_fields(fields, names | {"sha256"} if file_format == FORMAT else names, "the network")
    _require(fields["format"] == file_format, f"its format is {reprlib.repr(fields['format'])}")
    _require(isinstance(fields["buffers"], list), "buffers is not a list")
    buffers = []
    for i, buffer in enumerate(fields["buffers"]):
        _require(isinstance(buffer, list) and len(buffer) == 2, f"buffer {i} is not [channels, level]")
        channels = _integer(buffer[0], 1, 1 << 16, f"channels of buffer {i}")
        buffers.append((channels, _integer(buffer[1], 0, 16, f"level of buffer {i}")))
    _require(bool(buffers) and buffers[0][1] == 0, "buffer 0 is not the image")

    channels = sum(channels for channels, _ in buffers)
    _require(channels <= MOST_CHANNELS, f"its buffers have {channels} channels, more than {MOST_CHANNELS}")

    steps, left = [], dict(tensors)
    largest = [np.full(channels, np.nan) for channels, _ in buffers]  # magnitudes; NaN: not yet written
    largest[0][:] = LARGEST_PIXEL
    _require(isinstance(fields["steps"], list) and bool(fields["steps"]), "there are no steps")
    for i, step in enumerate(fields["steps"]):
        steps.append(_checked_step(i, step, buffers, largest, left))
    _require(not left, f"no step uses the tensors {reprlib.repr(sorted(left))}")
    ops = [step.op for step in steps]
    _require(ops.count("linear") == 1 and ops[-1] == "linear", "the last step must be the only classifier")

    classes = fields["classes"]
    ok = isinstance(classes, list) and all(isinstance(name, str) for name in classes)
    ok = ok and 0 < len(classes) == len(steps[-1].tensors["bias"])
    _require(ok, "the class names do not fit the classifier")
    _require(isinstance(fields["config"], dict), "config is not an object")
    image_size = _integer(fields["image_size"], 1, 4096, "image_size")
    mean, std = (_numbers(fields[name], buffers[0][0], name) for name in ("mean", "std"))
    ok = all(s > 0 and (1 + abs(m)) / s <= LARGEST_PIXEL for m, s in zip(mean, std, strict=True))
    _require(ok, f"mean {reprlib.repr(mean)} and std {reprlib.repr(std)} leave no usable pixels")
    value_range = None
    if "value_range" in fields:
        value_range = _numbers(fields["value_range"], 2, "value_range")
        _require(value_range[0] < value_range[1], f"value_range is {reprlib.repr(value_range)}")
    return Program(
        buffers=tuple(buffers),
        steps=tuple(steps),
        classes=tuple(classes),
        mean=mean,
        std=std,
        image_size=image_size,
        resize=_integer(fields["resize"], image_size, 8192, "resize"),
        config=fields["config"],
        value_range=value_range,
    )


def _checked_step(index: int, fields: Any, buffers: list, largest: list, tensors: dict) -> Step:
    """The step, with its tensors taken out of `tensors` and its target's magnitudes put into `largest`."""
    what = f"step {index}"
    op = fields.get("op") if isinstance(fields, dict) else None
    _require(isinstance(op, str) and op in _STEP_FIELDS, f"{what}: unknown operation {reprlib.repr(op)}")
    optional = _OPTIONAL_FIELDS.get(op, set()) & fields.keys()
    _exact_fields(fields, {"op", "source", "name"} | _STEP_FIELDS[op] | optional, what)
    values: dict[str, Any] = {"op": op, "target": None, "name": fields["name"]}
    _require(isinstance(fields["name"], str), f"{what}: its name is not a string")
    for name, value in fields.items():
        if name in ("source", "target", "residual"):
            values[name] = _checked_view(value, buffers, f"{what}: {name}", optional=name == "residual")
        elif name in _STEP_RANGES:
            values[name] = _integer(value, *_STEP_RANGES[name], f"{what}: {name}")
        elif name in ("add", "average", "relu"):
            _require(type(value) is bool, f"{what}: {name} is {reprlib.repr(value)}, not true or false")
            values[name] = value
    step = Step(**values, tensors={})

    for view in (step.source, step.residual, step.target if step.add else None):
        unwritten = view is not None and np.isnan(largest[view.buffer][view.slice]).any()
        _require(not unwritten, f"{what} reads what no step wrote")
    if step.target is not None:
        _check_sizes(step, buffers, what)
    for name, (dtype, shape) in _tensor_shapes(step, tensors.get(f"{index}.bias")).items():
        tensor = tensors.pop(f"{index}.{name}", None)
        _require(tensor is not None, f"{what} lacks its tensor {name!r}")
        if tensor.dtype != dtype or tensor.shape != shape:
            ours = f"{tensor.dtype} {tensor.shape}"
            raise PackedFileError(f"{what}: {name} is {ours}, not {np.dtype(dtype)} {shape}")
        if name == "threshold":
            _require(bool((tensor < np.inf).all()), f"{what}: a threshold is not a number")
        elif dtype is np.float32:
            _require(bool(np.isfinite(tensor).all()), f"{what}: {name} is not finite")
        step.tensors[name] = np.array(tensor)  # aligned and writable, which a view of the file is not
    if op == "binary" and (spare := -(step.source.channels // step.groups) % 8):
        beyond = step.tensors["bits"][..., -1] >> (8 - spare)
        _require(not beyond.any(), f"{what}: there are bits past the last channel")
    magnitudes = _magnitudes(step, largest)
    _require(bool((magnitudes <= LARGEST_VALUE).all()), f"{what}: its values can overflow")
    if step.target is not None:
        largest[step.target.buffer][step.target.slice] = magnitudes
    return step


def _magnitudes(step: Step, largest: list[np.ndarray]) -> np.ndarray:
    """The largest magnitude, float64 (channels,), of what a step writes and of all its sums on the way there.

    `largest` holds that of every buffer's channels, NaN where nothing was written.
    """

    def of(view: View) -> np.ndarray:
        return largest[view.buffer][view.slice]

    if step.op == "pool":
        result = of(step.source).reshape(step.shuffle, -1).T.ravel()
    elif step.op == "binary":
        scale, bias, slope = np.abs(step.tensors["affine"].astype(np.float64))
        result = scale * (step.source.channels // step.groups * step.kernel**2) + bias
        if step.residual is not None:
            result = result + of(step.residual)
        result = result * np.maximum(slope, 1)
    else:
        weights, bias = (np.abs(step.tensors[name]) for name in ("weight", "bias"))
        result = weights.sum(tuple(range(1, weights.ndim)), dtype=np.float64) * of(step.source).max() + bias
    return result + of(step.target) if step.add else result


def _checked_view(value: Any, buffers: list, what: str, *, optional: bool) -> View | None:
    if optional and value is None:
        return None
    _require(isinstance(value, list) and len(value) == 3, f"{what} is not [buffer, first, channels]")
    buffer = _integer(value[0], 0, len(buffers) - 1, f"{what}: buffer")
    first = _integer(value[1], 0, buffers[buffer][0] - 1, f"{what}: first")
    return View(buffer, first, _integer(value[2], 1, buffers[buffer][0] - first, f"{what}: channels"))


def _check_sizes(step: Step, buffers: list, what: str) -> None:
    """Raise where a step's views do not fit each other or its kernel, or its target overlaps an input."""
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
        shuffles = step.kernel == 1 and step.source.channels % step.shuffle == 0
        _require(shuffles or step.shuffle == 1, f"{what}: no such shuffle")
        return
    divides = step.source.channels % step.groups == 0 and target.channels % step.groups == 0
    blocks = step.op == "float" and step.kernel == step.stride == 2
    _require(divides and (step.kernel % 2 == 1 or blocks), f"{what}: no such convolution")
    if step.op == "float":
        _require(step.padding == (step.kernel - 1) // 2, f"{what}: padding is not half the kernel")
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


def unpack_bits(step: Step) -> np.ndarray:
    """The binary weights of a step, float32 (filters, channels per group, kernel, kernel) of +1 and -1."""
    bits = np.unpackbits(step.tensors["bits"], axis=2, bitorder="little")
    bits = bits[..., : step.source.channels // step.groups]
    weight = bits.transpose(0, 2, 1).astype(np.float32) * 2 - 1
    return np.ascontiguousarray(weight.reshape(*weight.shape[:2], step.kernel, step.kernel))
