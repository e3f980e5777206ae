"""Classify pictures with a packed 1-bit network; PyTorch is not needed.

    python infer.py model.ebnas picture.jpg [...]                  # the five likeliest classes of each
    python infer.py model.ebnas pictures/ > predictions.csv        # a folder, searched through: a CSV
    python infer.py model.ebnas pictures/ --output predictions.csv

A picture is turned upright, made RGB (transparent parts over white), its shorter side resized and the centre
cut out, as in training. What a folder holds and Pillow cannot read is left out and named on stderr.
"""

from __future__ import annotations

import argparse
import csv
import io
import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from packed import PackedNetwork, load

SUFFIXES = {".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"}
BATCH = 64


class Parser(argparse.ArgumentParser):
    """A parser whose errors are ValueErrors: one line. (options.py has its like, but needs PyTorch.)"""

    def error(self, message: str):
        raise ValueError(f"{message}; {self.prog} --help lists the flags")


def make_parser() -> Parser:
    parser = Parser(description="classify pictures with a packed network (see export.py)")
    parser.add_argument("model", help="the .ebnas file")
    parser.add_argument("pictures", nargs="+", type=Path, help="pictures, or one folder of pictures")
    parser.add_argument("--top", type=int, default=5, help="how many classes to print per picture")
    parser.add_argument("--output", type=Path, help="the CSV of a folder; default: standard output")
    parser.add_argument("--threads", type=int, help="pictures at once; default: all usable cores")
    return parser


def main(args: argparse.Namespace) -> None:
    if args.top < 1 or (args.threads is not None and args.threads < 1):
        raise ValueError("--top and --threads must be at least 1")
    folders = [path for path in args.pictures if path.is_dir()]
    if folders and len(args.pictures) > 1:
        raise ValueError("give pictures, or one folder")
    if args.output and not folders:
        raise ValueError("--output is for the CSV of a folder")
    net = load(args.model, threads=args.threads)
    top = min(args.top, len(net.classes))
    if folders:
        write_csv(net, folders[0], args.output, top)
        return
    for path, probabilities in classify(net, args.pictures):
        if isinstance(probabilities, Exception):
            raise ValueError(f"cannot read {path}: {_one_line(probabilities)}")
        print(path)
        for index in np.argsort(-probabilities, kind="stable")[:top]:
            print(f"  {probabilities[index]:7.2%}  {net.classes[index]}")


def write_csv(net: PackedNetwork, folder: Path, output: Path | None, top: int) -> None:
    """One row per picture of the folder: file, then class and probability, `top` times."""
    paths = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not paths:
        raise ValueError(f"no pictures in {folder} ({', '.join(sorted(SUFFIXES))})")
    text, unreadable = io.StringIO(), []
    table = csv.writer(text)
    columns = (f"{what}{rank}" for rank in range(1, top + 1) for what in ("class", "probability"))
    table.writerow(["file", *columns])
    for path, probabilities in classify(net, paths):
        if isinstance(probabilities, Exception):
            unreadable.append(f"{path} ({_one_line(probabilities)})")
            continue
        row = [path.relative_to(folder)]
        for index in np.argsort(-probabilities, kind="stable")[:top]:
            row += [net.classes[index], f"{probabilities[index]:.4f}"]
        table.writerow(row)
    if len(unreadable) == len(paths):
        raise ValueError(f"none of the {len(paths)} pictures in {folder} can be read: {unreadable[0]}")
    if output:
        aside = output.with_name(f".{output.name}.{os.getpid()}")
        try:
            aside.write_text(text.getvalue(), newline="")
            os.replace(aside, output)  # whole or not at all
        finally:
            aside.unlink(missing_ok=True)
    else:
        sys.stdout.write(text.getvalue())
    if unreadable:
        print(f"left out {len(unreadable)}: {', '.join(unreadable[:3])}", file=sys.stderr)


def classify(net: PackedNetwork, paths: list[Path]) -> Iterator[tuple[Path, np.ndarray | Exception]]:
    """Each path with its class probabilities (classes,), or with what kept it from being read."""

    def read(path: Path) -> np.ndarray | Exception:
        try:
            return read_picture(path, net.program.resize, net.image_size)
        except Exception as error:  # Pillow's parsers raise many types
            return error

    with ThreadPoolExecutor(net.threads) as pool:
        for start in range(0, len(paths), BATCH):
            batch = paths[start : start + BATCH]
            pictures = list(pool.map(read, batch))
            readable = [picture for picture in pictures if isinstance(picture, np.ndarray)]
            rows = iter(softmax(net(net.preprocess(np.stack(readable))))) if readable else iter(())
            for path, picture in zip(batch, pictures, strict=True):
                yield path, next(rows) if isinstance(picture, np.ndarray) else picture


def read_picture(path: Path, resize: int, size: int) -> np.ndarray:
    """uint8 (size, size, 3): the shorter side made `resize` pixels, bilinear, and the centre cut out."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
    if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
        image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
    if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert("RGB")
    short, long = sorted(image.size)
    other = resize * long // short
    target = (resize, other) if image.width <= image.height else (other, resize)
    if image.size != target:
        image = image.resize(target, Image.Resampling.BILINEAR)
    left, top = (round((extent - size) / 2) for extent in image.size)
    return np.asarray(image.crop((left, top, left + size, top + size)))


def softmax(logits: np.ndarray) -> np.ndarray:
    """(n, classes) -> probabilities of the same shape."""
    powers = np.exp(logits - logits.max(1, keepdims=True))
    return powers / powers.sum(1, keepdims=True)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


if __name__ == "__main__":
    try:
        main(make_parser().parse_args())
    except (OSError, ValueError) as error:
        print(f"error: {_one_line(error)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
