"""Images in, batches out: data sets, splits and loaders.

A set that fits in memory (CIFAR, `shapes`, a folder of images) is one uint8 tensor, an `ImageSet`;
`BatchLoader` augments and normalises whole batches of it on its device. ImageNet is decoded by worker
processes and only normalised on the device. Both loaders have `len()`, `num_samples` and
`epoch(epoch, start)`: order and augmentation are pure functions of the seed, the epoch and the step, so a run
that resumes at any step continues as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import hashlib
import math
import multiprocessing
import os
import signal
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.error import URLError

import numpy as np
import torch
import torch.nn.functional as F
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from augment import (
    LIGHTING_AXES,
    NO_AUGMENTATION,
    Augmentation,
    Normalize,
    cutout,
    lighting,
    mixup,
    random_crop,
    random_flip,
)
from choices import SETS
from folders import ImageFiles, class_names, list_images
from packed.picture import ValueRange, central_corner, evaluation_resize, read_rgb, resized_shape
from shapes import SHAPES, draw_shapes
from split import choose_test_files, is_unsplit, part_of
from utils import InputError, RunFailed, nearest_multiples, one_line, printable

# Of the training images: DARTS's and PC-DARTS's for CIFAR.
STATISTICS = {
    "cifar10": Normalize((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": Normalize((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

TRIED = 64
"""Files of ImageNet that are read at the start, before a run of days is made of what nobody can read."""


# ---------------------------------------------------------------------------------------------------------
# Sets in memory
# ---------------------------------------------------------------------------------------------------------


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
        is for files of more than 8 bits a channel (see images.read_rgb). `root/<class>/**` is split:
        `test_files` are the digests of those to test on (see split.py), None for those of TEST_PART; where
        the folder has none of them, all of its images are to train on, and all to test on.
    shapes: drawn, nothing is read; `root` is not used. 10,000 training and 2,000 test images.

    Raises InputError for an unknown name, missing or unreadable data, a failed download, and a `count` that
    cannot be had; RunFailed where a process that reads is killed.
    """
    if name == "folder":
        how = {"image_size": image_size, "workers": workers, "value_range": value_range}
        files = _files_of(Path(root), train=train, test_files=test_files)
        return _load_folder(files, count=count, **how)
    if name in ("cifar10", "cifar100"):
        if image_size != 32:
            raise InputError(f"{name} images are 32 x 32, not {image_size}; leave image_size at 32")
        images = _load_cifar(name, root, train=train)
    elif name == "shapes":
        pixels, labels = draw_shapes(10_000 if train else 2_000, image_size, seed=0 if train else 1)
        images = ImageSet(torch.from_numpy(pixels), torch.from_numpy(labels), tuple(SHAPES))
    else:
        raise InputError(f"unknown set {name!r}; choose from {', '.join(SETS)}")
    if not count:
        return images
    kept = _first_of_each_class(images.labels, count, images.classes)
    return ImageSet(images.images[kept], images.labels[kept], images.classes)


def _first_of_each_class(labels: Tensor, count: int, classes: Sequence[str]) -> Tensor:
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


def check_spread(images: Tensor) -> None:
    """Raise InputError where no channel of uint8 images (n, 3, h, w) has two different values."""
    lowest, highest = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    if (lowest == highest).all():
        raise InputError(
            f"all {len(images)} images to train on have the one colour {tuple(lowest.tolist())}: look at the "
            "files, and whether --value_range is right"
        )


def split_halves(n: int, train_portion: float, seed: int) -> tuple[Tensor, Tensor]:
    """Indices of a search's parts: floor(n * train_portion) for the weights, the rest for alpha and beta."""
    return _split(n, math.floor(n * train_portion), seed, f"a training portion of {train_portion}")


def holdout_split(n: int, holdout: int, seed: int) -> tuple[Tensor, Tensor]:
    """Indices to train on, and of the `holdout` images that pick the best epoch."""
    return _split(n, n - holdout, seed, f"a hold-out of {holdout} images")


def _split(n: int, first: int, seed: int, what: str) -> tuple[Tensor, Tensor]:
    if not 0 < first < n:
        raise InputError(f"{what} leaves one part of the {n} training images empty")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(_mix("split", seed)))
    return order[:first], order[first:]


def _load_cifar(name: str, root: str | Path, *, train: bool) -> ImageSet:
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


def _is_of_the_file_system(error: Exception) -> bool:
    """Whether an OSError is of a file, not of the network: a name that cannot be opened, or a full disk."""
    if not isinstance(error, OSError) or isinstance(error, URLError):
        return False
    return error.filename is not None or error.errno in (errno.ENOSPC, errno.EDQUOT)


def _files_of(root: Path, *, train: bool, test_files: Collection[str] | None) -> ImageFiles:
    """The files to train on, or to test on, of a folder that is split or not."""
    if not is_unsplit(root):
        train_folder, test_folder = _split_folders([root], held_out=("test", "val"))
        return _list_images(train_folder if train else test_folder)
    files = _list_images(root) if train else list_images(root)
    _refuse_one_class(root, files.classes)
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
        kept = _first_of_each_class(torch.tensor(files.labels), count, files.classes)
        files = files.subset(kept.tolist())
    resize = evaluation_resize(image_size, imagenet=False)
    reader = _Reader(files, image_size, resize=resize, value_range=value_range)
    blocks = torch.arange(len(reader)).split(256)
    workers = min(workers, len(blocks) - 1)  # not worth a process for the smallest sets
    loader = _data_loader(reader, [(0, block) for block in blocks], workers)
    images = torch.empty(len(reader), 3, image_size, image_size, dtype=torch.uint8)
    unreadable = []
    with tqdm(total=len(reader), desc=f"reading {files.folder}", unit=" images", disable=None) as bar:
        for block, (pixels, _, errors) in zip(blocks, _read(loader), strict=True):
            images[block] = pixels
            unreadable += errors
            bar.update(len(block))
    _refuse(unreadable)
    return ImageSet(images, reader.labels, tuple(files.classes), tuple(files.paths))


# ---------------------------------------------------------------------------------------------------------
# Image files
# ---------------------------------------------------------------------------------------------------------


class _Reader(Dataset):
    """Image files, decoded and cut to `size` a block at a time.

    An item is `(epoch, indices)`; it gives uint8 (k, 3, size, size), labels int64 (k,), and a list of what
    could not be read: an exception would come out of a worker as a page of traceback. With a `seed` the
    images get RandomResizedCrop and a flip, drawn from (seed, epoch, index) and nothing else, so that the
    number of workers does not matter; else the shorter side becomes `resize`, and the centre is cut out.
    """

    def __init__(
        self,
        files: ImageFiles,
        size: int,
        *,
        resize: int = 0,
        seed: int | None = None,
        color_jitter: bool = False,
        jpeg_draft: bool = False,
        value_range: ValueRange | None = None,
    ):
        # Arrays, since forked workers share their pages; a list's would be copied, one reference count after
        # another: a quarter of a gigabyte in each worker for ImageNet.
        self.paths = np.array([os.fsencode(path) for path in files.paths])
        self.labels = torch.tensor(files.labels)
        self.size, self.resize, self.seed = size, resize, seed
        self.jpeg_draft, self.value_range = jpeg_draft, value_range
        if seed is None:
            return
        from torchvision.transforms import v2  # takes seconds to import; the small sets do without

        colors = [v2.ColorJitter(0.4, 0.4, 0.4, 0.2)] if color_jitter else []
        self.crop = v2.RandomResizedCrop(size, antialias=True)
        self.after_crop = v2.Compose([v2.RandomHorizontalFlip(), *colors])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, Tensor]) -> tuple[Tensor, Tensor, list[str]]:
        epoch, indices = item
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        unreadable = []
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            for image, index in zip(images, indices.tolist(), strict=True):
                path = os.fsdecode(self.paths[index])
                try:
                    # Pillow decodes, torchvision crops and resizes: training images of 500 x 375 take 0.85 of
                    # the time of Pillow alone. torchvision's decoder would make it 0.65; it is deprecated.
                    if self.seed is None:
                        image.copy_(self._centre(self._pixels(path)))
                    else:
                        torch.default_generator.manual_seed(_mix("crop", self.seed, epoch, index))
                        image.copy_(self._augmented(path))
                except Exception as error:  # Pillow's parsers raise many types; the caller reports them
                    unreadable.append(f"{path} ({_reason(error)})")
        return images, self.labels[indices], unreadable

    def _pixels(self, path: str, reduction: Callable[[int, int], int] | None = None) -> Tensor:
        """See read_rgb; uint8 (3, h, w)."""
        return torch.from_numpy(read_rgb(path, reduction, value_range=self.value_range)).permute(2, 0, 1)

    def _augmented(self, path: str) -> Tensor:
        """RandomResizedCrop, a flip, perhaps colours. With `jpeg_draft` a JPEG is decoded at 1/2, 1/4 or 1/8
        of its size where the crop, which is the same, still has `size` pixels each way."""
        if not self.jpeg_draft:
            return self.after_crop(self.crop(self._pixels(path)))
        from torchvision.transforms import RandomResizedCrop
        from torchvision.transforms.v2.functional import resized_crop

        whole = box = None

        def reduction(*size: int) -> int:
            nonlocal whole, box
            whole, like = size, torch.empty(3, *size, device="meta")
            # top, left, height, width
            box = RandomResizedCrop.get_params(like, self.crop.scale, self.crop.ratio)
            return min(box[2:]) // self.size

        image = self._pixels(path, reduction)
        drawn = [n / full for n, full in zip(image.shape[1:], whole, strict=True)]
        box = [round(n * scale) for n, scale in zip(box, 2 * drawn, strict=True)]
        return self.after_crop(resized_crop(image, *box, [self.size, self.size], antialias=True))

    def _centre(self, image: Tensor) -> Tensor:
        height, width = resized_shape(*image.shape[1:], self.resize)
        if image.shape[1:] != (height, width):  # v2 takes as long to find that out as a small image to decode
            from torchvision.transforms.v2.functional import resize

            image = resize(image, [height, width], antialias=True)
        top, left = central_corner(height, width, self.size)
        return image[:, top : top + self.size, left : left + self.size]

    def try_some(self) -> None:
        """Read TRIED of the files, spread over the set. Raises InputError where one cannot be read, or where
        all are of one colour."""
        indices = torch.arange(0, len(self), -(-len(self) // TRIED))
        images, _, unreadable = self[0, indices]
        _refuse(unreadable)
        check_spread(images)


def _split_folders(roots: Sequence[Path], held_out: Sequence[str]) -> tuple[Path, Path]:
    """`train` and the first of `held_out` that exists, in the first of `roots` that has a `train`.

    Raises InputError where there is none, or their classes differ, or there is only one.
    """
    root = next((root for root in roots if (root / "train").is_dir()), None)
    if root is None:
        raise InputError(f"no folder 'train' in {' or '.join(map(str, roots))}")
    name = next((name for name in held_out if (root / name).is_dir()), None)
    if name is None:
        raise InputError(
            f"no folder {' or '.join(map(repr, held_out))} in {root}, beside 'train'; --set folder splits "
            f"{root / 'train'} itself where --data names it"
        )
    train, test = root / "train", root / name
    classes = {folder: set(class_names(folder)) for folder in (train, test)}
    only = [
        f"only in {folder}: {', '.join(extra[:5])}{', ...' if len(extra) > 5 else ''}"
        for folder, other in ((train, test), (test, train))
        if (extra := sorted(classes[folder] - classes[other]))
    ]
    if only:
        raise InputError(f"the classes of {train} and {test} differ; {'; '.join(only)}")
    _refuse_one_class(train, sorted(classes[train]))
    return train, test


def _refuse_one_class(folder: Path, classes: Sequence[str]) -> None:
    if len(classes) == 1:
        raise InputError(
            f"{folder} has one class, {classes[0]}, and a network needs two to tell apart: each folder in "
            f"{folder} is to be a class"
        )


def _list_images(folder: Path) -> ImageFiles:
    """`list_images`, with a line of warning for what it leaves out."""
    files = list_images(folder)
    if files.left_out:
        print(printable(f"warning: left out in {folder}: {files.left_out}"), file=sys.stderr)
    return files


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without its name, which Pillow and the operating system repeat."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or one_line(error)


def _refuse(unreadable: list[str]) -> None:
    """Raise InputError where there are files that could not be read."""
    if unreadable:
        count = "1 image" if len(unreadable) == 1 else f"{len(unreadable)} images"
        more = ", ..." if len(unreadable) > 3 else ""
        advice = "" if "--value_range" in unreadable[0] else "; replace or remove"
        raise InputError(f"cannot read {count}: {', '.join(unreadable[:3])}{more}{advice}")


def _data_loader(
    reader: _Reader, items: Sequence | Sampler, workers: int, *, keep: bool = False, pin: bool = False
) -> DataLoader:
    """What `workers` processes, none for 0, read of `items`; with `keep` they stay for the next epoch."""
    return DataLoader(
        reader,
        batch_size=None,  # an item is a block of images already
        sampler=items,
        num_workers=workers,
        persistent_workers=keep and workers > 0,
        pin_memory=pin,
        generator=torch.Generator(),  # leaves the global generator alone, which a checkpoint restores
        worker_init_fn=_obey_the_main_process,
    )


def _obey_the_main_process(worker: int) -> None:
    """In a worker: a signal may reach a whole group of processes; the main one decides what it means.

    A SIGTERM that it sends itself ends the worker: so it does at exit, and would wait for ever.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if hasattr(signal, "SIGBREAK"):  # Windows: Ctrl-Break
        signal.signal(signal.SIGBREAK, signal.SIG_IGN)
    if not hasattr(signal, "sigwaitinfo"):  # macOS: any SIGTERM ends the worker; Windows has none
        return
    main = multiprocessing.parent_process().pid  # not os.getppid(), which may be that of a fork server
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_its_signal() -> None:
        while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main:
            pass
        os._exit(0)

    threading.Thread(target=wait_for_its_signal, daemon=True).start()


def _read(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """The items of a `_data_loader`, in order. Raises RunFailed where one of its processes was killed."""
    child_ends = getattr(signal, "SIGCHLD", None)  # Windows has none
    handler = child_ends and signal.getsignal(child_ends)
    try:
        items = iter(loader)
        if child_ends:  # torch's handler would raise wherever the main thread happens to be
            signal.signal(child_ends, handler)
        yield from items
    except RuntimeError as error:
        if "DataLoader worker" not in str(error):
            raise
        raise RunFailed(
            "a process that reads images was killed, as happens where memory (or /dev/shm) is short; "
            "fewer --workers need less"
        ) from error


# ---------------------------------------------------------------------------------------------------------
# Loaders
# ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What one process gets of a step."""

    images: Tensor  # float32 (b, 3, h, w), normalised, on the device
    targets: Tensor  # int64 (b,), or float32 (b, classes) after mixup
    global_size: int  # images of this step over all processes


@dataclass(frozen=True)
class Share:
    """What falls to process `rank` of `size`: a contiguous part, the parts differing by one at most."""

    rank: int = 0
    size: int = 1

    def of(self, n: int) -> slice:
        """Its part of `n` things in a row."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


@dataclass(eq=False, repr=False)
class Loader(ABC):
    """How an epoch falls into steps, and steps into the shares of the processes.

    `batch_size` is global: step s takes images [s * batch_size, (s + 1) * batch_size) of the epoch's order,
    which is the same on all processes, and each process takes its `share` of them. In training (`shuffle`) a
    last batch of fewer than two images per process is left out of that epoch, as batch normalisation needs
    two. In evaluation every image comes exactly once, and a process may get a batch of no images.

    `stream` tells apart loaders of one run, so that they do not draw the same random numbers.
    """

    source: Any  # where the images come from, and how many there are
    batch_size: int
    _: KW_ONLY
    normalize: Normalize
    shuffle: bool = False
    seed: int = 0
    stream: int = 0
    share: Share = Share()

    def __post_init__(self) -> None:
        n = self.num_images
        if self.shuffle and self.batch_size > n:
            raise InputError(
                f"a batch of {self.batch_size} is larger than the {n} images to train on; give a smaller "
                "--batch_size, for some hundred images about 16"
            )
        smallest = 2 * self.share.size if self.shuffle else 1
        if self.batch_size < smallest:
            raise InputError(
                f"a batch of {self.batch_size} is too small; "
                f"with {self.share.size} processes it needs {smallest}"
            )
        full, tail = divmod(n, self.batch_size)
        self.num_steps = full + (tail >= smallest)
        self.num_samples = min(self.num_steps * self.batch_size, n)
        self.generator = torch.Generator(self.device)
        self.normalize_ = self.normalize.on(self.device)

    def __len__(self) -> int:
        return self.num_steps

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on."""

    @property
    def num_images(self) -> int:
        return len(self.source)

    def _order(self, epoch: int) -> Tensor:
        """The epoch's images, int64 (n,), on the CPU."""
        if not self.shuffle:
            return torch.arange(self.num_images)
        generator = torch.Generator().manual_seed(_mix("order", self.seed, self.stream, epoch))
        return torch.randperm(self.num_images, generator=generator)

    def _part(self, step: int) -> tuple[slice, int]:
        """Where in the order this process's images of a step are, and how many the step has in all."""
        first = step * self.batch_size
        size = min(self.batch_size, self.num_images - first)
        part = self.share.of(size)
        return slice(first + part.start, first + part.stop), size

    def _seed(self, epoch: int, step: int) -> int:
        return _mix("step", self.seed, self.stream, epoch, step, self.share.rank)


@dataclass(eq=False, repr=False)
class BatchLoader(Loader):
    """Batches of an `ImageSet`, augmented and normalised on its device.

    `indices`, int64 (k,), are the images to take, where not all: no copy is made of them. Order and
    augmentation are functions of (seed, stream, epoch, step, rank) and the kind of device alone.
    """

    source: ImageSet
    _: KW_ONLY
    augmentation: Augmentation = NO_AUGMENTATION
    indices: Tensor | None = None

    def __post_init__(self) -> None:
        self.device = self.source.images.device
        if self.indices is not None:
            self.indices = self.indices.to(self.device)
        super().__post_init__()

    @property
    def num_images(self) -> int:
        return len(self.source if self.indices is None else self.indices)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = self._order(epoch).to(self.device)
        if self.indices is not None:
            order = self.indices[order]
        for step in range(start, len(self)):
            part, global_size = self._part(step)
            yield Batch(*self._batch(order[part], self._seed(epoch, step)), global_size)

    def _batch(self, indices: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        images, targets = self.source.images[indices], self.source.labels[indices]
        augmentation, generator = self.augmentation, self.generator.manual_seed(seed)
        if augmentation.crop_padding:
            images = random_crop(images, augmentation.crop_padding, generator)
        if augmentation.flip:
            images = random_flip(images, generator)
        images = self.normalize_(images.float().div_(255))
        if augmentation.cutout_length:
            images = cutout(images, augmentation.cutout_length, generator)
        if augmentation.mixup_alpha:
            # The host draws the weight, like the original: torch has no Beta that takes a generator.
            weight = np.random.default_rng(seed).beta(augmentation.mixup_alpha, augmentation.mixup_alpha)
            one_hot = F.one_hot(targets, len(self.source.classes)).float()
            images, targets = mixup(images, one_hot, weight, generator)
        return images, targets


class _Upload:
    """Copies tensors to a device. To a GPU on a stream of its own, from pinned memory: the copy of a batch
    then does not queue behind the steps that the GPU has been given before."""

    def __init__(self, device: torch.device):
        self.device = device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __call__(self, *tensors: Tensor) -> list[Tensor]:
        if self.stream is None:
            return [tensor.to(self.device) for tensor in tensors]
        with torch.cuda.stream(self.stream):
            copies = [tensor.to(self.device, non_blocking=True) for tensor in tensors]
        reader = torch.cuda.current_stream(self.device)
        reader.wait_stream(self.stream)
        for copy in copies:
            copy.record_stream(reader)  # its memory is not given to another copy before it has been read
        return copies


class _EpochSampler(Sampler):
    """What the workers are to read in the epoch that is open. They outlive it, and so does their sampler."""

    def __init__(self) -> None:
        self.items: list[tuple[int, Tensor]] | None = None  # None: no epoch is open

    def __iter__(self) -> Iterator[tuple[int, Tensor]]:
        return iter(self.items)

    @contextlib.contextmanager
    def open(self, items: list[tuple[int, Tensor]]) -> Iterator[None]:
        """Raises RuntimeError where another epoch is open: the two would take each other's items."""
        if self.items is not None:
            raise RuntimeError("an epoch of this loader is still open: exhaust or close it before the next")
        self.items = items
        try:
            yield
        finally:
            self.items = None


@dataclass(eq=False, repr=False)
class FileLoader(Loader):
    """Batches of image files, decoded by worker processes, normalised on the device; else like `BatchLoader`.

    A worker makes whole batches. One epoch at a time: RuntimeError where one is begun while another is open.
    Raises InputError, with its name, for a file that cannot be read, and RunFailed where a worker is killed.
    """

    source: _Reader
    _: KW_ONLY
    device: torch.device | str
    workers: int
    lighting_std: float = 0.0

    def __post_init__(self) -> None:
        self.device = torch.device(self.device)
        super().__post_init__()
        self.lighting_axes = self.lighting_std * LIGHTING_AXES.to(self.device)
        self.sampler, self.upload = _EpochSampler(), _Upload(self.device)
        pin = self.device.type == "cuda"
        self.loader = _data_loader(self.source, self.sampler, self.workers, keep=True, pin=pin)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = self._order(epoch)
        parts = [self._part(step) for step in range(start, len(self))]
        with self.sampler.open([(epoch, order[part]) for part, _ in parts]):
            for step, (images, targets, unreadable) in enumerate(_read(self.loader), start):
                _refuse(unreadable)
                generator = self.generator.manual_seed(self._seed(epoch, step))
                images, targets = self.upload(images, targets)
                images = images.float().div_(255)
                images = self.normalize_(lighting(images, self.lighting_axes, generator))
                yield Batch(images, targets, parts[step - start][1])


def imagenet_loaders(
    root: str | Path,
    batch_size: int,
    *,
    device: torch.device | str,
    workers: int,
    seed: int,
    image_size: int = 224,
    jpeg_draft: bool = False,
    share: Share = Share(),
    color_jitter: bool = False,
    value_range: ValueRange | None = None,
) -> tuple[FileLoader, FileLoader, tuple[str, ...]]:
    """Training and validation loader of ImageNet, or of any folders like it, and the classes' names.

    `train` and `val` are in `root`, or in its ILSVRC2012 or ImageNet-ILSVRC2012. Training:
    RandomResizedCrop(image_size), flip, Lighting 0.1 or `color_jitter` (brightness, contrast and saturation
    0.4, hue 0.2). Validation: the centre of the image resized to 256/224 of `image_size`. `workers` processes
    for each of the two loaders. `jpeg_draft`: training images that are larger than needed are decoded
    smaller, which is faster, with slightly other pixels. `value_range`: see images.read_rgb.

    Raises InputError for a missing `train` or `val`, an empty class, classes that differ between them, and an
    unreadable file among TRIED of each.
    """
    files = _list_images(imagenet_folders(root)[0])
    how = {"jpeg_draft": jpeg_draft, "color_jitter": color_jitter, "value_range": value_range}
    reader = _Reader(files, image_size, seed=seed, **how)
    reader.try_some()
    placed = {"device": device, "workers": workers, "share": share}
    train_loader = FileLoader(
        reader,
        batch_size,
        normalize=STATISTICS["imagenet"],
        shuffle=True,
        seed=seed,
        lighting_std=0.0 if color_jitter else 0.1,
        **placed,
    )
    how = {"image_size": image_size, "value_range": value_range}
    val_loader, classes = imagenet_val_loader(root, batch_size, **how, **placed)
    return train_loader, val_loader, classes


def imagenet_val_loader(
    root: str | Path,
    batch_size: int,
    *,
    device: torch.device | str,
    workers: int,
    image_size: int = 224,
    share: Share = Share(),
    value_range: ValueRange | None = None,
) -> tuple[FileLoader, tuple[str, ...]]:
    """The validation loader of `imagenet_loaders` alone, and the classes' names."""
    files = _list_images(imagenet_folders(root)[1])
    resize = evaluation_resize(image_size, imagenet=True)
    reader = _Reader(files, image_size, resize=resize, value_range=value_range)
    reader.try_some()
    loader = FileLoader(
        reader, batch_size, normalize=STATISTICS["imagenet"], device=device, workers=workers, share=share
    )
    return loader, tuple(files.classes)


def search_file_loaders(
    root: str | Path,
    batch_size: int,
    *,
    train_portion: float,
    device: torch.device | str,
    workers: int,
    seed: int,
    image_size: int = 224,
    count: int = 0,
    share: Share = Share(),
    value_range: ValueRange | None = None,
) -> tuple[FileLoader, FileLoader, FileLoader, tuple[str, ...]]:
    """For a search, of the training images of ImageNet, or of any folders like it: loaders of the part that
    trains the weights (`train_portion`), of the rest, which trains alpha and beta, and of this rest as it is,
    for evaluation; and the classes' names.

    `train` is in `root`, or in its ILSVRC2012 or ImageNet-ILSVRC2012, beside `val` or `test`. Of its images
    `count` (0: all), the first of each class. Augmentation and evaluation as in `imagenet_loaders`. No image
    is held in memory; `workers` processes for each of the three loaders.

    Raises InputError as `imagenet_loaders` does, and where a part would be empty or `count` cannot be had.
    """
    files = _list_images(imagenet_folders(root, held_out=("val", "test"))[0])
    labels = torch.tensor(files.labels)
    kept = _first_of_each_class(labels, count, files.classes) if count else torch.arange(len(labels))
    parts = [
        files.subset(kept[indices].sort().values.tolist())
        for indices in split_halves(len(kept), train_portion, seed)
    ]
    placed = {"device": device, "workers": workers, "share": share, "normalize": STATISTICS["imagenet"]}
    loaders = []
    for stream, part in enumerate(parts):
        reader = _Reader(part, image_size, seed=_mix("search", seed, stream), value_range=value_range)
        reader.try_some()
        training = {"shuffle": True, "seed": seed, "stream": stream, "lighting_std": 0.1}
        loaders.append(FileLoader(reader, batch_size, **training, **placed))
    resize = evaluation_resize(image_size, imagenet=True)
    reader = _Reader(parts[1], image_size, resize=resize, value_range=value_range)
    return *loaders, FileLoader(reader, batch_size, **placed), tuple(files.classes)


def imagenet_folders(root: str | Path, held_out: Sequence[str] = ("val",)) -> tuple[Path, Path]:
    """train/ and the first of `held_out`, in `root`, or in its ILSVRC2012 or ImageNet-ILSVRC2012. Raises
    InputError: there are none."""
    roots = [Path(root), Path(root, "ILSVRC2012"), Path(root, "ImageNet-ILSVRC2012")]
    return _split_folders(roots, held_out=held_out)


def _mix(*key: int | str) -> int:
    """A 64-bit seed of a key: near keys give unrelated seeds, on every platform."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")
