"""The snippets of the docs, on a photo that is not square: the logits of what training saw of it."""

import shutil
import sys

import numpy as np
import pytest
from support.scripts import ROOT
from support.snippets import SHAPES, expected_logits, photograph, snippet

from packed import load, read_program
from packed.exchange import onnx_bytes, pt2_bytes


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
