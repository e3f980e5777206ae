"""Batches of images.

`BatchLoader` augments and normalises whole batches of an `ImageSet` on its device. `FileLoader` has files
(ImageNet) decoded by worker processes, and only normalises on the device. Both have `len()`, `num_samples`
and `epoch(epoch, start)`: order and augmentation are pure functions of the seed, the epoch and the step, so
a run that resumes at any step continues as if it had never stopped.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Sampler

from images.augment import (
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
from images.files import imagenet_folders, listed_images
from images.reader import FileReader, block_loader, read_blocks, refuse_unreadable
from images.sets import STATISTICS, ImageSet, first_of_each_class, split_halves
from packed.picture import ValueRange, evaluation_resize
from utils import InputError, mixed_seed


class Batch(NamedTuple):
    """The part of a step's images that one process gets."""

    images: Tensor  # float32 (b, 3, h, w), normalised, on the device
    targets: Tensor  # int64 (b,), or float32 (b, classes) after mixup
    global_size: int  # images of this step over all processes


@dataclass(frozen=True)
class Shard:
    """The part of a batch that process `rank` of `size` takes. Parts are contiguous, and differ by one image
    at most."""

    rank: int = 0
    size: int = 1

    def of(self, n: int) -> slice:
        """Its part of `n` things in a row."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)


@dataclass(eq=False, repr=False)
class Loader(ABC):
    """How an epoch falls into steps, and steps into the shards of the processes.

    `batch_size` is global: step s takes images [s * batch_size, (s + 1) * batch_size) of the epoch's order,
    which is the same on all processes, and each process takes its `shard` of them. In training (`shuffle`) a
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
    shard: Shard = Shard()

    def __post_init__(self) -> None:
        n = self.num_images
        if self.shuffle and self.batch_size > n:
            raise InputError(
                f"a batch of {self.batch_size} is larger than the {n} images to train on; give a smaller "
                "--batch_size, for some hundred images about 16"
            )
        smallest = 2 * self.shard.size if self.shuffle else 1
        if self.batch_size < smallest:
            raise InputError(
                f"a batch of {self.batch_size} is too small: batch normalisation needs two images on each of "
                f"{self.shard.size} processes, so {smallest} or more"
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
        generator = torch.Generator().manual_seed(mixed_seed("order", self.seed, self.stream, epoch))
        return torch.randperm(self.num_images, generator=generator)

    def _part(self, step: int) -> tuple[slice, int]:
        """Where in the order this process's images of a step are, and how many the step has in all."""
        first = step * self.batch_size
        size = min(self.batch_size, self.num_images - first)
        part = self.shard.of(size)
        return slice(first + part.start, first + part.stop), size

    def _seed(self, epoch: int, step: int) -> int:
        return mixed_seed("step", self.seed, self.stream, epoch, step, self.shard.rank)


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
    """Tells the workers what to read in the epoch that is open. They and their sampler outlive it."""

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

    source: FileReader
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
        self.loader = block_loader(self.source, self.sampler, self.workers, keep=True, pin=pin)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = self._order(epoch)
        parts = [self._part(step) for step in range(start, len(self))]
        with self.sampler.open([(epoch, order[part]) for part, _ in parts]):
            for step, (images, targets, unreadable) in enumerate(read_blocks(self.loader), start):
                refuse_unreadable(unreadable)
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
    shard: Shard = Shard(),
    color_jitter: bool = False,
    value_range: ValueRange | None = None,
) -> tuple[FileLoader, FileLoader, tuple[str, ...]]:
    """Training and validation loader of ImageNet, or of any folders like it, and the classes' names.

    `train` and `val` are in `root`, or in its ILSVRC2012 or ImageNet-ILSVRC2012. Training:
    RandomResizedCrop(image_size), flip, Lighting 0.1 or `color_jitter` (brightness, contrast and saturation
    0.4, hue 0.2). Validation: the centre of the image resized to 256/224 of `image_size`. `workers` processes
    for each of the two loaders. `value_range`: see packed.picture.read_rgb.

    Raises InputError for a missing `train` or `val`, an empty class, classes that differ between them, and an
    unreadable file among TRIED of each.
    """
    files = listed_images(imagenet_folders(root)[0])
    how = {"color_jitter": color_jitter, "value_range": value_range}
    reader = FileReader(files, image_size, seed=seed, **how)
    reader.try_some()
    placed = {"device": device, "workers": workers, "shard": shard}
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
    shard: Shard = Shard(),
    value_range: ValueRange | None = None,
) -> tuple[FileLoader, tuple[str, ...]]:
    """The validation loader of `imagenet_loaders` alone, and the classes' names."""
    files = listed_images(imagenet_folders(root)[1])
    resize = evaluation_resize(image_size, imagenet=True)
    reader = FileReader(files, image_size, resize=resize, value_range=value_range)
    reader.try_some()
    loader = FileLoader(
        reader, batch_size, normalize=STATISTICS["imagenet"], device=device, workers=workers, shard=shard
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
    shard: Shard = Shard(),
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
    files = listed_images(imagenet_folders(root, held_out=("val", "test"))[0])
    labels = torch.tensor(files.labels)
    kept = first_of_each_class(labels, count, files.classes) if count else torch.arange(len(labels))
    parts = [
        files.subset(kept[indices].sort().values.tolist())
        for indices in split_halves(len(kept), train_portion, seed)
    ]
    placed = {"device": device, "workers": workers, "shard": shard, "normalize": STATISTICS["imagenet"]}
    loaders = []
    for stream, part in enumerate(parts):
        reader = FileReader(
            part, image_size, seed=mixed_seed("search", seed, stream), value_range=value_range
        )
        reader.try_some()
        training = {"shuffle": True, "seed": seed, "stream": stream, "lighting_std": 0.1}
        loaders.append(FileLoader(reader, batch_size, **training, **placed))
    resize = evaluation_resize(image_size, imagenet=True)
    reader = FileReader(parts[1], image_size, resize=resize, value_range=value_range)
    return *loaders, FileLoader(reader, batch_size, **placed), tuple(files.classes)
