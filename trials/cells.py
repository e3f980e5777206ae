"""A cell as a set of choices: drawing it, changing one choice, its features for a regression. No torch.

A candidate is a genotype and the size of the network made of it. Of two orders in which a node can list its
inputs only one occurs here, since both are the same network.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np

from genotypes import NODES, PRIMITIVES, Genotype, genotype_from_dict, genotype_to_dict
from search_space import ENTRIES

Pair = tuple[str, int]
KINDS = ("normal", "reduce")
CONCAT = tuple(range(2, 2 + NODES))

INPUTS = [[(a, b) for b in range(2 + node) for a in range(b)] for node in range(NODES)]
"""Of each node the pairs of states that it can read."""

RESIZED = 0.25
"""Probability that a mutation changes the network's size, where several sizes are allowed."""


def _sorted_inputs(pairs: Sequence[Pair]) -> tuple[Pair, ...]:
    """The two inputs of each node in the order of the states they read."""
    return tuple(
        pair
        for node in range(NODES)
        for pair in sorted(pairs[2 * node : 2 * node + 2], key=lambda pair: (pair[1], pair[0]))
    )


@dataclass(frozen=True)
class Candidate:
    """A network that a trial trains. Genotypes that differ in the order of a node's inputs make one
    candidate."""

    normal: tuple[Pair, ...]
    reduce: tuple[Pair, ...]
    init_channels: int
    layers: int

    @classmethod
    def of(cls, genotype: Genotype, *, init_channels: int, layers: int) -> Candidate:
        return cls(_sorted_inputs(genotype.normal), _sorted_inputs(genotype.reduce), init_channels, layers)

    @property
    def genotype(self) -> Genotype:
        return Genotype(self.normal, CONCAT, self.reduce, CONCAT)

    @cached_property
    def key(self) -> str:
        """Names the candidate: equal keys are equal candidates."""
        return hashlib.sha256(json.dumps(self.to_dict()).encode()).hexdigest()[:12]

    def to_dict(self) -> dict[str, Any]:
        return {
            "genotype": genotype_to_dict(self.genotype),
            "init_channels": self.init_channels,
            "layers": self.layers,
        }

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Candidate:
        """Raises InputError on what is no genotype, LookupError or TypeError on what is no candidate."""
        genotype = genotype_from_dict(fields["genotype"])
        return cls.of(genotype, init_channels=fields["init_channels"], layers=fields["layers"])

    @cached_property
    def features(self) -> np.ndarray:
        """Float64, of one length for all candidates. For each kind of cell: how often it has each operation;
        how many convolutions, pools and skips read the older input, the newer one and inner states; the
        longest path; the states that no node reads. Then the logarithms of width and depth."""
        numbers: list[float] = []
        for pairs in (self.normal, self.reduce):
            numbers += [sum(name == each for each, _ in pairs) for name in ENTRIES]
            reads = [(ENTRIES[name].kind, min(source, 2)) for name, source in pairs]
            numbers += [
                reads.count((kind, source)) for kind in ("convolution", "pool", "skip") for source in range(3)
            ]
            depth = [0, 0]
            for node in range(NODES):
                depth.append(1 + max(depth[source] for _, source in pairs[2 * node : 2 * node + 2]))
            numbers.append(max(depth))
            numbers.append(2 + NODES - len({source for _, source in pairs}))
        return np.array([*numbers, np.log2(self.init_channels), np.log2(self.layers)])

    @cached_property
    def choices(self) -> dict[str, str]:
        """Name and value of each choice, as Optuna's pages show them: `normal 2 inputs`: `0 1`."""
        found = {"init_channels": str(self.init_channels), "layers": str(self.layers)}
        for kind in KINDS:
            pairs = getattr(self, kind)
            for node in range(NODES):
                (first, a), (second, b) = pairs[2 * node : 2 * node + 2]
                found[f"{kind} {node + 2} inputs"] = f"{a} {b}"
                found[f"{kind} {node + 2} first"] = first
                found[f"{kind} {node + 2} second"] = second
        return found


@dataclass(frozen=True)
class Space:
    """All cells that a search of the supernet can derive from these operations, at any of these widths and
    depths."""

    init_channels: tuple[int, ...]
    layers: tuple[int, ...]
    operations: tuple[str, ...] = PRIMITIVES
    alternatives: dict[str, list[str]] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        values = {"init_channels": [*map(str, self.init_channels)], "layers": [*map(str, self.layers)]}
        for kind in KINDS:
            for node in range(NODES):
                values[f"{kind} {node + 2} inputs"] = [f"{a} {b}" for a, b in INPUTS[node]]
                for which in ("first", "second"):
                    values[f"{kind} {node + 2} {which}"] = list(self.operations)
        object.__setattr__(self, "alternatives", values)

    def draw(self, rng: np.random.Generator) -> Candidate:
        """A uniform draw: for each node two different inputs, for each of these any operation; any size."""

        def cell() -> tuple[Pair, ...]:
            names = rng.integers(len(self.operations), size=2 * NODES).tolist()
            inputs = rng.integers([len(states) for states in INPUTS]).tolist()
            sources = [state for states, i in zip(INPUTS, inputs, strict=True) for state in states[i]]
            return tuple((self.operations[i], source) for i, source in zip(names, sources, strict=True))

        return Candidate(cell(), cell(), _any(self.init_channels, rng), _any(self.layers, rng))

    def mutate(self, parent: Candidate, rng: np.random.Generator) -> Candidate:
        """A candidate with one choice of `parent` changed: an operation or an input, as likely as each other
        (Real et al., Regularized evolution, AAAI 2019), or where sizes vary, now and then the size."""
        sizes = {"init_channels": self.init_channels, "layers": self.layers}
        varying = [name for name, values in sizes.items() if set(values) - {getattr(parent, name)}]
        if varying and rng.random() < RESIZED:
            name = _any(varying, rng)
            others = [value for value in sizes[name] if value != getattr(parent, name)]
            return replace(parent, **{name: _any(others, rng)})
        kind = _any(KINDS, rng)
        pairs = list(getattr(parent, kind))
        if rng.random() < 0.5:
            edge = int(rng.integers(2 * NODES))
            operation, source = pairs[edge]
            pairs[edge] = (_any([name for name in self.operations if name != operation], rng), source)
        else:
            edge = int(rng.integers(2, 2 * NODES))  # the first node reads both inputs, and has no choice
            taken = {pairs[edge][1], pairs[edge ^ 1][1]}
            others = [state for state in range(2 + edge // 2) if state not in taken]
            pairs[edge] = (pairs[edge][0], _any(others, rng))
        return replace(parent, **{kind: _sorted_inputs(pairs)})

    def pool(self, best: Sequence[Candidate], count: int, rng: np.random.Generator) -> list[Candidate]:
        """`count` candidates to choose from: half of them drawn, half mutations of the `best`, of one to
        three choices each. All are drawn where there are no best ones."""
        drawn = count if not best else count // 2
        found = [self.draw(rng) for _ in range(drawn)]
        while len(found) < count:
            candidate = best[int(rng.integers(len(best)))]
            for _ in range(int(rng.integers(1, 4))):
                candidate = self.mutate(candidate, rng)
            found.append(candidate)
        return found


def _any(values: Sequence, rng: np.random.Generator) -> Any:
    return values[int(rng.integers(len(values)))]
