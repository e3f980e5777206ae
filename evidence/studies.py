"""The studies, and the scales that they run at."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from evidence.plan import Arm, BestOf, CellOf, FolderOf, Job, Study, held_out
from genotypes import GENOTYPES, Genotype, canonical

Flags = Mapping[str, Any]

ONE_STAGE = ("BNAS-C", "ResNet18")
"""Rows that train without a first stage: 1-bit from the start, and in full precision."""


@dataclass(frozen=True)
class Way:
    """A way to train a cell: `images` of the training set, those that are held out among them, for so many
    epochs; of W1A1 from scratch where `stage1_epochs` are 0, else after these."""

    images: int
    epochs: int
    stage1_epochs: int = 0


@dataclass(frozen=True)
class Instrument:
    """How a table of trained cells is made. `ways` are tried on `tried` cells, two seeds each, of which the
    second is left out where a name is in `once`; `long` is what they are measured by. The table has `cells`
    random cells, `twice` of them with two seeds, all trained in the way `chosen`."""

    ways: Mapping[str, Way]
    long: Way
    chosen: str
    tried: int = 12
    cells: int = 160
    twice: int = 40
    once: tuple[str, ...] = ()


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
    small_sets: Mapping[int, tuple[int, int]] = field(
        default_factory=lambda: {20: (200, 40), 100: (1_000, 16), 500: (5_000, 6)}
    )
    """By images a class, of ten: images, and epochs of each stage."""
    instrument: Instrument | None = None
    found: Mapping[str, Genotype] = field(default_factory=dict)
    """Cells that stand in the table beside the random ones, and have no name in genotypes.py."""


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
        small_sets=dict.fromkeys((20, 100, 500), (20, 1)),
        instrument=Instrument(
            ways={
                "many images": Way(200, 1),
                "many epochs": Way(100, 2),
                "both stages": Way(100, 1, stage1_epochs=1),
            },
            long=Way(200, 1, stage1_epochs=1),
            chosen="many epochs",
            tried=3,
            cells=4,
            twice=2,
            once=("both stages",),
        ),
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
    "medium": Scale(
        images={"set": "folder", "image_size": 32, "train_images": 50_000, "batch_size": 64, "workers": 0},
        search={"init_channels": 16, "layers": 8, "epochs": 50, "batch_size": 256},  # the published one
        # of C 84 and 14 groups, as published, a group has 6 channels too
        network={"init_channels": 12, "groups": 2, "layers": 5, "drop_path_prob": 0, "learning_rate": 3e-3}
        | {"holdout": 5_000},
        stage1_epochs=3,
        stage2_epochs=5,
        trial={"epochs": 1},
        candidates=8,
        searches=3,
        random_cells=10,
        published=3,
        seeds=3,
        ema=0.99,
        rows={},
        larger={},
        larger_epochs=(1, 1),
        # 45,000 images a run in all its epochs, and 8 times as many of the long training
        instrument=Instrument(
            ways={
                "many images": Way(50_000, 1),
                "many epochs": Way(16_250, 4),
                "both stages": Way(16_250, 3, stage1_epochs=1),
            },
            long=Way(50_000, 5, stage1_epochs=3),
            chosen="many epochs",
            once=("both stages",),
        ),
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


def way_job(scale: Scale, way: Way, seed: int, arch: Any) -> Job:
    scale = replace(scale, stage1_epochs=way.stage1_epochs, stage2_epochs=way.epochs)
    if way.stage1_epochs:
        return network_job(scale, seed, arch, train_images=way.images)
    return scratch_job(scale, seed, arch, train_images=way.images, epochs=way.epochs)


SECOND = 1_000
"""Cell `random:N` trains with seed N, and where it does so twice, with this much more; in the long training
with twice this more. So no two runs of a cell have a seed in common."""

NAMED_SEEDS = range(2_000, 2_003)
"""Of the cells that are not random."""

FIRST_CELL = 100
"""The table has other random cells than those that chose how it is made."""


def medium(scale: Scale) -> Study:
    """Which short training ranks cells as a long one does, and tells them apart: how the table is made."""
    plan = scale.instrument
    numbers = range(plan.tried)

    def arm_of(name: str, way: Way, more: int) -> Arm:
        jobs = {number: way_job(scale, way, number + more, f"random:{number}") for number in numbers}
        return Arm(name, jobs, held_out)

    arms = [replace(arm_of("long training", plan.long, 2 * SECOND), way="long training")]
    for more, which in ((0, "first"), (SECOND, "second")):
        for name, way in plan.ways.items():
            if not more or name not in plan.once:
                arms.append(replace(arm_of(f"{name}, {which} seed", way, more), way=name))
    question = "Which short training ranks cells as a long one does?"
    return Study("medium", question, tuple(arms), analysis="ways")


def cells(scale: Scale) -> Study:
    """The table: random cells; the published one and those that this program found, by their names."""
    plan = scale.instrument
    way = plan.ways[plan.chosen]
    numbers = range(FIRST_CELL, FIRST_CELL + plan.cells)

    def random(numbers: range, more: int) -> dict[int, Job]:
        return {n + more: way_job(scale, way, n + more, f"random:{n}") for n in numbers}

    arms = [
        Arm("random cells", random(numbers, 0)),
        Arm("random cells again", random(numbers[: plan.twice], SECOND)),
    ]
    for names, arch in named_cells(scale).items():
        arms.append(Arm(names, {seed: way_job(scale, way, seed, arch) for seed in NAMED_SEEDS}))
    return Study("cells", "How do random cells differ, and the named ones from them?", tuple(arms), "table")


def named_cells(scale: Scale) -> dict[str, Any]:
    """What --arch takes, by name: EBNAS's of genotypes.py, and those found. Names of one network under
    renaming are one, `A = B`."""
    named = {name: genotype for name, genotype in GENOTYPES.items() if name.startswith("EBNAS")}
    alike: dict[Genotype, list[str]] = {}
    for name, genotype in (named | dict(scale.found)).items():
        alike.setdefault(canonical(genotype), []).append(name)
    return {
        " = ".join(names): names[0] if names[0] in named else CellOf(scale.found[names[0]])
        for names in alike.values()
    }


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


def small_set(scale: Scale, *, each: int) -> Study:
    """A training set of `each` images a class, of ten; 100 or 200 more of all choose the epoch. The
    reference has the published batch, or one of the whole set where that is smaller."""
    n, epochs = scale.small_sets[each]
    held_out = min(200, n // 2)
    images = {**scale.images, "train_images": n + held_out}
    small = replace(
        scale,
        images=images,
        network={**scale.network, "holdout": held_out},
        stage1_epochs=epochs,
        stage2_epochs=epochs,
    )
    whole = min(256, n)
    variants: dict[str, Flags] = {f"batch {whole}": {"batch_size": whole}}
    smaller = (64, 16, 8) if each < 500 else (64, 16)
    variants |= {f"batch {size}": {"batch_size": size} for size in smaller if size < whole}
    variants["batch 16, cutout"] = {"batch_size": 16, "cutout": True, "cutout_length": 8}
    return Study(
        f"small_{each}",
        f"Which batch, and cutout or not, for {each} images a class?",
        tuple(
            arm(name, 2, lambda seed, flags=flags: network_job(small, seed, **flags))
            for name, flags in variants.items()
        ),
    )


STUDIES: dict[str, Callable[[Scale], Study]] = {
    **{
        study.__name__: study
        for study in (resolution, search, regularisers, stages, rows, beyond, sampling, ranking, transfer)
    },
    **{f"small_{each}": partial(small_set, each=each) for each in (20, 100, 500)},
}
"""In the order in which they are worth running."""

INSTRUMENTS: dict[str, Callable[[Scale], Study]] = {study.__name__: study for study in (medium, cells)}
"""A table of trained cells: how it is made, and the table."""
