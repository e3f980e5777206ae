"""Going on from a trained network: with a new schedule, in another stage, with other classes."""

import shutil

import pytest
import torch
from support.scripts import TINY_STAGE

from model import build_model
from networks.registry import trained_network
from run.checkpoint import load_checkpoint
from training.pretrained import Start, load_start

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture(scope="module")
def stage2(pipeline):
    (run,) = pipeline.runs("eval-*-stage2-*")
    return run


def first_weights(monkeypatch) -> list[dict[str, torch.Tensor]]:
    """What load_start leaves in each network of this test."""
    loaded = []

    def load(model, start: Start) -> None:
        load_start(model, start)
        loaded.append({name: tensor.clone() for name, tensor in model.state_dict().items()})

    monkeypatch.setattr("training.stages.load_start", load)
    return loaded


@pytest.mark.parametrize("binary", [["--binary"], []])
def test_a_finished_run_is_trained_further(pipeline, stage2, data_flags, scripts, monkeypatch, binary):
    loaded, (search,) = first_weights(monkeypatch), pipeline.runs("search-*")
    flags = [*data_flags, *TINY_STAGE, "--epochs", 1, "--arch", search, "--auxiliary", *binary]
    log = scripts.run("train.py", *flags, "--pretrained", stage2).stdout
    assert f"starting from {stage2}/last.pt, a stage2 network of folder, 2 epochs: all its weights; " in log
    theirs = load_checkpoint(stage2)["model"]
    assert loaded[0].keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in loaded[0].items())
    (run,) = scripts.runs("eval-*")
    checkpoint = load_checkpoint(run)
    assert (checkpoint["epoch"], checkpoint["kind"]) == (1, "stage2" if binary else "stage1")
    assert checkpoint["state"]["scheduler"]["last_epoch"] == 1  # a schedule of its own


def test_of_other_classes_all_but_the_classifier_is_taken(
    pipeline, stage2, images, scripts, monkeypatch, tmp_path
):
    loaded, (search,) = first_weights(monkeypatch), pipeline.runs("search-*")
    for split in ("train", "test"):
        for name in sorted(path.name for path in (images / split).iterdir())[:2]:
            shutil.copytree(images / split / name, tmp_path / "two" / split / name)
    flags = ["--set", "folder", "--data", tmp_path / "two", "--image_size", 24, "--workers", 0, *TINY_STAGE]
    flags += ["--epochs", 1, "--arch", search, "--auxiliary", "--binary", "--pretrained", stage2]
    log = scripts.run("train.py", *flags).stdout
    theirs = load_checkpoint(stage2)["model"]
    count = len(theirs)
    assert f"{count - 4} of {count} tensors, all but the classifier's, because its 3 classes" in log
    assert "learnt from other images: image_size 16, not 24, other classes" in log
    same = {name for name, tensor in loaded[0].items() if torch.equal(tensor, theirs[name])}
    left_out = {f"{part}classifier.{name}" for part in ("", "auxiliary_head.") for name in ("weight", "bias")}
    assert set(theirs) - same == left_out


def test_every_systems_classifier_is_known(stage2):
    """What a start leaves out are the tensors with a row a class, whatever a system calls them."""
    from networks.registry import make_config
    from training.pretrained import CLASSIFIERS

    for arch in ("EBNAS", "BNAS-A", "BATS", "DCP-NAS-L", "ResNet18"):
        with torch.device("meta"):
            few, many = (
                build_model(make_config(arch, num_classes=classes)).state_dict() for classes in (7, 9)
            )
        differing = {name for name in few if few[name].shape != many[name].shape}
        assert differing == {name for name in few if name.split(".")[-2] in CLASSIFIERS}
    assert trained_network(load_checkpoint(stage2)).config.num_classes == 3
