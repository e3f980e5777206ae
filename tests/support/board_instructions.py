"""How many instructions a microcontroller takes per image: counted under qemu, not timed.

    python tests/support/board_instructions.py [model.ebnas]  # without a file: the shipped network of shapes

The C form of export.py --c beside float convolutions of the same shapes (board_float.c). Each count is what a
program that computes twice takes beyond one that computes once. The C form's count is of the whole network:
the float stem, signs, both BatchNorms, residuals, PReLU and pools; that of the float convolutions is of the
convolutions alone.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE.parent / "board"), str(HERE.parents[1])]

import test_board  # noqa: E402

from packed import Program, read_program  # noqa: E402


def main(path: str | None = None) -> None:
    program = read_program(path or test_board.SHAPES)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        test_board.written(program, folder / "bits")
        (folder / "float" / "test").mkdir(parents=True)
        (folder / "float" / "test" / "main.c").write_text((HERE / "board_float.c").read_text())
        plugin = folder / "counter.so"
        build = ("gcc", "-shared", "-fPIC", "-O2", "-Wl,--unresolved-symbols=ignore-all")
        subprocess.run([*build, HERE / "arm_counter.c", "-o", plugin], check=True)
        for core in test_board.CORES:
            for level in ("-Os", "-O2", "-O3"):
                bits = counted(core, folder / "bits", plugin, level)
                floats = counted(core, folder / "float", plugin, level, f"-DSHAPES={float_shapes(program)}")
                print(f"{core:11} {level}: {bits / 1e6:8.1f} million, float {floats / 1e6:8.1f}, "
                      f"ratio {floats / bits:5.1f}", flush=True)  # fmt: skip


def counted(core: str, folder: Path, plugin: Path, *flags: str) -> int:
    totals = []
    for runs in (1, 2):
        program = folder / f"count{runs}.elf"
        done = test_board.run_on(core, folder, program, *flags, f"-DRUNS={runs}", plugin=plugin)
        if done.returncode:
            raise SystemExit(f"{core}: {done.stdout}{done.stderr}")
        totals.append(int(done.stderr))
    return totals[1] - totals[0]


def float_shapes(program: Program) -> str:
    shapes = []
    for step in program.steps:
        if step.op in ("binary", "float"):
            size = -(-program.image_size // 2 ** program.buffers[step.source.buffer][1])
            shape = (step.kernel, step.stride, step.dilation, max(step.padding, 0), size)
            shapes.append((step.source.channels, step.target.channels, step.groups, *shape))
    return ",".join("{" + ",".join(map(str, shape)) + "}" for shape in shapes)


if __name__ == "__main__":
    main(*sys.argv[1:])
