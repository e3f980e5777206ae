"""One picture, as evaluation sees it: from a file to RGB pixels, resized, and its centre cut out.

Training, infer.py and a copy of packed/ alone use this module: it needs NumPy, and Pillow to read files.
Without Pillow arrays are resized by NumPy, to the same bytes.

A picture of 8 bits a channel says what is black and what is white. One of 16 or 32 bits, or of floats, often
does not: a camera of 12 bits writes 0 to 4095 into 16. See `value_range_of`.
"""

from __future__ import annotations

import functools
import math
import operator
import os
import stat

import numpy as np

try:
    from PIL import Image, ImageOps
except ImportError:  # where packed/ runs alone
    Image = None

LONGEST = 200
"""How many times its shorter side the longer side of a picture may be."""


ValueRange = tuple[float, float]
"""The values that are black and white."""


def read_rgb(path: str | os.PathLike, *, value_range: ValueRange | None = None) -> np.ndarray:
    """An image file as a viewer shows it: uint8 (h, w, 3), RGB, upright, transparent parts over white.

    `value_range` says what is black and white in pictures of more than 8 bits a channel; where it is None,
    the file has to say so.

    Raises ValueError for what is not a regular file (a pipe would be waited for) and for a picture of more
    than 8 bits of which nobody says how to read it, ImportError where Pillow is not installed, and what
    Pillow raises for a file that it cannot read.
    """
    if Image is None:
        raise ImportError(
            "reading files needs Pillow (pip install pillow); or give arrays of RGB, uint8 (h, w, 3)"
        )
    if not stat.S_ISREG(os.stat(path).st_mode):
        raise ValueError("not a regular file")
    with Image.open(path) as image:
        deep = has_deep_colour(image)
        tags = tiff_tags(image)
        ImageOps.exif_transpose(image, in_place=True)
        if image.mode == "F" or image.mode.startswith("I"):  # convert("RGB") would clip them at 255
            values = np.asarray(image)
            chosen = value_range or value_range_of(path, image, values, tags)
            image = Image.fromarray(eight_bits(values, chosen))
        elif deep:
            check_deep_colour(image, value_range)
        if image.mode in ("RGBA", "LA", "PA") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        return np.array(image.convert("RGB"))


BITS_PER_SAMPLE, MIN_SAMPLE, MAX_SAMPLE, SMIN_SAMPLE, SMAX_SAMPLE = 258, 280, 281, 340, 341  # TIFF's tags


def eight_bits(values: np.ndarray, value_range: ValueRange) -> np.ndarray:
    """Values of any type -> uint8 of the same shape: 256 equal steps from black to white, and beyond these
    black and white. Of whole numbers the upper 8 bits, where the range is one of bits."""
    low, high = value_range
    width = high - low + (1 if values.dtype.kind in "iu" else 0)
    levels = np.floor((values.astype(np.float64) - low) * (256 / width))
    return np.clip(np.nan_to_num(levels, nan=0.0), 0, 255).astype(np.uint8)


def value_range_of(
    path: str | os.PathLike, image: Image.Image, values: np.ndarray, tags: dict[int, float]
) -> ValueRange:
    """What is black and white in a picture of more than 8 bits a channel, where the file says so:

    TIFF: SMinSampleValue and SMaxSampleValue, MinSampleValue and MaxSampleValue, or BitsPerSample below 16.
    PNG: sBIT, the bits that count. By the standard they are the upper ones of 16; values that use no others
        than the lower ones, as some programs write them, are read as what they are.
    PPM: its largest value, which Pillow has applied.
    any: whole numbers of 16 bits of which one is 2^15 or more, so that they use all of the 16.

    Raises ValueError for all others, with their smallest and largest value.
    """
    if tags:
        for lowest, highest in ((SMIN_SAMPLE, SMAX_SAMPLE), (MIN_SAMPLE, MAX_SAMPLE)):
            low, high = tags.get(lowest, 0), tags.get(highest)
            if high is not None and high > low:
                return low, high
        bits = tags.get(BITS_PER_SAMPLE, 16)
        if 8 < bits < 16:
            return 0, 2**bits - 1
    finite = values[np.isfinite(values)]
    low, high = (finite.min(), finite.max()) if finite.size else (0, 0)
    if image.format == "PNG" and (bits := significant_bits(path)):
        spare = 16 - bits
        filler = values & (1 << spare) - 1
        upper = (filler == 0) | (filler == values >> bits)
        return (0, 65535) if upper.all() or high >= 1 << bits else (0, 2**bits - 1)
    whole = values.dtype.kind in "iu"
    if image.format == "PPM" and whole:
        return 0, 65535
    if whole and low >= 0 and 2**15 <= high < 2**16:
        return 0, 65535
    guess = f"0 {2 ** max(int(high).bit_length(), 8) - 1}" if whole and low >= 0 else "0 1"
    if low < 0:
        guess = f"{low:g} {high:g}"
    raise ValueError(
        f"mode {image.mode}, values {low:g} to {high:g}, and it does not say which is white: give "
        f"--value_range LOW HIGH, perhaps {guess}"
    )


def tiff_tags(image: Image.Image) -> dict[int, float]:
    """What a TIFF that is not yet decoded says of its values, by tag. Empty for other formats."""
    tags = getattr(image, "tag_v2", None) or {}
    found = {
        tag: tags.get(tag) for tag in (BITS_PER_SAMPLE, MIN_SAMPLE, MAX_SAMPLE, SMIN_SAMPLE, SMAX_SAMPLE)
    }
    firsts = {tag: value[0] if isinstance(value, tuple) and value else value for tag, value in found.items()}
    return {tag: float(value) for tag, value in firsts.items() if value not in (None, ())}


def has_deep_colour(image: Image.Image) -> bool:
    """Whether an image that is not yet decoded has 16 bits in each of several channels."""
    if tags := tiff_tags(image):
        return tags.get(BITS_PER_SAMPLE, 8) > 8
    return image.format == "PNG" and bool(image.tile) and str(image.tile[0][3]).endswith("16B")


def check_deep_colour(image: Image.Image, value_range: ValueRange | None) -> None:
    """Raise ValueError where colours of 16 bits, of which Pillow keeps the upper 8, use less than these."""
    if value_range not in (None, (0, 65535)):
        raise ValueError(
            "16 bits a colour, of which the upper 8 are read, whatever --value_range says: convert it"
        )
    highest = 256 * max(high for _, high in image.getextrema()) + 255
    if value_range is None and highest < 2**15:
        raise ValueError(
            f"16 bits a colour, values to {highest} at most: convert it to 8 bits, or, where white is 65535, "
            "give --value_range 0 65535"
        )


def significant_bits(path: str | os.PathLike) -> int | None:
    """The bits that sBIT of a PNG of 16-bit grey names; None without one, and of one that names all 16."""
    with open(path, "rb") as file:
        file.seek(8)
        while len(header := file.read(8)) == 8 and header[4:] != b"IDAT":
            length = int.from_bytes(header[:4], "big")
            if header[4:] == b"sBIT" and length:
                bits = file.read(1)[0]
                return bits if 0 < bits < 16 else None
            file.seek(length + 4, os.SEEK_CUR)
    return None


def evaluation_resize(image_size: int, *, imagenet: bool) -> int:
    """What the shorter side of an evaluation image becomes before the central image_size square is cut out:
    256 for ImageNet's 224, in that proportion for its other sizes; image_size for all other sets."""
    return image_size * 256 // 224 if imagenet else image_size


def resized_shape(height: int, width: int, shorter: int) -> tuple[int, int]:
    """(height, width) with the shorter side made `shorter` pixels, the longer in proportion, rounded down.

    Raises ValueError on a picture without pixels, and on one so long that it would take gigabytes.
    """
    if not min(height, width):
        raise ValueError(f"its sides are {height} and {width}")
    if max(height, width) > LONGEST * min(height, width):
        raise ValueError(f"its sides are {height} and {width}; one is at most {LONGEST} times the other")
    longer = int(shorter * max(height, width) / min(height, width))
    return (shorter, longer) if height <= width else (longer, shorter)


def central_corner(height: int, width: int, size: int) -> tuple[int, int]:
    """(top, left) of the central size x size square."""
    return round((height - size) / 2), round((width - size) / 2)


def central_square(image: np.ndarray, *, resize: int, size: int) -> np.ndarray:
    """The shorter side of uint8 (h, w, channels) made `resize` pixels, bilinear, and the centre:
    (size, size, channels). Raises ValueError: see resized_shape."""
    height, width = resized_shape(*image.shape[:2], resize)
    top, left = central_corner(height, width, size)
    if image.shape[:2] == (height, width):
        return image[top : top + size, left : left + size]
    if Image is None or image.shape[2] != 3:
        narrow = resampled(image.swapaxes(0, 1), width, left, size).swapaxes(0, 1)
        return resampled(narrow, height, top, size)
    resized = Image.fromarray(image)
    # columns first, as here without Pillow: newer versions choose by the sizes, and so round otherwise
    for sides in ((width, resized.height), (width, height)):
        resized = resized.resize(sides, Image.Resampling.BILINEAR)
    return np.asarray(resized)[top : top + size, left : left + size]


PRECISION = 22
"""Bits behind the point of Pillow's weights for images of 8 bits."""


def resampled(image: np.ndarray, length: int, first: int, count: int) -> np.ndarray:
    """The rows `first` to `first + count` of uint8 (h, ...) resized to `length` rows: uint8 (count, ...).

    To the bit what Pillow's bilinear filter gives (Resample.c): a triangle as wide as two rows of the smaller
    of both images, its weights in whole numbers, and the sum rounded to a byte.
    """
    if length == len(image):
        return image[first : first + count]
    scale = len(image) / length
    reach = max(scale, 1.0)
    rows = np.empty((count, *image.shape[1:]), np.uint8)
    for i in range(count):
        centre = (first + i + 0.5) * scale
        start, end = max(int(centre - reach + 0.5), 0), min(int(centre + reach + 0.5), len(image))
        weights = [max(1 - abs((x - centre + 0.5) * (1 / reach)), 0.0) for x in range(start, end)]
        total = functools.reduce(operator.add, weights)  # in order, and rounded each time, as C does
        whole = [math.floor(weight / total * (1 << PRECISION) + 0.5) for weight in weights]
        sums = np.tensordot(np.int64(whole), image[start:end].astype(np.int64), 1)
        rows[i] = np.clip((sums + (1 << PRECISION - 1)) >> PRECISION, 0, 255)
    return rows
