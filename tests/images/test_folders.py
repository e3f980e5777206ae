"""Which files are images, of which class, and in which order: torchvision's, where there are no links."""

import os
from pathlib import Path

import pytest
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import IMG_EXTENSIONS

from images.files import SUFFIXES, class_names, list_images, readable_classes
from utils import InputError


def make(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text("")
    return root


def listed(root: Path) -> list[tuple[str, str]]:
    """(file, class) of each image in `root`."""
    files = list_images(root)
    names = [os.path.relpath(path, root) for path in files.paths]
    return [(name, files.classes[label]) for name, label in zip(names, files.labels, strict=True)]


def test_an_ordinary_tree_is_read_as_torchvision_reads_it(tmp_path):
    store = make(tmp_path / "store", "b.png", "deep/a.png")
    root = make(
        tmp_path / "root",
        *"dog/1.jpg dog/10.jpg dog/2.JPEG dog/x/3.png dog/x-y/4.png dog/x/y/5.webp".split(),
        *(
            "Cat/b.tif",
            "Cat/a.ppm",
            "Cat/x.jpg",
            "Cat/folder.jpg/c.bmp",
            "Cat/notes.txt",
            "ü ñ/ß.pgm",
            "file.jpg",
        ),
    )
    (root / "bee").symlink_to(store)
    (root / "dog" / "linked").symlink_to(store / "deep" / ".." / ".." / "other")
    make(tmp_path / "other", "e.jpg")
    (root / "dog" / "linked.jpg").symlink_to(store / "b.png")
    theirs, ours = ImageFolder(root), list_images(root)
    assert ours.classes == theirs.classes == class_names(root)
    assert list(zip(ours.paths, ours.labels, strict=True)) == theirs.samples
    assert len(ours.paths) == 15
    assert (*IMG_EXTENSIONS, ".gif") == SUFFIXES


def test_what_systems_leave_in_folders_is_neither_an_image_nor_a_class(tmp_path):
    """`._1.png` is what a Mac writes beside 1.png on a stick and into a zip."""
    make(
        tmp_path,
        *"cat/1.jpg cat/._1.jpg cat/.DS_Store cat/Thumbs.db cat/.ipynb_checkpoints/1-copy.png".split(),
        *"cat/@eaDir/1.jpg/SYNOPHOTO_THUMB.jpg dog/2.GIF dog/DESKTOP.INI dog/.2.gif.swp".split(),
        *(
            ".hidden/3.jpg",
            ".ipynb_checkpoints/4.jpg",
            "__MACOSX/cat/._1.jpg",
            "._cat",
            ".DS_Store",
            "thumbs.db",
        ),
    )
    assert class_names(tmp_path) == ["cat", "dog"]
    assert listed(tmp_path) == [("cat/1.jpg", "cat"), ("dog/2.GIF", "dog")]
    left_out = "@eaDir (1), Thumbs.db (2), __MACOSX (1), desktop.ini (1), hidden (8)"
    assert list_images(tmp_path).left_out == left_out


def test_hidden_folders_above_do_not_matter(tmp_path):
    root = make(tmp_path / ".cache" / "train", "cat/1.jpg")
    assert listed(root) == [("cat/1.jpg", "cat")]


@pytest.mark.parametrize("where", ["cat/up", "cat/deep/up", "dog/up"])
@pytest.mark.parametrize("to", [".", "cat", "cat/deep", "dog", "..", "../.."])
def test_a_link_neither_repeats_nor_mislabels(tmp_path, where, to):
    root = make(tmp_path / "a" / "train", "cat/1.jpg", "cat/deep/2.jpg", "dog/3.jpg")
    make(tmp_path, "a/test/dog/4.jpg")
    before = listed(root)
    (root / where).symlink_to(root / to)
    (root / f"{where}_again").symlink_to(root / to)
    assert listed(root) == before
    assert list_images(root).left_out == "link to a folder that is read elsewhere (2)"


def test_links_to_folders_elsewhere_are_followed_once(tmp_path):
    make(tmp_path, "store/1.jpg", "store/deep/2.jpg", "train/cat/3.jpg", "train/dog/4.jpg")
    (tmp_path / "store" / "up").symlink_to(tmp_path)
    (tmp_path / "store" / "deep" / "round").symlink_to(tmp_path / "store")
    (tmp_path / "train" / "cat" / "more").symlink_to(tmp_path / "store")
    (tmp_path / "train" / "dog" / "more").symlink_to(tmp_path / "store" / "deep")
    names = ["cat/3.jpg", "cat/more/1.jpg", "cat/more/deep/2.jpg", "dog/4.jpg"]
    assert listed(tmp_path / "train") == [(name, name[:3]) for name in names]


def test_a_class_that_is_a_link_to_another_is_refused(tmp_path):
    make(tmp_path, "cat/1.jpg")
    (tmp_path / "animal").symlink_to(tmp_path / "cat")
    with pytest.raises(InputError, match=r"no image in the classes animal .*a link to a folder that is read"):
        list_images(tmp_path)


def test_links_that_lead_nowhere_and_pipes_are_left_out(tmp_path):
    make(tmp_path, "cat/1.jpg", "cat/.hidden", "cat/notes.db")
    os.mkfifo(tmp_path / "cat" / "x.jpg")
    (tmp_path / "cat" / "gone.jpg").symlink_to(tmp_path / "nowhere")
    (tmp_path / "cat" / "gone").symlink_to(tmp_path / "nowhere")
    assert listed(tmp_path) == [("cat/1.jpg", "cat")]
    assert list_images(tmp_path).left_out == ".db (1), hidden (1), not a regular file (3)"


def test_numbers_of_wordnet_are_named(tmp_path):
    ours, root = ["n01440764", "n01443537"], tmp_path / "ILSVRC" / "Data"
    root.mkdir(parents=True)
    assert readable_classes(["cat", *ours], root) == ["cat", *ours] and readable_classes(ours, root) == ours
    (tmp_path / "LOC_synset_mapping.txt").write_text("n01440764 tench, Tinca tinca\nn00000001 other\n")
    assert readable_classes(ours, root) == ["tench, Tinca tinca", "n01443537"]
    every = ["n01440764", *(f"n0{i:07d}" for i in range(2_000_000, 2_000_998)), "n15075141"]
    (tmp_path / "LOC_synset_mapping.txt").unlink()
    named = readable_classes(every, root)
    assert (named[0], named[-1], len(named)) == ("tench", "toilet tissue", 1000)
