"""The derived networks of a genotype, for CIFAR-sized and ImageNet-sized images: what all systems share
(`Cell`, `CellNetwork`), and EBNAS's own (`Network`). The other systems are in networks/.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from binary_ops import ACTIVATION_MODULES
from flags.choices import FAMILIES, WEIGHT_BINARIZATIONS
from genotypes import Genotype, genotype_from_dict, genotype_to_dict, reduction_cells
from operations import (
    BinaryUnit,
    FactorizedReduce,
    Zero,
    conv_bn_relu,
    drop_path,
    imagenet_convolutions,
    make_operation,
)
from utils import InputError, check_count, nearest_multiples


@dataclass(frozen=True)
class ModelConfig:
    """All that a derived network is built from; a checkpoint carries it as a dictionary.

    `bits` per stage: stage 1 is W1A32 (weight_bits 1, activation_bits 32), or W32A1; stage 2 is W1A1.
    Raises InputError on values that make no network.
    """

    system: ClassVar[str] = "ebnas"
    counts_global_mean: ClassVar[bool] = True  # on ImageNet, where the original has it as an AvgPool2d

    genotype: Genotype
    family: str = "cifar"
    init_channels: int = 84
    layers: int = 16
    groups: int = 14
    num_classes: int = 10
    auxiliary: bool = False
    weight_bits: int = 1
    activation_bits: int = 1
    weight_binarization: str = "plain"
    activation: str = "prelu"

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise InputError(f"unknown network family {self.family!r}; choose from {FAMILIES}")
        if self.weight_binarization not in WEIGHT_BINARIZATIONS:
            raise InputError(
                f"unknown weight binarization {self.weight_binarization!r}; "
                f"choose from {WEIGHT_BINARIZATIONS}"
            )
        if self.activation not in ACTIVATION_MODULES:
            names = tuple(ACTIVATION_MODULES)
            raise InputError(f"unknown activation {self.activation!r}; choose from {names}")
        check_count("layers", self.layers, 3, 1_000)  # two cells reduce the size, after one that does not
        for name in ("init_channels", "groups", "num_classes"):
            check_count(name, getattr(self, name), 1, 1_000_000)
        # halves of a factorised reduction; ImageNet's stem has a convolution in 4 groups of C/2 channels
        halves = 8 if self.family == "imagenet" else 2
        step = math.lcm(self.groups, halves)
        if self.init_channels % step:
            raise InputError(
                f"init_channels {self.init_channels} is no multiple of {step}, which {self.groups} groups "
                f"and the halves of layers need; try {nearest_multiples(self.init_channels, step)}"
            )

    @property
    def bits(self) -> dict:
        """The keyword arguments of a BinaryConv2d."""
        names = ("weight_bits", "activation_bits", "weight_binarization")
        return {name: getattr(self, name) for name in names}

    @property
    def reductions(self) -> tuple[int, int]:
        return reduction_cells(self.layers)

    def check_image_size(self, size: int) -> None:
        """Any size will do."""

    def to_dict(self) -> dict:
        return {**dataclasses.asdict(self), "genotype": genotype_to_dict(self.genotype)}

    @classmethod
    def from_dict(cls, fields: dict) -> ModelConfig:
        return cls(**{**fields, "genotype": genotype_from_dict(fields["genotype"])})

    def build(self) -> Network:
        return Network(self)


class Cell(nn.Module):
    """One cell: s0 (n, c_older, h', w'), s1 (n, c_newer, h, w) -> (n, 4 * channels, h or ceil(h/2), ...).

    The walk through a genotype; what it is made of is given: two `preprocess` modules, of the older and of
    the newer input, and the operations, two a node, with the states (`sources`) that they read. Of the states
    those of `concat` are concatenated.
    """

    def __init__(
        self,
        preprocess: tuple[nn.Module, nn.Module],
        operations: Iterable[nn.Module],
        *,
        sources: Iterable[int],
        concat: tuple[int, ...],
        channels: int,
    ):
        super().__init__()
        self.preprocess0, self.preprocess1 = preprocess
        self.concat = concat
        self.sources = tuple(sources)
        self.operations = nn.ModuleList(operations)
        self.out_channels = channels * len(concat)

    def forward(self, s0: Tensor, s1: Tensor, keep: Tensor | None = None) -> Tensor:
        """With `keep`, drop-path keeps each result with this probability (see `drop_path`)."""
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        for node in range(0, len(self.operations), 2):
            terms = []
            for edge in (node, node + 1):
                drops = keep is not None and not isinstance(self.operations[edge], (nn.Identity, Zero))
                terms.append(self.dropped(edge, states, keep) if drops else self.operated(edge, states))
            states.append(terms[0] + terms[1])
        return torch.cat([states[i] for i in self.concat], dim=1)

    def operated(self, edge: int, states: list[Tensor]) -> Tensor:
        """The result of an edge's operation on the state that it reads."""
        return self.operations[edge](states[self.sources[edge]])

    def dropped(self, edge: int, states: list[Tensor], keep: Tensor) -> Tensor:
        """The same, with drop-path."""
        return drop_path(self.operated(edge, states), keep)


class AuxiliaryHead(nn.Module):
    """A second classifier on a middle cell's output (n, c, h, w), full precision; used in training only.

    AvgPool 5x5, 1x1 conv to 128, BN, ReLU, 2x2 conv to 768, BN, ReLU, linear: for features of 8 x 8 (CIFAR,
    stride 3) and 7 x 7 (ImageNet, stride 2) the 2x2 convolution gives one pixel, as in DARTS; larger ones
    are averaged after it, and features below 7 x 7 are pooled to 2 x 2 before it.
    """

    def __init__(self, channels: int, num_classes: int, *, stride: int):
        super().__init__()
        self.stride = stride
        self.features = self.make_features(channels)
        self.classifier = nn.Linear(768, num_classes)

    def make_features(self, channels: int) -> nn.Sequential:
        return nn.Sequential(
            nn.Conv2d(channels, 128, 1, bias=False),
            nn.BatchNorm2d(128),
            nn.ReLU(),
            nn.Conv2d(128, 768, 2, bias=False),
            nn.BatchNorm2d(768),
            nn.ReLU(),
        )

    def forward(self, x: Tensor) -> Tensor:
        if min(x.shape[2:]) >= 5 + self.stride:
            x = F.avg_pool2d(x, 5, self.stride, count_include_pad=False)
        else:
            x = F.adaptive_avg_pool2d(x, 2)
        return self.classifier(self.features(x).mean((2, 3)))


class CellNetwork(nn.Module):
    """A network of cells: images (n, 3, h, w) -> logits (n, classes), auxiliary logits or None.

    Auxiliary logits are given in training mode only, where the configuration asks for the head. Images of
    16 x 16 and more (`cifar`), or 32 x 32 and more (`imagenet`). `drop_path_prob` is set by the training
    loop, epoch by epoch, and acts in training mode. A system says what its stems, preprocessing, operations
    and auxiliary head are.
    """

    cell_type = Cell
    auxiliary_head_type = AuxiliaryHead

    def __init__(self, config: Any):
        super().__init__()
        self.config = config
        self.register_buffer("keep", torch.ones(()), persistent=False)
        self.drop_path_prob = 0.0
        channels = config.init_channels
        if config.family == "cifar":
            c_older = c_newer = 3 * channels
            self.stem = nn.Sequential(*self.cifar_stem(channels))
        else:
            c_older = c_newer = channels
            stem0, stem1 = self.imagenet_stems(channels)
            self.stem0, self.stem1 = nn.Sequential(*stem0), nn.Sequential(*stem1)

        # ImageNet: stem1 halves the size of the older input, as a reduction cell would
        reduction_before = config.family == "imagenet"
        self.cells = nn.ModuleList()
        self.auxiliary_head = None
        for index in range(config.layers):
            reduction = index in config.reductions
            channels *= 2 if reduction else 1
            cell = self.make_cell(
                c_older, c_newer, channels, reduction=reduction, reduction_before=reduction_before
            )
            self.cells.append(cell)
            c_older, c_newer, reduction_before = c_newer, cell.out_channels, reduction
            if config.auxiliary and index == config.reductions[1]:
                stride = 3 if config.family == "cifar" else 2
                self.auxiliary_head = self.auxiliary_head_type(c_newer, config.num_classes, stride=stride)
        self.classifier = nn.Linear(c_newer, config.num_classes)

    # What a system is made of

    def cifar_stem(self, channels: int) -> list[nn.Module]:
        """Layers (n, 3, h, w) -> (n, 3 * channels, h, w)."""
        return conv_bn_relu(3, 3 * channels, stride=1)

    def imagenet_stems(self, channels: int) -> tuple[list[nn.Module], list[nn.Module]]:
        """Layers (n, 3, h, w) -> (n, channels, h/4, w/4), the older input; and from these on to
        (n, channels, h/8, w/8)."""
        raise NotImplementedError

    def preprocess(self, c_in: int, channels: int) -> nn.Module:
        """(n, c_in, h, w) -> (n, channels, h, w)."""
        raise NotImplementedError

    def reduce(self, c_in: int, channels: int) -> nn.Module:
        """Preprocessing of an older input of twice the size: (n, c_in, h, w) -> (n, channels, h/2, w/2)."""
        raise NotImplementedError

    def operation(self, name: str, channels: int, stride: int) -> nn.Module:
        """(n, channels, h, w) -> (n, channels, ceil(h / stride), ...)."""
        raise NotImplementedError

    def make_cell(
        self, c_older: int, c_newer: int, channels: int, *, reduction: bool, reduction_before: bool
    ) -> Cell:
        genotype = self.config.genotype
        pairs = genotype.reduce if reduction else genotype.normal
        preprocess0 = self.reduce if reduction_before else self.preprocess
        return self.cell_type(
            (preprocess0(c_older, channels), self.preprocess(c_newer, channels)),
            [self.operation(name, channels, 2 if reduction and source < 2 else 1) for name, source in pairs],
            sources=(source for _, source in pairs),
            concat=genotype.reduce_concat if reduction else genotype.normal_concat,
            channels=channels,
        )

    def register_update_rule(self, optimizer: torch.optim.Optimizer) -> None:
        """Have `optimizer` do, before each step, what the system does to latent weights and their gradients
        beyond autograd: nothing, unless the system says so."""

    @property
    def drop_path_prob(self) -> float:
        return self._drop_path_prob

    @drop_path_prob.setter
    def drop_path_prob(self, probability: float) -> None:
        # compiled code and CUDA graphs are made for one value of a number or a bool, but read the tensor anew
        self._drop_path_prob, self.drops_paths = probability, probability > 0
        self.keep.fill_(1.0 - probability)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.config.family == "cifar":
            s0 = s1 = self.stem(x)
        else:
            s0 = self.stem0(x)
            s1 = self.stem1(s0)
        auxiliary_logits = None
        keep = self.keep if self.training and self.drops_paths else None
        for index, cell in enumerate(self.cells):
            s0, s1 = s1, cell(s0, s1, keep)
            if self.training and self.auxiliary_head is not None and index == self.config.reductions[1]:
                auxiliary_logits = self.auxiliary_head(s1)
        return self.classifier(s1.mean((2, 3))), auxiliary_logits


class Network(CellNetwork):
    """EBNAS's derived network; odd image sizes too."""

    config: ModelConfig

    @property
    def unit_settings(self) -> dict[str, Any]:
        return {"bits": self.config.bits, "activation": self.config.activation}

    def imagenet_stems(self, channels: int) -> tuple[list[nn.Module], list[nn.Module]]:
        first, second, third = imagenet_convolutions(channels)
        return [*first, nn.ReLU(), *second, nn.ReLU()], [*third, nn.ReLU()]

    def preprocess(self, c_in: int, channels: int) -> nn.Module:
        return BinaryUnit(c_in, channels, 1, **self.unit_settings)

    def reduce(self, c_in: int, channels: int) -> nn.Module:
        return FactorizedReduce(c_in, channels, **self.unit_settings)

    def operation(self, name: str, channels: int, stride: int) -> nn.Module:
        return make_operation(name, channels, stride, groups=self.config.groups, **self.unit_settings)


def build_model(config: Any) -> nn.Module:
    """The network of a configuration, freshly initialised from torch's global random state, on the CPU.

    Its modules are the definitions; `kernels.accelerate` makes them fast."""
    return config.build()


def float_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The BN statistics of `model`, by name: what changes in training without gradients, and is kept."""
    held = model.state_dict()
    return {name: b for name, b in model.named_buffers() if name in held and b.is_floating_point()}
