"""The forms for other engines compute what the packed network does."""

import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.packed_programs import one_step, random_program
from support.scripts import ROOT

from images.shapes import draw_shapes
from packed import load
from packed.bipolar import qonnx_bytes
from packed.exchange import onnx_bytes, pt2_bytes
from packed.float_form import FloatForm

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


def run_qonnx(content: bytes, images: np.ndarray) -> np.ndarray:
    """By the package qonnx, node after node, all images at once."""
    pytest.importorskip("qonnx", reason="qonnx is not installed")
    import onnx
    from qonnx.core.modelwrapper import ModelWrapper
    from qonnx.core.onnx_exec import execute_onnx
    from qonnx.transformation.change_batchsize import ChangeBatchSize
    from qonnx.transformation.infer_shapes import InferShapes

    model = ModelWrapper(onnx.load_from_string(content))
    model = model.transform(ChangeBatchSize(len(images))).transform(InferShapes())
    return execute_onnx(model, {"images": images})["logits"]


def test_qonnx_gives_the_packed_networks_logits(scripts):
    """Its 1-bit sums are exact, as packed's: what rounds is the rest. Images of the test set."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    scripts.run("export.py", SHAPES, "--qonnx", "network.onnx")
    (file,) = scripts.folder.iterdir()
    net = load(SHAPES)
    images = net.preprocess(draw_shapes(50, 32, seed=4)[0].transpose(0, 2, 3, 1))
    logits, expected = run_qonnx(file.read_bytes(), images), net(images)
    np.testing.assert_array_equal(logits.argmax(1), expected.argmax(1))
    np.testing.assert_allclose(logits, expected, atol=1e-3)
    assert tuple(metadata_of("onnx", file)["classes"]) == net.classes

    import onnx

    nodes = onnx.load(file).graph.node
    made_by = {output: each for each in nodes for output in each.output}

    def has_one_bit(value: str) -> bool:
        """Values that a padding of -1 cuts have, too."""
        made = made_by.get(value)
        return made is not None and (
            made.op_type == "BipolarQuant" or (made.op_type == "Slice" and has_one_bit(made.input[0]))
        )

    stem, *others = [each for each in nodes if each.op_type == "Conv"]
    assert not any(map(has_one_bit, stem.input))
    assert all(len(each.input) == 2 and all(map(has_one_bit, each.input)) for each in others) and others


@pytest.mark.parametrize("seed", range(6))
def test_qonnx_of_whatever_a_file_may_hold(seed):
    """Channels that are added to and overlap, paddings of -1, dilations, groups, shuffles, odd sizes."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    rng = np.random.default_rng(seed)
    program = random_program(rng)
    size = program.image_size
    images = rng.standard_normal((2, program.buffers[0][0], size, size), np.float32)
    expected = FloatForm(program).logits(images)
    np.testing.assert_allclose(run_qonnx(qonnx_bytes(program), images), expected, rtol=1e-4, atol=1e-3)


def test_the_sign_of_zero_in_qonnx():
    """And of a threshold of -inf, which all reach."""
    pytest.importorskip("onnx", reason="onnx is not installed")
    for threshold, expected in ((0, [3.5, 3.5, 0.25 * -2.5, 3.5]), (-np.inf, [3.5] * 4)):
        tensors = {
            "threshold": np.full(1, threshold, np.float32),
            "bits": np.ones((1, 1, 1), np.uint8),
            "affine": np.float32([[3], [0.5], [0.25]]),
        }
        images = np.float32([0.0, -0.0, -1e-30, 1e-30]).repeat(64).reshape(4, 1, 8, 8)
        logits = run_qonnx(qonnx_bytes(one_step("binary", 1, 1, tensors)), images)
        np.testing.assert_array_equal(logits[:, 0], np.float32(expected))


def test_a_missing_exporter_is_named(fails, monkeypatch):
    """And nothing is left of what else was asked for."""
    monkeypatch.setitem(sys.modules, "onnx", None)
    flags = ("--onnx", "a.onnx", "--web", "page")
    assert "pip install onnx onnxscript" in fails("export.py", SHAPES, *flags)
    assert "(pip install onnx)" in fails("export.py", SHAPES, "--qonnx", "a.onnx")


def test_what_cannot_be_exported(fails, tmp_path):
    assert "give --web, --onnx, --qonnx, --pt2 or --c" in fails("export.py", SHAPES)
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
