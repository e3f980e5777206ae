"""A folder that is not split: always the same split, by class, kept with the run."""

import csv
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from support.scripts import TINY_STAGE

import train
from images.duplicates import near_duplicates
from images.files import list_images
from images.sets import load_set
from images.shapes import SHAPES, draw_shapes
from images.split import choose_test_files, digest, is_unsplit, part_of
from run.checkpoint import load_checkpoint
from run.images import fit_batch
from run.resume import Origin
from utils import InputError

pytestmark = pytest.mark.usefixtures("without_pictures")


@pytest.fixture
def folder(tmp_path):
    """Three classes of 30, 20 and 10 images, 16 x 16, not split."""
    drawn, labels = draw_shapes(600, 16, seed=3)
    for label, count in enumerate((30, 20, 10)):
        (tmp_path / "set" / list(SHAPES)[label]).mkdir(parents=True)
        for i in np.flatnonzero(labels == label)[:count]:
            path = tmp_path / "set" / list(SHAPES)[label] / f"{i}.png"
            Image.fromarray(drawn[i].transpose(1, 2, 0)).save(path)
    return tmp_path / "set"


def names(root, *, train: bool, part: float = 0.2) -> set[tuple[str, str]]:
    files = list_images(root)
    kept = part_of(files, choose_test_files(files, part), train=train)
    return {(files.classes[label], digest(path)) for path, label in zip(kept.paths, kept.labels, strict=True)}


def test_each_class_is_split_and_each_image_is_on_one_side(folder):
    for part, expected in ((0.2, (6, 4, 2)), (0.5, (15, 10, 5)), (0.001, (1, 1, 1)), (0.999, (29, 19, 9))):
        train, test = names(folder, train=True, part=part), names(folder, train=False, part=part)
        assert not train & test and len(train | test) == 60
        counts = [sum(name == each for name, _ in test) for each in list(SHAPES)[:3]]
        assert tuple(counts) == expected


def test_neither_names_nor_order_matter_and_copies_stay_together(folder, tmp_path):
    before = names(folder, train=False)
    for number, path in enumerate(sorted(folder.rglob("*.png"), reverse=True)):
        path.rename(path.with_name(f"photo {number}.PNG"))
    assert names(folder, train=False) == before
    for path in list(folder.rglob("*.PNG")):
        shutil.copy(path, path.with_name(f"copy of {path.name}"))
    files = list_images(folder)
    chosen = choose_test_files(files)
    test = {digest(path) for path in part_of(files, chosen, train=False).paths}
    assert test == set(chosen) and not test & {
        digest(path) for path in part_of(files, chosen, train=True).paths
    }
    assert {each for _, each in before} == test


def test_what_is_split_is_read_as_before(folder, tmp_path):
    assert is_unsplit(folder) and not is_unsplit(folder / "nowhere") and not is_unsplit(folder / "bar")
    train, test = (load_set("folder", folder, train=part, image_size=16, workers=0) for part in (True, False))
    assert (len(train), len(test)) == (48, 12) and train.classes == test.classes == (
        "bar",
        "crescent",
        "cross",
    )
    assert len(train.paths) == 48 and not set(train.paths) & set(test.paths)
    everything = load_set("folder", folder, train=False, image_size=16, workers=0, test_files=())
    assert len(everything) == 60
    (folder / "test").mkdir()
    assert not is_unsplit(folder)
    with pytest.raises(InputError, match="no folder 'train' in"):
        load_set("folder", folder, train=True)


def test_classes_that_cannot_be_split(folder):
    for path in sorted((folder / "cross").iterdir())[1:]:
        shutil.copy(sorted((folder / "cross").iterdir())[0], path)
    with pytest.raises(InputError, match="class cross has 1 image; it needs two different"):
        load_set("folder", folder, train=True)
    for name in ("cross", "crescent"):
        shutil.rmtree(folder / name)
    with pytest.raises(InputError, match="has one class, bar, and a network needs two"):
        load_set("folder", folder, train=True)


def test_near_duplicates_are_found_and_others_are_not():
    drawn = torch.from_numpy(draw_shapes(400, 32, seed=1)[0])
    train, test = drawn[:300], drawn[300:].clone()
    assert list(near_duplicates(train, test)) == []
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(-9, 10, (3, 32, 32), generator=generator)
    test[7] = (train[123].int() + noise).clamp(0, 255).to(torch.uint8)
    test[70] = (train[5].float() * 0.99).to(torch.uint8)
    assert list(near_duplicates(train, test)) == [(7, 123), (70, 5)]


def test_a_run_keeps_what_is_where(folder, scripts, monkeypatch):
    path = sorted((folder / "bar").iterdir())[0]
    for number in range(12):  # of which some fall on the other side
        pixels = np.asarray(Image.open(path)).astype(int) + (
            np.arange(16 * 16 * 3).reshape(16, 16, 3) == number
        )
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / "bar" / f"again {number}.png")
    flags = ["--set", "folder", "--data", folder, "--image_size", 16, "--workers", 0, *TINY_STAGE]
    flags += ["--epochs", 1, "--batch_size", 16, "--test_part", 0.3]
    told = scripts.run("train.py", *flags).stderr
    (run,) = scripts.runs("eval-*")
    rows = list(csv.reader((run / "split.csv").open(newline="")))
    assert rows[0] == ["file", "class", "part"] and len(rows) == 73
    parts = {part: {file for file, _, each in rows if each == part} for part in ("train", "test")}
    tested = load_checkpoint(run)["data"]["test_files"]
    assert {digest(str(folder / file)) for file in parts["test"]} == set(tested)
    assert (
        f"{len(parts['train'])} images to train on, {len(parts['test'])} to test on (--test_part 0.3)" in told
    )
    assert f"of the {len(parts['test'])} images to test on are nearly the same as one to train on (" in told

    def top1_of_all(*where) -> tuple[str, int]:
        seen = []
        monkeypatch.setattr(
            "evaluate.evaluate", lambda model, loader, **_: seen.append(loader.num_images) or result
        )
        scripts.run("evaluate.py", run, *where)
        return seen[0]

    result = {"top1": 1.0, "top5": 1.0}
    assert top1_of_all() == len(parts["test"])
    elsewhere = scripts.folder / "elsewhere"
    for file in parts["train"]:  # a folder without what was tested on
        (elsewhere / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(folder / file, elsewhere / file)
    assert top1_of_all("--data", elsewhere) == len(parts["train"])
    other = [*flags[:-1], 0.5, "--binary"]
    assert "no finished stage-1 run" in scripts.run("train.py", *other, code=2).stderr
    scripts.run("train.py", *flags, "--binary")


@pytest.mark.parametrize("given", [None, 20, 300])
def test_a_small_set_has_a_small_batch_unless_one_is_given(given, data_flags):
    """It goes by the names of the files; a run that is resumed keeps its own."""
    typed = train.parser().read([*data_flags, *(["--batch_size", str(given)] if given else [])])
    origin = Origin("train", "name", {**vars(typed.values)})
    origin.flags["batch_size"] = typed.values.batch_size or 256
    note = "a batch of 8, because there are 128 images to train on; --batch_size takes another"
    assert fit_batch(origin, typed.given) == ([] if given else [note])
    assert origin.flags["batch_size"] == (given or 8)
    resumed = replace(origin, flags={**origin.flags, "batch_size": 256}, checkpoint={"epoch": 1})
    assert fit_batch(resumed, frozenset()) == [] and resumed.flags["batch_size"] == 256
