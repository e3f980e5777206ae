"""A packed network as C99 for a microcontroller: constants, and the plain path of packed/binary_cpu.c.

The folder that `board_files` describes is an Arduino library and an ESP-IDF component as it stands.
board/files/ holds its texts, in which $NAME and the like are filled in.
"""

from __future__ import annotations

import re
import string
from pathlib import Path
from typing import NamedTuple

import numpy as np

from packed.kernel import _CStep, _taps, kernel_weights
from packed.program import Program

from .plan import SIGNS, BoardPlan, Task

_HERE = Path(__file__).parent
_KERNEL = _HERE.parent / "packed" / "binary_cpu.c"
_FILES = {  # template: the file it becomes; {} is the network's name
    "network.h": "src/{}.h",
    "frame.c": "src/{}_frame.c",
    "main.c": "test/main.c",
    "README": "README.md",
    "library.properties": "library.properties",
    "CMakeLists.txt": "CMakeLists.txt",
    "frame.ino": "examples/frame/frame.ino",
}
_OPS = ("BINARY", "FLOAT", "POOL", "LINEAR", "SIGNS")
_INTEGERS = [name for name in _CStep._integers if name not in ("chunks", "op")]
_POINTERS = {  # of struct step, by operation; the others are made on the board or have no use there
    "SIGNS": ("threshold",),
    "BINARY": ("term", "bits", "scale", "bias", "slope"),
    "FLOAT": ("weight", "bias"),
    "POOL": (),
    "LINEAR": ("weight", "bias"),
}
_TYPES = {"term": "struct term", "bits": "uint8_t"}  # the others are floats


class BoardFiles(NamedTuple):
    """The files for a board, by path, and the memory that they take there, in bytes."""

    files: dict[str, str]
    constants: int
    arena: int
    largest: list[tuple[str, int]]  # parts of the arena at the step that needs most, with their bytes


def board_files(program: Program, name: str, picture: np.ndarray, logits: np.ndarray) -> BoardFiles:
    """The C form of a program under a C name; `picture` (size, size, channels), uint8, and its `logits` are
    the test vector: what packed's path "c" gives for it."""
    plan = BoardPlan(program)
    constants = _Constants()
    tasks = ",\n".join(_task(task, constants) for task in plan.tasks)
    size, channels = program.image_size, program.buffers[0][0]
    fields = {
        "NAME": name,
        "UPPER": name.upper(),
        "SIZE": size,
        "RESIZE": program.resize,
        "CHANNELS": channels,
        "CLASSES": len(program.classes),
        "ARENA": plan.arena,
        "CONSTANTS": f"{constants.bytes + len(plan.tasks) * TASK_BYTES:,}",
        "ARENA_TEXT": f"{plan.arena:,}",
        "LARGEST": "\n".join(f"- {each.name}: {4 * each.floats:,}" for each in plan.largest(4)),
        "NAMES": ",\n    ".join(_string(each) for each in program.classes),
        "MEAN": ", ".join(_float(v) for v in program.mean),
        "STD": ", ".join(_float(v) for v in program.std),
        "IMAGE": plan.image.offset,
        "LOGITS": plan.tasks[-1].c_step.target,
        "PIXELS": _rows(str(v) for v in picture.ravel()),
        "EXPECTED": _rows(_float(v) for v in logits),
        "KERNEL": _kernel(),
        "BOARD": (_HERE / "board.c").read_text(),
        "ARRAYS": "\n".join(constants.lines),
        "TASKS": tasks,
    }
    made = {path.format(name): _filled(file, fields) for file, path in _FILES.items()}
    made[f"src/{name}.c"] = _filled("network.c", fields)
    largest = [(each.name, 4 * each.floats) for each in plan.largest(4)]
    return BoardFiles(made, constants.bytes + len(plan.tasks) * TASK_BYTES, plan.arena, largest)


TASK_BYTES = 4 * (len(_CStep._integers) + len(_CStep._pointers) + 4)
"""A task's on a processor of 32 bits."""


class _Constants:
    """The arrays of the C file, each once."""

    def __init__(self):
        self.lines, self.bytes = [], 0
        self._names: dict[tuple, str] = {}

    def name(self, kind: str, array: np.ndarray) -> str:
        key = kind, array.dtype.str, array.tobytes()
        if key not in self._names:
            name = self._names[key] = f"{kind}_{len(self._names)}"
            self.bytes += array.nbytes
            if kind == "term":
                values = _rows(f"{{{first}, {mask}}}" for first, mask in array.tolist())
            else:
                text = _float if array.dtype == np.float32 else str
                values = _rows(text(value) for value in array.ravel().tolist())
            length = len(array) if kind == "term" else array.size
            declared = _TYPES.get(kind, "float")
            self.lines.append(f"static const {declared} {name}[{length}] = {{\n{values}}};")
        return self._names[key]


def _task(task: Task, constants: _Constants) -> str:
    c_step, step = task.c_step, task.step
    op = _OPS[c_step.op]
    fields = [f".op = {op}"]
    fields += [f".{name} = {getattr(c_step, name)}" for name in _INTEGERS if getattr(c_step, name)]
    arrays = _arrays(task)
    for name in _POINTERS[op]:
        fields.append(f".{name} = {constants.name(name, arrays[name])}")
    others = {"dilation": step.dilation, "first": task.first, "end": task.end, "tables": task.tables}
    values = ", ".join(f".{name} = {value}" for name, value in others.items() if value)
    comment = (step.name or step.op).replace("*/", "")
    return f"    /* {comment} */\n    {{{{{', '.join(fields)}}}, {values or '.first = 0'}}}"


def _arrays(task: Task) -> dict[str, np.ndarray]:
    """The constants of a task, by the names of `struct step`."""
    step, c_step = task.step, task.c_step
    if step.op != "binary":
        return kernel_weights(step, 0)
    if c_step.op == SIGNS:
        return {"threshold": step.tensors["threshold"]}
    scale, bias, slope = step.tensors["affine"]
    shape = (step.kernel, step.stride, step.dilation, step.padding, step.source.channels // step.groups)
    terms = _taps(*shape, c_step.height_in, c_step.width_in)["term"]
    return {"term": terms, "bits": board_bits(step), "scale": scale, "bias": bias, "slope": slope}


def board_bits(step) -> np.ndarray:
    """A 1-bit step's weights, a byte of 8 channels each, as the plain path reads them:
    [group][block of filters][term][filter], in blocks of 4 filters, then 2, then 1."""
    bits = step.tensors["bits"]
    bits = bits.reshape(step.groups, bits.shape[0] // step.groups, -1)  # (group, filter, term)
    blocks, first, filters = [], 0, bits.shape[1]
    for size in (4, 2, 1):
        while filters - first >= size:
            blocks.append(bits[:, first : first + size].transpose(0, 2, 1).reshape(step.groups, -1))
            first += size
    return np.concatenate(blocks, axis=1)


def _kernel() -> str:
    """The part of binary_cpu.c that is marked for boards, with its names and types written out."""
    source = _KERNEL.read_text()
    parts = re.findall(r"/\* board: from here \*/\n(.*?)/\* board: to here \*/\n", source, re.DOTALL)
    text = "\n".join(part.rstrip() + "\n" for part in parts)
    text = re.sub(r"#if defined\(BOARD\).*?\n(.*?)#else.*?#endif\n", r"\1", text, flags=re.DOTALL)
    return re.sub(r"FN\((\w+)\)", r"\1", text).replace("int64_t", "int32_t")


def _filled(file: str, fields: dict[str, object]) -> str:
    return string.Template((_HERE / "files" / file).read_text()).substitute(fields)


def _float(value: float) -> str:
    """A C99 constant of exactly this float32."""
    value = float(np.float32(value))
    return ("-INFINITY" if value < 0 else "INFINITY") if np.isinf(value) else f"{value.hex()}f"


def _string(text: str) -> str:
    """A C string of a name in UTF-8; what is not plain is in octal, which ends after three digits."""
    plain = set(string.ascii_letters + string.digits + " _-.,:;()+'/")
    return '"' + "".join(chr(b) if chr(b) in plain else f"\\{b:03o}" for b in text.encode()) + '"'


def _rows(values) -> str:
    """Comma-separated values in lines of about 100 characters."""
    lines, line = [], "   "
    for value in values:
        if len(line) + len(value) > 100:
            lines.append(line)
            line = "   "
        line += f" {value},"
    return "\n".join([*lines, line])
