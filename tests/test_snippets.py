"""The snippets of the docs, on a photo that is not square: the logits of what training saw of it."""

import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image

from images.shapes import draw_shapes
from packed import load, read_program
from packed.exchange import onnx_bytes, pt2_bytes

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


@pytest.fixture
def logits_of(tmp_path, monkeypatch):
    """`logits_of(code)` runs it in a folder with a network, a photo and a copy of picture.py."""
    shutil.copy(SHAPES, tmp_path / "model.ebnas")
    shutil.copy(ROOT / "packed" / "picture.py", tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)

    def run(code: str) -> np.ndarray:
        names = {}
        exec(code, names)
        return np.asarray(names["logits"].detach() if hasattr(names["logits"], "detach") else names["logits"])

    yield run
    sys.modules.pop("picture", None)


def test_packed(logits_of, tmp_path, capsys):
    expected = expected_logits(photograph(tmp_path))
    logits = logits_of(snippet("packed.md", 'load("model.ebnas")'))
    np.testing.assert_allclose(logits, np.repeat(expected, 2, 0), rtol=1e-5, atol=1e-5)
    assert capsys.readouterr().out == f"{[load(SHAPES).classes[expected.argmax()]] * 2}\n"


@pytest.mark.parametrize("form", ["onnx", "pt2"])
def test_other_engines(form, logits_of, tmp_path):
    for package in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
        pytest.importorskip(package)
    make = {"onnx": onnx_bytes, "pt2": pt2_bytes}[form]
    (tmp_path / f"model.{form}").write_bytes(make(read_program(SHAPES)))
    expected = expected_logits(photograph(tmp_path))
    logits = logits_of(snippet("deploy.md", f'"model.{form}"'))
    assert logits.argmax() == expected.argmax() and np.median(np.abs(logits - expected)) < 1e-3
