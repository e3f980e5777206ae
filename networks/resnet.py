"""ResNet18 in full precision (He et al., Deep residual learning for image recognition, CVPR 2016)."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from flags.choices import FAMILIES
from utils import InputError, check_count


@dataclass(frozen=True)
class ResNetConfig:
    """All that a ResNet18 is built from; `init_channels` is the width of its first stage."""

    system: ClassVar[str] = "resnet"
    weight_bits: ClassVar[int] = 32
    activation_bits: ClassVar[int] = 32
    auxiliary: ClassVar[bool] = False
    counts_global_mean: ClassVar[bool] = False

    family: str = "cifar"
    init_channels: int = 64
    num_classes: int = 10

    def __post_init__(self):
        if self.family not in FAMILIES:
            raise InputError(f"unknown network family {self.family!r}; choose from {FAMILIES}")
        # below 8, torch's 1x1 convolution at stride 2 writes past its memory on a CPU, in channels-last order
        check_count("init_channels", self.init_channels, 8, 1_000_000)
        check_count("num_classes", self.num_classes, 1, 1_000_000)

    def check_image_size(self, size: int) -> None:
        """Any size will do."""

    def to_dict(self) -> dict[str, Any]:
        return {"system": self.system, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, fields: dict[str, Any]) -> ResNetConfig:
        return cls(**{name: value for name, value in fields.items() if name != "system"})

    def build(self) -> ResNet18:
        return ResNet18(self)


class ResNet18(nn.Module):
    """torchvision's resnet18, layer by layer and with its names: images (n, 3, h, w) -> logits, None.

    For CIFAR its first convolution is 3x3 at stride 1, and there is no max pool.
    """

    drop_path_prob = 0.0  # it has no paths to drop

    def __init__(self, config: ResNetConfig):
        from torchvision.models.resnet import BasicBlock  # takes a while, and export.py needs none

        super().__init__()
        self.config = config
        channels = width = config.init_channels
        if config.family == "cifar":
            self.conv1 = nn.Conv2d(3, width, 3, padding=1, bias=False)
            self.maxpool = nn.Identity()
        else:
            self.conv1 = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
            self.maxpool = nn.MaxPool2d(3, stride=2, padding=1)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU(inplace=True)
        for stage in range(4):
            width, stride, downsample = config.init_channels << stage, 1 if stage == 0 else 2, None
            if stride == 2:
                downsample = nn.Sequential(
                    nn.Conv2d(channels, width, 1, stride=2, bias=False), nn.BatchNorm2d(width)
                )
            blocks = BasicBlock(channels, width, stride, downsample), BasicBlock(width, width)
            setattr(self, f"layer{stage + 1}", nn.Sequential(*blocks))
            channels = width
        self.fc = nn.Linear(channels, config.num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        x = self.maxpool(self.relu(self.bn1(self.conv1(x))))
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(x.mean((2, 3))), None

    def register_update_rule(self, optimizer: torch.optim.Optimizer) -> None:
        """Nothing beyond autograd."""
