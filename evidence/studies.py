"""The studies, and the scales that they run at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from evidence.plan import Arm, BestOf, FolderOf, Job, Study

Flags = Mapping[str, Any]

ONE_STAGE = ("BNAS-C", "ResNet18")
"""Rows that train without a first stage: 1-bit from the start, and in full precision."""


@dataclass(frozen=True)
class Scale:
    """Sizes, epochs and numbers of runs. `images` are flags of all scripts, `network` of both stages.

    `candidates` random cells, each trained with `trial`, are to cost about what a search does: the table has
    the minutes of both. `larger`: what the larger task of `transfer` has other than these, with
    `larger_epochs` of each stage.
    """

    images: Flags
    search: Flags
    network: Flags
    stage1_epochs: int
    stage2_epochs: int
    trial: Flags
    candidates: int
    searches: int
    random_cells: int
    published: int
    seeds: int
    ema: float
    rows: Mapping[str, Mapping[str, Flags]]
    larger: Flags
    larger_epochs: tuple[int, int]


SMALL_IMAGES = {"set": "folder", "image_size": 16, "train_images": 10_000, "batch_size": 64, "workers": 1}

SCALES = {
    "tiny": Scale(
        images={"set": "shapes", "image_size": 16, "train_images": 200, "batch_size": 20, "workers": 0},
        search={"init_channels": 8, "layers": 3, "epochs": 2},
        network={"init_channels": 4, "groups": 2, "layers": 3, "drop_path_prob": 0, "holdout": 50},
        stage1_epochs=1,
        stage2_epochs=1,
        trial={"epochs": 1},
        candidates=2,
        searches=2,
        random_cells=3,
        published=2,
        seeds=2,
        ema=0.9,
        rows={"parameters": {"BNAS-C": {"init_channels": 4, "groups": None}}},
        larger={"image_size": 32},
        larger_epochs=(1, 1),
    ),
    "small": Scale(
        images=SMALL_IMAGES,
        # 316 architecture steps, where the published search takes 2,450: larger ones
        search={"init_channels": 8, "layers": 5, "epochs": 8, "learning_rate": 3e-3}
        | {"arch_learning_rate": 5e-3},
        network={"init_channels": 14, "layers": 5, "drop_path_prob": 0, "learning_rate": 3e-3}
        | {"holdout": 2_000},
        stage1_epochs=2,
        stage2_epochs=4,
        trial={"epochs": 2},
        candidates=3,
        searches=5,
        random_cells=10,
        published=5,
        seeds=3,
        ema=0.99,
        # EBNAS: 102 k parameters, 0.98 M OPs. BATS's width jumps, and ResNet18's least is 8 (176 k, 2.26 M)
        rows={
            "parameters": {
                "BNAS-C": {"init_channels": 8},
                "BATS": {"init_channels": 12, "groups": 12},
                "DCP-NAS-L": {"init_channels": 12},
                "ResNet18": {"init_channels": 8, "layers": None, "drop_path_prob": None},
            },
            "OPs": {
                "BNAS-C": {"init_channels": 6},
                "BATS": {"init_channels": 16, "groups": 16},
                "DCP-NAS-L": {"init_channels": 4},
            },
        },
        larger={"image_size": 32, "train_images": None},
        larger_epochs=(1, 3),
    ),
    "full": Scale(  # the published settings
        images={"set": "cifar10"},
        search={"epochs": 50},
        network={"auxiliary": True, "cutout": True, "holdout": 5_000},
        stage1_epochs=600,
        stage2_epochs=600,
        trial={"init_channels": 28, "layers": 8, "epochs": 4, "auxiliary": False},
        candidates=8,
        searches=5,
        random_cells=10,
        published=5,
        seeds=3,
        ema=0.9999,
        # EBNAS: 10.0 M parameters, 6.88e7 OPs
        rows={
            "parameters": {
                "BNAS-C": {"init_channels": 52, "auxiliary": None},
                "BATS": {"init_channels": 60},
                "DCP-NAS-L": {"init_channels": 96, "auxiliary": None},
                "ResNet18": {"init_channels": 60, "auxiliary": None},
            },
            "OPs": {
                "BNAS-C": {"init_channels": 26, "auxiliary": None},
                "BATS": {"init_channels": 72},
                "DCP-NAS-L": {"init_channels": 22, "auxiliary": None},
                "ResNet18": {"init_channels": 22, "auxiliary": None},
            },
        },
        larger={"set": "cifar100"},
        larger_epochs=(600, 600),
    ),
}


def search_job(scale: Scale, seed: int, **flags: Any) -> Job:
    return Job("train_search.py", {**scale.images, **scale.search, "seed": seed, **flags})


def network_job(scale: Scale, seed: int, arch: Any = "EBNAS", **flags: Any) -> Job:
    """Both stages of a network, with `flags` in both."""
    both = {**scale.images, **scale.network, "seed": seed, "arch": arch, **flags}
    first = Job("train.py", {**both, "epochs": scale.stage1_epochs})
    return Job(
        "train.py", {**both, "epochs": scale.stage2_epochs, "binary": True, "pretrained": FolderOf(first)}
    )


def scratch_job(scale: Scale, seed: int, arch: Any = "EBNAS", **flags: Any) -> Job:
    """A W1A1 network without a stage 1."""
    both = {**scale.images, **scale.network, "seed": seed, "arch": arch}
    return Job("train.py", {**both, "binary": True, "from_scratch": True, **flags})


def searched_job(scale: Scale, seed: int, **flags: Any) -> Job:
    """A search, and the network of the cell that it finds."""
    return network_job(scale, seed, FolderOf(search_job(scale, seed, **flags)))


def arm(name: str, n: int, job: Callable[[int], Job]) -> Arm:
    return Arm(name, {seed: job(seed) for seed in range(n)})


def searched_arms(scale: Scale, variants: Mapping[str, Flags]) -> tuple[Arm, ...]:
    """Arms by name, whose searches have these flags."""
    return tuple(
        arm(name, scale.seeds, lambda seed, flags=flags: searched_job(scale, seed, **flags))
        for name, flags in variants.items()
    )


def resolution(scale: Scale) -> Study:
    """Each cell with two seeds, the second of which is the next cell's first; its first run is the one of the
    random arm of `search`."""
    cells = [
        Arm(f"cell {i}", {seed: network_job(scale, seed, f"random:{i}") for seed in (i, i + 1)})
        for i in range(min(6, scale.random_cells))
    ]
    question = "Can this scale tell cells apart: do random cells differ by more than seeds do?"
    return Study("resolution", question, tuple(cells), analysis="spread")


def ranking(scale: Scale) -> Study:
    """The random cells of `search`; the same ones after a trial as its candidates have; and as what supernets
    are cut down to, with their weights: one that never had an architecture step, and one after its search."""
    cells = scale.random_cells

    def supernet(name: str, **flags: Any) -> Arm:
        job = search_job(scale, 0, score_random=cells, **flags)
        return Arm(name, dict.fromkeys(range(cells), job), lambda figures, i: figures["random_cells"][i])

    return Study(
        "ranking",
        "Does a short training, or a supernet, rank random cells as a long training does?",
        (
            arm("long training", cells, lambda i: network_job(scale, i, f"random:{i}")),
            arm("trial", cells, lambda i: scratch_job(scale, i, f"random:{i}", **scale.trial)),
            supernet("in a supernet before its search", arch_start_epoch=scale.search["epochs"]),
            supernet("in a supernet after its search"),
        ),
        analysis="ranks",
    )


def search(scale: Scale) -> Study:
    """The images that choose an epoch are among those that a search has seen, and no other arm's cell has:
    the test images are seen by none."""

    def best_of_random(seed: int) -> Job:
        numbers = range(1_000 + seed * scale.candidates, 1_000 + (seed + 1) * scale.candidates)
        trials = (scratch_job(scale, seed, f"random:{number}", **scale.trial) for number in numbers)
        return network_job(scale, seed, BestOf(tuple(trials)))

    return Study(
        "search",
        "Does the search find better cells than chance?",
        (
            arm("random", scale.random_cells, lambda i: network_job(scale, i, f"random:{i}")),
            arm("searched", scale.searches, lambda seed: searched_job(scale, seed)),
            arm("published", scale.published, lambda seed: network_job(scale, seed)),
            arm(f"best of {scale.candidates} random", scale.searches, best_of_random),
        ),
        paired=False,
    )


def regularisers(scale: Scale) -> Study:
    none = {"path_reg_weight": 0, "edge_reg_weight": 0}
    variants = {
        "both": {},
        "without path": {"path_reg_weight": 0},
        "without edge": {"edge_reg_weight": 0},
        "without both": none,
    }
    return Study(
        "regularisers",
        "What do the path and the edge regularisation bring?",
        searched_arms(scale, variants),
    )


def sampling(scale: Scale) -> Study:
    variants = {"k 8 and 4": {}, "k 4 and 4": {"k_normal": 4}, "k 8 and 8": {"k_reduce": 8}}
    return Study(
        "sampling",
        "Does sampling 1 in 8 channels in normal and 1 in 4 in reduction cells balance the operations?",
        searched_arms(scale, variants),
    )


def stages(scale: Scale) -> Study:
    epochs = scale.stage1_epochs + scale.stage2_epochs
    balanced, w32a1 = {"weight_binarization": "balanced"}, {"stage1": "w32a1"}
    return Study(
        "stages",
        "What does the first stage bring, at equal epochs in all, and which one?",
        (
            arm("W1A32, then W1A1", scale.seeds, lambda seed: network_job(scale, seed)),
            arm("W1A1 from scratch", scale.seeds, lambda seed: scratch_job(scale, seed, epochs=epochs)),
            arm("W32A1, then W1A1", scale.seeds, lambda seed: network_job(scale, seed, **w32a1)),
            arm("balanced weights", scale.seeds, lambda seed: network_job(scale, seed, **balanced)),
        ),
    )


def beyond(scale: Scale) -> Study:
    """What trains 1-bit networks better elsewhere in the field. The teacher is the same network in float,
    trained for as many epochs before: beside it stands what training for twice the epochs brings, without
    a teacher and with that one."""
    longer = replace(scale, stage1_epochs=2 * scale.stage1_epochs, stage2_epochs=2 * scale.stage2_epochs)

    def taught(seed: int) -> Flags:
        epochs = scale.stage1_epochs + scale.stage2_epochs
        both = {**scale.images, **scale.network, "seed": seed, "arch": "EBNAS"}
        return {"teacher": FolderOf(Job("train.py", {**both, "stage1": "w32a32", "epochs": epochs}))}

    single: dict[str, Callable[[int], Flags]] = {
        "RPReLU": lambda _: {"activation": "rprelu"},
        "teacher": taught,
        "decay in stage 1": lambda _: {"stage1_weight_decay": 1e-5},  # ReActNet's
        "moving average": lambda _: {"ema": scale.ema},
        "clipped weights": lambda _: {"clip_weights": True},
    }

    def together(seed: int) -> Flags:
        return {name: value for flags in single.values() for name, value in flags(seed).items()}

    return Study(
        "beyond",
        "Which of the field's ways to train 1-bit networks help these?",
        (
            *(
                arm(name, scale.seeds, lambda seed, flags=flags: network_job(scale, seed, **flags(seed)))
                for name, flags in {"EBNAS": lambda _: {}, **single, "all of them": together}.items()
            ),
            arm("twice the epochs", scale.seeds, lambda seed: network_job(longer, seed)),
            arm("twice, with a teacher", scale.seeds, lambda seed: network_job(longer, seed, **taught(seed))),
        ),
    )


def rows(scale: Scale) -> Study:
    """The systems of the tables that have a CIFAR form, under one recipe, near EBNAS's number of parameters
    and near its OPs; each with the stages that it has, at equal epochs in all."""

    def job(row: str, seed: int, size: Flags) -> Job:
        if row in ONE_STAGE:
            epochs = scale.stage1_epochs + scale.stage2_epochs
            flags = {**scale.images, **scale.network, "seed": seed, "arch": row, "epochs": epochs}
            return Job("train.py", {**flags, **size})
        return network_job(scale, seed, row, **size)

    return Study(
        "rows",
        "How do the systems of the tables compare, under one recipe and at one size?",
        (
            arm("EBNAS", scale.seeds, lambda seed: network_job(scale, seed)),
            *(
                arm(f"{row}, near {what}", scale.seeds, lambda seed, row=row, size=size: job(row, seed, size))
                for what, sizes in scale.rows.items()
                for row, size in sizes.items()
            ),
        ),
    )


def transfer(scale: Scale) -> Study:
    """One seed. Of the searches' cells the one whose network did best on its held-out images, which are other
    images for each seed: a standard error of about a point at the small scale."""
    found = BestOf(tuple(searched_job(scale, seed) for seed in range(scale.searches)))
    stage1, stage2 = scale.larger_epochs
    images = {**scale.images, **scale.larger}
    larger = replace(scale, images=images, stage1_epochs=stage1, stage2_epochs=stage2)
    return Study(
        "transfer",
        "Does the best cell found keep up with the published one on a larger task?",
        (
            arm("published", 1, lambda seed: network_job(larger, seed)),
            arm("best found", 1, lambda seed: network_job(larger, seed, found)),
        ),
    )


STUDIES: dict[str, Callable[[Scale], Study]] = {
    study.__name__: study
    for study in (resolution, search, regularisers, stages, rows, beyond, sampling, ranking, transfer)
}
"""In the order in which they are worth running."""
