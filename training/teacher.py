"""Distillation: a trained network that a network learns from, and the loss that compares the two."""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from images.loaders import Batch
from networks.registry import trained_network
from run.checkpoint import load_checkpoint
from run.distributed import World
from utils import InputError, one_line


class Taught(NamedTuple):
    """The targets of a student's logits."""

    labels: Tensor  # int64 (n,), or float32 (n, classes) after mixup
    logits: Tensor  # the teacher's, float32 (n, classes)


class DistillationLoss(nn.Module):
    """(1 - weight) * criterion(logits, labels) + weight * T^2 * KL(teacher || student) at temperature T.

    (n, classes), Taught -> (), the mean over n. KL is of softmax(logits / T) of both (Hinton et al.,
    Distilling the Knowledge in a Neural Network, 2015). Weight 1 and T = 1 are the distributional loss of
    ReActNet (Liu et al., ECCV 2020). Weight 1 looks at no labels, and so at neither mixed nor smoothed ones;
    the images are mixed all the same.
    """

    def __init__(self, criterion: nn.Module, *, weight: float = 1.0, temperature: float = 1.0):
        super().__init__()
        self.criterion, self.weight, self.temperature = criterion, weight, temperature

    def forward(self, logits: Tensor, targets: Taught) -> Tensor:
        student, teacher = ((each / self.temperature).log_softmax(1) for each in (logits, targets.logits))
        divergence = F.kl_div(student, teacher, reduction="batchmean", log_target=True)
        loss = self.weight * self.temperature**2 * divergence
        return loss if self.weight == 1 else loss + (1 - self.weight) * self.criterion(logits, targets.labels)


class Teacher:
    """A trained network in evaluation mode; called with a batch it gives what a DistillationLoss compares.

    It sees the student's images, as they are augmented and mixed, in the student's precision. `flags` are
    those of its own training, where known. Its state is a SHA-256 of its names and weights, so that a run
    goes on with the teacher that it began with.
    """

    def __init__(self, network: nn.Module, name: str, flags: dict[str, Any]):
        self.network, self.name, self.flags = network.eval(), name, flags
        digest = hashlib.sha256()
        for entry, tensor in network.state_dict().items():
            digest.update(entry.encode() + tensor.cpu().numpy().tobytes())
        self.digest = digest.hexdigest()

    @torch.no_grad()
    def __call__(self, batch: Batch) -> Taught:
        output = self.network(batch.images)
        logits = output[0] if isinstance(output, tuple) else output
        return Taught(batch.targets, logits.float())

    def state_dict(self) -> dict[str, str]:
        return {"sha256": self.digest}

    def load_state_dict(self, state: dict[str, str]) -> None:
        """Raise InputError where `state` is another teacher's."""
        if state != self.state_dict():
            raise InputError(f"--teacher {self.name} has changed: this run began with other weights there")


def find_teacher(name: str, data: dict[str, Any], world: World) -> Teacher:
    """The teacher that --teacher names, on the CPU: of a checkpoint or a run's folder, or else torchvision's
    network of that name with its best weights, which are downloaded if need be.

    `data` is the student's entry of a checkpoint. Raises InputError where there is no such teacher, or it
    cannot be downloaded, has other classes, saw images of another mean and std, or takes none of this size.
    Of torchvision's classes only the number can be compared.
    """
    flags, network = {}, None
    if Path(name).exists():
        checkpoint = load_checkpoint(name)
        network, theirs, flags = trained_network(checkpoint), checkpoint["data"], checkpoint["args"]
        fits = theirs["classes"] == data["classes"]
    elif (weights := _torchvision_weights(name)) is not None:
        theirs = {"classes": weights.meta["categories"]} | {
            entry: getattr(weights.transforms(), entry) for entry in ("mean", "std")
        }
        fits = len(theirs["classes"]) == len(data["classes"])
    else:
        raise InputError(
            f"--teacher {name} is neither a checkpoint nor a run's folder, nor a network of torchvision's "
            "like resnet34"
        )
    if not fits:
        raise InputError(
            f"--teacher {name} tells {len(theirs['classes'])} classes apart ({theirs['classes'][0]}, ...), "
            f"not these {len(data['classes'])} ({data['classes'][0]}, ...)"
        )
    for entry in ("mean", "std"):
        if not np.allclose(theirs[entry], data[entry], rtol=1e-5):
            numbers, ours = (", ".join(f"{n:.4f}" for n in each[entry]) for each in (theirs, data))
            raise InputError(f"--teacher {name} learnt from images of {entry} {numbers}, not {ours}")
    if network is None:  # all that can be refused without its weights is
        network = _torchvision_network(name, weights, world)
    teacher, size = Teacher(network, name, flags), data["image_size"]
    try:
        teacher(Batch(torch.zeros(1, 3, size, size), torch.zeros(1, dtype=torch.int64), 1))
    except (RuntimeError, AssertionError) as error:
        reason = one_line(error, 100)
        raise InputError(f"--teacher {name} takes no images of {size} x {size} ({reason})") from None
    return teacher


def _torchvision_weights(name: str) -> Any:
    """The best weights of torchvision's network of a name; None where it has no such network."""
    from torchvision import models  # takes seconds to import

    return models.get_model_weights(name).DEFAULT if name in models.list_models(module=models) else None


def _torchvision_network(name: str, weights: Any, world: World) -> nn.Module:
    """torchvision's network of a name, with these of its weights."""
    from torchvision import models

    with world.in_turn("downloading the teacher"):
        try:
            return models.get_model(name, weights=weights, progress=sys.stderr.isatty())
        except Exception as error:  # no network, or a file that is not whole: torch.load raises a dozen kinds
            place = Path(torch.hub.get_dir()) / "checkpoints"
            raise InputError(
                f"--teacher {name}: no weights from {weights.url} ({one_line(error, 100)}); "
                f"put that file into {place}"
            ) from None
