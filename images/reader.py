"""Image files, decoded and cut to one size, a block of them at a time, by worker processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from PIL import UnidentifiedImageError
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from images.files import ImageFiles
from packed.picture import ValueRange, central_corner, read_rgb, resized_shape
from utils import InputError, RunFailed, mixed_seed, one_line

TRIED = 64
"""Files of ImageNet that are read at the start, before a run of days is made of what nobody can read."""


class FileReader(Dataset):
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
        value_range: ValueRange | None = None,
    ):
        # Arrays, since forked workers share their pages; a list's would be copied, one reference count after
        # another: a quarter of a gigabyte in each worker for ImageNet.
        self.paths = np.array([os.fsencode(path) for path in files.paths])
        self.labels = torch.tensor(files.labels)
        self.size, self.resize, self.seed = size, resize, seed
        self.value_range = value_range
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
                        torch.default_generator.manual_seed(mixed_seed("crop", self.seed, epoch, index))
                        image.copy_(self.after_crop(self.crop(self._pixels(path))))
                except Exception as error:  # Pillow's parsers raise many types; the caller reports them
                    unreadable.append(f"{path} ({_reason(error)})")
        return images, self.labels[indices], unreadable

    def _pixels(self, path: str) -> Tensor:
        """See read_rgb; uint8 (3, h, w)."""
        return torch.from_numpy(read_rgb(path, value_range=self.value_range)).permute(2, 0, 1)

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
        refuse_unreadable(unreadable)
        check_spread(images)


def block_loader(
    reader: FileReader, items: Sequence | Sampler, workers: int, *, keep: bool = False, pin: bool = False
) -> DataLoader:
    """A DataLoader in which `workers` processes (0: this one) read `items`; with `keep` they stay for the
    next epoch."""
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


def read_blocks(loader: DataLoader) -> Iterator[tuple[Tensor, Tensor, list[str]]]:
    """The items of a `block_loader`, in order. Raises RunFailed where one of its processes was killed."""
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


def _reason(error: Exception) -> str:
    """Why a file cannot be read, without its name, which Pillow and the operating system repeat."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return getattr(error, "strerror", None) or one_line(error)


def refuse_unreadable(unreadable: list[str]) -> None:
    """Raise InputError where there are files that could not be read."""
    if unreadable:
        count = "1 image" if len(unreadable) == 1 else f"{len(unreadable)} images"
        more = ", ..." if len(unreadable) > 3 else ""
        advice = "" if "--value_range" in unreadable[0] else "; replace or remove"
        raise InputError(f"cannot read {count}: {', '.join(unreadable[:3])}{more}{advice}")


def check_spread(images: Tensor) -> None:
    """Raise InputError where no channel of uint8 images (n, 3, h, w) has two different values."""
    lowest, highest = images.amin((0, 2, 3)), images.amax((0, 2, 3))
    if (lowest == highest).all():
        raise InputError(
            f"all {len(images)} images to train on have the one colour {tuple(lowest.tolist())}: look at the "
            "files, and whether --value_range is right"
        )
