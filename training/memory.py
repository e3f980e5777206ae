"""The GPU memory that a training step needs, counted on fake tensors: shapes and types, no values, no GPU."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from genotypes import GENOTYPES
from images.loaders import Batch
from kernels import accelerate
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet
from networks.registry import Config
from run.distributed import World
from training.engine import Precision, Training, parts_of, training_loss

GB = 2**30

CONTEXT, WORKSPACE, FRAGMENTATION = GB // 2, GB // 2, 1.1
"""The reserve: what CUDA takes before the first tensor; what convolutions take beside their tensors, with the
images of a small set; and, as a factor, what the allocator cannot use. Guesses, not measured on a GPU."""

CARDS = (8, 12, 16, 24, 80)


@dataclass(frozen=True)
class StepMemory:
    """A training step of one process on `images` images, as the scripts make it: in `accumulate` parts."""

    config: Config | SearchConfig
    image_size: int
    images: int = 256
    precision: str = "fp32"
    accumulate: int = 1

    def needs(self) -> int:
        """Bytes, with the reserve but CUDA's own."""
        return int(FRAGMENTATION * count_bytes(self)) + WORKSPACE

    def that_fits(self, free: int) -> StepMemory | None:
        """This step, or in twice, four, ... times as many parts: the first that fits into `free` bytes."""
        step = self
        while step.images >= 2 * step.accumulate:
            if step.needs() <= free:
                return step
            step = replace(step, accumulate=2 * step.accumulate)
        return None

    def advice(self, free: int | None, *, batch_size: int) -> str:
        """What to do where memory has run out: by count, on a GPU with `free` bytes; at least twice as many
        parts. `batch_size` is that of all processes."""
        more = replace(self, accumulate=2 * self.accumulate)
        fitting = more.that_fits(free) if free is not None else None
        if fitting is None:
            return "give a smaller one, or a larger --accumulate"
        smaller = batch_size * self.accumulate // fitting.accumulate
        return f"by count, --accumulate {fitting.accumulate} fits, or --batch_size {smaller}"


@cache
def count_bytes(step: StepMemory) -> int:
    """Parameters, Adam's two moments, and the most that tensors hold at one time in the forward and backward
    passes, gradients among them; of the search, of both kinds of step together."""
    build = Supernet if isinstance(step.config, SearchConfig) else build_model
    precision = Precision(step.precision, torch.device("cpu"))
    with torch.random.fork_rng(devices=[]), FakeTensorMode(), Allocations() as allocations:
        model = accelerate(build(step.config))
        images = torch.zeros(step.images, 3, step.image_size, step.image_size)
        batch = Batch(images, torch.zeros(step.images, dtype=torch.int64), step.images)
        if step.accumulate > 1:  # of the parts before
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter)
        largest = next(parts_of(batch, step.accumulate))
        optimizer = torch.optim.Adam(model.parameters())  # takes no step, and so has no moments
        training = Training(model, nn.CrossEntropyLoss(), optimizer, World(images.device), precision)
        objective, _, _ = training_loss(training, largest)
        objective.backward()
        moments = 2 * sum(parameter.nbytes for parameter in model.parameters())
    return allocations.peak + moments


class Allocations(TorchDispatchMode):
    """Within it, `held` are the bytes of all tensors there are, each storage once; `peak` was the most."""

    def __init__(self):
        super().__init__()
        self.held = self.peak = 0
        self.counted: set[int] = set()

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        results = operation(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._count(result.untyped_storage())
        return results

    def _count(self, storage: torch.UntypedStorage) -> None:
        if id(storage) not in self.counted:
            self.counted.add(id(storage))
            self.held += storage.nbytes()
            self.peak = max(self.peak, self.held)
            weakref.finalize(storage, self._forget, id(storage), storage.nbytes())

    def _forget(self, address: int, size: int) -> None:
        self.counted.remove(address)
        self.held -= size


def free_bytes(device: torch.device) -> int | None:
    """The bytes that a GPU has left for this process; None on a CPU."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else None


PUBLISHED = {
    "search": StepMemory(SearchConfig(), 32),
    "search, ImageNet, batch 64": StepMemory(SearchConfig(num_classes=1000, stem="imagenet"), 224, images=64),
    "CIFAR": StepMemory(ModelConfig(GENOTYPES["EBNAS"], auxiliary=True), 32),
    "ImageNet": StepMemory(
        ModelConfig(GENOTYPES["EBNAS"], "imagenet", 112, 14, num_classes=1000, auxiliary=True), 224
    ),
}
"""The published runs on one GPU; of the stages the second."""


def table() -> Iterator[str]:
    """Markdown: what a step of each published run needs, and the --accumulate that fits it on a card."""
    yield "| run | precision | GB | " + " | ".join(f"{card} GB" for card in CARDS) + " |"
    yield "|---|---|---:|" + "---|" * len(CARDS)
    for name, run in PUBLISHED.items():
        for precision in ("fp32", "bf16"):
            step = replace(run, precision=precision)
            cells = [name, precision, f"{(step.needs() + CONTEXT) / GB:.1f}"]
            for card in CARDS:
                fitting = step.that_fits(card * GB - CONTEXT)
                if fitting is None:
                    cells.append("no")
                else:
                    cells.append("yes" if fitting == step else f"`--accumulate {fitting.accumulate}`")
            yield "| " + " | ".join(cells) + " |"
