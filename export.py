"""Turn a trained stage-2 (W1A1) network into a file of bits that runs without PyTorch.

    python export.py runs/eval-EXP-stage2-TIME             # its last checkpoint, to model.ebnas in the folder
    python export.py runs/eval-EXP-stage2-TIME/best.pt --output small.ebnas

The file is read by packed/, infer.py, benchmark.py infer and evaluate.py --packed.
"""

from __future__ import annotations

if __name__ == "__main__":  # torch takes seconds to import
    from utils import end_on_interrupt

    end_on_interrupt()

import argparse
from pathlib import Path

import options
from baselines import check_packable, trained_network
from checkpoint import load_checkpoint, resolve_checkpoint
from packed import PackedFileError, parse_program, program_bytes
from packed.lowering import lower
from utils import InputError, check_output, run_main, write_atomically


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument("checkpoint", help="a checkpoint file or a run's folder, of stage 2")
    parser.add_argument("--output", type=Path, help="default: model.ebnas beside the checkpoint")
    return parser


def main(args: argparse.Namespace) -> None:
    path = resolve_checkpoint(args.checkpoint)
    output = args.output or path.with_name("model.ebnas")
    check_output(output, path)
    checkpoint = load_checkpoint(path)
    check_packable(checkpoint)
    model = trained_network(checkpoint)
    content = program_bytes(lower(model, checkpoint["data"]))
    try:
        parse_program(content)
    except PackedFileError as error:  # weights so large that they overflow, no classes, a std of 0
        raise InputError(f"{path} makes no packed network: {error}") from None
    write_atomically(output, content)
    model.auxiliary_head = None  # of training only
    weights = 4 * sum(parameter.numel() for parameter in model.parameters())
    print(f"{output}: {len(content):,} bytes, {weights / len(content):.1f} times fewer than float32 weights")


if __name__ == "__main__":
    run_main(main, parser)
