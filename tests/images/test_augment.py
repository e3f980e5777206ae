"""The batched augmentations against torchvision's and the original's, one image at a time.

The random numbers differ, so distributions are compared: the pixels of every draw that is possible, exactly,
and how often each draw comes, by a chi-squared test.
"""

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from images.augment import (
    LIGHTING_AXES,
    Augmentation,
    Normalize,
    cutout,
    lighting,
    mixup,
    random_crop,
    random_flip,
)
from images.loaders import BatchLoader
from images.sets import ImageSet

NORMALIZE = Normalize((0.4, 0.5, 0.6), (0.2, 0.25, 0.3))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(*shape: int) -> torch.Tensor:
    return torch.randint(256, shape, dtype=torch.uint8, generator=generator(9))


def assert_uniform(draws: torch.Tensor, kinds: int) -> None:
    """All integers below `kinds` are among `draws`, as evenly as uniform ones (4.5 standard deviations)."""
    counts = torch.bincount(draws, minlength=kinds).double()
    expected = len(draws) / kinds
    statistic = ((counts - expected) ** 2 / expected).sum().item()
    assert len(counts) == kinds and counts.min() > 0
    assert statistic < kinds - 1 + 4.5 * (2 * (kinds - 1)) ** 0.5


def which(images: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """For each image the one candidate that equals it, int64 (n,)."""
    same = (images[:, None] == candidates).flatten(2).all(2)
    assert (same.sum(1) == 1).all()
    return same.long().argmax(1)


def test_crops_are_torchvisions_at_uniform_offsets():
    image = noise(3, 5, 6)
    padded = v2.Pad(4)(image)
    candidates = torch.stack([padded[:, y : y + 5, x : x + 6] for y in range(9) for x in range(9)])
    ours = random_crop(image.expand(20_000, -1, -1, -1), 4, generator())
    theirs = torch.stack([v2.RandomCrop((5, 6), padding=4)(image) for _ in range(500)])
    which(theirs, candidates)  # torchvision's are among the same 81
    assert_uniform(which(ours, candidates), 81)


def test_each_image_of_a_batch_keeps_its_own_pixels():
    images = noise(64, 3, 8, 8)
    cropped = random_crop(images, 2, generator())
    padded = torch.nn.functional.pad(images, (2,) * 4)
    for one, source in zip(cropped, padded, strict=True):
        windows = torch.stack([source[:, y : y + 8, x : x + 8] for y in range(5) for x in range(5)])
        which(one[None], windows)
    flipped = random_flip(images, generator())
    for one, source in zip(flipped, images, strict=True):
        assert torch.equal(one, source) or torch.equal(one, v2.functional.horizontal_flip(source))


def test_half_the_images_are_mirrored():
    image = noise(3, 4, 5)
    candidates = torch.stack([image, v2.functional.horizontal_flip(image)])
    assert_uniform(which(random_flip(image.expand(10_000, -1, -1, -1), generator()), candidates), 2)


def original_cutout(image: torch.Tensor, length: int, y: int, x: int) -> torch.Tensor:
    """DARTS's Cutout of one image (3, h, w), with the centre as an argument."""
    h, w = image.shape[1:]
    mask = np.ones((h, w), np.float32)
    y1, y2 = np.clip(y - length // 2, 0, h), np.clip(y + length // 2, 0, h)
    x1, x2 = np.clip(x - length // 2, 0, w), np.clip(x + length // 2, 0, w)
    mask[y1:y2, x1:x2] = 0.0
    return image * torch.from_numpy(mask)


@pytest.mark.parametrize("length", [2, 5, 6])
def test_cutout_is_the_originals_at_uniform_centres(length):
    image = torch.rand(3, 5, 7, generator=generator()) + 0.1
    centres = [(y, x) for y in range(5) for x in range(7)]
    candidates = torch.stack([original_cutout(image, length, y, x) for y, x in centres])
    candidates, kind = candidates.unique(dim=0, return_inverse=True)  # large squares look alike when cut
    drawn = which(cutout(image.expand(10_000, -1, -1, -1), length, generator()), candidates)
    expected = torch.bincount(kind) / len(kind)
    counts = torch.bincount(drawn, minlength=len(expected))
    deviation = (counts - 10_000 * expected) / (10_000 * expected * (1 - expected)).sqrt()
    assert deviation.abs().max() < 4.5


def test_mixup_mixes_images_and_targets_alike():
    images, targets = torch.rand(16, 3, 4, 4, generator=generator()), torch.eye(16)
    mixed, soft = mixup(images, targets, 0.7, generator())
    partner = (soft - 0.7 * targets).argmax(1)
    assert sorted(partner.tolist()) == list(range(16))
    assert torch.allclose(soft, 0.7 * targets + 0.3 * targets[partner])
    assert torch.allclose(mixed, 0.7 * images + 0.3 * images[partner], atol=1e-6)


def test_mixup_weights_follow_a_beta_distribution():
    labels = torch.arange(64)
    dataset = ImageSet(noise(64, 3, 2, 2), labels, tuple(map(str, labels.tolist())))
    loader = BatchLoader(
        dataset, 2, normalize=NORMALIZE, shuffle=True, augmentation=Augmentation(mixup_alpha=0.2)
    )
    weights = []
    for epoch in range(60):
        for _, targets, _ in loader.epoch(epoch):
            top = targets.amax(1)  # two labels: the weights are w and 1 - w, or 1 where a pair is one image
            assert torch.allclose(targets.sum(1), torch.ones(2))
            weights += top[:1].tolist() if top[0] < 1 else []
    assert 800 < len(weights) < 1120  # half of the permutations of two are the identity
    expected = np.random.default_rng(0).beta(0.2, 0.2, 200_000)
    expected = np.maximum(expected, 1 - expected)
    expected = expected[expected.astype(np.float32) < 1]
    for quantile in (0.1, 0.25, 0.5, 0.75):
        assert np.mean(np.array(weights) < np.quantile(expected, quantile)) == pytest.approx(
            quantile, abs=0.05
        )


def test_soft_targets_give_the_originals_mixup_loss():
    logits = torch.randn(8, 5, generator=generator(), dtype=torch.float64)
    labels = torch.randint(5, (8,), generator=generator(1))
    one_hot = torch.nn.functional.one_hot(labels, 5).double()
    _, soft = mixup(torch.zeros(8, 3, 1, 1), one_hot, 0.3, generator(2))
    partner = torch.randperm(8, generator=generator(2))
    loss = torch.nn.functional.cross_entropy
    expected = 0.3 * loss(logits, labels) + 0.7 * loss(logits, labels[partner])
    assert loss(logits, soft).item() == pytest.approx(expected.item(), rel=1e-12)


def test_lighting_is_alexnets_per_image():
    values = torch.tensor([0.2175, 0.0188, 0.0045])
    vectors = torch.tensor(
        [[-0.5675, 0.7192, 0.4009], [-0.5808, -0.0045, -0.8140], [-0.5836, -0.6948, 0.4203]]
    )
    images = torch.rand(4, 3, 5, 5, generator=generator())
    alpha = 0.1 * torch.randn(4, 3, generator=generator(1))
    ours = lighting(images, 0.1 * LIGHTING_AXES, generator(1))
    for image, mine, a in zip(images, ours, alpha, strict=True):
        shift = vectors @ (a * values)
        assert torch.allclose(mine, image + shift.view(3, 1, 1), atol=1e-6)


def test_without_augmentation_a_batch_is_only_normalised():
    dataset = ImageSet(noise(10, 3, 6, 6), torch.arange(10), tuple("abcdefghij"))
    usual = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(*NORMALIZE)])
    batch = next(BatchLoader(dataset, 10, normalize=NORMALIZE).epoch(0))
    assert torch.allclose(batch.images, usual(dataset.images), atol=1e-6)
    assert torch.equal(batch.targets, dataset.labels)


def test_a_crop_pads_with_black_and_cutout_with_the_mean():
    white = ImageSet(torch.full((256, 3, 8, 8), 255, dtype=torch.uint8), torch.zeros(256).long(), ("white",))
    mean, std = (torch.tensor(values).view(3, 1) for values in NORMALIZE)
    for wish, filled in (
        (Augmentation(crop_padding=2), -mean / std),
        (Augmentation(cutout_length=4), mean * 0),
    ):
        batch = next(BatchLoader(white, 256, normalize=NORMALIZE, augmentation=wish).epoch(0))
        pixels = batch.images.permute(1, 0, 2, 3).reshape(3, -1).unique(dim=1)
        expected = torch.cat([filled, (1 - mean) / std], 1)
        assert torch.allclose(pixels[:, pixels[0].argsort()], expected, atol=1e-6)


def test_the_data_set_is_not_changed():
    dataset = ImageSet(noise(32, 3, 8, 8), torch.arange(32), tuple(map(str, range(32))))
    before = dataset.images.clone()
    wish = Augmentation(crop_padding=2, flip=True, cutout_length=4, mixup_alpha=1.0)
    list(BatchLoader(dataset, 8, normalize=NORMALIZE, augmentation=wish, shuffle=True).epoch(0))
    assert torch.equal(dataset.images, before)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_no_step_waits_for_the_device():
    dataset = ImageSet(noise(64, 3, 8, 8), torch.arange(64), tuple(map(str, range(64)))).to("cuda")
    wish = Augmentation(crop_padding=2, flip=True, cutout_length=4, mixup_alpha=1.0)
    epoch = BatchLoader(dataset, 8, normalize=NORMALIZE, augmentation=wish, shuffle=True).epoch(0)
    next(epoch)  # moves the order to the device, once
    torch.cuda.set_sync_debug_mode("error")
    try:
        assert len(list(epoch)) == 7
    finally:
        torch.cuda.set_sync_debug_mode("default")
