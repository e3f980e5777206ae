"""What a network confuses: the figures against their definitions, and what evaluate.py leaves of them."""

import csv
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from images.augment import Normalize
from images.loaders import BatchLoader
from images.sets import ImageSet
from pictures import draw_confusion
from training.confusion import SHOWN, Confusion, Mistake, measure_confusion, table, write_tables
from training.engine import Precision

COUNTS = np.array([[8, 2, 0], [1, 4, 0], [3, 2, 0]])
CLASSES = ("cat", "$dog_", "x" * 30)


def test_recall_precision_and_balanced_accuracy():
    confusion = Confusion(COUNTS, CLASSES)
    assert confusion.images.tolist() == [10, 5, 5]
    assert confusion.recall == pytest.approx([0.8, 0.8, 0])
    assert confusion.precision[:2] == pytest.approx([8 / 12, 4 / 8]) and np.isnan(confusion.precision[2])
    assert confusion.top1 == pytest.approx(60) and confusion.balanced_accuracy == pytest.approx(160 / 3)
    lines = list(table(confusion))
    assert lines[1].split() == ["cat", "10", "80.00", "66.67", "$dog_", "(2)"]
    assert lines[3].split()[1:] == ["5", "0.00", "-", "cat", "(3)"]
    assert lines[4].startswith("top-1 60.00 %, balanced accuracy 53.33 %; always answering cat, ")
    assert lines[4].endswith("would reach 50.00 %")
    assert "always" not in list(table(Confusion(np.eye(3, dtype=int), CLASSES)))[-1]


def test_of_many_classes_those_of_the_lowest_recall_are_printed(tmp_path):
    counts = np.diag(np.full(150, 2))
    counts[7, 8], counts[7, 7] = 2, 0
    confusion = Confusion(counts, tuple(f"class {n}" for n in range(150)))
    lines = list(table(confusion))
    assert lines[0] == "the 100 classes of the lowest recall, of 150:" and len(lines) == 103
    assert lines[2].startswith("class 7 ") and "class 8 (2)" in lines[2]
    assert draw_confusion(confusion, tmp_path) == []


class Answers(torch.nn.Module):
    """Logits from the red of an image's corner: 10 times its level for class 1."""

    def forward(self, images):
        red = images[:, 0, 0, 0]
        return torch.stack([torch.zeros_like(red), 10 * red - 5, torch.full_like(red, -9)], 1), None


def test_the_surest_mistakes_are_kept_with_their_pictures():
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (90, 3, 4, 4), dtype=torch.uint8, generator=generator)
    labels = torch.randint(3, (90,), generator=generator)
    normalize = Normalize((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))
    plain = BatchLoader(ImageSet(images, labels, CLASSES), 17, normalize=Normalize((0, 0, 0), (1, 1, 1)))
    result = measure_confusion(Answers(), plain, CLASSES, precision=Precision("fp32", torch.device("cpu")))
    logits = Answers()(images.float() / 255)[0]
    sure, answers = logits.softmax(1).max(1)
    for truth in range(3):
        for answer in range(3):
            expected = ((labels == truth) & (answers == answer)).sum()
            assert result.counts[truth, answer] == expected
    wrong = [n for n in sure.argsort(descending=True, stable=True).tolist() if answers[n] != labels[n]]
    assert len(wrong) > SHOWN and [each.number for each in result.mistakes] == wrong[:SHOWN]
    for each in result.mistakes:
        assert (each.picture == images[each.number].permute(1, 2, 0).numpy()).all()
        assert (each.truth, each.answer) == (labels[each.number], answers[each.number])
        assert each.probability == pytest.approx(sure[each.number].item())
    normal = BatchLoader(ImageSet(images, labels, CLASSES), 90, normalize=normalize)
    for each in measure_confusion(
        Answers(), normal, CLASSES, precision=Precision("fp32", torch.device("cpu"))
    ).mistakes:
        assert (each.picture == images[each.number].permute(1, 2, 0).numpy()).all()


def test_tables_and_pictures(tmp_path):
    picture = np.full((8, 8, 3), 200, np.uint8)
    mistakes = tuple(Mistake(n, 0, 1, 0.9 - n / 10, picture) for n in range(2))
    confusion = Confusion(COUNTS, CLASSES, mistakes)
    written = write_tables(confusion, tmp_path, prefix="best-", paths=["a.png", "b.png"])
    rows = {path.name: list(csv.reader(path.open(newline=""))) for path in written}
    assert rows["best-classes.csv"][1:] == [
        ["cat", "10", "0.8000", "0.6667"],
        ["$dog_", "5", "0.8000", "0.5000"],
        ["x" * 30, "5", "0.0000", ""],
    ]
    assert rows["best-confusion.csv"] == [
        ["truth", *CLASSES],
        *([name, *map(str, row)] for name, row in zip(CLASSES, COUNTS, strict=True)),
    ]
    assert rows["best-mistakes.csv"][1:] == [
        ["a.png", "cat", "$dog_", "0.9000"],
        ["b.png", "cat", "$dog_", "0.8000"],
    ]
    for path in draw_confusion(confusion, tmp_path, prefix="best-"):
        with Image.open(path) as image:
            assert image.width > 400 and len(np.unique(np.asarray(image.convert("L")))) > 10
    assert {path.name for path in tmp_path.glob("*.png")} == {"best-confusion.png", "best-mistakes.png"}


def test_evaluate_shows_it(pipeline, scripts):
    (run,) = pipeline.runs("eval-*-stage2-*")
    shutil.copytree(run, scripts.folder / "run")
    printed = scripts.run("evaluate.py", "run", "--confusion").stdout
    rows = list(csv.reader((scripts.folder / "run" / "classes.csv").open(newline="")))
    assert len(rows) == 4 and sum(int(row[1]) for row in rows[1:]) == 30
    names = ("classes.csv", "confusion.csv", "mistakes.csv", "confusion.png", "mistakes.png")
    assert all(f"run/{name}\n" in printed and (scripts.folder / "run" / name).is_file() for name in names)
    summary = next(line for line in printed.splitlines() if "balanced accuracy" in line)
    table = next(line for line in printed.splitlines() if "stage2 W1A1" in line).split()
    assert f"top-1 {table[5]} %" in summary and table[6] == "-"  # top-5 of three classes
    mistakes = list(csv.reader((scripts.folder / "run" / "mistakes.csv").open(newline="")))[1:]
    assert all(f"/test/{truth}/" in path and truth != answer for path, truth, answer, _ in mistakes)
    line = scripts.run("evaluate.py", "run", "run", "--confusion", "--out", "x", code=2).stderr
    assert "--out takes the files of one checkpoint" in line
