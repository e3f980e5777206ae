"""The settled flags of a run as values, by concern: which run, which images, which network, how it is
trained, how a step computes. They are made of the flags that a checkpoint keeps, and so can be made again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields, is_dataclass
from typing import Any, TypeVar, get_type_hints

Value = TypeVar("Value")


@dataclass(frozen=True)
class RunSettings:
    """Which run it is, how long it is, and what it says and keeps on its way."""

    save: str
    note: str
    epochs: int
    seed: int
    report_freq: int
    save_freq: int
    workers: int


@dataclass(frozen=True)
class ImageSettings:
    """A set of images that fits in memory."""

    set: str
    data: str
    image_size: int
    train_images: int
    value_range: list[float] | None
    test_part: float
    cutout: bool
    cutout_length: int


@dataclass(frozen=True)
class TrainImages(ImageSettings):
    """With what train.py does to them, and how many it holds out of training to choose an epoch by."""

    mixup: bool
    alpha: float
    holdout: int
    family = "cifar"


@dataclass(frozen=True)
class SearchImages(ImageSettings):
    """Or folders of files, with ImageNet's stem, that do not: `tmp_data_dir`, where not `data`."""

    tmp_data_dir: str | None


@dataclass(frozen=True)
class ImageNetImages:
    """Folders of files. `holdout`: none, there are validation images."""

    tmp_data_dir: str | None
    image_size: int
    value_range: list[float] | None
    holdout = 0
    family = "imagenet"


@dataclass(frozen=True)
class NetworkSettings:
    """The network of a stage, and the weights that it starts from."""

    arch: str
    family: str | None
    variant: str | None
    init_channels: int
    layers: int
    groups: int
    auxiliary: bool
    weight_binarization: str
    activation: str
    binary: bool
    stage1: str
    pretrained: str | None
    from_scratch: bool


@dataclass(frozen=True)
class RecipeSettings:
    """How a network is trained, but for its epochs and batch."""

    recipe: str
    learning_rate: float
    learning_rate_min: float
    weight_decay: float
    stage1_weight_decay: float
    drop_path_prob: float
    label_smooth: float
    auxiliary_weight: float
    teacher: str | None
    teacher_weight: float
    teacher_temperature: float
    ema: float
    clip_weights: bool


@dataclass(frozen=True)
class ImageNetRecipe(RecipeSettings):
    warmup_epochs: int


@dataclass(frozen=True)
class SupernetSettings:
    init_channels: int
    layers: int
    k_normal: int
    k_reduce: int
    stem: str
    operations: list[str]


@dataclass(frozen=True)
class SearchRecipe:
    """How a search goes; `train_portion` of the images trains the weights."""

    train_portion: float
    learning_rate: float
    weight_decay: float
    arch_learning_rate: float
    arch_weight_decay: float
    arch_start_epoch: int
    path_reg_weight: float
    edge_reg_weight: float
    most_skips: int | None
    score_random: int


@dataclass(frozen=True)
class StepSettings:
    """How a step computes."""

    batch_size: int
    accumulate: int
    grad_clip: float
    precision: str
    tf32: bool
    cudnn_benchmark: bool
    memory_format: str
    kernels: str
    compile: bool
    compile_mode: str


@dataclass(frozen=True)
class TrainSettings:
    """The settings of train.py."""

    run: RunSettings
    images: TrainImages
    network: NetworkSettings
    recipe: RecipeSettings
    step: StepSettings


@dataclass(frozen=True)
class ImageNetSettings:
    """The settings of train_imagenet.py."""

    run: RunSettings
    images: ImageNetImages
    network: NetworkSettings
    recipe: ImageNetRecipe
    step: StepSettings


@dataclass(frozen=True)
class SearchSettings:
    """The settings of train_search.py."""

    run: RunSettings
    images: SearchImages
    network: SupernetSettings
    recipe: SearchRecipe
    step: StepSettings


StageSettings = TrainSettings | ImageNetSettings
Settings = TrainSettings | ImageNetSettings | SearchSettings


def settings_from(kind: type[Value], flags: Mapping[str, Any]) -> Value:
    """The value of `kind` whose fields, and those of the values in it, are flags by name."""
    types = get_type_hints(kind)
    return kind(
        **{
            field.name: settings_from(types[field.name], flags)
            if is_dataclass(types[field.name])
            else flags[field.name]
            for field in fields(kind)
        }
    )


def table(settings: Settings) -> Iterator[str]:
    """A line for each concern: what is set, and what is switched on."""
    for concern in fields(settings):
        values = vars(getattr(settings, concern.name)).items()
        words = [
            name if value is True else f"{name} {value}"
            for name, value in values
            if value is not False and value is not None and value != ""
        ]
        yield f"{concern.name}: {', '.join(words)}"
