"""The forms for other engines compute what the packed network does."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from packed_programs import one_step

from packed import load
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


def skip_without_exporter(form: str) -> None:
    for package in ("onnx", "onnxscript", "onnxruntime") if form == "onnx" else ():
        pytest.importorskip(package, reason=f"{package} is not installed")


def metadata_of(form: str, file: Path) -> dict:
    if form == "onnx":
        import onnx

        return {each.key: json.loads(each.value) for each in onnx.load(file).metadata_props}
    extra = {"metadata.json": ""}
    torch.export.load(file, extra_files=extra)
    return json.loads(extra["metadata.json"])


@pytest.mark.parametrize("form", FORMS)
def test_the_shipped_network_elsewhere(form, scripts):
    """Batches of any size. Folded scales round: a sign may change, which the median does not see."""
    skip_without_exporter(form)
    scripts.run("export.py", SHAPES, f"--{form}", "network")
    (file,) = scripts.folder.iterdir()
    net = load(SHAPES)
    images = net.preprocess(draw_shapes(100, 32, seed=4)[0].transpose(0, 2, 3, 1))
    run, content, expected = FORMS[form][1], file.read_bytes(), net(images)
    logits = run(content, images)
    assert np.median(np.abs(logits - expected)) < 1e-4
    assert (logits.argmax(1) == expected.argmax(1)).mean() >= 0.99
    np.testing.assert_allclose(run(content, images[:1]), logits[:1], atol=1e-4)
    with pytest.raises(Exception, match=r"shape\[2\]|size\(\)\[2\]|index: 2"):  # engines differ in the type
        run(content, np.zeros((1, 3, 48, 48), np.float32))

    ours = metadata_of(form, file)
    assert tuple(ours["classes"]) == net.classes and tuple(ours["mean"]) == net.program.mean
    assert ours["image_size"] == ours["resize"] == 32 and "RGB" in ours["preprocessing"]


@pytest.mark.parametrize("form", FORMS)
def test_the_sign_of_zero_is_plus_one(form):
    skip_without_exporter(form)
    tensors = {
        "threshold": np.zeros(1, np.float32),
        "bits": np.ones((1, 1, 1), np.uint8),
        "affine": np.float32([[3], [0.5], [0.25]]),
    }
    make, run = FORMS[form]
    images = np.float32([0.0, -0.0, -1e-30]).repeat(64).reshape(3, 1, 8, 8)
    logits = run(make(one_step("binary", 1, 1, tensors)), images)
    np.testing.assert_array_equal(logits[:, 0], np.float32([3.5, 3.5, 0.25 * -2.5]))


def test_a_missing_exporter_is_named(fails, monkeypatch):
    """And nothing is left of what else was asked for."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    flags = ("--onnx", "a.onnx", "--web", "page")
    assert "pip install onnx onnxscript" in fails("export.py", SHAPES, *flags)


def test_what_cannot_be_exported(fails, tmp_path):
    assert "give --web, --onnx, --pt2 or --c" in fails("export.py", SHAPES)
    (tmp_path / "file").touch()
    assert "is not a folder" in fails("export.py", SHAPES, "--web", "file")
    assert "there is no folder" in fails("export.py", SHAPES, "--web", "absent/page")
    assert "not a regular file" in fails("export.py", SHAPES, "--onnx", "/dev/null")
    assert "the same file" in fails("export.py", SHAPES, "--onnx", "a", "--pt2", "a")
    assert "there is no folder" in fails("export.py", SHAPES, "--pt2", "absent/a.pt2")
    assert "--web is empty" in fails("export.py", SHAPES, "--web", "")
    (tmp_path / "page").mkdir()
    (tmp_path / "link").symlink_to("page")
    for file in ("page/index.html", "link/index.html", "page"):
        assert "the same file" in fails("export.py", SHAPES, "--web", "page", "--output", file)
