"""Classify pictures with a packed 1-bit network; PyTorch is not needed.

    python infer.py picture.jpg [...]                              # the five likeliest classes of each
    python infer.py model.ebnas picture.jpg [...]                  # by a network of your own
    python infer.py model.ebnas pictures/ > predictions.csv        # a folder, searched through: a CSV
    python infer.py model.ebnas pictures/ --output predictions.csv
    python infer.py --list                                         # the networks that come along, in models/

A picture is turned upright, made RGB (transparent parts over white), its shorter side resized and the centre
cut out, as in training. What a folder holds and Pillow cannot read is left out and named on stderr.
"""

from __future__ import annotations

import csv
import io
import json
import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from flags import options
from images.files import SUFFIXES, counted, of_system
from packed import NoCompiler, PackedNetwork, load
from utils import InputError, RunFailed, check_output, one_line, printable, run_main, write_atomically

BATCH = 64
MODELS = Path(__file__).resolve().parent / "models"
DEFAULTS = ("cifar10", "shapes")  # the first that is there


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument(
        "paths",
        nargs="*",
        type=Path,
        metavar="path",
        help="an .ebnas file (see export.py; default: one of models/), then pictures, or one folder of them",
    )
    parser.add_argument("--list", action="store_true", help="list the networks of models/, and end")
    parser.add_argument(
        "--top", type=options.integer(1), default=5, help="how many classes to print per picture"
    )
    parser.add_argument("--output", type=Path, help="the CSV of a folder; default: standard output")
    parser.add_argument(
        "--threads", type=options.integer(1, 1024), help="pictures at once; default: all usable cores"
    )
    return parser


def main(flags: options.Flags) -> None:
    args = flags.values
    warnings.showwarning = lambda message, *_: print(
        f"warning: {printable(one_line(message))}", file=sys.stderr
    )
    if args.list:
        options.check_alone(flags, "list")
        print("\n".join(map(described, sorted(MODELS.glob("*.ebnas")))))
        return
    for path in args.paths[1:]:
        if path.suffix == ".ebnas":
            raise InputError(f"{path} is a network; give one at most, and before the pictures")
    model, given = model_and_pictures(args.paths)
    folders = [path for path in given if path.is_dir()]
    if folders and len(given) > 1:
        raise InputError("give pictures, or one folder")
    if args.output and not folders:
        raise InputError("--output is for the CSV of a folder")
    paths = pictures_in(folders[0]) if folders else given
    if args.output:
        check_output(args.output, model, *paths)
    net = load_network(model, args.threads)
    if folders:
        write_csv(net, folders[0], paths, args.output, top=args.top)
        return
    for path, result in classify(net, paths):
        if isinstance(result, Exception):
            raise InputError(f"cannot read {path}: {one_line(result)}")
        print(printable(str(path)))
        for name, probability in likeliest(net, result, args.top):
            print(f"  {probability:7.2%}  {name}")


def model_and_pictures(paths: list[Path]) -> tuple[Path, list[Path]]:
    """A network and pictures; where none was typed, the network that comes along, which is then named."""
    if paths and paths[0].suffix != ".ebnas" and (len(paths) == 1 or paths[0].suffix.lower() in SUFFIXES):
        files = [MODELS / f"{name}.ebnas" for name in DEFAULTS]
        model = next(filter(Path.is_file, files), files[-1])
        print(f"no network given: {described(model)}", file=sys.stderr)
        return model, paths
    if len(paths) < 2:
        raise InputError("give a picture, or a folder of them; --list lists the networks that come along")
    return paths[0], paths[1:]


def described(model: Path) -> str:
    """A network that comes along in a line: file, bytes, classes, accuracy."""
    try:
        facts = json.loads(model.with_suffix(".json").read_text())
        text = f"{facts['data']}, {facts['test_top1']} % on its test images"
    except (OSError, ValueError, KeyError, TypeError):  # a network of the user's own
        text = "no description"
    return printable(f"models/{model.name} ({model.stat().st_size / 1e3:.0f} kB): {text}")


def load_network(path: Path, threads: int | None) -> PackedNetwork:
    """The network of a file. Raises InputError; RunFailed where there is neither a compiler nor PyTorch."""
    try:
        net = load(path, threads=threads)
    except ValueError as error:
        raise InputError(str(error)) from None
    except NoCompiler as error:
        raise RunFailed(str(error)) from None
    if (channels := len(net.program.mean)) != 3:
        raise InputError(f"{path} is a network of images with {channels} channels; pictures have 3")
    return net


def pictures_in(folder: Path) -> list[Path]:
    """The pictures in a folder and in those in it. What systems leave there for themselves is left out, which
    a line on stderr says. Raises InputError: there are none."""
    paths, left_out = [], Counter()
    for path in sorted(folder.rglob("*")):
        kinds = [of_system(part) for part in path.relative_to(folder).parts]
        if any(kinds[:-1]):  # in a folder that is left out
            continue
        if kinds[-1]:
            left_out[kinds[-1]] += 1
        elif path.suffix.lower() in SUFFIXES and path.is_file():
            paths.append(path)
    if not paths:
        raise InputError(f"no pictures in {folder} ({', '.join(sorted(SUFFIXES))})")
    if left_out:
        print(printable(f"warning: left out in {folder}: {counted(left_out)}"), file=sys.stderr)
    return paths


def write_csv(net: PackedNetwork, folder: Path, paths: list[Path], output: Path | None, *, top: int) -> None:
    """One row per picture of the folder: file, then class and probability, `top` times."""
    text, unreadable = io.StringIO(), []
    table = csv.writer(text)
    columns = range(1, min(top, len(net.classes)) + 1)
    table.writerow(["file", *(f"{what}{rank}" for rank in columns for what in ("class", "probability"))])
    for path, result in classify(net, paths):
        if isinstance(result, Exception):
            unreadable.append(f"{path} ({one_line(result)})")
            continue
        row = [printable(str(path.relative_to(folder)))]
        for name, probability in likeliest(net, result, top):
            row += [name, f"{probability:.4f}"]
        table.writerow(row)
    if len(unreadable) == len(paths):
        raise InputError(f"none of the {len(paths)} pictures in {folder} can be read: {unreadable[0]}")
    if output:
        write_atomically(output, text.getvalue().encode())
    else:
        sys.stdout.write(text.getvalue())
    if unreadable:
        print(f"left out {len(unreadable)}: {printable(', '.join(unreadable[:3]))}", file=sys.stderr)


def likeliest(net: PackedNetwork, row: np.ndarray, top: int) -> list[tuple[str, float]]:
    """The `top` likeliest classes of a row of probabilities, named for a terminal, each with its own."""
    return [(printable(net.classes[i]), float(row[i])) for i in np.argsort(-row, kind="stable")[:top]]


def classify(net: PackedNetwork, paths: list[Path]) -> Iterator[tuple[Path, np.ndarray | Exception]]:
    """Each path with its class probabilities (classes,), or with what kept it from being read."""

    def read(path: Path) -> np.ndarray | Exception:
        try:
            return net.square(path)
        except MemoryError:
            raise
        except Exception as error:  # Pillow's parsers raise many types
            return error

    with ThreadPoolExecutor(net.threads) as pool:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            pictures = list(pool.map(read, batch))
            readable = [picture for picture in pictures if isinstance(picture, np.ndarray)]
            rows = iter(probabilities(net, np.stack(readable)) if readable else ())
            for path, picture in zip(batch, pictures, strict=True):
                yield path, next(rows) if isinstance(picture, np.ndarray) else picture


def probabilities(net: PackedNetwork, pictures: np.ndarray) -> np.ndarray:
    """uint8 (n, size, size, 3) -> (n, classes). Raises InputError: such images are too large."""
    try:
        logits = net(net.normalize(pictures))
    except ValueError as error:
        raise InputError(str(error)) from None
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


if __name__ == "__main__":
    run_main(main, parser)
