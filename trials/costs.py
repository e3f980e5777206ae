"""What a candidate's network will cost, exactly: no cost depends on the weights."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

from torch import nn

from flags.choices import COSTS
from genotypes import Genotype
from images.files import readable_classes
from model import ModelConfig
from networks.cost import measure_cost
from networks.lowering import lower
from packed import Program, program_bytes
from packed.kernel import Plan
from trials.cells import Candidate


class Costs:
    """Costs of candidates on images that `data` describes (a checkpoint's entry of that name).

    `settings` are those of ModelConfig beside the genotype, the size and the number of classes.
    """

    def __init__(self, data: Mapping[str, Any], **settings: Any):
        classes = readable_classes(list(data["classes"]), Path(data["root"]))
        self.data, self.settings = {**data, "classes": classes}, settings
        self.value = cache(self._value)
        self._program = lru_cache(1)(lambda candidate: lower(self.network(candidate), self.data))

    def of(self, candidate: Candidate) -> dict[str, float]:
        """All COSTS, by name."""
        return {name: self.value(candidate, name) for name in COSTS}

    def config(self, genotype: Genotype, init_channels: int, layers: int) -> ModelConfig:
        """Raises InputError where the size makes no network."""
        return ModelConfig(
            genotype,
            init_channels=init_channels,
            layers=layers,
            num_classes=len(self.data["classes"]),
            **self.settings,
        )

    def network(self, candidate: Candidate) -> nn.Module:
        """With random weights, as it will be packed."""
        return self.config(candidate.genotype, candidate.init_channels, candidate.layers).build().eval()

    def _value(self, candidate: Candidate, name: str) -> float:
        size = self.data["image_size"]
        if name == "ops":
            return measure_cost(self.network(candidate), size).ops
        program = self._program(candidate)
        if name == "ram":
            return arena_bytes(program, size) / 1_000
        return len(program_bytes(program)) / 1_000


def arena_bytes(program: Program, image_size: int) -> int:
    """Bytes that packed/kernel.py computes one image in, by one thread. No kernel is compiled for it."""
    tensors = [step.tensors if step.op == "linear" else {} for step in program.steps]
    return Plan(program, tensors, image_size, image_size).new_arena().base.nbytes
