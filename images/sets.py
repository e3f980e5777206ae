"""Image sets that fit in memory, each one uint8 tensor: CIFAR, `shapes`, a folder; and their splits."""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import math
import sys
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import partial
from http.client import HTTPException
from pathlib import Path
from urllib.error import URLError

import torch
from torch import Tensor
from tqdm import tqdm

from images.augment import Normalize
from images.files import ImageFiles, list_images, listed_images, refuse_one_class, split_folders
from images.reader import FileReader, block_loader, check_spread, read_blocks, refuse_unreadable
from images.shapes import SHAPES, draw_shapes
from images.split import choose_test_files, is_unsplit, part_of
from packed.picture import ValueRange, evaluation_resize
from utils import InputError, mixed_seed, nearest_multiples, one_line

# Of the training images: DARTS's and PC-DARTS's for CIFAR.
STATISTICS = {
    "cifar10": Normalize((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size: `images` uint8 (n, 3, h, w), `labels` int64 (n,), names of the classes;
    the files that they were read from, where they were."""

    images: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    paths: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> ImageSet:
        return dataclasses.replace(self, images=self.images.to(device), labels=self.labels.to(device))


def load_set(
    name: str,
    root: str | Path,
    *,
    train: bool,
    image_size: int = 32,
    workers: int = 2,
    count: int = 0,
    value_range: ValueRange | None = None,
    test_files: Collection[str] | None = None,
) -> ImageSet:
    """The training or the test images of a set, on the CPU; of these, `count` (0: all), the first of each
    class, as many of one as of another.

    cifar10, cifar100: from `root`, downloaded there if absent (by one process at a time, please).
    folder: `root/train/<class>/**` and `root/test/<class>/**` (or `val`), read by `workers` processes. Any
        size and mode: made RGB, the shorter side resized to `image_size`, the centre cut out. `value_range`
        is for files of more than 8 bits a channel (see packed.picture.read_rgb). `root/<class>/**` is split:
        `test_files` are the digests of those to test on (see images/split.py), None for those of TEST_PART;
        where the folder has none of them, all of its images are to train on, and all to test on.
    shapes: drawn, nothing is read; `root` is not used. 10,000 training and 2,000 test images.

    Raises InputError for an unknown name, missing or unreadable data, a failed download, and a `count` that
    cannot be had; RunFailed where a process that reads is killed.
    """
    if name == "folder":
        how = {"image_size": image_size, "workers": workers, "value_range": value_range}
        files = _files_of(Path(root), train=train, test_files=test_files)
        return _load_folder(files, count=count, **how)
    if name not in READERS:
        raise InputError(f"unknown set {name!r}; choose from {', '.join((*READERS, 'folder'))}")
    images = READERS[name](root, train=train, image_size=image_size)
    if not count:
        return images
    kept = first_of_each_class(images.labels, count, images.classes)
    return ImageSet(images.images[kept], images.labels[kept], images.classes)


def first_of_each_class(labels: Tensor, count: int, classes: Sequence[str]) -> Tensor:
    """Indices, in order, of the first count / len(classes) of each class. Raises InputError where a class has
    too few, or `count` does not divide by that."""
    smallest, name = min(zip(labels.bincount(minlength=len(classes)).tolist(), classes, strict=True))
    if count > smallest * len(classes):
        raise InputError(
            f"--train_images takes as many of each class: class {name} has {smallest}, so at most "
            f"{smallest * len(classes)}"
        )
    each, left = divmod(count, len(classes))
    if left:
        raise InputError(
            f"--train_images {count} cannot be shared out evenly among {len(classes)} classes; "
            f"try {nearest_multiples(count, len(classes))}"
        )
    found = [torch.nonzero(labels == label).flatten()[:each] for label in range(len(classes))]
    return torch.cat(found).sort().values


def channel_statistics(name: str, train_set: ImageSet) -> Normalize:
    """The constants in common use for CIFAR; for the other sets those of `train_set`, by its histogram.

    Raises InputError where all pixels of all images are the same: there is nothing to learn from.
    """
    if name in STATISTICS:
        return STATISTICS[name]
    check_spread(train_set.images)
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in train_set.images.unbind(1):
        frequency = torch.bincount(channel.flatten(), minlength=256).cpu() / channel.numel()
        mean = (frequency * levels).sum()
        means.append(mean.item())
        # At least one level, so that images of one colour do not divide by zero.
        stds.append(max((frequency * (levels - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return Normalize(tuple(means), tuple(stds))


def split_halves(n: int, train_portion: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a search's parts: floor(n * train_portion) for the weights, the rest for alpha and beta."""
    return _split(n, math.floor(n * train_portion), seed, f"a training portion of {train_portion}")


def holdout_split(n: int, holdout: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on, and of the `holdout` images that pick the best epoch."""
    return _split(n, n - holdout, seed, f"a hold-out of {holdout} images")


def _split(n: int, first: int, seed: int, what: str) -> tuple[Tensor, Tensor]:
    if not 0 < first < n:
        raise InputError(f"{what} leaves one part of the {n} training images empty")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(mixed_seed("split", seed)))
    return order[:first], order[first:]


def _read_shapes(_root: str | Path, *, train: bool, image_size: int) -> ImageSet:
    pixels, labels = draw_shapes(10_000 if train else 2_000, image_size, seed=0 if train else 1)
    return ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), tuple(SHAPES))


def _read_cifar(name: str, root: str | Path, *, train: bool, image_size: int) -> ImageSet:
    if image_size != 32:
        raise InputError(f"{name} images are 32 x 32, not {image_size}; leave image_size at 32")
    from torchvision.datasets import CIFAR10, CIFAR100  # takes seconds to import; other sets do without

    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    root = Path(root)
    missing = [folder for folder in (root, *root.parents) if not folder.exists()]  # torchvision makes them
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some versions of torchvision report on stdout
            dataset = source(root, train=train, download=True)
    except (OSError, RuntimeError, HTTPException) as error:
        with contextlib.suppress(OSError):
            for folder in missing:
                folder.rmdir()
        if _is_of_the_file_system(error):
            raise
        if isinstance(error, RuntimeError):
            reason = "its checksum is wrong"
        else:
            reason = one_line(error.reason if isinstance(error, URLError) else error)
        raise InputError(
            f"{name} is not, or not whole, in {root}, and its download failed ({reason}); put "
            f"{source.filename} from {source.url} there, or use the set shapes, which needs no download"
        ) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (n, h, w, 3) -> (n, 3, h, w)
    return ImageSet(images, torch.tensor(dataset.targets), tuple(dataset.classes))


READERS: dict[str, Callable[..., ImageSet]] = {
    "cifar10": partial(_read_cifar, "cifar10"),
    "cifar100": partial(_read_cifar, "cifar100"),
    "shapes": _read_shapes,
}
"""By name of a set: reader(root, train=, image_size=) gives its images. For flags: choices.SETS."""


def _is_of_the_file_system(error: Exception) -> bool:
    """Whether an OSError is of a file, not of the network: a name that cannot be opened, or a full disk."""
    if not isinstance(error, OSError) or isinstance(error, URLError):
        return False
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)


def _files_of(root: Path, *, train: bool, test_files: Collection[str] | None) -> ImageFiles:
    """The files to train on, or to test on, of a folder that is split or not."""
    if not is_unsplit(root):
        train_folder, test_folder = split_folders([root], held_out=("test", "val"))
        return listed_images(train_folder if train else test_folder)
    files = listed_images(root) if train else list_images(root)
    refuse_one_class(root, files.classes)
    test_files = choose_test_files(files) if test_files is None else test_files
    part = part_of(files, test_files, train=train)
    return part if part.paths else files


def _load_folder(
    files: ImageFiles,
    *,
    image_size: int,
    workers: int,
    count: int,
    value_range: ValueRange | None,
) -> ImageSet:
    if count:
        kept = first_of_each_class(torch.tensor(files.labels), count, files.classes)
        files = files.subset(kept.tolist())
    resize = evaluation_resize(image_size, imagenet=False)
    reader = FileReader(files, image_size, resize=resize, value_range=value_range)
    blocks = torch.arange(len(reader)).split(256)
    workers = min(workers, len(blocks) - 1)  # not worth a process for the smallest sets
    loader = block_loader(reader, [(0, block) for block in blocks], workers)
    images = torch.empty(len(reader), 3, image_size, image_size, dtype=torch.uint8)
    unreadable = []
    with tqdm(total=len(reader), desc=f"reading {files.folder}", unit=" images", disable=None) as bar:
        for block, (pixels, _, errors) in zip(blocks, read_blocks(loader), strict=True):
            images[block] = pixels
            unreadable += errors
            bar.update(len(block))
    refuse_unreadable(unreadable)
    return ImageSet(images, reader.labels, tuple(files.classes), tuple(files.paths))
