"""Turn a trained stage-2 (W1A1) network into a file of bits that runs without PyTorch.

    python export.py runs/eval-EXP-stage2-TIME             # its last checkpoint, to model.ebnas in the folder
    python export.py runs/eval-EXP-stage2-TIME/best.pt --output small.ebnas
    python export.py runs/eval-EXP-stage2-TIME --web page  # page/index.html: the network in a browser
    python export.py model_best.pth.tar --data DIR         # of the original EBNAS program; classes: of images
    python export.py models/shapes.ebnas --onnx shapes.onnx --pt2 shapes.pt2
    python export.py models/shapes.ebnas --qonnx fpga.onnx # for FPGAs: its 1-bit values are marked
    python export.py models/shapes.ebnas --c shapes        # C99 for a microcontroller, in the folder shapes

The .ebnas file is read by packed/, infer.py and benchmark.py infer; a page holds it and the same kernel.
ONNX, QONNX and .pt2 have no 1-bit arithmetic: they hold a float for each bit, many times the bytes, and run
as float networks do. Given another form, export.py writes no .ebnas file unless --output names it.
"""

from __future__ import annotations

import os
from pathlib import Path

from flags import options
from utils import InputError, check_output, check_usage, run_main, write_atomically


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("network", help="a checkpoint file or a run's folder, of stage 2; or an .ebnas file")
    flag("--output", type=Path, metavar="FILE", help="default: model.ebnas beside the checkpoint")
    flag(
        "--web", type=Path, metavar="DIR", help="a page, DIR/index.html, that needs no server and no network"
    )
    flag("--onnx", type=Path, metavar="FILE", help="for ONNX Runtime, OpenVINO and others, in float32")
    flag(
        "--qonnx", type=Path, metavar="FILE", help="for tools that make FPGAs of networks, as hls4ml and FINN"
    )
    flag("--pt2", type=Path, metavar="FILE", help="for torch.export.load, in float32")
    flag(
        "--c",
        type=Path,
        metavar="DIR",
        help="C99 for a microcontroller: a library's folder, whose name is that of the C functions",
    )
    options.add_original_flags(parser)
    flag("--data", metavar="DIR", help="where the images are, for the names of classes")
    return parser


if __name__ == "__main__":
    check_usage(parser)

import numpy as np

from board import BoardFiles, board_files
from images.files import readable_classes
from networks.lowering import lower
from networks.registry import trained_network
from packed import (
    NoCompiler,
    PackedFileError,
    PackedNetwork,
    Program,
    parse_program,
    program_bytes,
    read_program,
)
from packed.bipolar import qonnx_bytes
from packed.exchange import onnx_bytes, pt2_bytes
from run.originals import Said, find_file, load_as_said, named_by_its_images
from web import page


def main(flags: options.Flags) -> None:
    args = flags.values
    packed = args.network.endswith(".ebnas")
    path = Path(args.network) if packed else find_file(args.network)
    others = (args.web, args.onnx, args.qonnx, args.pt2, args.c)
    if packed and not any((args.output, *others)):
        raise InputError(f"{path} is exported already; give --web, --onnx, --qonnx, --pt2 or --c")
    output = args.output or (None if any(others) else path.with_name("model.ebnas"))
    web_page = args.web / "index.html" if args.web else None
    named = [file for file in (output, args.onnx, args.qonnx, args.pt2, web_page) if file]
    places = [os.path.realpath(place) for place in (*named, args.web, args.c) if place]
    if len(set(places)) < len(places):
        raise InputError(
            "two of --output, --web, --onnx, --qonnx, --pt2 and --c are the same file; give another name"
        )
    for folder in filter(None, (args.web, args.c)):
        if not folder.is_dir():
            check_output(folder)  # what a file could be made of, a folder can
            if folder.exists():
                raise InputError(f"{folder} is not a folder; give another name")
    if args.c:
        check_c_name(args.c)
    for file in named:
        if file != web_page or args.web.is_dir():
            check_output(file, path)

    said = Said(args.arch, args.variant, None, args.set, args.image_size, args.data)
    if packed and said != Said():
        raise InputError(f"{path} knows its own network and images: leave out --arch, --set and their like")
    program, saved = (read_packed(path), "") if packed else lowered(path, said)
    content = program_bytes(program)
    makers = {args.onnx: onnx_form, args.qonnx: qonnx_form, args.pt2: pt2_bytes, output: lambda _: content}
    makers[web_page] = lambda _: page(content)
    made = {file: make(program) for file, make in makers.items() if file}  # before anything is written
    board = c_form(program, args.c.name) if args.c else None
    if args.web:
        args.web.mkdir(exist_ok=True)
    for file, form in made.items():
        write_atomically(file, form)
        print(f"{file}: {len(form):,} bytes{saved if file == output else ''}")
    if board:
        write_board(args.c, board)


def check_c_name(folder: Path) -> None:
    """The folder's name becomes that of C functions."""
    if not (folder.name.isascii() and folder.name.isidentifier()):
        raise InputError(f"--c {folder}: {folder.name!r} is no name in C; use letters, digits and _")


def c_form(program: Program, name: str) -> BoardFiles:
    """The C form with a test vector: a picture of noise and the logits that the plain path gives for it."""
    shape = (1, program.image_size, program.image_size, program.buffers[0][0])
    picture = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    try:
        net = PackedNetwork(program, kernel="c", threads=1)
    except (NoCompiler, ValueError) as error:
        raise InputError(f"--c computes a test vector, which needs a C compiler: {error}") from None
    return board_files(program, name, picture[0], net(net.normalize(picture))[0])


def write_board(folder: Path, board: BoardFiles) -> None:
    for path, content in board.files.items():
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        write_atomically(folder / path, content.encode())
    print(f"{folder}: {len(board.files)} files of C")
    print(f"  flash: {board.constants:,} bytes of constants, and some 10,000 of code")
    print(f"  RAM: {board.arena:,} bytes, of which the largest at once are")
    for name, size in board.largest:
        print(f"    {size:9,}  {name}")


def read_packed(path: Path) -> Program:
    try:
        return read_program(path)
    except PackedFileError as error:
        raise InputError(str(error)) from None


def lowered(path: Path, said: Said) -> tuple[Program, str]:
    """The program of a checkpoint's network, and what it saves."""
    checkpoint = load_as_said(path, said)
    model = trained_network(checkpoint)
    data = checkpoint["data"]
    if said.root:
        data = named_by_its_images({**data, "root": said.root})
    program = lower(model, {**data, "classes": readable_classes(data["classes"], Path(data["root"]))})
    content = program_bytes(program)
    try:
        parse_program(content)
    except PackedFileError as error:  # weights so large that they overflow, no classes, a std of 0
        raise InputError(f"{path} makes no packed network: {error}") from None
    model.auxiliary_head = None  # of training only
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    return program, f", {weights / len(content):.1f} times fewer than float32 weights"


def onnx_form(program: Program) -> bytes:
    try:
        return onnx_bytes(program)
    except ImportError as error:
        raise InputError(f"--onnx needs two more packages (pip install onnx onnxscript): {error}") from None


def qonnx_form(program: Program) -> bytes:
    try:
        return qonnx_bytes(program)
    except ImportError as error:
        raise InputError(f"--qonnx needs one more package (pip install onnx): {error}") from None


if __name__ == "__main__":
    run_main(main, parser)
