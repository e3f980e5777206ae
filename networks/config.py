"""The base class of the other systems' configurations, those of networks of cells."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

from flags.choices import FAMILIES
from genotypes import OPERATIONS, Genotype, genotype_from_dict, genotype_to_dict, reduction_cells
from utils import InputError, check_count


@dataclass(frozen=True)
class BaselineConfig:
    """All that a network is built from; a checkpoint carries it as a dictionary, with its `system`.

    A system gives the `allowed_bits` of weights and activations that its stages have, and its
    `variants`, the default first. Raises InputError on values that make no network.
    """

    system: ClassVar[str]
    allowed_bits: ClassVar[tuple[tuple[int, int], ...]]
    variants: ClassVar[tuple[str, ...]] = ("",)
    counts_global_mean: ClassVar[bool] = True  # on ImageNet, where it is an AvgPool2d layer
    auxiliary = False  # a field only where a system has the head

    genotype: Genotype
    family: str = "cifar"
    init_channels: int = 36
    layers: int = 20
    num_classes: int = 10
    weight_bits: int = 1
    activation_bits: int = 1
    variant: str = ""

    def __post_init__(self):
        if not self.variant:
            object.__setattr__(self, "variant", self.variants[0])
        if self.family not in FAMILIES:
            raise InputError(f"unknown network family {self.family!r}; choose from {FAMILIES}")
        if self.variant not in self.variants:
            raise InputError(f"unknown variant {self.variant!r}; choose from {self.variants}")
        if (self.weight_bits, self.activation_bits) not in self.allowed_bits:
            raise InputError(f"no W{self.weight_bits}A{self.activation_bits} in {self.system}")
        check_count("layers", self.layers, 3, 1_000)
        for name in ("init_channels", "num_classes"):
            check_count(name, getattr(self, name), 1, 1_000_000)

    @property
    def reductions(self) -> tuple[int, int]:
        return reduction_cells(self.layers)

    def check_image_size(self, size: int) -> None:
        """Raise InputError where the network cannot take images of this size."""

    def to_dict(self) -> dict[str, Any]:
        fields = dataclasses.asdict(self)
        return {"system": self.system, **fields, "genotype": genotype_to_dict(self.genotype)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> BaselineConfig:
        genotype = genotype_from_dict(fields["genotype"], known=OPERATIONS[cls.system])
        return cls(
            **{name: value for name, value in fields.items() if name != "system"} | {"genotype": genotype}
        )
