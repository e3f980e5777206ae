"""One folder of images, DIR/<class>/**, split into those to train on and those to test on.

An image's part follows from its content alone, so a folder is always split the same, whatever its files are
called and in whichever order they are listed, and copies of a file fall on one side. No torch.
"""

from __future__ import annotations

import csv
import dataclasses
import functools
import hashlib
import io
import os
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from images.files import ImageFiles, class_names
from utils import InputError

TEST_PART = 0.2


def is_unsplit(root: str | Path) -> bool:
    """Whether `root` has class folders of its own: neither `train` nor `test` nor `val`."""
    root = Path(root)
    if not root.is_dir() or any((root / name).is_dir() for name in ("train", "test", "val")):
        return False
    try:
        return bool(class_names(root))
    except InputError:
        return False


def choose_test_files(files: ImageFiles, part: float = TEST_PART) -> tuple[str, ...]:
    """The digests, sorted, of what is to test on: of each class the nearest to `part` of its images, and at
    least one; which are those of the lowest digests. Raises InputError where a class has too few images."""
    classes: dict[int, dict[str, int]] = defaultdict(dict)  # of each class the digests and how many have it
    known: dict[str, int] = {}
    for path, label in zip(files.paths, files.labels, strict=True):
        each = digest(path)
        owner = known.setdefault(each, label)  # the same file in two classes is on one side
        classes[owner][each] = classes[owner].get(each, 0) + 1
    chosen = []
    for label, counts in classes.items():
        if len(counts) < 2:
            raise InputError(
                f"{files.folder}: class {files.classes[label]} has {len(counts)} image; it needs two "
                "different ones, to train on and to test on"
            )
        wanted, taken = part * sum(counts.values()), 0
        for each in sorted(counts)[:-1]:  # one is left to train on
            if taken and taken + counts[each] / 2 > wanted:
                break
            chosen.append(each)
            taken += counts[each]
    return tuple(sorted(chosen))


def part_of(files: ImageFiles, test_files: Collection[str], *, train: bool) -> ImageFiles:
    """The files to train on, or to test on."""
    tested = set(test_files)
    kept = [i for i, path in enumerate(files.paths) if (digest(path) in tested) != train]
    paths, labels = ([whole[i] for i in kept] for whole in (files.paths, files.labels))
    return dataclasses.replace(files, paths=paths, labels=labels)


def digest(path: str) -> str:
    """The digest of a file's content: 16 hexadecimal digits."""
    status = os.stat(path)
    return _digest(path, status.st_size, status.st_mtime_ns)


@functools.lru_cache(maxsize=1 << 20)
def _digest(path: str, _size: int, _time: int) -> str:
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=8).hexdigest()


def split_table(root: str | Path, parts: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> bytes:
    """A CSV: file (in `root`), class and part of each image; `parts`: of each its files and their classes."""
    text = io.StringIO()
    table = csv.writer(text)
    table.writerow(["file", "class", "part"])
    rows = [
        (os.path.relpath(path, root), name, part)
        for part, (paths, names) in parts.items()
        for path, name in zip(paths, names, strict=True)
    ]
    table.writerows(sorted(rows))
    return text.getvalue().encode("utf-8", "surrogateescape")
