"""The flags that scripts share, and at each flag its bounds. No torch before a parser is made: infer.py."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from genotypes import OPERATIONS
from utils import InputError

LARGE = 1e30
"""What is larger does not fit float32 in an optimiser, or is a slip of the hand."""


def integer(least: int, most: float = LARGE) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `least` to `most`."""

    def whole_number(text: str) -> int:
        value = _number(int, text, "a whole number")
        return _within(value, least <= value <= most, f"at least {least} and at most {most:g}")

    return whole_number


def real(
    least: float = -LARGE, below: float = math.inf, *, above: float = -math.inf, most: float = LARGE
) -> Callable[[str], float]:
    """The type of a flag that takes numbers of at least `least`, more than `above`, less than `below`, and at
    most `most`."""

    def number(text: str) -> float:
        value = _number(float, text, "a number")
        lower = f"above {above:g}" if above > -math.inf else f"at least {least:g}"
        upper = f"below {below:g}" if below < math.inf else f"at most {most:g}"
        return _within(value, least <= value < below and above < value <= most, f"{lower} and {upper}")

    return number


def _number(kind: Callable[[str], Any], text: str, name: str) -> Any:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"is {text}; it must be {name}") from None


def _within(value: float, fits: bool, rule: str) -> Any:
    if not fits:
        raise argparse.ArgumentTypeError(f"is {value}; it must be {rule}")
    return value


def run_label(text: str) -> str:
    """The type of --save: part of a folder's name."""
    if {"/", os.sep} & set(text) or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"is {text}; it is a name without slashes, the folder is under runs/"
        )
    return text


EMPTY = "is empty; give a value, or leave it out"


def path(text: str) -> Path:
    """What `type=Path` stands for: `Path("")` would be the present folder."""
    if not text:
        raise argparse.ArgumentTypeError(EMPTY)
    return Path(text)


positive_float = real(above=0)
non_negative_float = real(0)
probability = real(0, 1)


class Store(argparse.Action):
    """argparse's `store`, which also notes in `given` that the user gave the flag."""

    def __call__(self, parser, namespace, value, option_string=None):
        if "" in (value if isinstance(value, list) else [value]) and self.dest != "note":
            raise argparse.ArgumentError(self, EMPTY)
        setattr(namespace, self.dest, value)
        vars(namespace).setdefault("given", set()).add(self.dest)


class Switch(Store):
    """argparse's `store_true`, noted in `given` likewise."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, dest, nargs=0, default=False, help=help)

    def __call__(self, parser, namespace, value, option_string=None):
        super().__call__(parser, namespace, True, option_string)


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors (one line, exit code 2) and that notes what was given.

    The flags it returns have `given`, the names of those that the user gave.
    """

    def __init__(self, description: str | None = None, **keywords):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords
        )
        self.register("action", None, Store)
        self.register("action", "store", Store)
        self.register("action", "store_true", Switch)
        self.register("type", Path, path)
        # flag: whether it is idle beside the others, and why
        self.idle: dict[str, tuple[Callable[[argparse.Namespace], bool], str]] = {}

    def error(self, message: str):
        # argparse: `argument --epochs: is 0; it must ...`
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        raise InputError(f"{message}; {self.prog} --help lists the flags")

    def parse_args(self, args: Sequence[str] | None = None, namespace=None) -> argparse.Namespace:
        flags = super().parse_args(args, namespace)
        flags.given = frozenset(vars(flags).get("given", ()))
        flags.idle = tuple(self._idle_ones(flags))
        return flags

    def check(self, saved: dict[str, Any]) -> None:
        """Raise InputError where a flag has a value, in what a run saved, that it does not take."""
        ours = as_dict(self.parse_args([]))
        saved = {name: value for name, value in saved.items() if name in ours}
        words = [
            f"--{name}" if value is True else f"--{name}={value}"
            for name, value in saved.items()
            if value is not None and value is not False
        ]
        taken = vars(self.parse_args(words))
        for name, value in saved.items():
            if taken[name] != value:
                raise InputError(f"--{name} is {value!r}")

    def retire(self, name: str, reason: str) -> None:
        """Accept a flag of PC-DARTS that has no use in this script."""
        self.add_argument(f"--{name}", help=f"accepted, but without use: {reason}")
        self.idle[name] = (lambda _flags: True, reason)

    def needs(self, name: str, other: str) -> None:
        """Say that flag `name` has no use without `other`."""
        self.idle[name] = (lambda flags: not getattr(flags, other), f"it needs --{other}")

    def needs_gpu(self, name: str) -> None:
        """Say that flag `name` has no use on a CPU."""
        self.idle[name] = (lambda flags: not _on_gpu(flags), "it is for a GPU, and this runs on the CPU")

    def _idle_ones(self, flags: argparse.Namespace) -> list[str]:
        lines = [
            f"--{name} has no use here: {reason}"
            for name, (is_idle, reason) in self.idle.items()
            if name in flags.given and is_idle(flags)
        ]
        if "LOCAL_RANK" in os.environ and _on_gpu(flags):
            numbers = [f"--{name}" for name in ("gpu",) if name in flags.given]
            if ":" in (flags.device or ""):
                numbers.append(f"the number in --device {flags.device}")
            reason = "has no use here: under torchrun each process takes the GPU of its local rank"
            lines += [f"{number} {reason}" for number in numbers]
        return lines


def _on_gpu(flags: argparse.Namespace) -> bool:
    """Whether `distributed.setup` takes a GPU."""
    import torch

    device = getattr(flags, "device", "cpu")  # a script without the flag runs on the CPU
    return (device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")


def check_alone(args: argparse.Namespace, name: str) -> None:
    """Raise InputError where more than the flag `name` was given."""
    others = [other for other in sorted(args.given - {name}) if getattr(args, other) != []]
    if others:
        raise InputError(f"--{name} takes no other arguments; leave out {', '.join(others)}")


def as_dict(args: argparse.Namespace) -> dict[str, Any]:
    """The flags alone, as args.json and checkpoints keep them."""
    return {name: value for name, value in vars(args).items() if name not in ("given", "idle")}


def command_line(flags: Mapping[str, Any]) -> list[str]:
    """Words for a shell: a flag that is True is a switch, one that is False or None is left out."""
    words = []
    for name, value in flags.items():
        if value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def add_device_flags(parser: Parser) -> None:
    """Where and in which arithmetic a script computes."""
    from engine import PRECISIONS

    flag = parser.add_argument
    flag(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="bf16 and fp16: autocast, faster on a GPU, with other results (docs/performance.md)",
    )
    flag("--tf32", action="store_true", help="let a GPU round fp32 convolutions and products to TF32")
    flag("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.needs_gpu("tf32")


def add_layout_flags(parser: Parser) -> None:
    """How convolutions are computed, where it changes their speed and no more than rounding."""
    from engine import MEMORY_FORMATS

    flag = parser.add_argument
    flag(
        "--memory_format",
        choices=MEMORY_FORMATS,
        default="auto",
        help="of images; auto: channels_last in training on a CPU, where it is faster, else contiguous "
        "(channels_last has not been measured on a GPU)",
    )
    flag(
        "--cudnn_benchmark",
        action="store_true",
        help="let cuDNN try its algorithms on the first batch of a size: faster steps, less repeatable runs",
    )
    parser.needs_gpu("cudnn_benchmark")


def add_kernels_flag(parser: Parser) -> None:
    from kernels import CHOICES

    parser.add_argument(
        "--kernels",
        choices=CHOICES,
        default="auto",
        help="what computes, the same but for rounding: native, C for a CPU; torch, fewer and larger tensor "
        "operations; plain, the modules as they are read; auto: native on a CPU with a C compiler, or torch",
    )


def add_worker_flag(parser: Parser) -> None:
    default = min(4, os.cpu_count() or 1)
    parser.add_argument(
        "--workers", type=integer(0, 1024), default=default, help="processes that read images"
    )


def add_run_flags(parser: Parser, *, epochs: int, batch_size: int) -> None:
    """Flags of everything that trains."""
    from kernels.compilation import MODES

    flag = parser.add_argument
    flag(
        "--save",
        type=run_label,
        default="EXP",
        help="name of the run; its folder is runs/<kind>-<name>-<time>",
    )
    flag("--note", default="", help="a note on this run, kept in its args.json")
    flag("--epochs", type=integer(1), default=epochs)
    flag("--batch_size", type=integer(1), default=batch_size, help="images a step, over all GPUs together")
    flag(
        "--accumulate",
        metavar="N",
        type=integer(1),
        default=1,
        help="take a step's images in N parts, for a GPU that is too small: batch normalisation sees a part",
    )
    flag("--learning_rate", type=positive_float, default=1e-3, help="initial rate of the weights' Adam")
    flag(
        "--grad_clip",
        type=non_negative_float,
        default=5.0,
        help="largest norm of the gradient; 0 leaves it as it is",
    )
    flag("--report_freq", type=integer(1), default=50, help="steps between log lines")
    flag(
        "--save_freq",
        type=integer(0),
        default=0,
        help="steps between checkpoints within an epoch; 0: none but before its evaluation and at its end",
    )
    flag("--seed", type=integer(0, 2**32 - 1024), default=0)  # NumPy's largest, less the processes' own
    add_worker_flag(parser)
    flag(
        "--resume",
        metavar="PATH",
        help="go on with a run's folder; `auto`: with the newest unfinished one of the same flags",
    )
    flag("--compile", action="store_true", help="torch.compile: minutes at the start, then faster steps")
    flag(
        "--compile_mode",
        choices=MODES,
        default="default",
        help="of torch.compile; reduce-overhead: CUDA graphs, for a GPU that waits for the host",
    )
    parser.needs("compile_mode", "compile")
    add_device_flags(parser)
    add_layout_flags(parser)
    add_kernels_flag(parser)
    flag("--gpu", type=integer(0, 1024), default=0, help="number of the CUDA GPU")
    parser.needs_gpu("gpu")
    parser.retire("momentum", "Adam is the optimiser; a recipe with SGD has its own")
    parser.retire("model_path", "checkpoints are in the run's folder")


def add_set_flags(parser: Parser, sets: Sequence[str]) -> None:
    """Flags of the sets that fit in memory."""
    flag = parser.add_argument
    flag("--set", choices=sets, default="cifar10")
    flag("--data", default="data", help="where the set is, or is downloaded to")
    flag("--image_size", type=integer(16, 4096), default=32, help="size that `folder` images are brought to")
    flag(
        "--train_images",
        metavar="N",
        type=integer(0),
        default=0,
        help="take N training images, the first of each class, for a trial; 0: all",
    )
    flag("--cutout", action="store_true")
    flag("--cutout_length", type=integer(1, 4096), default=16)
    parser.needs("cutout_length", "cutout")
    parser.idle["data"] = (lambda flags: flags.set == "shapes", "--set shapes is drawn, and reads nothing")


def add_network_flags(
    parser: Parser, *, init_channels: int, layers: int, drop_path_prob: float, label_smooth: float
) -> None:
    """Flags of a derived network and of its two stages."""
    from binary_ops import WEIGHT_BINARIZATIONS

    flag = parser.add_argument
    flag(
        "--arch",
        default="EBNAS",
        help="a row of the published tables (docs/rows.md), random:SEED, a genotype file, or a search run's "
        "folder",
    )
    flag(
        "--family", choices=tuple(OPERATIONS), help="whose blocks to build the genotype in; default: its own"
    )
    flag(
        "--recipe",
        choices=("ebnas", "own", "best"),
        default="ebnas",
        help="EBNAS's training, the same for every row; the system's own: its flags are then the defaults; "
        "EBNAS's with what was measured to help, a --teacher",
    )
    flag("--variant", help="of BNAS as_run or intended, of BATS learned or mean; default: the first")
    of_row = "default: that of --arch, of EBNAS"
    flag("--init_channels", type=integer(1, 10_000), default=init_channels, help=f"{of_row} {init_channels}")
    flag("--layers", type=integer(3, 1_000), default=layers, help=f"number of cells; {of_row} {layers}")
    flag(
        "--groups",
        type=integer(1, 10_000),
        default=14,
        help=f"groups of the cells' convolutions, in EBNAS and BATS; {of_row} 14",
    )
    flag("--auxiliary", action="store_true", help="train with the auxiliary head")
    flag("--auxiliary_weight", type=non_negative_float, default=0.4)
    parser.needs("auxiliary_weight", "auxiliary")
    flag(
        "--drop_path_prob",
        type=probability,
        default=drop_path_prob,
        help="at the last epoch; it grows from 0",
    )
    flag("--label_smooth", type=probability, default=label_smooth)
    flag("--learning_rate_min", type=non_negative_float, default=0.0, help="the cosine schedule ends here")
    flag("--weight_decay", type=non_negative_float, default=0.0)
    flag(
        "--binary",
        action="store_true",
        help="stage 2: binary weights and activations, from stage 1's weights",
    )
    flag(
        "--stage1",
        choices=("w1a32", "w32a1", "w32a32"),
        default="w1a32",
        help="what stage 1 makes binary: weights, activations, or nothing (a teacher)",
    )
    flag("--weight_binarization", choices=WEIGHT_BINARIZATIONS, default="plain")
    flag(
        "--pretrained",
        metavar="PATH",
        help="stage-1 run or checkpoint to start stage 2 from; default: the newest that fits",
    )
    flag("--from_scratch", action="store_true", help="train stage 2 without stage 1")


def add_beyond_flags(parser: Parser) -> None:
    """Flags that EBNAS does not have and that train the best networks of its field (docs/method.md)."""
    from binary_ops import ACTIVATIONS

    flag = parser.add_argument
    flag("--activation", choices=tuple(ACTIVATIONS), default="prelu", help="rprelu: with ReActNet's shift")
    flag(
        "--teacher",
        metavar="PATH|NAME",
        help="learn from a trained network: a run or checkpoint, or a torchvision network with its weights",
    )
    flag(
        "--teacher_weight",
        type=real(above=0, most=1),
        default=1.0,
        help="of the teacher's loss; that of the labels has the rest",
    )
    flag("--teacher_temperature", type=real(above=0, most=1_000), default=1.0)
    parser.needs("teacher_weight", "teacher")
    parser.needs("teacher_temperature", "teacher")
    flag(
        "--stage1_weight_decay",
        type=non_negative_float,
        default=0.0,
        help="of convolutions' and linear layers' weights in stage 1 only (--weight_decay: of all, always)",
    )
    flag(
        "--ema",
        metavar="DECAY",
        type=probability,
        default=0.0,
        help="evaluate and keep an exponential moving average of the weights over steps",
    )
    flag("--clip_weights", action="store_true", help="keep the latent weights of 1 bit within [-1, 1]")
