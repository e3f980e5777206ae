"""Images in, batches out: data sets, augmentation on the device, splits and loaders.

A set that fits in memory (CIFAR, `shapes`, a folder of images) is one uint8 tensor, an `ImageSet`;
`BatchLoader` augments and normalises whole batches of it on its device. ImageNet is decoded by worker
processes and only normalised on the device. Both loaders have `len()`, `num_samples` and
`epoch(epoch, start)`, and both keep no state: order and augmentation are pure functions of the seed, the
epoch and the step, so a run that resumes at any step continues as if it had never stopped.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import signal
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import CIFAR10, CIFAR100, ImageFolder
from torchvision.transforms import v2
from tqdm import tqdm

from utils import InputError

SETS = ("cifar10", "cifar100", "shapes", "folder")

# Channel mean and standard deviation of the training images: DARTS's and PC-DARTS's for CIFAR.
STATISTICS = {
    "cifar10": ((0.49139968, 0.48215827, 0.44653124), (0.24703233, 0.24348505, 0.26158768)),
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}

# The principal axes of ImageNet's colours in [0, 1], each as long as its standard deviation: AlexNet's
# Lighting (Krizhevsky et al., 2012), in the values that Torch made common.
LIGHTING_AXES = torch.tensor([[0.2175], [0.0188], [0.0045]]) * torch.tensor(
    [[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]]
)


# ---------------------------------------------------------------------------------------------------------
# Sets in memory
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ImageSet:
    """Labelled images of one size: `images` uint8 (n, 3, h, w), `labels` int64 (n,), names of the classes."""

    images: torch.Tensor
    labels: torch.Tensor
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.images)

    def to(self, device: torch.device | str) -> ImageSet:
        return ImageSet(self.images.to(device), self.labels.to(device), self.classes)

    def subset(self, indices: torch.Tensor) -> ImageSet:
        """The images at `indices`, int64 (k,), in that order; a copy."""
        return ImageSet(self.images[indices], self.labels[indices], self.classes)


def load_set(name: str, root: str | Path, *, train: bool, image_size: int = 32, workers: int = 2) -> ImageSet:
    """The training or the test images of a set, on the CPU.

    cifar10, cifar100: from `root`, downloaded there if absent (by one process at a time, please).
    folder: `root/train/<class>/*` and `root/test/<class>/*` (or `val`), read by `workers` processes. Any size
        and mode: made RGB, the shorter side resized to `image_size`, the centre cut out.
    shapes: drawn, nothing is read; `root` is not used. 10,000 training and 2,000 test images.

    Raises InputError for an unknown name, missing or unreadable data, and a failed download.
    """
    if name in ("cifar10", "cifar100"):
        if image_size != 32:
            raise InputError(f"{name} images are 32 x 32, not {image_size}; leave image_size at 32")
        return _load_cifar(name, root, train=train)
    if name == "folder":
        return _load_folder(root, train=train, image_size=image_size, workers=workers)
    if name == "shapes":
        return draw_shapes(10_000, image_size, seed=0) if train else draw_shapes(2_000, image_size, seed=1)
    raise InputError(f"unknown set {name!r}; choose from {', '.join(SETS)}")


def channel_statistics(name: str, train_set: ImageSet) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel, in units of the full range [0, 1].

    The constants in common use for CIFAR; for the other sets those of `train_set`, exactly, by its histogram.
    """
    if name in STATISTICS:
        return STATISTICS[name]
    levels = torch.arange(256, dtype=torch.float64) / 255
    means, stds = [], []
    for channel in train_set.images.unbind(1):
        frequency = torch.bincount(channel.flatten(), minlength=256).cpu() / channel.numel()
        mean = (frequency * levels).sum()
        means.append(mean.item())
        # At least one level, so that images of one colour do not divide by zero.
        stds.append(max((frequency * (levels - mean) ** 2).sum().sqrt().item(), 1 / 255))
    return tuple(means), tuple(stds)


def split_halves(n: int, train_portion: float, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices of a search's parts: floor(n * train_portion) for the weights, the rest for alpha and beta."""
    return _split(n, math.floor(n * train_portion), seed, f"a training portion of {train_portion}")


def holdout_split(n: int, holdout: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Indices to train on, and of the `holdout` images that pick the best epoch."""
    return _split(n, n - holdout, seed, f"a hold-out of {holdout} images")


def _split(n: int, first: int, seed: int, wish: str) -> tuple[torch.Tensor, torch.Tensor]:
    if not 0 < first < n:
        raise InputError(f"{wish} leaves one part of the {n} training images empty")
    order = torch.randperm(n, generator=torch.Generator().manual_seed(_mix("split", seed)))
    return order[:first], order[first:]


def _load_cifar(name: str, root: str | Path, *, train: bool) -> ImageSet:
    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # some versions of torchvision report on stdout
            dataset = source(root, train=train, download=True)
    except (OSError, RuntimeError) as error:  # URLError is an OSError
        with contextlib.suppress(OSError):
            Path(root).rmdir()  # torchvision has made it; it goes where it is empty
        raise InputError(
            f"{name} is not in {root} and could not be downloaded ({_one_line(error)}); "
            f"put {source.filename} from {source.url} there, or use the set shapes, which needs no download"
        ) from error
    images = torch.from_numpy(dataset.data).permute(0, 3, 1, 2).contiguous()  # (n, h, w, 3) -> (n, 3, h, w)
    return ImageSet(images, torch.tensor(dataset.targets), tuple(dataset.classes))


def _load_folder(root: str | Path, *, train: bool, image_size: int, workers: int) -> ImageSet:
    folders = _image_folders([Path(root)], held_out=("test", "val"))
    folder = folders[0] if train else folders[1]
    files = _ImageFiles(folder, image_size, resize=image_size)
    blocks = torch.arange(len(files)).split(256)
    loader = DataLoader(
        files,
        batch_size=None,  # an item is a block of images already
        sampler=[(0, block) for block in blocks],
        num_workers=min(workers, len(blocks) - 1),  # not worth a process for the smallest sets
        generator=torch.Generator(),  # leaves the caller's global generator alone
        worker_init_fn=_ignore_interrupts,
    )
    images, labels, unreadable = [], [], []
    with tqdm(total=len(files), desc=f"reading {folder.root}", unit=" images", disable=None) as bar:
        for block, block_labels, errors in loader:
            images.append(block)
            labels.append(block_labels)
            unreadable += errors
            bar.update(len(block))
    if unreadable:
        raise InputError(_unreadable_message(unreadable))
    return ImageSet(torch.cat(images), torch.cat(labels), tuple(folder.classes))


# ---------------------------------------------------------------------------------------------------------
# Image files
# ---------------------------------------------------------------------------------------------------------


def read_image(path: str | Path) -> torch.Tensor:
    """An image file as a viewer shows it: uint8 (3, h, w), RGB, upright, transparent parts over white.

    Raises whatever Pillow raises for a file that it cannot read.
    """
    # Pillow decodes, torchvision crops and resizes the tensor: training images of 500 x 375 take 0.85 of
    # the time of Pillow alone. torchvision's decoder would make it 0.65, but is deprecated (0.29).
    with Image.open(path) as image:
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
            image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


class _ImageFiles(Dataset):
    """The files of an ImageFolder, decoded and cut to `size` a block at a time.

    An item is `(epoch, indices)`; it gives uint8 (k, 3, size, size), labels int64 (k,), and a list of what
    could not be read: an exception would come out of a worker as a page of traceback. With a `seed` the
    images get RandomResizedCrop and a flip, drawn from (seed, epoch, index) and nothing else, so that the
    number of workers does not matter; else the shorter side becomes `resize`, and the centre is cut out.
    """

    def __init__(self, folder: ImageFolder, size: int, *, resize: int = 0, seed: int | None = None):
        # Arrays, since forked workers share their pages; a list's would be copied, one reference count after
        # another: a quarter of a gigabyte in each worker for ImageNet.
        self.paths = np.array([os.fsencode(path) for path, _ in folder.samples])
        self.labels = torch.tensor([label for _, label in folder.samples])
        self.size, self.resize, self.seed = size, resize, seed
        self.augment = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, item: tuple[int, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        epoch, indices = item
        images = torch.empty(len(indices), 3, self.size, self.size, dtype=torch.uint8)
        unreadable = []
        with torch.random.fork_rng(devices=[]):  # torchvision draws from the global generator
            for image, index in zip(images, indices.tolist(), strict=True):
                path = os.fsdecode(self.paths[index])
                try:
                    source = read_image(path)
                except Exception as error:  # Pillow's parsers raise many types; the caller reports them
                    unreadable.append(f"{path} ({_one_line(error)})")
                    continue
                if self.seed is None:
                    image.copy_(self._centre(source))
                else:
                    torch.default_generator.manual_seed(_mix("crop", self.seed, epoch, index))
                    image.copy_(self.augment(source))
        return images, self.labels[indices], unreadable

    def _centre(self, image: torch.Tensor) -> torch.Tensor:
        if image.shape[1:] == (self.size, self.size) and self.resize == self.size:
            return image  # so would v2, in as long as it takes to decode a small image
        image = v2.functional.resize(image, [self.resize], antialias=True)
        return v2.functional.center_crop(image, [self.size])


def _image_folders(roots: Sequence[Path], held_out: Sequence[str]) -> tuple[ImageFolder, ImageFolder]:
    """`train` and the first of `held_out` that exists, in the first of `roots` that has a `train`."""
    root = next((root for root in roots if (root / "train").is_dir()), None)
    if root is None:
        raise InputError(f"no folder 'train' in {' or '.join(map(str, roots))}")
    name = next((name for name in held_out if (root / name).is_dir()), None)
    if name is None:
        raise InputError(f"no folder {' or '.join(map(repr, held_out))} in {root}, beside 'train'")
    try:
        train, test = ImageFolder(root / "train"), ImageFolder(root / name)
    except FileNotFoundError as error:  # no class at all, or a class without an image; the message says which
        raise InputError(f"{root}: {_one_line(error)}") from error
    if train.classes != test.classes:
        only = [
            f"only in {folder.root}: {', '.join(extra[:5])}{', ...' if len(extra) > 5 else ''}"
            for folder, other in ((train, test), (test, train))
            if (extra := sorted(set(folder.classes) - set(other.classes)))
        ]
        raise InputError(f"the classes of {train.root} and {test.root} differ; {'; '.join(only)}")
    return train, test


def _unreadable_message(unreadable: list[str]) -> str:
    count = "1 image" if len(unreadable) == 1 else f"{len(unreadable)} images"
    more = ", ..." if len(unreadable) > 3 else ""
    return f"cannot read {count}: {', '.join(unreadable[:3])}{more}; replace or remove"


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _ignore_interrupts(worker: int) -> None:
    """A signal may reach a whole group of processes; the main one decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# ---------------------------------------------------------------------------------------------------------
# Augmentation: one batch at a time, on its device, no host synchronisation
# ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Augmentation:
    """What happens to a training batch, in this order. The default does nothing.

    crop_padding: pixels of zero padding around the image before a random crop of its own size.
    flip: mirror every image with probability 1/2.
    cutout_length: side of the square set to zero, that is to the mean, after normalisation; in pixels.
    mixup_alpha: parameter of mixup's Beta distribution; 0 is no mixup.
    """

    crop_padding: int = 0
    flip: bool = False
    cutout_length: int = 0
    mixup_alpha: float = 0.0


def random_crop(images: torch.Tensor, padding: int, generator: torch.Generator) -> torch.Tensor:
    """torchvision's RandomCrop((h, w), padding) of every image of (b, 3, h, w), each at its own offset."""
    b, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # (b, 3, 2p + 1, 2p + 1, h, w), a view
    top, left = torch.randint(2 * padding + 1, (2, b), generator=generator, device=images.device)
    return windows[torch.arange(b, device=images.device), :, top, left]  # (b, 3, h, w)


def random_flip(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Mirrors every image of (b, 3, h, w) left to right with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


def cutout(images: torch.Tensor, length: int, generator: torch.Generator) -> torch.Tensor:
    """Zeroes a square in every image of (b, 3, h, w) (DeVries and Taylor, 2017; as in DARTS).

    The centre is uniform over the pixels, so that the border may cut the square; an odd `length` is one less.
    """
    b, _, h, w = images.shape
    y = torch.randint(h, (b, 1, 1, 1), generator=generator, device=images.device)
    x = torch.randint(w, (b, 1, 1, 1), generator=generator, device=images.device)
    rows = torch.arange(h, device=images.device).view(h, 1)
    columns = torch.arange(w, device=images.device)
    half = length // 2
    inside = (rows >= y - half) & (rows < y + half) & (columns >= x - half) & (columns < x + half)
    return images.masked_fill(inside, 0)  # inside: (b, 1, h, w)


def mixup(
    images: torch.Tensor, targets: torch.Tensor, weight: float, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """`weight` of every image and target plus 1 - weight of another of the batch (Zhang et al., 2018).

    Images (b, 3, h, w) and targets (b, classes), float. Cross-entropy is linear in its target: this is the
    original's `weight * loss(a) + (1 - weight) * loss(b)`.
    """
    other = torch.randperm(len(images), generator=generator, device=images.device)
    return torch.lerp(images[other], images, weight), torch.lerp(targets[other], targets, weight)


def lighting(images: torch.Tensor, axes: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Shifts the colour of each image of (b, 3, h, w) by a normal amount along each row of `axes` (k, 3)."""
    alpha = torch.randn(len(images), len(axes), generator=generator, device=images.device)
    return images + (alpha @ axes)[:, :, None, None]


# ---------------------------------------------------------------------------------------------------------
# Loaders
# ---------------------------------------------------------------------------------------------------------


class Batch(NamedTuple):
    """What one process gets of a step."""

    images: torch.Tensor  # float32 (b, 3, h, w), normalised, on the device
    targets: torch.Tensor  # int64 (b,), or float32 (b, classes) after mixup
    global_size: int  # images of this step over all processes


class Loader(ABC):
    """How an epoch falls into steps, and steps into the shares of the processes.

    `batch_size` is global: step s takes images [s * batch_size, (s + 1) * batch_size) of the epoch's order,
    which is the same on all `world_size` processes, and process `rank` takes a contiguous share of them; the
    shares differ by one image at most. In training (`shuffle`) a last batch of fewer than two images per
    process is left out of that epoch, as batch normalisation needs two. In evaluation every image comes
    exactly once, and a process may get a batch of no images.

    `stream` tells apart loaders of one run, so that they do not draw the same random numbers.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        device: torch.device | str,
        *,
        shuffle: bool,
        seed: int,
        stream: int,
        rank: int,
        world_size: int,
    ):
        if shuffle and batch_size > num_images:
            raise InputError(f"a batch of {batch_size} is larger than the {num_images} images to train on")
        smallest = 2 * world_size if shuffle else 1
        if batch_size < smallest:
            raise InputError(
                f"a batch of {batch_size} is too small; with {world_size} processes it needs {smallest}"
            )
        self.num_images, self.batch_size, self.shuffle = num_images, batch_size, shuffle
        self.rank, self.world_size = rank, world_size
        self.key = (seed, stream)
        self.generator = torch.Generator(device)
        full, tail = divmod(num_images, batch_size)
        self.num_steps = full + (tail >= smallest)
        self.num_samples = min(self.num_steps * batch_size, num_images)

    def __len__(self) -> int:
        return self.num_steps

    @abstractmethod
    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        """The batches of an epoch from step `start` on."""

    def _order(self, epoch: int) -> torch.Tensor:
        """The epoch's images, int64 (n,), on the CPU."""
        if not self.shuffle:
            return torch.arange(self.num_images)
        generator = torch.Generator().manual_seed(_mix("order", *self.key, epoch))
        return torch.randperm(self.num_images, generator=generator)

    def _share(self, step: int) -> tuple[slice, int]:
        """Where in the order this process's images of a step are, and how many the step has in all."""
        first = step * self.batch_size
        size = min(self.batch_size, self.num_images - first)
        begin, end = (first + size * r // self.world_size for r in (self.rank, self.rank + 1))
        return slice(begin, end), size

    def _seed(self, epoch: int, step: int) -> int:
        return _mix("step", *self.key, epoch, step, self.rank)


class BatchLoader(Loader):
    """Batches of an `ImageSet`, augmented and normalised on its device.

    Order and augmentation are functions of (seed, stream, epoch, step, rank) and the kind of device alone.
    `mean` and `std` are in units of the full range, as `channel_statistics` gives them. See `Loader` for how
    a batch is shared among processes, and `Augmentation` for what happens to it.
    """

    def __init__(
        self,
        dataset: ImageSet,
        batch_size: int,
        *,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation = Augmentation(),
        shuffle: bool = False,
        seed: int = 0,
        stream: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        device = dataset.images.device
        super().__init__(
            len(dataset),
            batch_size,
            device,
            shuffle=shuffle,
            seed=seed,
            stream=stream,
            rank=rank,
            world_size=world_size,
        )
        self.dataset, self.augmentation = dataset, augmentation
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = self._order(epoch).to(self.dataset.images.device)
        for step in range(start, len(self)):
            share, global_size = self._share(step)
            yield Batch(*self._batch(order[share], self._seed(epoch, step)), global_size)

    def _batch(self, indices: torch.Tensor, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        images, targets = self.dataset.images[indices], self.dataset.labels[indices]
        wish, generator = self.augmentation, self.generator.manual_seed(seed)
        if wish.crop_padding:
            images = random_crop(images, wish.crop_padding, generator)
        if wish.flip:
            images = random_flip(images, generator)
        images = images.float().div_(255).sub_(self.mean).div_(self.std)
        if wish.cutout_length:
            images = cutout(images, wish.cutout_length, generator)
        if wish.mixup_alpha:
            # The host draws the weight, like the original: torch has no Beta that takes a generator.
            weight = np.random.default_rng(seed).beta(wish.mixup_alpha, wish.mixup_alpha)
            one_hot = F.one_hot(targets, len(self.dataset.classes)).float()
            images, targets = mixup(images, one_hot, weight, generator)
        return images, targets


class _FileLoader(Loader):
    """Batches of image files, decoded by worker processes, normalised on the device; else like `BatchLoader`.

    A worker makes whole batches. Raises InputError, with its name, for a file that cannot be read.
    """

    def __init__(
        self,
        files: _ImageFiles,
        batch_size: int,
        *,
        device: torch.device | str,
        workers: int,
        lighting_std: float,
        shuffle: bool,
        seed: int,
        rank: int,
        world_size: int,
    ):
        super().__init__(
            len(files),
            batch_size,
            device,
            shuffle=shuffle,
            seed=seed,
            stream=0,
            rank=rank,
            world_size=world_size,
        )
        self.device = torch.device(device)
        self.lighting_axes = lighting_std * LIGHTING_AXES.to(device)
        mean, std = STATISTICS["imagenet"]
        self.mean = torch.tensor(mean, device=device).view(3, 1, 1)
        self.std = torch.tensor(std, device=device).view(3, 1, 1)
        # Workers outlive the epoch, hence the loader, and its sampler is a list that each epoch fills anew.
        self.plan: list[tuple[int, torch.Tensor]] = []
        self.loader = DataLoader(
            files,
            batch_size=None,
            sampler=self.plan,
            num_workers=workers,
            persistent_workers=workers > 0,
            pin_memory=self.device.type == "cuda",
            generator=torch.Generator(),  # leaves the global generator alone, which a checkpoint restores
            worker_init_fn=_ignore_interrupts,
        )

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Batch]:
        order = self._order(epoch)
        shares = [self._share(step) for step in range(start, len(self))]
        self.plan[:] = [(epoch, order[share]) for share, _ in shares]
        for step, (images, targets, unreadable) in enumerate(self.loader, start):
            if unreadable:
                raise InputError(_unreadable_message(unreadable))
            images = images.to(self.device, non_blocking=True).float().div_(255)
            images = lighting(images, self.lighting_axes, self.generator.manual_seed(self._seed(epoch, step)))
            images = images.sub_(self.mean).div_(self.std)
            targets = targets.to(self.device, non_blocking=True)
            yield Batch(images, targets, shares[step - start][1])


def imagenet_loaders(
    root: str | Path,
    batch_size: int,
    *,
    device: torch.device | str,
    workers: int,
    seed: int,
    image_size: int = 224,
    rank: int = 0,
    world_size: int = 1,
) -> tuple[_FileLoader, _FileLoader, tuple[str, ...]]:
    """Training and validation loader of ImageNet, or of any folders like it, and the classes' names.

    `train` and `val` are in `root`, or in its ILSVRC2012 or ImageNet-ILSVRC2012. Training:
    RandomResizedCrop(image_size), flip, Lighting 0.1. Validation: the centre of the image resized to 256/224
    of `image_size`. `workers` processes for each of the two loaders.

    Raises InputError for a missing `train` or `val`, an empty class, and classes that differ between them.
    """
    train, val = _imagenet_folders(root)
    shared = {"device": device, "workers": workers, "rank": rank, "world_size": world_size}
    train_files = _ImageFiles(train, image_size, seed=seed)
    train_loader = _FileLoader(train_files, batch_size, shuffle=True, seed=seed, lighting_std=0.1, **shared)
    return train_loader, _val_loader(val, batch_size, image_size, **shared), tuple(train.classes)


def imagenet_val_loader(
    root: str | Path, batch_size: int, *, device: torch.device | str, workers: int, image_size: int = 224
) -> tuple[_FileLoader, tuple[str, ...]]:
    """The validation loader of `imagenet_loaders` alone, and the classes' names."""
    _, val = _imagenet_folders(root)
    shared = {"device": device, "workers": workers, "rank": 0, "world_size": 1}
    return _val_loader(val, batch_size, image_size, **shared), tuple(val.classes)


def _val_loader(val: ImageFolder, batch_size: int, image_size: int, **shared: Any) -> _FileLoader:
    files = _ImageFiles(val, image_size, resize=image_size * 256 // 224)
    return _FileLoader(files, batch_size, shuffle=False, seed=0, lighting_std=0.0, **shared)


def _imagenet_folders(root: str | Path) -> tuple[ImageFolder, ImageFolder]:
    roots = [Path(root), Path(root, "ILSVRC2012"), Path(root, "ImageNet-ILSVRC2012")]
    return _image_folders(roots, held_out=("val",))


def _mix(*key: int | str) -> int:
    """A 64-bit seed of a key: near keys give unrelated seeds, on every platform."""
    return int.from_bytes(hashlib.blake2b(repr(key).encode(), digest_size=8).digest(), "little")


# ---------------------------------------------------------------------------------------------------------
# The embedded set: shapes
# ---------------------------------------------------------------------------------------------------------


# The signed distance of points (x, y) to an outline of radius about 1, negative inside; y points down.
Outline = Callable[[np.ndarray, np.ndarray], np.ndarray]


def _bar(x: np.ndarray, y: np.ndarray, length: float = 1.0, width: float = 0.3) -> np.ndarray:
    return np.maximum(np.abs(x) - length, np.abs(y) - width)


def _stroke(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return _bar(x, y, width=0.1)


def _heart(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """A square on its corner, with a half disc on each of its upper sides."""
    u, v = (x - y + 0.2) * np.sqrt(0.5), (-x - y + 0.2) * np.sqrt(0.5)
    return np.minimum.reduce(
        [_bar(u, v, 0.55, 0.55), np.hypot(u - 0.55, v) - 0.55, np.hypot(u, v - 0.55) - 0.55]
    )


def _star(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Five points at radius 1, notches at radius 0.42."""
    sector = 2 * np.pi / 5
    angle = np.abs((np.arctan2(x, -y) + sector / 2) % sector - sector / 2)  # folded onto half a point
    radius = np.hypot(x, y)
    notch_x, notch_y = 0.42 * np.cos(sector / 2), 0.42 * np.sin(sector / 2)
    edge = np.hypot(1 - notch_x, notch_y)
    return ((radius * np.cos(angle) - 1) * notch_y + radius * np.sin(angle) * (1 - notch_x)) / edge


def _triangle(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    sides = [x * np.cos(a) + y * np.sin(a) for a in (0, 2 * np.pi / 3, 4 * np.pi / 3)]
    return np.maximum.reduce(sides) - 0.5


SHAPES: dict[str, Outline] = {
    "bar": _bar,
    "crescent": lambda x, y: np.maximum(np.hypot(x, y) - 1, 0.85 - np.hypot(x - 0.55, y)),
    "cross": lambda x, y: np.minimum(_bar(x, y), _bar(y, x)),
    "disc": lambda x, y: np.hypot(x, y) - 0.85,
    "frame": lambda x, y: np.abs(np.maximum(np.abs(x), np.abs(y)) - 0.62) - 0.17,
    "heart": _heart,
    "ring": lambda x, y: np.abs(np.hypot(x, y) - 0.74) - 0.2,
    "square": lambda x, y: _bar(x, y, 0.76, 0.76),
    "star": _star,
    "triangle": _triangle,
}


def draw_shapes(n: int, size: int, seed: int) -> ImageSet:
    """`n` images, uint8 (n, 3, size, size), of the ten SHAPES, equally often, in random order.

    A shape at random position, angle, scale and stretch, on a darker gradient crossed by two strokes of any
    colour, under noise. The class is in the outline alone: colours, pose and clutter tell nothing of it.
    """
    rng = np.random.Generator(np.random.PCG64(seed))
    labels = rng.permutation(np.arange(n) % len(SHAPES))
    images = np.empty((n, 3, size, size), np.uint8)
    for label, outline in enumerate(SHAPES.values()):
        members = np.flatnonzero(labels == label)
        images[members] = _draw(outline, len(members), size, rng)
    return ImageSet(torch.from_numpy(images), torch.from_numpy(labels), tuple(SHAPES))


def _draw(outline: Outline, n: int, size: int, rng: np.random.Generator) -> np.ndarray:
    """`n` images of one shape, uint8 (n, 3, size, size)."""
    pixels = (np.arange(size, dtype=np.float32) * 2 + 1) / size - 1  # centres, in [-1, 1]

    def uniform(low: float, high: float, channels: int = 1) -> np.ndarray:
        return rng.uniform(low, high, (n, channels, 1, 1)).astype(np.float32)

    def coverage(outline: Outline, *, spread, scales, turn, stretch) -> np.ndarray:
        """The part of each pixel, (n, 1, size, size), that a copy of the outline in a random pose covers."""
        x, y = pixels - uniform(-spread, spread), pixels[:, None] - uniform(-spread, spread)
        angle, scale, aspect = uniform(-turn, turn), uniform(*scales), uniform(1 / stretch, stretch)
        cos, sin = np.cos(angle) / scale, np.sin(angle) / scale
        pixels_outside = outline((x * cos + y * sin) * aspect, y * cos - x * sin) * scale * size / 2
        return np.clip(0.5 - pixels_outside, 0, 1)

    def paint(canvas: np.ndarray, colour: np.ndarray, part: np.ndarray) -> np.ndarray:
        return canvas + (colour - canvas) * part

    background, angle = uniform(0.1, 0.45, 3), uniform(-np.pi, np.pi)
    slope = np.cos(angle) * pixels + np.sin(angle) * pixels[:, None]
    canvas = background + uniform(-0.2, 0.2, 3) * slope  # (n, 3, size, size)
    for _ in range(2):
        stroke = coverage(_stroke, spread=1, scales=(0.3, 0.8), turn=np.pi, stretch=1)
        canvas = paint(canvas, uniform(0, 1, 3), stroke)
    colour = background + uniform(0.25, 0.55, 3)
    shape = coverage(outline, spread=0.25, scales=(0.5, 0.8), turn=np.pi / 4, stretch=1.25)
    canvas = paint(canvas, colour, shape)
    canvas += uniform(0.02, 0.1) * rng.standard_normal(canvas.shape, np.float32)
    return np.rint(np.clip(canvas, 0, 1) * 255).astype(np.uint8)
