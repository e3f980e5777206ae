"""What a network confuses: each class's recall and precision, and the pictures that it gets wrong."""

from __future__ import annotations

import csv
import heapq
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from images.loaders import Loader
from training.engine import Precision
from utils import printable, write_atomically

SHOWN = 24
"""Pictures in mistakes.png."""

LISTED = 100
"""Classes that are printed; of more, those of the lowest recall."""


@dataclass(frozen=True)
class Mistake:
    """A picture, uint8 (h, w, 3), that is a `truth` and is called `answer` with this probability; `number`:
    which of the set's images it is."""

    number: int
    truth: int
    answer: int
    probability: float
    picture: np.ndarray


@dataclass(frozen=True)
class Confusion:
    """`counts` int64 (k, k): how many images of the class of a row are called the class of a column."""

    counts: np.ndarray
    classes: tuple[str, ...]
    mistakes: tuple[Mistake, ...] = ()  # the surest first

    @property
    def images(self) -> np.ndarray:
        """How many of each class."""
        return self.counts.sum(1)

    @property
    def recall(self) -> np.ndarray:
        """The part of a class's images that is given its name; NaN for a class without images."""
        return _divided(self.counts.diagonal(), self.images)

    @property
    def precision(self) -> np.ndarray:
        """The part of the images given a class's name that belong to it; NaN where none is given it."""
        return _divided(self.counts.diagonal(), self.counts.sum(0))

    @property
    def top1(self) -> float:
        return 100 * self.counts.trace() / max(self.counts.sum(), 1)

    @property
    def balanced_accuracy(self) -> float:
        """The mean of the classes' recall, in percent: each class counts the same."""
        return 100 * float(np.nanmean(self.recall))

    @property
    def largest(self) -> tuple[str, float]:
        """The class of most images, and the top-1 of always answering it."""
        label = int(self.images.argmax())
        return self.classes[label], 100 * self.images[label] / max(self.counts.sum(), 1)


def _divided(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return np.divide(part, whole, out=np.full(len(part), np.nan), where=whole > 0)


@torch.no_grad()
def measure_confusion(
    model: nn.Module, loader: Loader, classes: Sequence[str], *, precision: Precision
) -> Confusion:
    """What `model`, which is put into evaluation mode, calls the images of `loader`. Keeps SHOWN mistakes."""
    model.eval()
    counts = torch.zeros(len(classes) ** 2, dtype=torch.int64)
    surest: list[tuple[float, int, Mistake]] = []  # a heap; by -number, of equally sure ones the first stay
    seen = 0
    for batch in loader.epoch(0):
        if not len(batch.images):
            continue
        with precision.autocast(), torch.compiler.set_stance("force_eager"):
            logits = model(batch.images)[0].float()
        probabilities, answers = logits.softmax(1).max(1)
        counts += torch.bincount((batch.targets * len(classes) + answers).cpu(), minlength=len(counts))
        for i in (answers != batch.targets).nonzero().flatten().tolist():
            rank = (probabilities[i].item(), -seen - i)
            if len(surest) == SHOWN and rank <= surest[0][:2]:
                continue
            picture = _picture(batch.images[i], loader)
            mistake = Mistake(seen + i, batch.targets[i].item(), answers[i].item(), rank[0], picture)
            (heapq.heappush if len(surest) < SHOWN else heapq.heappushpop)(surest, (*rank, mistake))
        seen += len(batch.images)
    mistakes = tuple(mistake for *_, mistake in sorted(surest, key=lambda entry: entry[:2], reverse=True))
    return Confusion(counts.view(len(classes), -1).numpy(), tuple(classes), mistakes)


def _picture(image: Tensor, loader: Loader) -> np.ndarray:
    """A normalised image (3, h, w) as it was: uint8 (h, w, 3)."""
    mean, std = (torch.tensor(each).view(3, 1, 1) for each in (loader.normalize.mean, loader.normalize.std))
    levels = (image.float().cpu() * std + mean).mul(255).round().clamp(0, 255)
    return levels.to(torch.uint8).permute(1, 2, 0).numpy()


def table(confusion: Confusion) -> Iterator[str]:
    """Lines to print: a class a line, then the whole."""
    order = np.arange(len(confusion.classes))
    if len(order) > LISTED:
        order = np.argsort(np.nan_to_num(confusion.recall, nan=2), kind="stable")[:LISTED]
        yield f"the {LISTED} classes of the lowest recall, of {len(confusion.classes)}:"
    names = [printable(name) for name in confusion.classes]
    width = max(5, *(len(names[label]) for label in order))
    yield f"{'class':{width}}  images  recall %  precision %  most often taken for"
    for label in order:
        others = confusion.counts[label].copy()
        others[label] = 0
        taken_for = f"{names[others.argmax()]} ({others.max()})" if others.any() else "-"
        yield (
            f"{names[label]:{width}}  {confusion.images[label]:6d}  {_percent(confusion.recall[label]):>8}  "
            f"{_percent(confusion.precision[label]):>11}  {taken_for}"
        )
    line = f"top-1 {confusion.top1:.2f} %, balanced accuracy {confusion.balanced_accuracy:.2f} %"
    if len(set(confusion.images.tolist())) > 1:
        name, accuracy = confusion.largest
        line += f"; always answering {printable(name)}, the largest class, would reach {accuracy:.2f} %"
    yield line


def _percent(part: float) -> str:
    return "-" if np.isnan(part) else f"{100 * part:.2f}"


def write_tables(confusion: Confusion, folder: Path, *, prefix: str, paths: Sequence[str] = ()) -> list[Path]:
    """Write classes.csv (a class a row), confusion.csv (the counts, truth by rows, answers by columns) and
    mistakes.csv (the surest mistakes) into `folder`, each behind `prefix`. `paths`: of the images, where they
    are files. Raises OSError where one cannot be written."""
    rows = zip(confusion.classes, confusion.images, confusion.recall, confusion.precision, strict=True)
    classes: list[list] = [["class", "images", "recall", "precision"]]
    for name, images, *parts in rows:
        classes.append([name, int(images), *("" if np.isnan(part) else f"{part:.4f}" for part in parts)])
    counts = [["truth", *confusion.classes]]
    counts += [[name, *row.tolist()] for name, row in zip(confusion.classes, confusion.counts, strict=True)]
    mistakes = [["image", "truth", "answer", "probability"]]
    for each in confusion.mistakes:
        names = [confusion.classes[label] for label in (each.truth, each.answer)]
        image = paths[each.number] if paths else each.number
        mistakes.append([image, *names, f"{each.probability:.4f}"])
    written = []
    for name, lines in (("classes", classes), ("confusion", counts), ("mistakes", mistakes)):
        text, path = io.StringIO(), folder / f"{prefix}{name}.csv"
        csv.writer(text).writerows(lines)
        write_atomically(path, text.getvalue().encode("utf-8", "surrogateescape"))
        written.append(path)
    return written
