"""How many ARM instructions a packed network takes per image: counted under qemu, not timed.

    python tests/support/arm_instructions.py [model.ebnas]  # without a file: the published CIFAR-10 network

NEON and plain C beside float convolutions of the same shapes (arm_float.c). Each count is what a program that
computes twice takes beyond one that computes once. The 1-bit units' count includes their signs, both
BatchNorms, residual and PReLU; that of the float convolutions nothing but the convolutions.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parents[1])]

from genotypes import get_genotype  # noqa: E402
from model import ModelConfig, build_model  # noqa: E402
from networks import lowering  # noqa: E402
from packed import KERNELS, PackedNetwork, Program, read_program  # noqa: E402
from packed import kernel as packed_kernel  # noqa: E402
from packed.kernel import _OPS, Plan  # noqa: E402
from support import kernel_process  # noqa: E402


def main(path: str | None = None) -> None:
    if reason := kernel_process.missing():
        raise SystemExit(reason)
    program = read_program(path) if path else published()
    with tempfile.TemporaryDirectory() as folder:
        plugin, driver, floats = (Path(folder) / name for name in ("counter.so", "driver", "floats"))
        build = ("gcc", "-shared", "-fPIC", "-O2", "-Wl,--unresolved-symbols=ignore-all")
        subprocess.run([*build, HERE / "arm_counter.c", "-o", plugin], check=True)
        kernel_process.build(driver, *kernel_process.DRIVER)
        kernel_process.build(floats, HERE / "arm_float.c")
        kernel_process.install(kernel_process.Library(driver))
        counts = {
            f"{name}, {kernel}": packed_count(program, driver, plugin, kernel, ops)
            for name, ops in (("whole network", _OPS), ("1-bit units", ("binary", "linear")))
            for kernel in ("c", "neon")
        }
        counts["float convolutions"] = float_count(program, floats, plugin)
    for name, count in counts.items():
        print(f"{name:24}{count / 1e6:10.2f} million instructions per image")
    units = counts["1-bit units, neon"]
    print(f"1-bit units: plain C / NEON {counts['1-bit units, c'] / units:.2f}")
    print(f"float convolutions / NEON {counts['float convolutions'] / units:.2f}")


def published() -> Program:
    model = build_model(ModelConfig(get_genotype("EBNAS"))).eval()
    data = {
        "set": "cifar10",
        "image_size": 32,
        "classes": list("0123456789"),
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
    }
    return lowering.lower(model, data)


def packed_count(program: Program, driver: Path, plugin: Path, kernel: str, ops: tuple[str, ...]) -> int:
    """Of an image through the steps of these kinds; the last, the classifier, is always among them."""
    net = PackedNetwork(program, kernel=kernel, threads=1)
    size = program.image_size
    plan = Plan(program, net._weights, size, size)
    arena = plan.new_arena()
    chosen = [unit for unit in plan.c_steps if _OPS[unit.op] in ops]
    units = (type(plan.c_steps[0]) * len(chosen))(*chosen)
    images, logits = np.zeros((2, 3, size, size), np.float32), np.zeros((2, len(program.classes)), np.float32)
    totals = []
    for n in (1, 2):
        counted = kernel_process.Library(driver, "-plugin", str(plugin), stderr=subprocess.PIPE)
        counted.sizes = packed_kernel.library().sizes
        sizes = (n, 3, size * size)
        pointers = (images.ctypes.data, *sizes, logits.ctypes.data)
        counted.run_network(KERNELS.index(kernel), units, len(units), arena.ctypes.data, *pointers)
        totals.append(int(counted.end()))
    return totals[1] - totals[0]


def float_count(program: Program, floats: Path, plugin: Path) -> int:
    """Of the float convolutions with the shapes of the 1-bit ones."""
    lines = []
    for step in program.steps:
        if step.op == "binary":
            size = -(-program.image_size // 2 ** program.buffers[step.source.buffer][1])
            shape = (step.kernel, step.stride, step.dilation, max(step.padding, 0), size, size)
            lines.append((step.source.channels, step.target.channels, step.groups, *shape))
    totals = []
    for n in (1, 2):
        text = "".join(f"{n} {' '.join(map(str, line))}\n" for line in lines)
        command = [*kernel_process.EMULATOR, "-plugin", plugin, floats]
        done = subprocess.run(command, input=text, stderr=subprocess.PIPE, text=True, check=True)
        totals.append(int(done.stderr))
    return totals[1] - totals[0]


if __name__ == "__main__":
    main(*sys.argv[1:])
