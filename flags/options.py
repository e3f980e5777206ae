"""The flags that scripts share, and at each flag its bounds. No torch before a parser is made: infer.py."""

from __future__ import annotations

import argparse
import math
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flags.choices import (
    ACTIVATIONS,
    COMPILE_MODES,
    FORMS,
    MEMORY_FORMATS,
    PRECISIONS,
    SETS,
    STAGE1_BITS,
    TRAINED_SETS,
    WEIGHT_BINARIZATIONS,
)
from genotypes import OPERATIONS
from images.split import TEST_PART, is_unsplit
from search_space import PRIMITIVES, checked_operations
from utils import InputError

LARGE = 1e30
"""What is larger does not fit float32 in an optimiser, or is a slip of the hand."""


def integer(least: int, most: float = LARGE) -> Callable[[str], int]:
    """The type of a flag that takes whole numbers from `least` to `most`."""

    def whole_number(text: str) -> int:
        value = _number(int, text, "a whole number")
        return _within(value, least <= value <= most, f"at least {least} and at most {most:g}")

    return whole_number


def operations(text: str) -> list[str]:
    """The type of a flag that takes a search space: names of search_space.ENTRIES, separated by commas."""
    try:
        return list(checked_operations([name.strip() for name in text.split(",") if name.strip()]))
    except InputError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


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


EMPTY = "is empty; give a value, or leave it out"


def run_label(text: str) -> str:
    """The type of --save: part of a folder's name."""
    if not text:
        raise argparse.ArgumentTypeError(EMPTY)
    if {"/", os.sep} & set(text) or not text.isprintable():
        raise argparse.ArgumentTypeError(
            f"is {text}; it is a name without slashes, the folder is under runs/"
        )
    return text


def path(text: str) -> Path:
    """The type of a flag that takes a path. It may not be empty: `Path("")` would be the present folder."""
    if not text:
        raise argparse.ArgumentTypeError(EMPTY)
    return Path(text)


positive_float = real(above=0)
non_negative_float = real(0)
probability = real(0, 1)


def text(text: str) -> str:
    """The type of a flag that takes words."""
    if not text:
        raise argparse.ArgumentTypeError(EMPTY)
    return text


@dataclass(frozen=True)
class Flags:
    """What a user typed: the value of every flag, the names of those that were given, and a line for each of
    these that has no use beside the others."""

    values: argparse.Namespace
    given: frozenset[str]
    idle: tuple[str, ...]


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keeps the lines of a script's docstring, and says each flag's default."""

    def _get_help_string(self, action: argparse.Action) -> str:
        words = action.help or ""
        nothing = any(action.default is each for each in (None, False, "", argparse.SUPPRESS))
        if nothing or "default" in words:
            return words
        return f"{words} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors (one line, exit code 2). It knows which flags have no
    use beside others."""

    def __init__(self, description: str | None = None, **keywords):
        super().__init__(description=description, formatter_class=HelpFormatter, **keywords)
        self.register("type", None, text)
        self.register("type", Path, path)
        # flag: whether it is idle beside the others, and why
        self.idle: dict[str, tuple[Callable[[argparse.Namespace], bool], str]] = {}

    def error(self, message: str):
        # argparse: `argument --epochs: is 0; it must ...`
        message = message.removeprefix("argument ").replace(": is ", " is ", 1)
        raise InputError(f"{message}; {self.prog} --help lists the flags")

    def read(self, words: Sequence[str] | None = None) -> Flags:
        """The flags among `words`, by default those of the command line."""
        values, given = self.parse_args(words), self._given(words)
        return Flags(values, given, tuple(self._idle_ones(values, given)))

    def _given(self, words: Sequence[str] | None) -> frozenset[str]:
        """The names of the flags among `words`: those that a second parse finds, without defaults."""
        defaults = {action: action.default for action in self._all_actions()}
        try:
            for action in defaults:
                action.default = argparse.SUPPRESS
            return frozenset(vars(self.parse_args(words)))
        finally:
            for action, default in defaults.items():
                action.default = default

    def _all_actions(self) -> Iterator[argparse.Action]:
        for action in self._actions:
            yield action
            if isinstance(action, argparse._SubParsersAction):
                for parser in action.choices.values():
                    yield from parser._all_actions()

    def check(self, saved: dict[str, Any]) -> None:
        """Raise InputError where a flag has a value, in what a run saved, that it does not take."""
        ours = vars(self.parse_args([]))
        saved = {name: value for name, value in saved.items() if name in ours}
        words = []
        for name, value in saved.items():
            if isinstance(value, list) and all(isinstance(each, str) for each in value):  # as `operations`
                words.append(f"--{name}={','.join(value)}")
            elif isinstance(value, list):
                words += [f"--{name}", *map(str, value)]
            elif value is not None and value is not False:
                words.append(f"--{name}" if value is True else f"--{name}={value}")
        taken = vars(self.parse_args(words))
        for name, value in saved.items():
            if taken[name] != value:
                raise InputError(f"--{name} is {value!r}")

    def retire(self, name: str, reason: str, **how: Any) -> None:
        """Accept a flag that has no use in this script: one of PC-DARTS, or of an earlier version."""
        self.add_argument(f"--{name}", help=f"accepted, but without use: {reason}", **how)
        self.idle[name] = (lambda _flags: True, reason)

    def needs(self, name: str, other: str) -> None:
        """Say that flag `name` has no use without `other`."""
        self.idle[name] = (lambda flags: not getattr(flags, other), f"it needs --{other}")

    def needs_gpu(self, name: str) -> None:
        """Say that flag `name` has no use on a CPU."""
        self.idle[name] = (lambda flags: not _on_gpu(flags), "it is for a GPU, and this runs on the CPU")

    def _idle_ones(self, flags: argparse.Namespace, given: Collection[str]) -> list[str]:
        lines = [
            f"--{name} has no use here: {reason}"
            for name, (is_idle, reason) in self.idle.items()
            if name in given and is_idle(flags)
        ]
        if "LOCAL_RANK" in os.environ and _on_gpu(flags):
            numbers = [f"--{name}" for name in ("gpu",) if name in given]
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


def check_alone(flags: Flags, name: str, *, beside: Sequence[str] = ()) -> None:
    """Raise InputError where more than the flag `name` and those `beside` it was given."""
    if others := sorted(flags.given - {name, *beside}):
        raise InputError(f"--{name} takes no other arguments; leave out {', '.join(others)}")


def command_line(flags: Mapping[str, Any]) -> list[str]:
    """Words for a shell: a flag that is True is a switch, one that is False or None is left out."""
    words = []
    for name, value in flags.items():
        if isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif value is not None and value is not False:
            words += [f"--{name}"] if value is True else [f"--{name}", str(value)]
    return words


def add_device_flags(parser: Parser) -> None:
    """Where and in which arithmetic a script computes."""
    flag = parser.add_argument_group("arithmetic").add_argument
    flag("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    flag(
        "--precision",
        choices=PRECISIONS,
        default="fp32",
        help="bf16 and fp16: autocast, faster on a GPU, with other results (docs/performance.md)",
    )
    flag("--tf32", action="store_true", help="let a GPU round fp32 convolutions and products to TF32")
    parser.needs_gpu("tf32")


def add_layout_flags(parser: Parser) -> None:
    """How convolutions are computed, where it changes their speed and no more than rounding."""
    flag = parser.add_argument_group("layout").add_argument
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
    parser.add_argument(
        "--kernels",
        choices=("auto", *FORMS),
        default="auto",
        help="what computes, the same but for rounding: native, C for a CPU; torch, fewer and larger tensor "
        "operations; plain, the modules as they are read; auto: native on a CPU with a C compiler, or torch",
    )


def add_worker_flag(parser: Parser) -> None:
    default = min(4, os.cpu_count() or 1)
    parser.add_argument(
        "--workers", type=integer(0, 1024), default=default, help="processes that read images"
    )


def add_run_flags(parser: Parser) -> None:
    """Flags of everything that trains, but for those of `add_step_flags`."""
    flag = parser.add_argument_group("run").add_argument
    flag(
        "--save",
        type=run_label,
        default="EXP",
        help="name of the run; its folder is runs/<kind>-<name>-<time>",
    )
    flag("--note", type=str, default="", help="a note on this run, kept in its args.json")
    flag("--report_freq", type=integer(1), default=50, help="steps between log lines")
    flag(
        "--save_freq",
        type=integer(0),
        default=0,
        help="steps between checkpoints within an epoch; 0: none but before its evaluation and at its end",
    )
    flag(
        "--seed",
        type=integer(0, 2**32 - 1024),  # NumPy's largest, less the processes' own
        default=0,
        help="of weights, of the order of the images and of their augmentation",
    )
    flag(
        "--resume",
        metavar="PATH",
        help="go on with a run's folder; `auto`: with the newest unfinished one of the same flags",
    )
    add_worker_flag(parser)
    add_device_flags(parser)
    flag = parser.add_argument_group("speed").add_argument
    flag("--compile", action="store_true", help="torch.compile: minutes at the start, then faster steps")
    flag(
        "--compile_mode",
        choices=COMPILE_MODES,
        default="default",
        help="of torch.compile; reduce-overhead: CUDA graphs, for a GPU that waits for the host",
    )
    parser.needs("compile_mode", "compile")
    flag("--gpu", type=integer(0, 1024), default=0, help="number of the CUDA GPU")
    parser.needs_gpu("gpu")
    add_layout_flags(parser)
    add_kernels_flag(parser)
    parser.retire("momentum", "Adam is the optimiser; a recipe with SGD has its own")
    parser.retire("model_path", "checkpoints are in the run's folder")


def add_step_flags(parser: Parser, defaults: Mapping[str, Any], *, of_recipe: bool = False) -> None:
    """Epochs, batch, rate and clipping. `of_recipe`: the value comes from --recipe where none is given, and
    `defaults` are those of EBNAS's."""
    flag = parser.add_argument_group("training").add_argument

    def usual(name: str, words: str) -> dict[str, Any]:
        if not of_recipe:
            return {"default": defaults[name], "help": words}
        return {"help": f"{words}; {of_ebnas(defaults[name])}"}

    flag("--epochs", type=integer(1), **usual("epochs", "passes over the training images"))
    flag("--batch_size", type=integer(1), **usual("batch_size", "images a step, over all GPUs together"))
    flag(
        "--accumulate",
        metavar="N",
        type=integer(1),
        default=1,
        help="take a step's images in N parts, for a GPU that is too small: batch normalisation sees a part",
    )
    flag(
        "--learning_rate",
        type=positive_float,
        **usual("learning_rate", "of the weights; the highest where it changes"),
    )
    flag(
        "--grad_clip",
        type=non_negative_float,
        **usual("grad_clip", "largest norm of the gradient; 0 leaves it as it is"),
    )


def of_ebnas(value: Any) -> str:
    return f"default: that of --recipe, of ebnas {value}"


def add_set_flags(parser: Parser) -> None:
    """Flags of the sets that fit in memory."""
    flag = parser.add_argument_group("images").add_argument
    flag("--set", choices=SETS, default="cifar10", help="what to train on")
    flag("--data", default="data", help="where the set is, or is downloaded to")
    flag(
        "--image_size",
        type=integer(16, 4096),
        default=32,
        help="height and width, in pixels, that images of `folder` are brought to",
    )
    flag(
        "--train_images",
        metavar="N",
        type=integer(0),
        default=0,
        help="take N training images, the first of each class, for a trial; 0: all",
    )
    flag(
        "--test_part",
        type=real(above=0, below=1),
        default=TEST_PART,
        help="of each class of a folder DIR/<class>/* that is not split, to test on",
    )
    parser.idle["test_part"] = (
        lambda flags: flags.set != "folder" or not is_unsplit(flags.data),
        "only a folder that is not split needs it",
    )
    add_value_range_flag(flag)
    flag("--cutout", action="store_true", help="cover a square of each training image")
    flag("--cutout_length", type=integer(1, 4096), default=16, help="side of that square, in pixels")
    parser.needs("cutout_length", "cutout")
    parser.idle["data"] = (lambda flags: flags.set == "shapes", "--set shapes is drawn, and reads nothing")


def add_most_skips_flag(parser: Parser, note: str = "") -> None:
    parser.add_argument(
        "--most_skips",
        metavar="N",
        type=integer(0),
        help="keep at most N skips in the normal cell, those of largest weight; the other edges take their "
        f"next best operation; default: however many there are{note}",
    )


def add_original_flags(parser: Parser) -> None:
    """Flags that say what a checkpoint of another program does not say of itself (see run/originals.py)."""
    flag = parser.add_argument_group("a checkpoint of the original EBNAS program, or of BNAS's").add_argument
    flag("--arch", help="its genotype, as train.py --arch takes it; default: the published one of its system")
    flag("--variant", help="of BNAS as_run or intended; default: as_run")
    flag(
        "--set",
        choices=TRAINED_SETS,
        help="its images; default: CIFAR-10, CIFAR-100 or ImageNet, by its classes",
    )
    flag("--image_size", type=integer(16, 4096), help="of these; default: 32, of ImageNet 224")


def add_value_range_flag(flag: Callable[..., Any]) -> None:
    flag(
        "--value_range",
        nargs=2,
        type=real(),
        metavar=("LOW", "HIGH"),
        help="black and white in files of more than 8 bits a channel (0 4095: 12 bits); default: their own",
    )


SYSTEM_FLAG = ("--system", "--family")
"""The flag for one of CELL_SYSTEMS, and the name that it had first."""


def add_operations_flag(flag: Callable[..., Any]) -> None:
    """The search space, for both kinds of search."""
    flag(
        "--operations",
        type=operations,
        default=list(PRIMITIVES),
        metavar="LIST",
        help="what an edge chooses from: names of search_space.py, separated by commas; default: the seven",
    )


def add_network_flags(parser: Parser, defaults: Mapping[str, Any], size: Mapping[str, Any]) -> None:
    """Flags of a derived network and of its two stages. `defaults`: of EBNAS's recipe; `size`: of its row."""
    flag = parser.add_argument_group("network").add_argument
    flag(
        "--arch",
        default="EBNAS",
        help="a row of the published tables (docs/rows.md), random:SEED, a genotype file or text, a search "
        "run's folder, or FOLDER@EPOCH: its genotype at the end of that epoch",
    )
    flag(
        *SYSTEM_FLAG,
        dest="family",  # its first name, which runs have saved
        choices=tuple(OPERATIONS),
        help="whose blocks to build the genotype in; default: its own",
    )
    flag("--variant", help="of BNAS as_run or intended, of BATS learned or mean; default: the first")

    def of_row(name: str, words: str) -> str:
        return f"{words}; default: that of --arch, of EBNAS {size[name]}"

    flag("--init_channels", type=integer(1, 10_000), help=of_row("init_channels", "width of the first cell"))
    flag("--layers", type=integer(3, 1_000), help=of_row("layers", "number of cells"))
    flag(
        "--groups",
        type=integer(1, 10_000),
        help=of_row("groups", "groups of the cells' convolutions, in EBNAS and BATS"),
    )
    flag("--auxiliary", action="store_true", help="train with the auxiliary head")
    flag("--auxiliary_weight", type=non_negative_float, default=0.4, help="of the auxiliary head's loss")
    parser.needs("auxiliary_weight", "auxiliary")
    flag(
        "--weight_binarization",
        choices=WEIGHT_BINARIZATIONS,
        default="plain",
        help="of latent weights: their sign times their mean size; or centred first (docs/method.md)",
    )
    flag = parser.add_argument_group("stages").add_argument
    flag(
        "--binary",
        action="store_true",
        help="stage 2: binary weights and activations, from stage 1's weights",
    )
    flag(
        "--stage1",
        choices=tuple(STAGE1_BITS),
        help="what stage 1 makes binary: weights, activations, or nothing (a teacher); default: that of the "
        "system, of EBNAS w1a32",
    )
    flag(
        "--pretrained",
        metavar="PATH",
        help="a run or checkpoint of the same network, of any stage and set, to start from with a new "
        "schedule; default: none, in stage 2 the newest stage 1 that fits",
    )
    flag("--from_scratch", action="store_true", help="train stage 2 without stage 1")
    flag = parser.add_argument_group("recipe").add_argument
    flag(
        "--recipe",
        choices=("ebnas", "own", "best"),
        default="ebnas",
        help="EBNAS's training, the same for every row; the system's own; EBNAS's with what was measured to "
        "help, a --teacher",
    )

    def usual(name: str, words: str) -> str:
        return f"{words}; {of_ebnas(defaults[name])}"

    flag("--drop_path_prob", type=probability, help=usual("drop_path_prob", "at the last epoch, from 0 on"))
    flag("--label_smooth", type=probability, help=usual("label_smooth", "weight of the uniform distribution"))
    flag(
        "--learning_rate_min",
        type=non_negative_float,
        help=usual("learning_rate_min", "the cosine ends here"),
    )
    flag("--weight_decay", type=non_negative_float, help=usual("weight_decay", "of all weights"))
    flag(
        "--stage1_weight_decay",
        type=non_negative_float,
        help=usual("stage1_weight_decay", "of convolutions' and linear layers' weights, in stage 1 only"),
    )


def add_beyond_flags(parser: Parser) -> None:
    """Flags that EBNAS does not have and that train the best networks of its field (docs/method.md)."""
    flag = parser.add_argument_group("beyond the paper").add_argument
    flag("--activation", choices=ACTIVATIONS, default="prelu", help="rprelu: with ReActNet's shift")
    flag(
        "--teacher",
        metavar="PATH|NAME",
        help="learn from a trained network: a run or checkpoint, or a torchvision network with its weights",
    )
    flag(
        "--teacher_weight",
        type=real(above=0, most=1),
        help="of the teacher's loss, that of the labels has the rest; default: 1",
    )
    flag(
        "--teacher_temperature",
        type=real(above=0, most=1_000),
        default=1.0,
        help="both distributions are softened by it",
    )
    parser.needs("teacher_weight", "teacher")
    parser.needs("teacher_temperature", "teacher")
    flag(
        "--ema",
        metavar="DECAY",
        type=probability,
        default=0.0,
        help="evaluate and keep an exponential moving average of the weights over steps",
    )
    flag("--clip_weights", action="store_true", help="keep the latent weights of 1 bit within [-1, 1]")
