"""A search on large images: the supernet with ImageNet's stem, its images, and what follows its genotype."""

from copy import deepcopy

import pytest
import torch
from support.scripts import TINY_SEARCH, receive
from torch.nn import functional as F

from genotypes import get_genotype
from images.loaders import search_file_loaders
from kernels import FORMS, accelerate
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet
from run.checkpoint import load_checkpoint
from training.memory import CONTEXT, GB, PUBLISHED
from utils import InputError

pytestmark = pytest.mark.usefixtures("without_pictures")

STEM = ["--stem", "imagenet", "--image_size", 64, "--workers", 1]


@pytest.fixture(scope="module")
def supernet() -> Supernet:
    torch.manual_seed(0)
    return Supernet(SearchConfig(8, 3, 3, stem="imagenet")).double()


def test_three_halvings_before_the_first_cell_as_in_the_derived_network(supernet):
    images = torch.randn(2, 3, 64, 48, dtype=torch.float64)
    older, newer = supernet.stems(images)
    assert (older.shape, newer.shape) == ((2, 8, 16, 12), (2, 8, 8, 6))
    assert 0.1 < (older >= 0).double().mean() < 0.9  # signs of what a ReLU gives would all be +1
    assert 0.1 < (newer >= 0).double().mean() < 0.9
    genotype = supernet.genotype()
    derived = build_model(ModelConfig(genotype, "imagenet", 8, 3, groups=2))
    for stem in ("stem0", "stem1"):
        shapes = [
            [tuple(parameter.shape) for parameter in getattr(network, stem).parameters()]
            for network in (supernet, derived)
        ]
        assert shapes[0] == shapes[1]


@pytest.mark.parametrize("size", [(64, 64), (61, 47)])
@pytest.mark.parametrize("form", [form for form in FORMS if form != "plain"])
def test_fast_forms_compute_the_same(supernet, form, size):
    images = torch.randn(4, 3, *size, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    results = {}
    for name in ("plain", form):
        network = accelerate(deepcopy(supernet), name)
        logits, _ = network(images)
        F.cross_entropy(logits, torch.tensor([0, 1, 2, 0])).backward()
        gradients = {n: p.grad for n, p in network.named_parameters()}
        results[name] = {"logits": logits.detach(), **gradients, **network.state_dict()}
    for entry, expected in results["plain"].items():
        torch.testing.assert_close(results[form][entry], expected, rtol=1e-9, atol=1e-11)


def test_batch_64_of_224_pixels_fits_a_card_of_12_gb():
    step = PUBLISHED["search, ImageNet, batch 64"]
    assert (step.images, step.image_size, step.config.init_channels, step.config.layers) == (64, 224, 16, 8)
    assert step.needs() + CONTEXT < 12 * GB


def test_weights_and_architecture_have_parts_of_their_own(images):
    settings = {"device": "cpu", "workers": 0, "seed": 3, "image_size": 32}
    weights, architecture, valid, classes = search_file_loaders(
        images, 8, train_portion=0.75, count=48, **settings
    )
    assert len(classes) == 3
    parts = [set(loader.source.paths.tolist()) for loader in (weights, architecture, valid)]
    assert (len(parts[0]), len(parts[1])) == (36, 12)
    assert not parts[0] & parts[1] and parts[1] == parts[2]
    both = torch.cat([weights.source.labels, architecture.source.labels])
    assert both.bincount().tolist() == [16, 16, 16]
    first, second = (next(iter(weights.epoch(0))).images for _ in range(2))
    assert torch.equal(first, second) and first.shape == (8, 3, 32, 32)
    assert sum(len(batch.targets) for batch in valid.epoch(0)) == 12
    with pytest.raises(InputError, match="so at most 117"):
        search_file_loaders(images, 8, train_portion=0.5, count=3000, **settings)


def test_a_search_on_files_ends_in_a_genotype_for_train_imagenet(scripts, imagenet_flags, at_step):
    root = imagenet_flags[imagenet_flags.index("--tmp_data_dir") + 1]
    search = ["--tmp_data_dir", root, *TINY_SEARCH, *STEM, "--train_images", 96]
    at_step(5, receive(15))  # in the second epoch, where architecture steps are
    scripts.run("train_search.py", *search, "--save", "halved", code=143)
    (halved,) = scripts.runs("search-halved-*")
    scripts.run("train_search.py", "--resume", halved)
    log = scripts.run("train_search.py", *search, "--save", "whole").stdout
    (whole,) = scripts.runs("search-whole-*")
    command = f"python train_imagenet.py --tmp_data_dir {root} --image_size 64 --auxiliary"
    assert f"{command} --arch runs/{whole.name}" in log
    resumed, expected = load_checkpoint(halved), load_checkpoint(whole)
    assert all(torch.equal(tensor, resumed["model"][name]) for name, tensor in expected["model"].items())
    assert expected["config"]["stem"] == "imagenet" and expected["data"]["set"] == "imagenet"
    scripts.run("train_imagenet.py", *imagenet_flags, "--epochs", 1, "--arch", whole)
    (stage1,) = scripts.runs("eval-*")
    genotype = load_checkpoint(stage1)["config"]["genotype"]
    assert get_genotype(str(whole)).normal == tuple(map(tuple, genotype["normal"]))


def test_folders_serve_too_at_224_pixels_by_default(scripts, images, monkeypatch):
    monkeypatch.setattr("train_search.train_one_epoch", lambda *_, **__: {})  # nothing else is looked at
    monkeypatch.setattr("train_search.Session.start", stop)
    flags = ["--set", "folder", "--data", images, *TINY_SEARCH, "--stem", "imagenet", "--workers", 0]
    with pytest.raises(Begun) as begun:
        scripts.run("train_search.py", *flags)
    assert begun.value.data["image_size"] == 224 and begun.value.data["set"] == "folder"


class Begun(BaseException):
    """A run would begin: with these images."""

    def __init__(self, data: dict):
        self.data = data


def stop(_session, *, data: dict, **_header):
    raise Begun(data)


def test_what_does_not_go_with_the_stem_is_refused(fails, images):
    assert "takes folders of images: give --tmp_data_dir" in fails("train_search.py", "--stem", "imagenet")
    assert "is for --stem imagenet" in fails("train_search.py", "--tmp_data_dir", images)
    cutout = ["--stem", "imagenet", "--tmp_data_dir", images, "--cutout"]
    assert "--cutout is for --stem cifar" in fails("train_search.py", *cutout)
    flags = [*STEM, "--tmp_data_dir", images, "--batch_size", 32, "--k_normal", 2, "--k_reduce", 2]
    line = fails("train_search.py", *flags, "--init_channels", 12)
    assert "init_channels 12 is no multiple of 8" in line
