"""Checkpoints of the original program and of BNAS's: read, evaluated, exported and trained further."""

import json
import re

import numpy as np
import pytest
import torch
from support.reference_values import assert_close, load
from support.scripts import TINY_STAGE
from torch import nn

from genotypes import genotype_from_dict, random_genotype, save_genotype
from images.sets import STATISTICS
from model import ModelConfig, build_model
from networks.registry import trained_network
from packed import read_program
from run.checkpoint import load_checkpoint
from run.originals import Said, load_any
from utils import InputError

REFERENCES = {  # file: system, and what the file of weights does not tell
    "cifar_w1a1": ("ebnas", {}),
    "cifar_w32a1": ("ebnas", {"stage1": "w32a1"}),
    "imagenet_w1a1": ("ebnas", {}),
    "baselines/bnas_cifar": ("bnas", {}),
    "baselines/bnas_imagenet": ("bnas", {}),
}


def original_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """The weights of one of our networks as the original names them, parallelised as it saves them."""

    def original_name(name: str) -> str:
        name = name.replace(".operations.", "._ops.")
        return re.sub(r"(head\.features)\.(\d+)", lambda match: f"{match[1]}.{int(match[2]) + 1}", name)

    return {f"module.{original_name(name)}": tensor for name, tensor in model.state_dict().items()}


@pytest.fixture(scope="module")
def trained(pipeline, tmp_path_factory):
    """Of the pipeline's stage 2: its checkpoint with the original's mean and std, the same weights as the
    original saves them, and the flags that say what these do not."""
    ((run,), (search,)) = pipeline.runs("eval-*-stage2-*"), pipeline.runs("search-*")
    folder, checkpoint = tmp_path_factory.mktemp("original"), load_checkpoint(run)
    statistics = STATISTICS["cifar10"]
    checkpoint["data"] |= {"mean": list(statistics.mean), "std": list(statistics.std)}
    torch.save(checkpoint, folder / "ours.pt")
    state = original_state(trained_network(checkpoint))
    torch.save({"epoch": 7, "state_dict": state, "best_top1_acc": 50.0}, folder / "model_best.pth.tar")
    data = checkpoint["data"]
    return folder, ["--arch", search, "--set", "folder", "--data", data["root"], "--image_size", 16]


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "before torch 1.6"])
@pytest.mark.parametrize("file", REFERENCES)
def test_its_network_computes_what_the_original_did(file, legacy, tmp_path):
    """The values of the original program, by a file as it writes them."""
    system, said = REFERENCES[file]
    values = load(file)
    state = {
        f"module.{name[6:]}": torch.from_numpy(values[name]) for name in values.files if name[:6] == "state."
    }
    if "genotype" in values.files:
        save_genotype(tmp_path / "cell.json", genotype_from_dict(json.loads(str(values["genotype"]))))
        said = {**said, "arch": str(tmp_path / "cell.json")}
    torch.save(
        {"epoch": 3, "state_dict": state}, tmp_path / "x.tar", _use_new_zipfile_serialization=not legacy
    )
    checkpoint = load_any(tmp_path / "x.tar", Said(**said))
    settings = json.loads(str(values["config"])) if system == "bnas" else values
    config = checkpoint["config"]
    assert config["init_channels"] == int(settings["C" if system == "bnas" else "init_channels"])
    assert config["layers"] == int(settings["layers"])
    if system == "ebnas":
        assert config["groups"] == int(values["groups"])
        assert config["auxiliary"] == ("aux_train" in values.files)
        assert (checkpoint["kind"], checkpoint["epoch"]) == ("stage1" if "stage1" in said else "stage2", 4)
    network = trained_network(checkpoint).double().train()
    images = np.random.RandomState(int(settings["input_seed"])).randn(*settings["input_shape"])
    with torch.no_grad():
        logits = network(torch.from_numpy(images))[0]
    assert_close(logits, values["logits_train"], "logits in training mode")


def test_it_is_evaluated_as_our_own_checkpoint_is(trained, pipeline):
    folder, flags = trained
    ours = pipeline.run("evaluate.py", folder / "ours.pt").stdout.splitlines()
    original = pipeline.run("evaluate.py", folder / "model_best.pth.tar", *flags, "--packed").stdout
    row = next(line for line in ours if str(folder) in line).split()[1:]
    expected = " ".join(row).replace("stage2 W1A1 2", "stage2 W1A1 8")  # it has its own epochs
    assert any(" ".join(line.split()[1:]) == expected for line in original.splitlines()), original
    assert "the class of the float form on 100.00 %" in original
    by_folder = pipeline.run("evaluate.py", folder, *flags).stdout  # model_best.pth.tar is in it
    assert expected in " ".join(by_folder.split())


def test_it_is_exported_as_our_own_checkpoint_is(trained, pipeline, tmp_path):
    folder, flags = trained
    pipeline.run("export.py", folder / "ours.pt", "--output", tmp_path / "ours.ebnas")
    for name, given in (("named", flags), ("numbered", [*flags[:4], *flags[6:]])):
        pipeline.run("export.py", folder, *given, "--output", tmp_path / f"{name}.ebnas")
    assert (tmp_path / "named.ebnas").read_bytes() == (tmp_path / "ours.ebnas").read_bytes()
    assert read_program(tmp_path / "numbered.ebnas").classes == ("class 0", "class 1", "class 2")


def test_stage_2_begins_with_its_weights(trained, scripts, data_flags, without_pictures):
    folder, flags = trained
    stage = [*data_flags, *TINY_STAGE, "--epochs", 1, *flags[:2], "--auxiliary", "--binary"]
    stage += ["--learning_rate", 1e-30, "--pretrained"]
    log = scripts.run("train.py", *stage, folder / "model_best.pth.tar").stdout
    assert f"starting from {folder}/model_best.pth.tar" in log
    before, after = load_checkpoint(folder / "ours.pt")["model"], load_checkpoint(*scripts.runs("*"))["model"]
    for name, value in before.items():
        if "running_" not in name and "num_batches" not in name:
            torch.testing.assert_close(after[name], value, rtol=0, atol=1e-12)
    before = sorted(scripts.folder.rglob("*"))
    assert "init_channels 4, not 8" in scripts.fails(
        "train.py", *stage, folder, "--init_channels", 8, "--groups", 2
    )
    assert before == sorted(scripts.folder.rglob("*"))


def test_what_does_not_fit_is_said(trained, fails, tmp_path):
    folder, flags = trained
    line = fails("evaluate.py", folder, *flags[2:], "--arch", "EBNAS")
    assert "the genotype EBNAS has " in line and "give its own with --arch" in line
    assert "it tells 3 classes apart" in fails("evaluate.py", folder, *flags[:2])
    assert "BNAS-A is of bnas, and this file of ebnas" in fails("evaluate.py", folder, "--arch", "BNAS-A")
    assert "knows its own network and images: leave out --arch" in fails(
        "evaluate.py", folder / "ours.pt", *flags[:2]
    )
    assert "no checkpoint in" in fails("evaluate.py", folder.parent)

    def refused(content, words: str, **said):
        torch.save(content, tmp_path / "weights.pt")
        with pytest.raises(InputError, match=words):
            load_any(tmp_path / "weights.pt", Said(**said))

    content = torch.load(folder / "model_best.pth.tar", weights_only=True)
    state, config = content["state_dict"], load_checkpoint(folder / "ours.pt")["config"]
    arch = {"arch": str(flags[1]), "set": "folder"}
    refused({"cells.0._ops.0._ops.3.conv.weight": torch.ones(1)}, "weights of a search")
    refused(dict(list(state.items())[:-2]), "lacks classifier.weight", **arch)
    refused({**state, "module.classifier.bias": torch.full((3,), torch.nan)}, "is not finite", **arch)
    refused({**state, "module.stem.1.bias": torch.ones(5)}, r"stem.1.bias is .*\(5,\)", **arch)
    refused({**state, "module.more": torch.ones(5)}, "should not have, more", **arch)
    other = build_model(ModelConfig.from_dict({**config, "genotype": random_genotype(5)._asdict()}))
    refused(original_state(other), "where the weights are those of", **arch)
    bnas = {name.replace("cells.0.preprocess1.bn1", "cells.0.preprocess1.bn"): t for name, t in state.items()}
    refused(bnas, "of another program or version", **arch)
