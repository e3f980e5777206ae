"""docs/extending.md is right: the code of each section, run."""

import re
import shutil
import subprocess
import sys

import pytest
import torch
from support.packed_programs import data_entry
from support.scripts import ROOT, environment
from torch import nn

import search_space
from architect import Architect
from binary_ops import ACTIVATION_MODULES
from genotypes import GENOTYPES
from images.sets import READERS, ImageSet, load_set
from kernels import FORMS, Form, accelerate
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet
from networks.lowering import lower
from utils import InputError

PAGE = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")


def code(section: str) -> list[str]:
    """The pieces of Python in a section of the page."""
    (text,) = re.findall(rf"## {section}\n(.*?)(?=\n## |\Z)", PAGE, re.DOTALL)
    return re.findall(r"```python\n(.*?)```", text, re.DOTALL)


def test_operations(monkeypatch):
    """What they compute is tested in test_search_space.py."""
    monkeypatch.setattr(search_space, "ENTRIES", dict(search_space.ENTRIES))
    for piece in code("An operation"):
        exec(piece, vars(search_space).copy())
    assert search_space.ENTRIES["bin_conv_7x7"].geometry == (7, 3, 1)
    assert search_space.checked_operations(["bin_conv_1x3_3x1", "bin_conv_7x7"])


@pytest.fixture
def hardtanh(monkeypatch):
    monkeypatch.setitem(ACTIVATION_MODULES, "hardtanh", None)
    (piece,) = code("A unit")
    exec(piece, {"ACTIVATION_MODULES": ACTIVATION_MODULES, "nn": nn})
    return ModelConfig(GENOTYPES["EBNAS"], init_channels=4, layers=3, groups=2, activation="hardtanh")


@pytest.mark.parametrize("form", FORMS)
def test_an_activation(form, hardtanh):
    """It is computed plain in every form, which is said once, and has no packed form."""
    torch.manual_seed(0)
    plain, images = build_model(hardtanh), torch.randn(2, 3, 16, 16)
    expected = plain(images)[0]
    torch.manual_seed(0)
    network = accelerate(build_model(hardtanh), form)
    torch.testing.assert_close(network(images)[0], expected, rtol=1e-4, atol=1e-4)
    told = Form(form, "kernels").told(network).words
    assert ("modules plain" in told) == (form != "plain")
    with pytest.raises(InputError, match="Hardtanh has no packed form"):
        lower(plain.eval(), data_entry())


def test_a_normalisation():
    network = build_model(ModelConfig(GENOTYPES["EBNAS"], init_channels=4, layers=3, groups=2))
    for unit in network.modules():
        if hasattr(unit, "bn2"):
            unit.bn2 = nn.GroupNorm(2, unit.bn2.num_features)
    logits = network(torch.ones(2, 3, 16, 16))[0]
    assert torch.equal(accelerate(network, "native")(torch.ones(2, 3, 16, 16))[0], logits)


def test_a_data_set(monkeypatch, tmp_path):
    monkeypatch.setitem(READERS, "stripes", None)
    (piece,) = code("A data set")
    exec(piece, {"READERS": READERS, "ImageSet": ImageSet, "torch": torch})
    train = load_set("stripes", tmp_path, train=True, image_size=8, count=10)
    assert len(train) == 10 and train.classes == ("rows", "columns")
    assert len(load_set("stripes", tmp_path, train=False)) == 40


def test_a_regulariser():
    supernet = Supernet(SearchConfig(8, 3, 4))
    weights = {"learning_rate": 1e-3, "weight_decay": 0, "path_reg_weight": 1.5, "edge_reg_weight": 0.8}
    architect = Architect(supernet, **weights)
    (piece,) = code("A regulariser of the search")
    exec(piece, {"architect": architect})
    weight, value = architect.regularizers["skips"]
    assert weight == 0.1 and value(supernet).item() == pytest.approx(14 / 7, abs=0.01)
    from train_search import epoch_record

    metrics = {"loss": 1.0, "top1": 10.0, "seconds": 1.0, "images_per_second": 1.0}
    record = epoch_record(architect, supernet.genotype(), metrics, metrics, before=None)
    assert record["skips_regularizer"] == pytest.approx(2, abs=0.01) and "path_regularizer" in record


ANCHORS = {
    "flags/options.py": r"def add_run_flags.*?\n    flag = .*?\n",
    "flags/settings.py": r"class RunSettings:\n.*?\n\n",
    "training/stages.py": r"def build_network\(.*?\"\"\"\n",
}


def test_a_flag(tmp_path):
    """In a copy of the program."""
    copy = tmp_path / "program"
    shutil.copytree(
        ROOT, copy, ignore=shutil.ignore_patterns(".*", "runs", "data", "docs", "results", "tests")
    )
    (piece,) = code("A flag")
    for file, line in re.findall(r"# (\S+), in \w+\n(.*)\n", piece):
        text = (copy / file).read_text(encoding="utf-8")
        end = re.search(ANCHORS[file], text, re.DOTALL).end()
        (copy / file).write_text(f"{text[:end]}    {line}\n{text[end:]}", encoding="utf-8")
    tiny = "--set shapes --image_size 16 --train_images 20 --batch_size 10 --layers 3 --init_channels 4"
    command = [
        sys.executable,
        copy / "train.py",
        *tiny.split(),
        "--groups",
        "2",
        "--epochs",
        "1",
        "--deterministic",
    ]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (log,) = tmp_path.glob("runs/*/log.txt")
    assert "deterministic" in log.read_text(encoding="utf-8")
