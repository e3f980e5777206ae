"""The batch loop: exact means, precision, and a loss that is not finite."""

import warnings

import pytest
import torch
from support.batches import WORLD, Batches
from torch import nn

from genotypes import GENOTYPES
from images.loaders import Batch
from model import ModelConfig, Network, build_model
from training.engine import (
    FiniteWatch,
    Position,
    Precision,
    Sums,
    Training,
    choose_precision,
    evaluate,
    parts_of,
    train_one_epoch,
)
from utils import RunFailed

CONFIG = ModelConfig(GENOTYPES["EBNAS"], init_channels=4, groups=2, layers=3, num_classes=4, auxiliary=True)


def test_means_are_over_samples_not_batches():
    sums = Sums(WORLD.device)
    logits = torch.eye(10)
    sums.add(torch.tensor(1.0), logits[:8], torch.arange(8))  # all right
    sums.add(torch.tensor(4.0), logits[:2], torch.tensor([9, 9]))  # wrong; and not among the first five ties
    means = sums.means(WORLD)
    assert means["samples"] == 10
    assert means["loss"] == pytest.approx(1.6)
    assert means["top1"] == pytest.approx(80.0)


def test_soft_targets_count_by_their_largest_class():
    sums = Sums(WORLD.device)
    sums.add(torch.tensor(0.0), torch.eye(3), torch.tensor([[0.6, 0.4, 0], [0.7, 0.3, 0], [0, 0.1, 0.9]]))
    assert sums.means(WORLD)["top1"] == pytest.approx(200 / 3)
    assert sums.means(WORLD)["top5"] == pytest.approx(100)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_loss_that_is_not_finite_names_epoch_and_step(value):
    watch = FiniteWatch(4)
    watch.add(0, torch.tensor(1.0))
    with pytest.raises(RunFailed, match="epoch 4, step 7; a lower --learning_rate"):
        watch.add(7, torch.tensor(value))


@pytest.mark.parametrize("tf32", [True, False])
def test_tf32_is_settled_by_switches_that_agree_and_without_a_warning(tf32):
    """The older ones: torch.compile reads them, and raises where newer ones say otherwise."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        choose_precision("fp32", WORLD.device, tf32=tf32)
    assert torch.backends.cudnn.allow_tf32 is tf32 and torch.backends.cuda.matmul.allow_tf32 is tf32
    if hasattr(torch.backends.cudnn, "conv"):  # from torch 2.9 on
        assert (torch.backends.cudnn.conv.fp32_precision == "tf32") is tf32
        assert (torch.backends.cuda.matmul.fp32_precision == "tf32") is tf32
    with torch.backends.cudnn.flags(enabled=True):  # reads all of them
        pass


@pytest.mark.parametrize("has", [True, False])
def test_bf16_on_a_gpu_that_emulates_it(monkeypatch, capsys, has):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    for name in ("fp32", "bf16"):
        choose_precision(name, torch.device("cuda"))
    assert capsys.readouterr().err.count("emulates it, slowly") == (not has)


def train_once(
    epochs: int = 1, precision: str = "fp32", start: Position | None = None, after_step=None, **changes
) -> tuple[dict, nn.Module]:
    """The means of the last of some epochs, and the network."""
    torch.manual_seed(0)
    model = build_model(CONFIG)
    training = Training(
        model,
        nn.CrossEntropyLoss(),
        torch.optim.Adam(model.parameters(), 1e-2),
        WORLD,
        Precision(precision, WORLD.device),
        **{"grad_clip": 5.0, "auxiliary_weight": 0.4, **changes},
    )
    for _ in range(epochs):
        means = train_one_epoch(training, Batches(), start=start or Position(0), after_step=after_step)
    return means, model


@pytest.mark.parametrize(("precision", "accumulate"), [("fp32", 1), ("bf16", 1), ("fp16", 1), ("fp16", 2)])
def test_training_learns_in_every_precision(precision, accumulate):
    first, _ = train_once(precision=precision, accumulate=accumulate)
    last, model = train_once(epochs=10, precision=precision, accumulate=accumulate)
    assert last["loss"] < 0.6 * first["loss"]
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    means = evaluate(model, Batches(), world=WORLD, precision=Precision(precision, WORLD.device))
    assert means["samples"] == 16 and not model.training


class FixedStatistics(Network):
    """Training with the auxiliary head, while batch normalisation stays in evaluation mode; in float64."""

    def train(self, mode: bool = True):
        super().train(False)
        self.training = mode
        return self

    def forward(self, x):
        return super().forward(x.double())


class SoftBatches(Batches):
    """A batch of 8 and a tail of 7, with targets as mixup gives them."""

    def epoch(self, _epoch, start=0):
        targets = torch.rand(8, 4, generator=torch.Generator().manual_seed(1)).softmax(1)
        for batch, size in zip(self.batches, (8, 7), strict=True):
            yield Batch(batch.images[:size], targets[:size], size)


@pytest.mark.parametrize("loader", [Batches(), SoftBatches()])
def test_a_step_in_parts_equals_a_whole_one(loader, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)  # losses too
    results = []
    for accumulate in (1, 2, 3, 8):
        torch.manual_seed(0)
        model = FixedStatistics(CONFIG).double()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        training = Training(
            model,
            nn.CrossEntropyLoss(label_smoothing=0.1),
            optimizer,
            WORLD,
            Precision("fp32", WORLD.device),
            grad_clip=0.5,
            auxiliary_weight=0.4,
            accumulate=accumulate,
        )
        means = train_one_epoch(training, loader, start=Position(0))
        results.append((dict(model.named_parameters()), {name: means[name] for name in ("loss", "top1")}))
    for parameters, means in results[1:]:
        torch.testing.assert_close(parameters, results[0][0], rtol=1e-10, atol=1e-12)
        assert means == pytest.approx(results[0][1], rel=1e-10)


def test_parts_have_two_images_at_least_and_sizes_that_differ_by_one_at_most():
    batch = Batch(torch.arange(11.0), torch.arange(11), 30)
    parts = list(parts_of(batch, 4))
    assert [len(part.images) for part in parts] == [3, 3, 3, 2]
    assert torch.equal(torch.cat([part.targets for part in parts]), batch.targets)
    assert sum(WORLD.loss_factor(part) for part in parts) == pytest.approx(WORLD.loss_factor(batch))
    assert len(list(parts_of(batch, 30))) == 5


def test_the_clip_bounds_the_gradient():
    _, model = train_once(grad_clip=1e-3)
    norm = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in model.parameters()]))
    assert norm <= 1.001e-3


@pytest.mark.parametrize("allowed", [True, False])
def test_tf32_is_settled_and_not_left_to_torch(allowed):
    choose_precision("fp32", WORLD.device, tf32=allowed)
    assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is allowed


def test_a_resumed_epoch_has_the_means_of_all_of_it():
    """Also where its steps were all done, and only the evaluation is left."""
    sums = []
    whole, _ = train_once(after_step=lambda _step, totals: sums.append(totals.values.tolist()))
    for step in (1, 2):
        rest, _ = train_once(start=Position(0, step, sums[step - 1]))
        assert rest["samples"] == whole["samples"] == 16
    assert [rest[name] for name in ("loss", "top1")] == [whole[name] for name in ("loss", "top1")]
