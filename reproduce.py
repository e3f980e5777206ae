"""The commands that give a row of the published tables, one after the other, and the figure to compare with.

    python reproduce.py BNAS-C cifar10                 # print them, with what they need
    python reproduce.py EBNAS imagenet --data DIR --run
    python reproduce.py BATS cifar10 --scale tiny --run    # the same chain, on the embedded images

With --run a chain that was ended anywhere goes on where it was: the same command again.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flags import options
from flags.options import command_line
from networks.rows import ROWS
from training.recipes import EBNAS, OWN, get_recipe
from utils import InputError, check_usage, command_text, run_main

HERE = Path(__file__).parent
IMAGES = {"cifar10": ("cifar", 10, 32), "cifar100": ("cifar", 100, 32), "imagenet": ("imagenet", 1000, 224)}
"""Family of images, number of classes, size."""

TINY = {"set": "shapes", "image_size": 16, "train_images": 200, "batch_size": 50, "epochs": 1}
TINY_SIZE = {
    "ebnas": {"layers": 3, "init_channels": 8, "groups": 2},
    "bnas": {"layers": 3, "init_channels": 8},
    "bats": {"layers": 3, "init_channels": 12, "groups": 3},
    "dcp": {"layers": 3, "init_channels": 8},
    "resnet": {"init_channels": 8},
}


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("row", metavar="ROW", choices=tuple(ROWS), help=", ".join(ROWS))
    flag("set", metavar="SET", choices=tuple(IMAGES), help=", ".join(IMAGES))
    flag("--scale", choices=("full", "tiny"), default="full")
    flag("--data", help="where the images are")
    flag("--run", action="store_true", help="run the commands, too")
    return parser


if __name__ == "__main__":
    check_usage(parser)

from networks.registry import Config, label, make_config
from run.runs import RESULT, RUNS
from training import stage_flags
from training.memory import CONTEXT, GB, StepMemory


def main(flags: options.Flags) -> None:
    args = flags.values
    tiny = args.scale == "tiny"
    script, words = training_command(args.row, args.set, args.data, tiny=tiny)
    config, recipe = trained(args.row, args.set, words, tiny=tiny)
    per = " a stage, two stages" if config.system in stage_flags.STAGE1 else ""
    print(f"# {label(config)} on {words.get('set', args.set)}")
    print(f"# {recipe['epochs']} epoch{'s' * (recipe['epochs'] > 1)}{per}, batch {recipe['batch_size']}")
    print(f"# published: {published_words(args.row, args.set, tiny=tiny)}")
    save, typed = words["save"], command_line(words)
    chain = ["stage1", "stage2"] if config.system in stage_flags.STAGE1 else ["single"]
    for stage in chain:
        start = ["--binary"] if stage == "stage2" else []  # it finds the newest stage 1 that fits
        print(command_text(["python", script, *typed, *start, "--resume", "auto"]))
    print(f"python evaluate.py runs/eval-{save}-{chain[-1]}-*", flush=True)
    print("counting the GPU memory of a step ...", file=sys.stderr, flush=True)
    size = words.get("image_size", IMAGES[args.set][2])
    print(f"# GPU memory, counted: {memory(config, size, recipe['batch_size'])}", flush=True)
    if not args.run:
        return
    for stage in chain:
        start = ["--binary", "--pretrained", finished(save, "stage1")] if stage == "stage2" else []
        if finished(save, stage) is None:
            run(script, *typed, *start, "--resume", "auto")
    run("evaluate.py", finished(save, chain[-1]))
    print(f"published: {published_words(args.row, args.set, tiny=tiny)}")


def training_command(name: str, images: str, data: str | None, *, tiny: bool) -> tuple[str, dict[str, Any]]:
    """The script that trains a row, and its flags: with the system's own recipe, where it is known.

    Raises InputError where the row has no network for such images, and on --data that nothing reads.
    """
    row, family = ROWS[name], IMAGES[images][0]
    if family not in row.sizes:
        sets = ", ".join(each for each, (other, _, _) in IMAGES.items() if other in row.sizes)
        raise InputError(f"{name} is no network for {images}; its sets are {sets}")
    if tiny and data is not None:
        raise InputError("--scale tiny draws its images and reads none; leave --data out")
    recipe = "own" if (row.system, "cifar" if tiny else family) in OWN else "ebnas"
    flags = {"arch": name, "save": f"{name}-{images}-{'tiny' if tiny else 'full'}", "recipe": recipe}
    if row.system in ("ebnas", "bats"):
        flags["auxiliary"] = True
    if tiny:
        return "train.py", {**flags, **TINY, **TINY_SIZE[row.system]}
    if family == "imagenet":
        return "train_imagenet.py", {**flags, "tmp_data_dir": data or "DIR"}
    as_ebnas = row.system in ("ebnas", "bats", "resnet")
    augmentation = {"cutout": as_ebnas, "mixup": as_ebnas and images == "cifar100"}
    return "train.py", {**flags, "set": images, "data": data, **augmentation}


def trained(name: str, images: str, flags: Mapping[str, Any], *, tiny: bool) -> tuple[Config, dict[str, Any]]:
    """The network that these flags train last, and the flags with those of its recipe."""
    system, (family, classes, _) = ROWS[name].system, IMAGES["cifar10" if tiny else images]
    bits = {} if system == "resnet" else {"weight_bits": 1, "activation_bits": 1}
    network = {each: flags[each] for each in stage_flags.NETWORK_FLAGS if each in flags}
    config = make_config(name, family=family, num_classes=classes, **bits, **network)
    recipe = get_recipe(flags["recipe"], system, family)
    return config, {**EBNAS[family].flags, **recipe.flags, **flags}


def memory(config: Config, image_size: int, batch_size: int) -> str:
    """The memory that a training step needs on a GPU, in words."""
    steps = [StepMemory(config, image_size, batch_size, precision) for precision in ("fp32", "bf16")]
    return " or ".join(f"{(step.needs() + CONTEXT) / GB:.1f} GB in {step.precision}" for step in steps)


def published_words(name: str, images: str, *, tiny: bool) -> str:
    """The row's published figures for a set, in words."""
    published = ROWS[name].published.get(images)
    if tiny:
        return "nothing of this size, which only tries the chain"
    if published is None:
        return "nothing"
    words = [f"error {published.error} %"] if published.error else []
    words += [f"top-5 error {published.top5_error} %"] if published.top5_error else []
    words += [f"{published.params}M parameters"] if published.params else []
    return ", ".join([*words, *([f"{published.ops}e8 OPs"] if published.ops else [])])


def finished(save: str, stage: str) -> str | None:
    """The folder of a finished run."""
    return next((str(path.parent) for path in sorted(RUNS.glob(f"eval-{save}-{stage}-*/{RESULT}"))), None)


def run(script: str, *words: str) -> None:
    code = subprocess.run([sys.executable, str(HERE / script), *words]).returncode
    if code:
        sys.exit(code)


if __name__ == "__main__":
    run_main(main, parser)
