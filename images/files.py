"""Which files of a folder are images, and of which class: DIR/<class>/**. No torch.

Order and suffixes are those of torchvision's ImageFolder, and .gif. Unlike there, a folder is read once at
most, however many links lead to it, a pipe is no image, and what systems and programs leave in folders for
themselves (hidden files, __MACOSX, Thumbs.db) is neither an image nor a class.
"""

from __future__ import annotations

import os
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from utils import InputError, printable

SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".bmp", ".pgm", ".tif", ".tiff", ".webp", ".gif")

OF_SYSTEMS = ("__MACOSX", "Thumbs.db", "ehthumbs.db", "desktop.ini", "@eaDir", "$RECYCLE.BIN", "lost+found")
"""What macOS, Windows, a NAS and Linux leave in folders for themselves, beside hidden files."""

_LOWER = {name.lower(): name for name in OF_SYSTEMS}

SYNSETS = ("LOC_synset_mapping.txt", "synset_words.txt")


@dataclass(frozen=True)
class ImageFiles:
    """The images of `folder`, class after class; `left_out` says how many of what else was found there."""

    folder: Path
    classes: list[str]
    paths: list[str]
    labels: list[int]
    left_out: str

    def subset(self, indices: Sequence[int]) -> ImageFiles:
        """The files of these indices, in their order."""
        paths, labels = ([whole[i] for i in indices] for whole in (self.paths, self.labels))
        return replace(self, paths=paths, labels=labels)


def class_names(folder: Path) -> list[str]:
    """The names of the class folders in `folder`, sorted. Raises InputError where there is none."""
    return [entry.name for entry in _class_folders(folder)]


def of_system(name: str) -> str | None:
    """What a file or folder of this name is where it is not the user's own (`hidden`, `Thumbs.db`): left out,
    and so counted. None for all others."""
    return "hidden" if name.startswith(".") else _LOWER.get(name.lower())


def readable_classes(classes: list[str], root: Path) -> list[str]:
    """The classes, numbers of WordNet (n01440764) by their names (tench, Tinca tinca) where those are known.

    ImageNet is distributed with one of two lists of them, LOC_synset_mapping.txt or synset_words.txt, in
    `root` or a folder above or below it. Without one, all 1000 classes have torchvision's names, if that is
    installed.
    """
    if not all(re.fullmatch(r"n\d{8}", name) for name in classes):
        return classes
    places = (root, *root.absolute().parents[:3], root / "ILSVRC2012", root / "ImageNet-ILSVRC2012")
    for file in (place / name for place in places for name in SYNSETS):
        if file.is_file():
            names = dict(
                line.split(" ", 1) for line in file.read_text("utf-8", "replace").splitlines() if " " in line
            )
            return [names.get(name, name).strip() for name in classes]
    if len(classes) == 1000 and (classes[0], classes[-1]) == ("n01440764", "n15075141"):
        try:
            from torchvision.models import ResNet18_Weights
        except ImportError:
            return classes
        return list(ResNet18_Weights.IMAGENET1K_V1.meta["categories"])
    return classes


def list_images(folder: Path) -> ImageFiles:
    """The image files of each class, those of its folders within folders too.

    A link to a folder is followed, unless that folder is read already, or holds one that is: a link back to
    a parent would repeat images, and one to another class would mislabel them. So a class's own folders come
    before its links. Raises InputError where a class has no image, and OSError for a folder that cannot be
    read.
    """
    classes = _class_folders(folder)
    folders, links = [], []  # to be read: (label, path)
    found, known = [], set()
    left_out = Counter(kind for entry in _sorted_entries(folder) if (kind := of_system(entry.name)))

    def note(label: int, entry: os.DirEntry) -> None:
        (links if entry.is_symlink() else folders).append((label, entry.path))

    for label, entry in enumerate(classes):
        note(label, entry)
    while folders or links:
        label, path = (folders or links).pop(0)
        real = Path(path).resolve()
        if _identity(real) in known:
            left_out["link to a folder that is read elsewhere"] += 1
            continue
        known.update(map(_identity, (real, *real.parents)))
        names = []
        for entry in _sorted_entries(path):
            if kind := of_system(entry.name):
                left_out[kind] += 1
            elif entry.is_dir():
                note(label, entry)
            elif not entry.is_file():
                left_out["not a regular file"] += 1
            elif entry.name.lower().endswith(SUFFIXES):
                names.append(entry.name)
            else:
                left_out[os.path.splitext(entry.name)[1].lower() or "without a suffix"] += 1
        found.append((label, path, names))
    found.sort()
    empty = set(range(len(classes))) - {label for label, _, names in found if names}
    if empty:
        raise InputError(
            f"{folder}: no image in the classes {', '.join(classes[label].name for label in sorted(empty))} "
            f"({', '.join(SUFFIXES)}; a link to a folder that is read elsewhere does not count)"
        )
    return ImageFiles(
        folder,
        [entry.name for entry in classes],
        [os.path.join(path, name) for _, path, names in found for name in names],
        [label for label, _, names in found for _ in names],
        counted(left_out),
    )


def counted(left_out: Counter[str]) -> str:
    """`.db (1), hidden (3)`."""
    return ", ".join(f"{what} ({count})" for what, count in sorted(left_out.items()))


def _class_folders(folder: Path) -> list[os.DirEntry]:
    entries = [entry for entry in _sorted_entries(folder) if entry.is_dir() and not of_system(entry.name)]
    if not entries:
        raise InputError(f"there is no class folder in {folder}: its images are to be in {folder}/<class>/")
    return entries


def _sorted_entries(folder: str | Path) -> list[os.DirEntry]:
    with os.scandir(folder) as entries:
        return sorted(entries, key=lambda entry: entry.name)


def _identity(folder: Path) -> tuple[int, int | str]:
    """The identity of a resolved folder: two paths to it have it in common, whether they are links or
    mounts."""
    status = folder.stat()
    return status.st_dev, status.st_ino or str(folder)  # some file systems of Windows number no files


def listed_images(folder: Path) -> ImageFiles:
    """`list_images`, with a line of warning for what it leaves out."""
    files = list_images(folder)
    if files.left_out:
        print(printable(f"warning: left out in {folder}: {files.left_out}"), file=sys.stderr)
    return files


def split_folders(roots: Sequence[Path], held_out: Sequence[str]) -> tuple[Path, Path]:
    """`train` and the first of `held_out` that exists, in the first of `roots` that has a `train`.

    Raises InputError where there is none, or their classes differ, or there is only one.
    """
    root = next((root for root in roots if (root / "train").is_dir()), None)
    if root is None:
        raise InputError(f"no folder 'train' in {' or '.join(map(str, roots))}")
    name = next((name for name in held_out if (root / name).is_dir()), None)
    if name is None:
        raise InputError(
            f"no folder {' or '.join(map(repr, held_out))} in {root}, beside 'train'; or give --data "
            f"{root / 'train'}, which --set folder then splits itself"
        )
    train, test = root / "train", root / name
    classes = {folder: set(class_names(folder)) for folder in (train, test)}
    only = [
        f"only in {folder}: {', '.join(extra[:5])}{', ...' if len(extra) > 5 else ''}"
        for folder, other in ((train, test), (test, train))
        if (extra := sorted(classes[folder] - classes[other]))
    ]
    if only:
        raise InputError(f"the classes of {train} and {test} differ; {'; '.join(only)}")
    refuse_one_class(train, sorted(classes[train]))
    return train, test


def refuse_one_class(folder: Path, classes: Sequence[str]) -> None:
    if len(classes) == 1:
        raise InputError(
            f"{folder} has one class, {classes[0]}, and a network needs two to tell apart: each folder in "
            f"{folder} is to be a class"
        )


def imagenet_folders(root: str | Path, held_out: Sequence[str] = ("val",)) -> tuple[Path, Path]:
    """train/ and the first of `held_out`, in `root`, or in its ILSVRC2012 or ImageNet-ILSVRC2012. Raises
    InputError: there are none."""
    roots = [Path(root), Path(root, "ILSVRC2012"), Path(root, "ImageNet-ILSVRC2012")]
    return split_folders(roots, held_out=held_out)
