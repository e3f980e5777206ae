"""The images of a run: read once, described for its checkpoints, and what its loaders have in common."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from augment import Normalize
from data import ImageSet, Share, channel_statistics, load_set
from distributed import World
from packed.picture import ValueRange
from resume import Origin
from settings import SearchSettings, TrainSettings
from utils import InputError


def checked_range(values: Sequence[float] | None) -> ValueRange | None:
    """--value_range. Raises InputError where white is not above black."""
    if values is None:
        return None
    low, high = values
    if low >= high:
        raise InputError(f"--value_range {low:g} {high:g}: the second must be the larger")
    return low, high


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
    read = partial(load_set, images.set, images.data, **how)
    with world.in_turn("reading the data"):
        train_set = read(train=True, count=images.train_images)
        test_set = read(train=False) if test else None
    statistics = channel_statistics(images.set, train_set)
    what = (images.set, images.data, images.image_size, train_set.classes, statistics)
    data = describe_data(*what, value_range=value_range)
    data = origin.own_images(data)
    return train_set.to(world.device), test_set.to(world.device) if test else None, data


def describe_data(
    name: str,
    root: str,
    image_size: int,
    classes: tuple[str, ...],
    normalize: Normalize,
    *,
    value_range: ValueRange | None = None,
) -> dict[str, Any]:
    """What a checkpoint keeps of its images."""
    return {
        "set": name,
        "root": str(root),
        "image_size": image_size,
        "classes": list(classes),
        "mean": list(normalize.mean),
        "std": list(normalize.std),
        **({"value_range": list(value_range)} if value_range else {}),
    }


def loader_settings(data: dict[str, Any], seed: int, world: World) -> dict[str, Any]:
    """The arguments that all loaders of a run have in common."""
    return {
        "normalize": Normalize(data["mean"], data["std"]),
        "seed": seed,
        "share": Share(world.rank, world.size),
    }
