"""The flags that scripts share, what they may hold, and flags of PC-DARTS that no longer have a use."""

from __future__ import annotations

import argparse
import os
from typing import TYPE_CHECKING

from binary_ops import WEIGHT_BINARIZATIONS
from utils import InputError

if TYPE_CHECKING:
    from logger import Run

RETIRED = {
    "momentum": "Adam is the optimiser, as in the original",
    "model_path": "checkpoints are in the run's folder",
    "learning_rate_min": "the learning rate of a search is constant, as in the original",
    "drop_path_prob": "the supernet has no drop-path, as in the original",
}
"""Flags of PC-DARTS that some script accepts only to say why they have no use there."""

LARGE = 1e30
"""What is larger does not fit float32 in an optimiser, or is a slip of the hand."""

BOUNDS = {  # least and largest value, both allowed
    "epochs": (1, LARGE),
    "batch_size": (1, LARGE),
    "init_channels": (1, 10_000),
    "layers": (3, 1_000),
    "groups": (1, 10_000),
    "image_size": (16, 4096),
    "cutout_length": (1, 4096),
    "holdout": (0, LARGE),
    "workers": (0, 1024),
    "seed": (0, 2**32 - 1024),  # NumPy's largest, less room for the processes' own
    "gpu": (0, 1024),
    "threads": (1, 1024),
    "repeats": (1, LARGE),
    "warmup": (0, LARGE),
    "report_freq": (1, LARGE),
    "warmup_epochs": (0, LARGE),
    "arch_start_epoch": (0, LARGE),
    "grad_clip": (0, LARGE),
    "weight_decay": (0, LARGE),
    "arch_weight_decay": (0, LARGE),
    "learning_rate_min": (0, LARGE),
    "auxiliary_weight": (0, LARGE),
    "path_reg_weight": (-LARGE, LARGE),
    "edge_reg_weight": (-LARGE, LARGE),
}
POSITIVE = ("learning_rate", "arch_learning_rate", "alpha")
PROBABILITIES = ("drop_path_prob", "label_smooth")


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are InputErrors: one line, exit code 2."""

    def __init__(self, description: str | None = None, **keywords):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter, **keywords
        )

    def error(self, message: str):
        raise InputError(f"{message}; {self.prog} --help lists the flags")

    def retire(self, *names: str) -> None:
        for name in names:
            self.add_argument(f"--{name}", help=f"accepted, but without use: {RETIRED[name]}")


def add_run_flags(parser: Parser, *, save: str, epochs: int, batch_size: int) -> None:
    """Flags of everything that trains."""
    from engine import PRECISIONS  # here, so that export.py does not import it

    flag = parser.add_argument
    flag("--save", default=save, help="name of the run; its folder is runs/<kind>-<name>-<time>")
    flag("--note", default="", help="a note on this run, kept in its args.json")
    flag("--epochs", type=int, default=epochs)
    flag("--batch_size", type=int, default=batch_size, help="images a step, over all GPUs together")
    flag("--learning_rate", type=float, default=1e-3, help="initial learning rate of the weights' Adam")
    flag("--grad_clip", type=float, default=5.0, help="largest norm of the gradient; 0 leaves it as it is")
    flag("--report_freq", type=int, default=50, help="steps between log lines")
    flag("--seed", type=int, default=0)
    flag("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that read images")
    flag(
        "--resume",
        metavar="PATH",
        help="go on with a run's folder or checkpoint; `auto`: the newest unfinished one",
    )
    flag("--precision", choices=PRECISIONS, help="default: bf16 on a CUDA GPU that has it, else fp32")
    flag("--compile", action="store_true", help="torch.compile: minutes at the start, then faster steps")
    flag("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    flag("--gpu", type=int, default=0, help="number of the CUDA GPU")


def add_set_flags(parser: Parser, sets: tuple[str, ...]) -> None:
    """Flags of the sets that fit in memory."""
    parser.add_argument("--set", choices=sets, default="cifar10")
    parser.add_argument("--data", default="data", help="where the set is, or is downloaded to")
    parser.add_argument("--image_size", type=int, default=32, help="size that `folder` images are brought to")
    parser.add_argument("--cutout", action="store_true")
    parser.add_argument("--cutout_length", type=int, default=16)


def add_network_flags(parser: Parser, *, init_channels: int, layers: int) -> None:
    """Flags of a derived network and of its two stages."""
    flag = parser.add_argument
    flag("--arch", default="EBNAS", help="a registered genotype, a genotype file, or a search run's folder")
    flag("--init_channels", type=int, default=init_channels)
    flag("--layers", type=int, default=layers)
    flag("--groups", type=int, default=14, help="groups of the cells' convolutions")
    flag("--auxiliary", action="store_true", help="train with the auxiliary head")
    flag("--auxiliary_weight", type=float, default=0.4)
    flag("--learning_rate_min", type=float, default=0.0, help="the cosine schedule ends here")
    flag("--weight_decay", type=float, default=0.0)
    flag(
        "--binary",
        action="store_true",
        help="stage 2: binary weights and activations, from stage 1's weights",
    )
    flag(
        "--stage1",
        choices=("w1a32", "w32a1"),
        default="w1a32",
        help="what stage 1 makes binary: weights (1 bit) or activations",
    )
    flag("--weight_binarization", choices=WEIGHT_BINARIZATIONS, default="plain")
    flag(
        "--pretrained",
        metavar="PATH",
        help="stage-1 run or checkpoint to start stage 2 from; default: the newest that fits",
    )
    flag("--from_scratch", action="store_true", help="train stage 2 without stage 1")


def parse(parser: Parser) -> tuple[argparse.Namespace, set[str]]:
    """The checked flags, and the names of those that the user gave.

    Raises InputError on a value out of range, with what would be right.
    """
    args = parser.parse_args()
    for action in parser._actions:
        action.default = argparse.SUPPRESS
    explicit = set(vars(parser.parse_args()))
    _check(args)
    return args, explicit


def log_retired(run: Run, args: argparse.Namespace, explicit: set[str]) -> None:
    """Say so of each flag given that has no use in this script (its value was never converted)."""
    for name, reason in RETIRED.items():
        if name in explicit and isinstance(getattr(args, name), str):
            run.log(f"--{name} has no use here: {reason}")


def _check(args: argparse.Namespace) -> None:
    for name, value in vars(args).items():
        if value == "" and name != "note":
            raise InputError(f"--{name} is empty; give a value, or leave the flag out")
        if name == "save" and "/" in value:
            raise InputError(f"--save is {value}; it is a name without slashes, the folder is under runs/")
        if isinstance(value, str | None):
            continue
        if name in BOUNDS and not BOUNDS[name][0] <= value <= BOUNDS[name][1]:
            least, most = (f"{bound:g}" if bound == LARGE else bound for bound in BOUNDS[name])
            raise InputError(f"--{name} is {value}; it must be at least {least} and at most {most}")
        if name in POSITIVE and not 0 < value <= LARGE:
            raise InputError(f"--{name} is {value}; it must be above 0 and at most {LARGE:g}")
        if name in PROBABILITIES and not 0 <= value < 1:
            raise InputError(f"--{name} is {value}; it must be at least 0 and below 1")
        if name == "train_portion" and not 0 < value < 1:
            raise InputError(f"--train_portion is {value}; it must be between 0 and 1")
