"""The snippets of the docs, a photo that is not square to try them on, and what they are to say of it."""

import re
from pathlib import Path

import numpy as np
from PIL import Image

from images.shapes import draw_shapes
from packed import load
from support.scripts import ROOT

SHAPES = ROOT / "models" / "shapes.ebnas"


def snippet(page: str, part: str) -> str:
    """The one snippet in Python or JavaScript of a page that holds `part`."""
    text = (ROOT / "docs" / page).read_text()
    (found,) = (code for code in re.findall(r"```(?:python|js)\n(.*?)```", text, re.DOTALL) if part in code)
    return found


def photograph(folder: Path) -> Image.Image:
    """photo.png, photo.npy and photo.jpg (as PNG, which loses nothing): a shape between wide margins."""
    drawn = draw_shapes(1, 120, seed=3)[0][0].transpose(1, 2, 0)
    pixels = np.pad(drawn, ((0, 0), (30, 51), (0, 0)), "edge")
    np.save(folder / "photo.npy", pixels)
    image = Image.fromarray(pixels)
    for name in ("photo.png", "photo.jpg"):
        image.save(folder / name, "PNG")
    return image


def expected_logits(image: Image.Image) -> np.ndarray:
    """201 x 120 becomes 53 x 32, and the middle 32 columns of it are from 10 on."""
    square = image.resize((53, 120), Image.Resampling.BILINEAR).resize((53, 32), Image.Resampling.BILINEAR)
    pixels = np.asarray(square.crop((10, 0, 42, 32)), np.float32).transpose(2, 0, 1) / 255
    net = load(SHAPES)
    mean, std = (np.float32(values)[:, None, None] for values in (net.program.mean, net.program.std))
    return net(((pixels - mean) / std)[None])
