"""What a search has found: the derived network's cost at the published sizes, beside the published cell's."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache

import torch

from genotypes import GENOTYPES, Genotype
from model import ModelConfig, build_model
from networks.cost import Cost, measure_cost
from networks.registry import make_config
from networks.rows import ROWS

PUBLISHED_SIZES = {"CIFAR-10": ("cifar", 32, 10), "ImageNet": ("imagenet", 224, 1000)}
"""By name: the family, side and classes of its images."""

PUBLISHED = "EBNAS"


@cache
def published_costs(genotype: Genotype, name: str) -> dict[bool, Cost]:
    """What the W1A1 network of a genotype costs on images of PUBLISHED_SIZES, at EBNAS's published
    size: without and with the auxiliary head."""
    family, image_size, classes = PUBLISHED_SIZES[name]
    usual = make_config(PUBLISHED, family=family, num_classes=classes, auxiliary=True)
    config = ModelConfig.from_dict({**usual.to_dict(), "genotype": genotype._asdict()})
    with torch.device("meta"):
        model = build_model(config)
    return {auxiliary: measure_cost(model, image_size, auxiliary=auxiliary) for auxiliary in (False, True)}


def describe_found(genotype: Genotype) -> Iterator[str]:
    """Lines: parameters, OPs and bytes at both published sizes, and how many skips and pools each cell has;
    of the genotype and of the published one."""
    published = GENOTYPES[PUBLISHED]
    yield f"found, beside the published cell {PUBLISHED}, both at the published sizes, W1A1, one image:"
    columns = ("parameters", "OPs (1e8)", "MiB stored")
    yield " " * 36 + "".join(f"{name:>26}" for name in columns)
    yield " " * 36 + f"{'found':>14}{PUBLISHED:>12}" * len(columns)
    for name, (family, _, _) in PUBLISHED_SIZES.items():
        size = ROWS[PUBLISHED].sizes[family]
        costs = [published_costs(cell, name) for cell in (genotype, published)]
        for auxiliary in (False, True):
            title = f"{name}, C {size.init_channels}, {size.layers} cells"
            title = "    with the auxiliary head" if auxiliary else title
            pairs = zip(*(_figures(cost[auxiliary]) for cost in costs), strict=True)
            yield f"{title:36}" + "".join(f"{ours:>14}{theirs:>12}" for ours, theirs in pairs)
    for what, words in (("skip", "skips"), ("pool", "pools")):
        ours, theirs = (count_operations(cell, what) for cell in (genotype, published))
        yield (
            f"{words}: {ours['normal']} in the normal cell, {ours['reduce']} in the reduction cell "
            f"({PUBLISHED}: {theirs['normal']} and {theirs['reduce']})"
        )


def _figures(cost: Cost) -> tuple[str, str, str]:
    stored = (cost.binary_bytes + cost.float_bytes) / 2**20
    return f"{cost.parameters:,}", f"{cost.ops / 1e8:.3f}", f"{stored:.2f}"


def count_operations(genotype: Genotype, what: str) -> dict[str, int]:
    """By cell, how many of its pairs have an operation with `what` in its name."""
    return {kind: sum(what in name for name, _ in getattr(genotype, kind)) for kind in ("normal", "reduce")}
