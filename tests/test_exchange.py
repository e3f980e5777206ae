"""The forms for other engines compute what the packed network does."""

import io
import json
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from packed_programs import one_step

from packed import Program, load
from packed.exchange import onnx_bytes, pt2_bytes
from shapes import draw_shapes

SHAPES = ROOT / "models" / "shapes.ebnas"


def run_onnx(content: bytes, images: np.ndarray) -> np.ndarray:
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    session = onnxruntime.InferenceSession(content, providers=["CPUExecutionProvider"])
    return session.run(["logits"], {"images": images})[0]


def run_pt2(content: bytes, images: np.ndarray) -> np.ndarray:
    module = torch.export.load(io.BytesIO(content)).module()
    return module(torch.from_numpy(images)).numpy()


FORMS = {"onnx": (onnx_bytes, run_onnx), "pt2": (pt2_bytes, run_pt2)}


def made(form: str, program: Program) -> bytes:
    if form == "onnx":
        for package in ("onnx", "onnxscript", "onnxruntime"):
            pytest.importorskip(package, reason=f"{package} is not installed")
    return FORMS[form][0](program)


@pytest.mark.parametrize("form", FORMS)
def test_the_shipped_network_elsewhere(form):
    """Batches of any size. Folded scales round: a sign may change, which the median does not see."""
    net = load(SHAPES)
    content = made(form, net.program)
    images = net.preprocess(draw_shapes(100, 32, seed=4)[0].transpose(0, 2, 3, 1))
    expected, logits = net(images), FORMS[form][1](content, images)
    assert np.median(np.abs(logits - expected)) < 1e-4
    assert (logits.argmax(1) == expected.argmax(1)).mean() >= 0.99
    np.testing.assert_allclose(FORMS[form][1](content, images[:1]), logits[:1], atol=1e-4)


@pytest.mark.parametrize("form", FORMS)
def test_the_sign_of_zero_is_plus_one(form):
    tensors = {
        "threshold": np.zeros(1, np.float32),
        "bits": np.ones((1, 1, 1), np.uint8),
        "affine": np.float32([[3], [0.5], [0.25]]),
    }
    program = one_step("binary", 1, 1, tensors)
    images = np.float32([0.0, -0.0, -1e-30]).repeat(64).reshape(3, 1, 8, 8)
    logits = FORMS[form][1](made(form, program), images)
    np.testing.assert_array_equal(logits[:, 0], np.float32([3.5, 3.5, 0.25 * -2.5]))


def test_classes_and_preprocessing_are_in_the_files(scripts):
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    pytest.importorskip("onnxscript", reason="onnxscript is not installed")
    scripts.run("export.py", SHAPES, "--onnx", "a.onnx", "--pt2", "a.pt2")
    assert sorted(path.name for path in scripts.folder.iterdir()) == ["a.onnx", "a.pt2"]
    properties = onnx.load(scripts.folder / "a.onnx").metadata_props
    ours = {each.key: json.loads(each.value) for each in properties}
    extra = {"metadata.json": ""}
    torch.export.load(scripts.folder / "a.pt2", extra_files=extra)
    program = load(SHAPES).program
    assert ours == json.loads(extra["metadata.json"])
    assert tuple(ours["classes"]) == program.classes and tuple(ours["mean"]) == program.mean
    assert ours["image_size"] == ours["resize"] == 32 and "RGB" in ours["preprocessing"]


def test_a_missing_exporter_is_named(fails, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    assert "pip install onnx onnxscript" in fails("export.py", SHAPES, "--onnx", "a.onnx")


def test_what_cannot_be_exported(fails, tmp_path):
    assert "give --web, --onnx or --pt2" in fails("export.py", SHAPES)
    (tmp_path / "file").touch()
    assert "is not a folder" in fails("export.py", SHAPES, "--web", "file")
    assert "there is no folder" in fails("export.py", SHAPES, "--pt2", "absent/a.pt2")
