"""The C form for microcontrollers computes what packed's plain path does, to the bit."""

import ctypes
import dataclasses
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
from support.packed_programs import one_step, random_program
from support.scripts import ROOT

from board import BoardFiles, board_bits, board_files
from board.plan import BoardPlan
from images.shapes import draw_shapes
from packed import PackedNetwork, Program, read_program
from packed.kernel import Plan, kernel_weights
from packed.picture import central_square

SUPPORT = Path(__file__).parents[1] / "support"
SHAPES = ROOT / "models" / "shapes.ebnas"
WARNINGS = ("-std=c99", "-Wall", "-Wextra", "-Wconversion", "-Werror", "-Isrc")
SANITIZE = ("-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all")
CORES = {  # compiler flags, and the emulated board that runs them: qemu has no Cortex-M0+ of enough memory
    "Cortex-M0+": (("-mcpu=cortex-m0plus",), "mps2-an385"),
    "Cortex-M4": (("-mcpu=cortex-m4", "-mfloat-abi=hard", "-mfpu=fpv4-sp-d16"), "mps2-an386"),
    "Cortex-M7": (("-mcpu=cortex-m7", "-mfloat-abi=hard", "-mfpu=fpv5-sp-d16"), "mps2-an500"),
}


def needs(*tools: str, packages: str) -> None:
    if absent := [tool for tool in tools if shutil.which(tool) is None]:
        pytest.skip(f"{' and '.join(absent)} not installed (Debian: apt-get install {packages})")


def written(program: Program, folder: Path, name: str = "net") -> BoardFiles:
    """The C form with noise as its test vector, in `folder`."""
    shape = (1, program.image_size, program.image_size, program.buffers[0][0])
    picture = np.random.default_rng(1).integers(0, 256, shape, np.uint8)
    net = PackedNetwork(program, kernel="c", threads=1)
    board = board_files(program, name, picture[0], net(net.normalize(picture))[0])
    for path, content in board.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(content)
    return board


def check(folder: Path, *flags: str) -> None:
    """Build the test vector's program for this machine and run it."""
    needs("gcc", packages="gcc")
    sources = sorted(map(str, folder.glob("src/*.c")))
    command = ["gcc", *WARNINGS, *flags, *sources, "test/main.c", "-o", "check"]
    subprocess.run(command, cwd=folder, check=True)
    done = subprocess.run([folder / "check"], capture_output=True, text=True)
    assert done.returncode == 0 and "the same bits" in done.stdout, done.stdout + done.stderr


@pytest.fixture(scope="module")
def shapes(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("board")
    written(read_program(SHAPES), folder)
    return folder


@pytest.fixture(scope="module")
def compiled(shapes) -> ctypes.CDLL:
    needs("gcc", packages="gcc")
    sources = sorted(map(str, shapes.glob("src/*.c")))
    command = ["gcc", *WARNINGS, "-O2", "-shared", "-fPIC", *sources, "-o", "net.so"]
    subprocess.run(command, cwd=shapes, check=True)
    return ctypes.CDLL(str(shapes / "net.so"))


@pytest.mark.parametrize("seed", range(8))
def test_random_programs_under_sanitizers(seed, tmp_path):
    """Buffers that are added to, overwritten and read in part; odd channels, groups, paddings and sizes."""
    program = random_program(np.random.default_rng(seed))
    written(dataclasses.replace(program, image_size=7 + seed % 3, resize=12), tmp_path)
    check(tmp_path, "-O0", *SANITIZE)


def test_the_shipped_network_under_sanitizers(shapes):
    check(shapes, "-O1", *SANITIZE)


def test_the_pictures_of_the_test_set(compiled):
    program = read_program(SHAPES)
    net = PackedNetwork(program, kernel="c", threads=1)
    pictures, _ = draw_shapes(40, size=32, seed=3)
    pictures = np.ascontiguousarray(pictures.transpose(0, 2, 3, 1))
    arena = np.full(BoardPlan(program).arena // 4, np.nan, np.float32)
    logits = np.empty((len(pictures), len(program.classes)), np.float32)
    for picture, row in zip(pictures, logits, strict=True):
        best = compiled.net_run(picture.ctypes.data_as(ctypes.c_void_p), row.ctypes.data_as(ctypes.c_void_p),
                                arena.ctypes.data_as(ctypes.c_void_p))  # fmt: skip
        assert best == row.argmax()
    np.testing.assert_array_equal(logits, net(net.normalize(pictures)))


@pytest.mark.parametrize("core", CORES)
def test_an_emulated_board(core, shapes, tmp_path):
    """The logits are the same bits with a floating-point unit that can fuse, and may, and without any."""
    needs("arm-none-eabi-gcc", "qemu-system-arm",
          packages="gcc-arm-none-eabi libnewlib-arm-none-eabi qemu-system-arm")  # fmt: skip
    done = run_on(core, shapes, tmp_path / "check.elf", "-O2", "-ffp-contract=fast")
    assert done.returncode == 0 and "the same bits" in done.stdout, done.stdout + done.stderr


def run_on(core: str, folder: Path, program: Path, *flags: str, plugin: Path | None = None):
    """The test vector's program, built for a core and run under qemu."""
    cpu, machine = CORES[core]
    sources = sorted(map(str, folder.glob("src/*.c")))
    start = ("-nostartfiles", "--specs=rdimon.specs", "-T", str(SUPPORT / "board.ld"))
    command = ["arm-none-eabi-gcc", *cpu, "-mthumb", *WARNINGS, *flags, *sources, "test/main.c"]
    subprocess.run(
        [*command, str(SUPPORT / "board_start.c"), *start, "-o", str(program)], cwd=folder, check=True
    )
    command = ["qemu-system-arm", "-machine", machine, "-nographic", "-monitor", "none", "-serial", "none"]
    command += ["-semihosting-config", "enable=on,target=native", *(("-plugin", plugin) if plugin else ())]
    return subprocess.run([*command, "-kernel", program], capture_output=True, text=True, timeout=120)


def test_risc_v_and_clang_compile_it(shapes):
    """Without a C library: Debian's compiler for RISC-V has none."""
    needs("riscv64-unknown-elf-gcc", packages="gcc-riscv64-unknown-elf")
    flags = ("-march=rv32imc", "-mabi=ilp32", "-ffreestanding", "-O2", "-c", "-o", "/dev/null")
    for source in shapes.glob("src/*.c"):
        subprocess.run(["riscv64-unknown-elf-gcc", *WARNINGS, *flags, source], cwd=shapes, check=True)
        if shutil.which("clang"):
            subprocess.run(["clang", *WARNINGS, "-c", "-o", "/dev/null", source], cwd=shapes, check=True)


@pytest.mark.parametrize("core", ["Cortex-M0+"])  # whose code is the longest
def test_flash_of_the_shipped_network(core, shapes, tmp_path):
    needs("arm-none-eabi-gcc", packages="gcc-arm-none-eabi libnewlib-arm-none-eabi")
    flags = (*CORES[core][0], "-mthumb", "-Os", "-c", "src/net.c", "-o", str(tmp_path / "net.o"))
    subprocess.run(["arm-none-eabi-gcc", *WARNINGS, *flags], cwd=shapes, check=True)
    sizes = subprocess.run(
        ["arm-none-eabi-size", tmp_path / "net.o"], capture_output=True, text=True, check=True
    )
    text, data, bss = map(int, sizes.stdout.splitlines()[1].split()[:3])
    assert text <= 110_000 and data == bss == 0
    constants = int(
        re.search(r"needs ([\d,]+) bytes of flash", (shapes / "README.md").read_text())[1].replace(",", "")
    )
    assert constants < text < constants + 13_000


def test_ram_of_the_shipped_network():
    """At most half of what the plan takes that keeps every buffer as floats; a fifth at 16 x 16."""
    program = read_program(SHAPES)
    plan = Plan(program, [kernel_weights(step, 0) for step in program.steps], 32, 32)
    assert BoardPlan(program).arena <= 4 * plan.floats / 2
    assert BoardPlan(dataclasses.replace(program, image_size=16, resize=16)).arena < 150_000


def test_the_bits_are_those_of_the_plain_path():
    for filters in (1, 2, 3, 4, 7, 13):
        program = one_step(
            "binary", 10, 2 * filters,
            {
                "threshold": np.zeros(10, np.float32),
                "bits": np.random.default_rng(0).integers(0, 32, (2 * filters, 9, 1), np.uint8),
                "affine": np.ones((3, 2 * filters), np.float32),
            },
            kernel=3, padding=1, groups=2,
        )  # fmt: skip
        step = next(step for step in program.steps if step.op == "binary")
        np.testing.assert_array_equal(board_bits(step).ravel(), kernel_weights(step, 0)["bits"] & 255)


@pytest.mark.parametrize("shape", [(120, 160), (32, 32), (31, 57), (97, 40), (20, 24), (200, 200)])
def test_a_frame_is_resized_as_a_picture_is(shape, compiled):
    rng = np.random.default_rng(0)
    colours = rng.integers(0, 1 << 16, shape)
    rgb = np.stack(
        [(colours >> 11) * 255 // 31, (colours >> 5 & 63) * 255 // 63, (colours & 31) * 255 // 31], 2
    )
    grey = rng.integers(0, 256, shape, np.uint8)
    frames = {0: grey, 1: colours.astype(">u2")}
    pictures = {0: np.repeat(grey[..., None], 3, 2), 1: rgb.astype(np.uint8)}
    for kind, frame in frames.items():
        pixels = np.empty((32, 32, 3), np.uint8)
        height, width = shape
        code = compiled.net_frame(frame.ctypes.data_as(ctypes.c_void_p), width, height, kind,
                                  pixels.ctypes.data_as(ctypes.c_void_p))  # fmt: skip
        assert code == 0
        expected = central_square(pictures[kind], resize=32, size=32)
        # Pillow resizes rows first or columns first, as its version chooses, and rounds in between
        assert np.abs(pixels.astype(int) - expected).max() <= 1 and (pixels != expected).mean() < 0.3
    assert compiled.net_frame(None, 0, 5, 0, None) == compiled.net_frame(None, 4000, 4000, 0, None) == -1


def test_the_command(scripts, fails):
    done = scripts.run("export.py", SHAPES, "--c", "tiny_net")
    assert "RAM: " in done.stdout and "floats of cells.1.preprocess0" in done.stdout
    folder = scripts.folder / "tiny_net"
    check(folder, "-O1")
    assert (folder / "library.properties").read_text().startswith("name=tiny_net\n")
    assert 'SRCS "src/tiny_net.c" "src/tiny_net_frame.c"' in (folder / "CMakeLists.txt").read_text()
    assert not any("$" in path.read_text() for path in folder.rglob("*.*") if path.name != "CMakeLists.txt")
    assert "is no name in C" in fails("export.py", SHAPES, "--c", "tiny-net")
    (scripts.folder / "file").touch()
    assert "is not a folder" in fails("export.py", SHAPES, "--c", "file")
