"""Test images that are nearly the same as a training image: a network knows them already."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

THUMBNAIL = 16
NEAR = 6.0
"""By how many levels of 255, as root of the mean square, thumbnails of near-duplicates differ at most. Of 200
CIFAR-10 images half keep within it when saved as JPEG of quality 75, resized there and back or made 3 %
brighter; of 2,000 test images none is that near to one of 8,000 training images (the nearest: 10.9)."""


def near_duplicates(train: Tensor, test: Tensor) -> Iterator[tuple[int, int]]:
    """For each test image that is nearly the same as a training image: its index and that image's. Both
    uint8 (n, 3, h, w)."""
    ours, theirs = (_thumbnails(images) for images in (train, test))
    for start in range(0, len(theirs), 256):
        distances = torch.cdist(theirs[start : start + 256], ours) / ours.shape[1] ** 0.5
        nearest = distances.min(1)
        for row in (nearest.values <= NEAR).nonzero().flatten().tolist():
            yield start + row, nearest.indices[row].item()


def _thumbnails(images: Tensor) -> Tensor:
    """(n, 3, h, w) -> float32 (n, 3 * THUMBNAIL ** 2)."""
    small = [F.adaptive_avg_pool2d(part.float(), THUMBNAIL).flatten(1) for part in images.split(1024)]
    return torch.cat(small)
