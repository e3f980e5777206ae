"""One picture: decoding and the resize rule, against what a viewer shows and what torchvision does."""

import os

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from packed import picture
from packed.picture import central_corner, central_square, read_rgb, resized_shape


def colour(mode: str):
    """An image of that mode, and the RGB that a viewer shows."""
    grey16 = np.full((6, 5), 200 * 257, np.uint16)
    transparent = Image.new("P", (5, 6), 1)
    transparent.putpalette([0, 0, 0, 10, 20, 30])
    return {
        "1": (Image.new("1", (5, 6), 1), (255, 255, 255)),
        "L": (Image.new("L", (5, 6), 77), (77, 77, 77)),
        "LA": (Image.new("LA", (5, 6), (100, 0)), (255, 255, 255)),
        "P": (Image.new("RGB", (5, 6), (10, 200, 30)).quantize(4), (10, 200, 30)),
        "P transparent": (transparent, (255, 255, 255)),
        "RGB": (Image.new("RGB", (5, 6), (10, 200, 30)), (10, 200, 30)),
        "RGBA": (Image.new("RGBA", (5, 6), (10, 200, 30, 0)), (255, 255, 255)),
        "RGBA half": (Image.new("RGBA", (5, 6), (0, 0, 0, 128)), (127, 127, 127)),
        "I;16": (Image.fromarray(grey16), (200, 200, 200)),
        "CMYK": (Image.new("CMYK", (5, 6), (255, 0, 255, 0)), (0, 255, 0)),
    }[mode]


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "P transparent", "RGB", "RGBA", "RGBA half", "I;16", "CMYK"]
)
def test_every_mode_becomes_what_a_viewer_shows(tmp_path, mode):
    image, expected = colour(mode)
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    image.save(path, **({"transparency": 1} if mode == "P transparent" else {}))
    pixels = read_rgb(path)
    assert pixels.dtype == np.uint8 and pixels.shape == (6, 5, 3)
    assert (pixels == expected).all()


@pytest.mark.parametrize("mode", ["L", "RGB", "CMYK"])
def test_jpegs_of_every_mode_are_read(tmp_path, mode):
    image, expected = colour(mode)
    image.save(tmp_path / "image.jpg", quality=95)
    difference = read_rgb(tmp_path / "image.jpg") - np.array(expected)
    assert difference.shape == (6, 5, 3) and np.abs(difference).max() <= 2


@pytest.mark.parametrize("suffix", [".jpg", ".png"])
def test_photographs_stand_upright(tmp_path, suffix):
    pixels = np.zeros((16, 32, 3), np.uint8)
    pixels[:, :16] = 255  # white at the left, which orientation 6 turns to the top
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / f"image{suffix}", exif=exif)
    image = read_rgb(tmp_path / f"image{suffix}")
    assert image.shape == (32, 16, 3)
    assert image[:14].min() > 200 and image[18:].max() < 50


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.jpg")
    with pytest.raises(ValueError, match="not a regular file"):
        read_rgb(tmp_path / "pipe.jpg")


@pytest.mark.parametrize("height, width, shorter", [(30, 40, 16), (41, 30, 32), (7, 99, 21), (8, 8, 8)])
def test_the_resize_rule_is_torchvisions(height, width, shorter):
    image = torch.arange(height * width).view(1, height, width)
    assert v2.functional.resize(image.float(), [shorter]).shape[1:] == resized_shape(height, width, shorter)
    top, left = central_corner(height, width, 5)
    assert v2.functional.center_crop(image, [5])[0, 0, 0] == image[0, top, left]


def test_without_pillow_an_array_becomes_the_same_bytes(monkeypatch):
    """Smaller and larger, high and wide, and what needs no resizing."""
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (32, 47), (7, 5), (300, 41), (33, 500), *rng.integers(5, 200, (40, 2)).tolist()]
    images = [rng.integers(0, 256, (*size, 3), np.uint8) for size in sizes]
    images += [255 * (image // 128) for image in images]  # black and white: sums at both ends
    rules = [{"resize": 32, "size": 32}, {"resize": 36, "size": 32}]
    expected = [central_square(image, **rule) for image in images for rule in rules]
    monkeypatch.setattr(picture, "Image", None)
    for i, image in enumerate(images):
        for j, rule in enumerate(rules):
            np.testing.assert_array_equal(central_square(image, **rule), expected[2 * i + j])
    with pytest.raises(ImportError, match="needs Pillow"):
        read_rgb(__file__)


def test_what_has_no_centre():
    for shape in ((0, 5, 3), (5, 0, 3), (1, 201, 3)):
        with pytest.raises(ValueError, match="its sides are"):
            central_square(np.zeros(shape, np.uint8), resize=8, size=8)
