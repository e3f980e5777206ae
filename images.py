"""One picture: from a file to RGB pixels, and where evaluation cuts it. No torch: infer.py uses it."""

from __future__ import annotations

import os
import stat
from collections.abc import Callable

import numpy as np
from PIL import ExifTags, Image, ImageOps

LONGEST = 200
"""How many times its shorter side the longer side of a picture may be."""


def read_rgb(path: str | os.PathLike, reduction: Callable[[int, int], int] | None = None) -> np.ndarray:
    """An image file as a viewer shows it: uint8 (h, w, 3), RGB, upright, transparent parts over white.

    `reduction` is told its height and width, and gives how many times smaller it may be: a JPEG is then
    decoded at 1/2, 1/4 or 1/8 of its size, the smallest of them that is allowed, which is faster.

    Raises ValueError for what is not a regular file (a pipe would be waited for), and whatever Pillow raises
    for a file that it cannot read.
    """
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with Image.open(path) as image:
        if reduction is not None:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1) in range(5, 9)
            factor = reduction(*(image.size if turned else image.size[::-1]))
            if factor > 1:
                image.draft(None, (image.width // factor, image.height // factor))
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode.startswith("I"):  # 16-bit grey, which convert("RGB") would clip at 255
            image = Image.fromarray((np.clip(np.asarray(image), 0, 65535) >> 8).astype(np.uint8))
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


def evaluation_resize(image_size: int, *, imagenet: bool) -> int:
    """What the shorter side of an evaluation image becomes before the central image_size square is cut out:
    256 for ImageNet's 224, in that proportion for its other sizes; image_size for all other sets."""
    return image_size * 256 // 224 if imagenet else image_size


def resized_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) with the shorter side made `shorter` pixels, the longer in proportion, rounded down.

    Raises ValueError on a picture so long that it would take gigabytes.
    """
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(f"its sides are {height} and {width}; one is at most {LONGEST} times the other")
    longer = int(shorter * max(height, width) / min(height, width))
    return (shorter, longer) if height <= width else (longer, shorter)


def central_corner(height: int, width: int, size: int) -> tuple[int, int]:
    """(top, left) of the central size x size square."""
    return round((height - size) / 2), round((width - size) / 2)


def central_square(image: np.ndarray, *, resize: int, size: int) -> np.ndarray:
    """The shorter side of uint8 (h, w, 3) made `resize` pixels, bilinear, and the centre: (size, size, 3)."""
    height, width = resized_shape(*image.shape[:2], resize)
    if image.shape[:2] != (height, width):
        image = np.asarray(Image.fromarray(image).resize((width, height), Image.Resampling.BILINEAR))
    top, left = central_corner(height, width, size)
    return image[top : top + size, left : left + size]
