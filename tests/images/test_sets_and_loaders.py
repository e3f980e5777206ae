"""Sets, splits and loaders: what is read, in which order, and what is said when it cannot be read."""

import contextlib
import errno
import hashlib
import http.client
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time
import urllib.error
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from PIL import Image
from support.scripts import ROOT, environment
from torchvision.datasets import CIFAR10, CIFAR100
from torchvision.datasets import utils as torchvision_downloads
from torchvision.transforms import v2

import infer
from images.augment import Augmentation, Normalize
from images.loaders import Batch, BatchLoader, Shard, _Upload, imagenet_loaders
from images.sets import STATISTICS, ImageSet, channel_statistics, holdout_split, load_set, split_halves
from packed.picture import read_rgb
from utils import InputError, RunFailed

HALF = Normalize((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
FULL_AUGMENTATION = Augmentation(crop_padding=2, flip=True, cutout_length=4, mixup_alpha=0.5)


def numbered(n: int, size: int = 4) -> ImageSet:
    """A set whose image i has label i and the value i in every pixel (n <= 256)."""
    labels = torch.arange(n)
    return ImageSet(
        labels.to(torch.uint8).view(n, 1, 1, 1).expand(n, 3, size, size).contiguous(),
        labels,
        tuple(map(str, range(n))),
    )


def loader_of(dataset: ImageSet, batch_size: int, **options) -> BatchLoader:
    return BatchLoader(dataset, batch_size, normalize=HALF, **options)


def seen(loader, epoch: int = 0) -> list[int]:
    return [label for batch in loader.epoch(epoch) for label in batch.targets.tolist()]


def equal(batch: Batch, other: Batch) -> bool:
    return torch.equal(batch.images, other.images) and torch.equal(batch.targets, other.targets)


# Order, resumption, processes


def test_an_epoch_in_training_is_a_permutation_of_its_own():
    loader = loader_of(numbered(100), 10, shuffle=True)
    first, second = seen(loader, 0), seen(loader, 1)
    assert sorted(first) == sorted(second) == list(range(100))
    assert first != second
    assert first == seen(loader, 0)
    assert first != seen(loader_of(numbered(100), 10, shuffle=True, seed=1))
    assert first != seen(loader_of(numbered(100), 10, shuffle=True, stream=1))


def digest(*tensors: torch.Tensor) -> str:
    return hashlib.sha256(torch.cat(tensors).numpy().tobytes()).hexdigest()[:16]


def test_orders_and_draws_are_still_those_of_the_first_version():
    """A run that was begun with commit 699bc97 goes on as it would have there."""
    loader = loader_of(numbered(100), 10, shuffle=True, seed=3, stream=1)
    orders = [digest(*(batch.targets for batch in loader.epoch(epoch))) for epoch in (0, 2)]
    assert orders == ["da821790c68ccf6a", "cdb24e14e4d139e8"]
    assert (
        digest(*split_halves(100, 0.5, seed=3))
        == digest(*holdout_split(100, 20, seed=3))
        == "0b64dff3b40173c6"
    )
    augmentation = Augmentation(crop_padding=2, flip=True, cutout_length=2, mixup_alpha=0.5)
    loader = loader_of(numbered(100), 10, shuffle=True, seed=3, stream=1, augmentation=augmentation)
    batch = next(loader.epoch(1, 4))
    sums = [
        -35.6143,
        -29.8762,
        -32.2944,
        -31.4997,
        -28.4536,
        -38.1267,
        -33.2619,
        -28.1585,
        -29.5459,
        -23.5218,
    ]
    assert batch.images.sum((1, 2, 3)).tolist() == pytest.approx(sums, abs=1e-3)
    assert batch.targets.amax(1).tolist() == pytest.approx([0.72238] * 10, abs=1e-5)
    assert batch.targets.argmax(1).tolist() == [28, 71, 65, 34, 64, 13, 24, 84, 72, 59]


@pytest.mark.parametrize("options", [{}, {"shuffle": True, "seed": 3, "augmentation": FULL_AUGMENTATION}])
@pytest.mark.parametrize("shard", [Shard(), Shard(1, 3)])
def test_indices_give_the_batches_of_a_copy_of_their_images(options, shard):
    dataset, indices = numbered(60), split_halves(60, 0.6, seed=0)[0]
    copy = ImageSet(dataset.images[indices], dataset.labels[indices], dataset.classes)
    loader = loader_of(dataset, 8, indices=indices, shard=shard, **options)
    other = loader_of(copy, 8, shard=shard, **options)
    assert (len(loader), loader.num_samples) == (len(other), other.num_samples)
    for epoch in (0, 1):
        assert all(map(equal, loader.epoch(epoch), list(other.epoch(epoch))))


def test_evaluation_keeps_the_order_and_the_tail():
    loader = loader_of(numbered(11), 5)
    assert seen(loader) == list(range(11))
    assert [batch.global_size for batch in loader.epoch(0)] == [5, 5, 1]
    assert (len(loader), loader.num_samples) == (3, 11)


@pytest.mark.parametrize("n, world_size, steps", [(11, 1, 2), (12, 1, 3), (13, 2, 2), (14, 2, 3), (10, 1, 2)])
def test_training_leaves_out_a_tail_too_small_for_batch_norm(n, world_size, steps):
    loaders = [
        loader_of(numbered(n), 5, shuffle=True, shard=Shard(rank, world_size)) for rank in range(world_size)
    ]
    for loader in loaders:
        batches = list(loader.epoch(0))
        assert len(batches) == len(loader) == steps
        assert sum(batch.global_size for batch in batches) == loader.num_samples == min(5 * steps, n)
        assert min(len(batch.images) for batch in batches) >= 2


def test_any_step_can_be_the_first():
    options = {"augmentation": FULL_AUGMENTATION, "shuffle": True, "seed": 3}
    batches = list(loader_of(numbered(50), 8, **options).epoch(2))
    for start in range(len(batches) + 1):
        rest = list(loader_of(numbered(50), 8, **options).epoch(2, start))
        assert len(rest) == len(batches) - start
        assert all(map(equal, rest, batches[start:]))


def test_loaders_leave_global_random_state_alone_and_do_not_feel_it():
    loader = loader_of(numbered(50), 8, augmentation=FULL_AUGMENTATION, shuffle=True)
    torch.manual_seed(0)
    np.random.seed(0)
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    batches = list(loader.epoch(0))
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    torch.manual_seed(1)
    np.random.seed(1)
    assert all(map(equal, loader.epoch(0), batches))


def test_interleaved_epochs_do_not_disturb_each_other():
    loader = loader_of(numbered(40), 8, augmentation=FULL_AUGMENTATION, shuffle=True)
    alone = list(loader.epoch(0))
    interleaved = [batch for batch, _ in zip(loader.epoch(0), loader.epoch(1), strict=True)]
    assert all(map(equal, interleaved, alone))


def test_streams_ranks_epochs_and_steps_draw_different_augmentation():
    image = torch.randint(256, (1, 3, 16, 16), dtype=torch.uint8)
    same = ImageSet(image.expand(16, -1, -1, -1), torch.zeros(16, dtype=torch.long), ("only",))

    def draw(epoch=0, step=0, **options):
        loader = loader_of(same, 8, augmentation=Augmentation(crop_padding=4), shuffle=True, **options)
        return next(loader.epoch(epoch, step)).images[:4]

    base = draw(shard=Shard(0, 2))
    others = [draw(shard=Shard(1, 2)), draw(stream=1), draw(seed=1), draw(epoch=1), draw(step=1)]
    assert not any(torch.equal(base, other) for other in others)


@pytest.mark.parametrize("shuffle", [False, True])
@pytest.mark.parametrize("n, batch_size, world_size", [(40, 8, 2), (43, 8, 2), (43, 10, 3), (41, 8, 4)])
def test_processes_share_each_batch_exactly(shuffle, n, batch_size, world_size):
    whole = loader_of(numbered(n), batch_size, shuffle=shuffle)
    loaders = [
        loader_of(numbered(n), batch_size, shuffle=shuffle, shard=Shard(rank, world_size))
        for rank in range(world_size)
    ]
    for batch, *parts in zip(whole.epoch(1), *(loader.epoch(1) for loader in loaders), strict=False):
        assert torch.equal(torch.cat([part.images for part in parts]), batch.images)
        assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
        sizes = [len(part.images) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert all(part.global_size == sum(sizes) for part in parts)
    assert len({len(loader) for loader in loaders}) == 1


def test_a_process_with_nothing_to_evaluate_gets_an_empty_batch():
    loader = loader_of(numbered(9), 4, shard=Shard(0, 2))
    last = list(loader.epoch(0))[-1]
    assert last.images.shape == (0, 3, 4, 4) and last.targets.shape == (0,) and last.global_size == 1


def test_batches_that_cannot_be_made_are_refused():
    with pytest.raises(InputError, match="batch of 11 is larger than the 10 images"):
        loader_of(numbered(10), 11, shuffle=True)
    with pytest.raises(InputError, match="two images on each of 2 processes, so 4"):
        loader_of(numbered(10), 3, shuffle=True, shard=Shard(0, 2))
    with pytest.raises(InputError, match="batch of 0 is too small"):
        loader_of(numbered(10), 0)
    assert len(loader_of(numbered(10), 11)) == 1  # evaluation may


# Splits and statistics


def test_splits_are_disjoint_complete_and_follow_the_seed():
    weights, alphas = split_halves(101, 0.5, seed=0)
    assert (len(weights), len(alphas)) == (50, 51)
    assert sorted([*weights.tolist(), *alphas.tolist()]) == list(range(101))
    assert torch.equal(split_halves(101, 0.5, seed=0)[0], weights)
    assert not torch.equal(split_halves(101, 0.5, seed=1)[0], weights)
    train, held_out = holdout_split(101, 20, seed=0)
    assert (len(train), len(held_out)) == (81, 20)
    assert not set(train.tolist()) & set(held_out.tolist())


@pytest.mark.parametrize("portion", [0.0, 1.0, -0.5, 1.5])
def test_a_split_with_an_empty_part_is_refused(portion):
    with pytest.raises(InputError, match=f"training portion of {portion}"):
        split_halves(10, portion, seed=0)


@pytest.mark.parametrize("holdout", [0, 10, 11])
def test_a_holdout_of_nothing_or_everything_is_refused(holdout):
    with pytest.raises(InputError, match=f"hold-out of {holdout} images"):
        holdout_split(10, holdout, seed=0)


def test_statistics_are_those_of_the_images():
    images = torch.randint(256, (20, 3, 7, 5), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = channel_statistics("folder", ImageSet(images, torch.zeros(20), ("only",)))
    scaled = images.double() / 255
    assert mean == pytest.approx(scaled.mean((0, 2, 3)).tolist(), rel=1e-6)
    assert std == pytest.approx(scaled.std((0, 2, 3), correction=0).tolist(), rel=1e-6)


def test_a_channel_without_spread_can_be_normalised():
    images = torch.zeros(4, 3, 4, 4, dtype=torch.uint8)
    images[0, 0] = 255
    one_red = ImageSet(images, torch.zeros(4, dtype=torch.long), ("only",))
    batch = next(BatchLoader(one_red, 4, normalize=channel_statistics("folder", one_red)).epoch(0))
    assert torch.equal(batch.images[:, 1:], torch.zeros(4, 2, 4, 4)) and batch.images[0, 0].min() > 1


# CIFAR


def make_cifar(root, monkeypatch, name: str, archive: bool) -> np.ndarray:
    """A tiny CIFAR in torchvision's own format, with checksums to match; returns its images, (n, 3072)."""
    source = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    folder = root / source.base_folder
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    key = "labels" if name == "cifar10" else "fine_labels"
    checksums, arrays = {}, {}

    def write(filename, content):
        path = folder / filename
        path.write_bytes(pickle.dumps(content))
        checksums[filename] = hashlib.md5(path.read_bytes()).hexdigest()

    for filename, _ in [*source.train_list, *source.test_list]:
        arrays[filename] = rng.integers(0, 256, (4, 3072), dtype=np.uint8)
        write(filename, {"data": arrays[filename], key: [3, 1, 2, 0]})
    write(source.meta["filename"], {source.meta["key"]: ["ant", "bee", "cow", "dog"]})

    for attribute in ("train_list", "test_list"):
        listed = [[filename, checksums[filename]] for filename, _ in getattr(source, attribute)]
        monkeypatch.setattr(source, attribute, listed)
    monkeypatch.setitem(source.meta, "md5", checksums[source.meta["filename"]])
    if archive:
        packed = root / source.filename
        with tarfile.open(packed, "w:gz") as tar:
            tar.add(folder, source.base_folder)
        monkeypatch.setattr(source, "tgz_md5", hashlib.md5(packed.read_bytes()).hexdigest())
        for path in folder.iterdir():
            path.unlink()
        folder.rmdir()
    return np.concatenate([arrays[filename] for filename, _ in source.train_list])


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
@pytest.mark.parametrize("archive", [False, True])
def test_cifar_is_read_as_torchvision_lays_it_out(tmp_path, monkeypatch, capsys, name, archive):
    arrays = make_cifar(tmp_path, monkeypatch, name, archive)
    train = load_set(name, tmp_path, train=True)
    assert train.images.is_contiguous() and train.images.dtype == torch.uint8
    assert np.array_equal(train.images.numpy(), arrays.reshape(-1, 3, 32, 32))
    assert train.labels.tolist() == [3, 1, 2, 0] * (len(arrays) // 4)
    assert train.classes == ("ant", "bee", "cow", "dog")
    assert len(load_set(name, tmp_path, train=False)) == 4
    assert capsys.readouterr().out == ""


def test_a_count_takes_the_first_images_of_each_class(images):
    whole = load_set("folder", images, train=True, image_size=16, workers=0)
    some = load_set("folder", images, train=True, image_size=16, workers=0, count=15)
    expected = sorted(
        i for label in range(3) for i in (whole.labels == label).nonzero().flatten()[:5].tolist()
    )
    assert torch.equal(some.images, whole.images[expected])
    assert some.labels.bincount().tolist() == [5, 5, 5] and some.classes == whole.classes
    drawn, part = (load_set("shapes", "", train=True, image_size=16, count=n) for n in (0, 40))
    assert part.labels.bincount().tolist() == [4] * 10 and len(drawn) == 10_000
    with pytest.raises(InputError, match="cannot be shared out evenly among 3 classes; try 15 or 18"):
        load_set("folder", images, train=True, image_size=16, workers=0, count=16)
    fewest = min(whole.labels.bincount().tolist())
    for count in (300, 301):
        with pytest.raises(InputError, match=rf"class .* has {fewest}, so at most {3 * fewest}"):
            load_set("folder", images, train=True, image_size=16, workers=0, count=count)


def refuse(*args, **kwargs):
    print("Downloading")
    raise urllib.error.URLError("name or service not known")


def test_a_failed_download_says_what_to_do(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(torchvision_downloads.urllib.request, "urlopen", refuse)
    with pytest.raises(InputError) as caught:
        load_set("cifar10", tmp_path, train=True)
    message = str(caught.value)
    for part in (
        "cifar10",
        f"{tmp_path},",
        "(name or service not known)",
        "cifar-10-python.tar.gz",
        "shapes",
    ):
        assert part in message
    assert "\n" not in message
    assert capsys.readouterr().out == ""  # torchvision's chatter goes to stderr


def test_a_failed_download_removes_the_folders_that_it_made_and_no_others(tmp_path, monkeypatch):
    monkeypatch.setattr(torchvision_downloads.urllib.request, "urlopen", refuse)
    (tmp_path / "mine").mkdir()
    for root in ("mine", "mine/data", "its/own"):
        with pytest.raises(InputError):
            load_set("cifar10", tmp_path / root, train=True)
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["mine"]


@pytest.mark.parametrize(
    "error, message",
    [
        (RuntimeError("File not found or corrupted. You have two options"), "(its checksum is wrong)"),
        (http.client.IncompleteRead(b"half"), "(IncompleteRead(4 bytes read))"),
        (ConnectionResetError(104, "Connection reset by peer"), "Connection reset by peer"),
    ],
)
def test_every_way_that_a_download_fails_is_told(tmp_path, monkeypatch, error, message):
    monkeypatch.setattr(torchvision_downloads.urllib.request, "urlopen", Mock(side_effect=error))
    with pytest.raises(InputError) as caught:
        load_set("cifar10", tmp_path, train=True)
    assert message in str(caught.value) and "options" not in str(caught.value)


def test_a_full_disk_is_not_told_as_a_failed_download(tmp_path, monkeypatch):
    full = OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(torchvision_downloads.urllib.request, "urlopen", Mock(side_effect=full))
    with pytest.raises(OSError, match="No space left"):
        load_set("cifar10", tmp_path, train=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError):
        load_set("cifar10", tmp_path / "file", train=True)


def test_unknown_sets_and_sizes_are_refused(tmp_path):
    with pytest.raises(InputError, match="'mnist'; choose from cifar10, cifar100, shapes, folder"):
        load_set("mnist", tmp_path, train=True)
    with pytest.raises(InputError, match="32 x 32, not 64"):
        load_set("cifar10", tmp_path, train=True, image_size=64)


# Folders of images


def write_folder(
    root, splits=("train", "test"), classes=("cat", "dog"), count=2, size=(40, 30), suffix=".png"
):
    """`count` images in each root/<split>/<class>, noise over a colour of the class; returns root."""
    rng = np.random.default_rng(0)
    for split in splits:
        for label, name in enumerate(classes):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 100, (*size[::-1], 3)) + np.array([70 * label, 0, 50])
                path = root / split / name / f"{i:03}{suffix}"
                Image.fromarray(pixels.astype(np.uint8)).save(path)
    return root


def test_a_folder_is_read_in_order_and_untouched_where_it_fits(tmp_path):
    write_folder(tmp_path, size=(8, 8), count=3)
    train = load_set("folder", tmp_path, train=True, image_size=8)
    files = sorted((tmp_path / "train").rglob("*.png"))
    assert train.classes == ("cat", "dog")
    assert train.labels.tolist() == [0, 0, 0, 1, 1, 1]
    pixels = np.stack([np.asarray(Image.open(path)) for path in files])
    assert np.array_equal(train.images.permute(0, 2, 3, 1).numpy(), pixels)


def test_workers_do_not_change_what_is_read(tmp_path, monkeypatch):
    write_folder(tmp_path, size=(8, 8), count=160)  # more than one block of images
    here = load_set("folder", tmp_path, train=True, image_size=8, workers=0)
    there = load_set("folder", tmp_path, train=True, image_size=8, workers=2)
    assert len(here) == 320
    assert torch.equal(here.images, there.images) and torch.equal(here.labels, there.labels)


def test_other_sizes_keep_the_centre(tmp_path):
    write_folder(tmp_path)
    for width, height in ((90, 30), (30, 90)):  # thirds: red, green, blue
        pixels = np.zeros((height, width, 3), np.uint8)
        for i, third in enumerate(np.array_split(pixels, 3, axis=int(width > height))):
            third[..., i] = 255
        Image.fromarray(pixels).save(tmp_path / "train" / "cat" / f"{width}.png")
    train = load_set("folder", tmp_path, train=True, image_size=10)
    assert train.images.shape == (6, 3, 10, 10)
    for image in train.images[2:4]:  # 30.png, 90.png
        assert torch.equal(image[:, 1:-1, 1:-1], torch.tensor([0, 255, 0]).view(3, 1, 1).expand(3, 8, 8))


def test_val_stands_in_for_test(tmp_path):
    write_folder(tmp_path, splits=("train", "val"), count=3)
    assert len(load_set("folder", tmp_path, train=False)) == 6


def test_all_corrupt_files_are_counted_and_the_first_named(tmp_path):
    write_folder(tmp_path, suffix=".jpg", count=6)
    files = sorted((tmp_path / "train").rglob("*.jpg"))
    files[1].write_bytes(b"")
    files[4].write_bytes(files[4].read_bytes()[:400])  # the header is whole
    files[7].write_text("not an image")
    files[9].write_bytes(b"\xff\xd8 not a JPEG")
    with pytest.raises(InputError) as caught:
        load_set("folder", tmp_path, train=True)
    message = str(caught.value)
    assert message.startswith("cannot read 4 images: ") and "\n" not in message
    assert [str(path) in message for path in files] == [i in (1, 4, 7) for i in range(12)]
    assert message.count(str(files[1])) == 1 and f"{files[7]} (not an image)" in message


def break_train(root):
    (root / "train").rename(root / "elsewhere")


def break_test(root):
    (root / "test").rename(root / "elsewhere")


def break_class(root):
    for path in (root / "train" / "dog").iterdir():
        path.unlink()


def break_agreement(root):
    (root / "test" / "dog").rename(root / "test" / "wolf")


def break_all_but_one_class(root):
    for split in ("train", "test"):
        (root / split / "dog").rename(root / split / "cat" / "dog")


def break_everything(root):
    for split in ("train", "test"):
        (root / split).rename(root / f"{split} elsewhere")
        (root / split).mkdir()


@pytest.mark.parametrize(
    "damage, message",
    [
        (break_train, "no folder 'train' in {root}"),
        (break_test, "no folder 'test' or 'val' in {root}"),
        (break_class, "{root}/train: no image in the classes dog"),
        (break_agreement, "only in {root}/train: dog; only in {root}/test: wolf"),
        (break_all_but_one_class, "{root}/train has one class, cat, and a network needs two"),
        (break_everything, "no class folder in {root}/train"),
    ],
)
def test_folders_that_are_no_data_set(tmp_path, damage, message):
    write_folder(tmp_path)
    damage(tmp_path)
    with pytest.raises(InputError) as caught:
        load_set("folder", tmp_path, train=True)
    assert message.format(root=tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_what_is_left_out_is_told_in_one_line(tmp_path, capsys):
    write_folder(tmp_path)
    assert load_set("folder", tmp_path, train=True).images.shape == (4, 3, 32, 32)
    assert capsys.readouterr().err == ""
    for name in ("1.txt", "2.TXT", "notes", "._000.png", "Thumbs.db"):
        (tmp_path / "train" / "cat" / name).write_text("")
    (tmp_path / "test" / "cat" / "\x1b.txt").write_text("")
    (tmp_path / "train" / ".ipynb_checkpoints").mkdir()
    assert len(load_set("folder", tmp_path, train=True)) == 4
    assert capsys.readouterr().err == (
        f"warning: left out in {tmp_path}/train: .txt (2), Thumbs.db (1), hidden (2), without a suffix (1)\n"
    )


def test_a_gif_is_read_by_training_and_by_infer(tmp_path, capsys):
    write_folder(tmp_path, count=1, suffix=".gif")
    assert load_set("folder", tmp_path, train=True).images.shape == (2, 3, 32, 32)
    assert capsys.readouterr().err == ""
    (tmp_path / "train" / "__MACOSX").mkdir()
    for name in ("cat/._000.gif", "__MACOSX/000.gif"):
        (tmp_path / "train" / name).write_text("")
    expected = [tmp_path / "train" / name / "000.gif" for name in ("cat", "dog")]
    assert infer.pictures_in(tmp_path / "train") == expected
    assert capsys.readouterr().err == f"warning: left out in {tmp_path}/train: __MACOSX (1), hidden (1)\n"


# ImageNet


@pytest.fixture
def imagenet(tmp_path):
    return write_folder(tmp_path, splits=("train", "val"), classes=("a", "b", "c"), count=7, suffix=".jpg")


def open_imagenet(root, batch_size=5, workers=0, **options):
    options = {"device": "cpu", "seed": 0, "image_size": 28, **options}
    return imagenet_loaders(root, batch_size, workers=workers, **options)


def test_imagenet_batches_do_not_depend_on_workers(imagenet):
    here, val_here, classes = open_imagenet(imagenet)
    there, val_there, _ = open_imagenet(imagenet, workers=2)
    assert classes == ("a", "b", "c")
    assert (len(here), here.num_samples, len(val_here), val_here.num_samples) == (4, 20, 5, 21)
    for epoch in (0, 1):  # the second with the same workers
        batches = list(here.epoch(epoch))
        assert all(map(equal, there.epoch(epoch), batches))
        assert [batch.images.shape for batch in batches] == [(5, 3, 28, 28)] * 4
        assert [batch.global_size for batch in batches] == [5] * 4
    assert all(map(equal, val_there.epoch(0), val_here.epoch(0)))


def test_imagenet_resumes_at_any_step_and_after_an_abandoned_epoch(imagenet):
    loader, _, _ = open_imagenet(imagenet, workers=2)
    batches = list(open_imagenet(imagenet)[0].epoch(1))
    assert equal(next(loader.epoch(0)), next(open_imagenet(imagenet)[0].epoch(0)))  # and leave it there
    resumed = list(loader.epoch(1, start=2))
    assert len(resumed) == 2 and all(map(equal, resumed, batches[2:]))


def test_imagenet_validation_is_the_usual_one(imagenet):
    _, loader, _ = open_imagenet(imagenet)
    usual = v2.Compose(
        [
            v2.Resize(32, antialias=True),
            v2.CenterCrop(28),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize(*STATISTICS["imagenet"]),
        ]
    )
    files = sorted((imagenet / "val").rglob("*.jpg"))
    pictures = [torch.from_numpy(read_rgb(path)).permute(2, 0, 1) for path in files]
    images = torch.cat([batch.images for batch in loader.epoch(0)])
    assert torch.allclose(images, torch.stack(list(map(usual, pictures))), atol=1e-6)
    assert seen(loader) == [0] * 7 + [1] * 7 + [2] * 7


def test_imagenet_training_images_change_from_epoch_to_epoch(imagenet):
    loader, _, _ = open_imagenet(imagenet, batch_size=21)
    loader.lighting_axes.zero_()  # the crops differ by themselves
    first, second = (next(loader.epoch(epoch)) for epoch in (0, 1))
    assert first.targets.sort().values.equal(second.targets.sort().values)
    assert not torch.equal(first.images, second.images)
    assert len({image.numpy().tobytes() for image in (*first.images, *second.images)}) == 42


def test_imagenet_processes_share_each_batch(imagenet):
    whole, val_whole, _ = open_imagenet(imagenet)
    pairs = [open_imagenet(imagenet, shard=Shard(rank, 2)) for rank in (0, 1)]
    for batch, one, two in zip(whole.epoch(0), *(pair[0].epoch(0) for pair in pairs), strict=True):
        assert torch.equal(torch.cat([one.targets, two.targets]), batch.targets)
    for batch, one, two in zip(val_whole.epoch(0), *(pair[1].epoch(0) for pair in pairs), strict=True):
        assert torch.equal(torch.cat([one.images, two.images]), batch.images)


def test_imagenet_leaves_global_random_state_alone(imagenet):
    torch.manual_seed(0)
    state = torch.get_rng_state()
    for workers in (0, 1):
        list(open_imagenet(imagenet, workers=workers)[0].epoch(0))
        assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("folder", ["ILSVRC2012", "ImageNet-ILSVRC2012"])
def test_imagenet_is_found_where_tools_put_it(tmp_path, folder):
    write_folder(tmp_path / folder, splits=("train", "val"))
    assert open_imagenet(tmp_path, batch_size=2)[2] == ("cat", "dog")


def failure(kind: type[Exception], loader) -> str:
    """What an epoch ends with. (pytest.raises would keep the loader, whose workers then end 5 s later.)"""
    try:
        list(loader.epoch(0))
    except kind as error:
        return str(error)
    pytest.fail(f"no {kind.__name__}")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_corrupt_imagenet_file_is_named_in_one_line(imagenet, workers):
    loader = open_imagenet(imagenet, batch_size=21, workers=workers)[0]
    broken = imagenet / "train" / "b" / "003.jpg"
    broken.write_bytes(broken.read_bytes()[:300])
    message = failure(InputError, loader)
    assert message.startswith(f"cannot read 1 image: {broken} (") and "\n" not in message


@pytest.mark.parametrize("part", ["train", "val"])
def test_some_files_of_imagenet_are_tried_at_the_start(imagenet, monkeypatch, part):
    monkeypatch.setattr("images.reader.TRIED", 3)  # of 21: the first of each class
    (imagenet / part / "b" / "001.jpg").write_text("not tried")
    open_imagenet(imagenet)
    (imagenet / part / "b" / "000.jpg").write_text("not an image")
    with pytest.raises(InputError, match=r"cannot read 1 image: .*/b/000.jpg \(not an image\)"):
        open_imagenet(imagenet)


@pytest.mark.parametrize("workers", [0, 1])
def test_imagenet_epochs_do_not_overlap(imagenet, workers):
    loader, _, _ = open_imagenet(imagenet, workers=workers)
    expected = list(open_imagenet(imagenet)[0].epoch(1))
    first = loader.epoch(0)
    never_begun = loader.epoch(2)  # noqa: F841 (an epoch that nobody asks for a batch is not open)
    next(first)
    with pytest.raises(RuntimeError, match="an epoch of this loader is still open"):
        next(loader.epoch(1))
    assert len(list(first)) == 3  # undisturbed, and then exhausted
    closed = loader.epoch(0)
    next(closed)
    closed.close()
    assert all(map(equal, loader.epoch(1), expected))


def test_a_signal_to_the_whole_group_leaves_workers_at_work(imagenet):
    loader, _, _ = open_imagenet(imagenet, batch_size=2, workers=1)
    before = multiprocessing.active_children()
    batches = loader.epoch(0)
    next(batches)
    (worker,) = (child for child in multiprocessing.active_children() if child not in before)
    for name in ("-INT", "-TERM"):
        subprocess.run(["kill", name, str(worker.pid)], check=True)  # not this process, whom it obeys
    assert len(list(batches)) == 9 and worker.is_alive()
    worker.terminate()
    worker.join()
    assert worker.exitcode == 0


def test_a_killed_worker_is_told_in_one_line(imagenet):
    loader, _, _ = open_imagenet(imagenet, batch_size=2, workers=1)
    before = multiprocessing.active_children()
    next(loader.epoch(0))
    (worker,) = (child for child in multiprocessing.active_children() if child not in before)
    os.kill(worker.pid, signal.SIGKILL)
    time.sleep(0.2)  # in which torch would raise, wherever the main thread is
    message = failure(RunFailed, loader)
    assert message.startswith("a process that reads images was killed") and "--workers" in message
    assert "\n" not in message


def test_workers_do_not_outlive_a_script_that_ends_in_mid_epoch(imagenet):
    program = (
        "import sys\nfrom images.loaders import imagenet_val_loader\n"
        "loader, _ = imagenet_val_loader(sys.argv[1], 2, device='cpu', workers=1, image_size=28)\n"
        "epoch = loader.epoch(0)\n"
        "next(epoch)\n"
        "sys.exit(3)"
    )
    command = [sys.executable, "-c", program, str(imagenet)]
    result = subprocess.run(command, cwd=ROOT, env=environment(), timeout=60, capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (3, "")


def test_imagenet_without_val_is_refused(tmp_path):
    write_folder(tmp_path, splits=("train", "test"))
    with pytest.raises(InputError, match="no folder 'val' in"):
        open_imagenet(tmp_path)
    with pytest.raises(InputError, match=r"no folder 'train' in .* or .*ILSVRC2012"):
        open_imagenet(tmp_path / "nowhere")


def test_a_batch_goes_to_a_gpu_on_a_stream_of_its_own(monkeypatch):
    """As far as a CPU can tell: what is asked of the two streams, and in which order."""
    calls = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            calls.append(f"{self.name} waits for {other.name}")

    @contextlib.contextmanager
    def within(stream):
        calls.append(f"copies on {stream.name}")
        yield

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream("steps"))
    monkeypatch.setattr(
        torch.Tensor, "record_stream", lambda self, stream: calls.append(f"held for {stream.name}")
    )
    upload = _Upload(torch.device("cuda"))
    upload.device = torch.device("cpu")
    copies = upload(torch.ones(2), torch.zeros(3))
    assert calls == ["copies on side", "steps waits for side", "held for steps", "held for steps"]
    assert [copy.tolist() for copy in copies] == [[1, 1], [0, 0, 0]]
