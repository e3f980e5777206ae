"""The images of a run: read once, described for its checkpoints, and what its loaders have in common."""

from __future__ import annotations

import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from flags.settings import ImageSettings, SearchSettings, TrainSettings
from images.augment import Normalize
from images.duplicates import near_duplicates
from images.files import list_images
from images.loaders import Shard
from images.sets import ImageSet, channel_statistics, load_set
from images.split import choose_test_files, is_unsplit, split_table
from packed.picture import ValueRange
from run.distributed import World
from run.resume import Origin
from utils import InputError, printable, write_atomically


def checked_range(values: Sequence[float] | None) -> ValueRange | None:
    """--value_range. Raises InputError where white is not above black."""
    if values is None:
        return None
    low, high = values
    if low >= high:
        raise InputError(f"--value_range {low:g} {high:g}: the second must be the larger")
    return low, high


LARGEST_SMALL_SET = 5_000
LEAST_STEPS, LEAST_BATCH = 60, 8
"""An epoch of a small set should have so many steps, in batches of at least so many images: measured at 200
and 1,000 images (results/README.md, small sets)."""


def fit_batch(origin: Origin, given: Collection[str]) -> list[str]:
    """Give a new run the batch that fits a small set of images, where the user has not chosen one; and a line
    that says so."""
    if origin.checkpoint or "batch_size" in given:
        return []
    count = count_training_images(origin.flags)
    if count is None or not 2 <= count <= LARGEST_SMALL_SET:
        return []
    batch = min(count, max(LEAST_BATCH, 1 << (count // LEAST_STEPS).bit_length() >> 1))  # a power of two
    if batch >= origin.flags["batch_size"]:
        return []
    origin.flags["batch_size"] = batch
    return [f"a batch of {batch}, because there are {count} images to train on; --batch_size takes another"]


def count_training_images(flags: Mapping[str, Any]) -> int | None:
    """How many images these flags train on, from the names of files alone; None where that is not known."""
    known = {"shapes": 10_000, "cifar10": 50_000, "cifar100": 50_000}
    count = flags["train_images"] or known.get(flags["set"])
    if not count and flags["set"] == "folder":
        root = Path(flags["data"])
        try:
            unsplit = is_unsplit(root)
            count = len(list_images(root if unsplit else root / "train").paths)
        except (InputError, OSError):  # which is said when they are read
            return None
        count = int(count * (1 - flags["test_part"])) if unsplit else count
    if not count:
        return None
    return int(count * flags.get("train_portion", 1)) - flags.get("holdout", 0)


def prepare_data(
    settings: TrainSettings | SearchSettings, origin: Origin, world: World, *, test: bool
) -> tuple[ImageSet, ImageSet | None, dict[str, Any]]:
    """Training and, if asked for, test images of a set, on the device; and what a checkpoint keeps of them.

    The first process of a machine downloads before the others look. Raises InputError as load_set does, and
    where a resumed run had other images.
    """
    images, workers = settings.images, settings.run.workers
    value_range = checked_range(images.value_range)
    how = {"image_size": images.image_size, "workers": workers, "value_range": value_range}
    saved = origin.checkpoint["data"] if origin.checkpoint else {}
    test_files = saved.get("test_files") or test_files_of(images.set, images.data, images.test_part)
    read = partial(load_set, images.set, images.data, test_files=test_files, **how)
    with world.in_turn("reading the data"):
        train_set = read(train=True, count=images.train_images)
        test_set = read(train=False) if test else None
    statistics = channel_statistics(images.set, train_set)
    what = (images.set, images.data, images.image_size, train_set.classes, statistics)
    data = describe_data(*what, value_range=value_range, test_files=test_files)
    if test_files is not None and test_set is not None and world.is_main:
        for line in told_of_split(images, train_set, test_set):
            print(printable(line), file=sys.stderr)
    data = origin.own_images(data)
    return train_set.to(world.device), test_set.to(world.device) if test else None, data


def test_files_of(name: str, root: str, test_part: float) -> tuple[str, ...] | None:
    """The digests of the files to test on, of a folder that is not split (see images/split.py); None for all
    other sets."""
    if name != "folder" or not is_unsplit(root):
        return None
    return choose_test_files(list_images(Path(root)), test_part)


def told_of_split(images: ImageSettings, train_set: ImageSet, test_set: ImageSet) -> Iterator[str]:
    """How many images are on which side, and which of those to test on are nearly the same as one to train
    on: a network knows them."""
    yield (
        f"{images.data} is not split: {len(train_set)} images to train on, {len(test_set)} to test on "
        f"(--test_part {images.test_part:g}), always the same; the run's split.csv lists them"
    )
    if pairs := list(near_duplicates(train_set.images, test_set.images)):
        few = ", ".join(f"{test_set.paths[i]} and {train_set.paths[j]}" for i, j in pairs[:3])
        more = ", ..." if len(pairs) > 3 else ""
        yield (
            f"warning: {len(pairs)} of the {len(test_set)} images to test on are nearly the same as one to "
            f"train on ({few}{more}): put such pictures into one part yourself, in DIR/train and DIR/test"
        )


def write_split(folder: Path, data: dict[str, Any], train_set: ImageSet, test_set: ImageSet) -> None:
    """Write split.csv into a run's folder: which image of a folder that is not split is where."""
    if "test_files" not in data:
        return
    parts = {
        part: (images.paths, [images.classes[label] for label in images.labels.tolist()])
        for part, images in (("train", train_set), ("test", test_set))
    }
    write_atomically(folder / "split.csv", split_table(data["root"], parts))


def describe_data(
    name: str,
    root: str,
    image_size: int,
    classes: tuple[str, ...],
    normalize: Normalize,
    *,
    value_range: ValueRange | None = None,
    test_files: Sequence[str] | None = None,
) -> dict[str, Any]:
    """The entry `data` of a checkpoint: how its images were read."""
    return {
        "set": name,
        "root": str(root),
        "image_size": image_size,
        "classes": list(classes),
        "mean": list(normalize.mean),
        "std": list(normalize.std),
        **({"value_range": list(value_range)} if value_range else {}),
        **({"test_files": list(test_files)} if test_files is not None else {}),
    }


def loader_settings(data: dict[str, Any], seed: int, world: World) -> dict[str, Any]:
    """The arguments that all loaders of a run have in common."""
    return {
        "normalize": Normalize(data["mean"], data["std"]),
        "seed": seed,
        "shard": Shard(world.rank, world.size),
    }
