"""Augmentation of one batch at a time, on its device, without making the host wait for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# The principal axes of ImageNet's colours in [0, 1], each as long as its standard deviation: AlexNet's
# Lighting (Krizhevsky et al., 2012), in the values that Torch made common.
LIGHTING_AXES = torch.tensor([[0.2175], [0.0188], [0.0045]]) * torch.tensor(
    [[-0.5675, -0.5808, -0.5836], [0.7192, -0.0045, -0.6948], [0.4009, -0.8140, 0.4203]]
)


class Normalize(NamedTuple):
    """Mean and standard deviation of each channel, in units of the full range [0, 1]."""

    mean: Sequence[float]
    std: Sequence[float]

    def on(self, device: torch.device | str) -> Callable[[Tensor], Tensor]:
        """A function that normalises float images (b, 3, h, w) on `device`, in place.

        The statistics go there now: copied with every batch, they would make the host wait.
        """
        mean, std = (torch.tensor(values, device=device).view(3, 1, 1) for values in self)
        return lambda images: images.sub_(mean).div_(std)


@dataclass(frozen=True)
class Augmentation:
    """How a training batch is augmented, in this order. The default does nothing.

    crop_padding: pixels of zero padding around the image before a random crop of its own size.
    flip: mirror every image with probability 1/2.
    cutout_length: side of the square set to zero, that is to the mean, after normalisation; in pixels.
    mixup_alpha: parameter of mixup's Beta distribution; 0 is no mixup.
    """

    crop_padding: int = 0
    flip: bool = False
    cutout_length: int = 0
    mixup_alpha: float = 0.0


NO_AUGMENTATION = Augmentation()


def random_crop(images: Tensor, padding: int, generator: torch.Generator) -> Tensor:
    """torchvision's RandomCrop((h, w), padding) of every image of (b, 3, h, w), each at its own offset."""
    b, _, h, w = images.shape
    padded = F.pad(images, (padding,) * 4)
    windows = padded.unfold(2, h, 1).unfold(3, w, 1)  # (b, 3, 2p + 1, 2p + 1, h, w), a view
    top, left = torch.randint(2 * padding + 1, (2, b), generator=generator, device=images.device)
    return windows[torch.arange(b, device=images.device), :, top, left]  # (b, 3, h, w)


def random_flip(images: Tensor, generator: torch.Generator) -> Tensor:
    """Mirrors every image of (b, 3, h, w) left to right with probability 1/2."""
    flip = torch.rand(len(images), 1, 1, 1, generator=generator, device=images.device) < 0.5
    return torch.where(flip, images.flip(3), images)


def cutout(images: Tensor, length: int, generator: torch.Generator) -> Tensor:
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
    images: Tensor, targets: Tensor, weight: float, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """`weight` of every image and target plus 1 - weight of another of the batch (Zhang et al., 2018).

    Images (b, 3, h, w) and targets (b, classes), float. Cross-entropy is linear in its target: this is the
    original's `weight * loss(a) + (1 - weight) * loss(b)`.
    """
    other = torch.randperm(len(images), generator=generator, device=images.device)
    return torch.lerp(images[other], images, weight), torch.lerp(targets[other], targets, weight)


def lighting(images: Tensor, axes: Tensor, generator: torch.Generator) -> Tensor:
    """Shifts the colour of each image of (b, 3, h, w) by a normal amount along each row of `axes` (k, 3)."""
    alpha = torch.randn(len(images), len(axes), generator=generator, device=images.device)
    return images + (alpha @ axes)[:, :, None, None]
