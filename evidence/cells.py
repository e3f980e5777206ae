"""A table of trained 1-bit cells: what a search would find out by training, looked up. No torch.

    from evidence.cells import Table
    table = Table()                                  # results/cells/rows.jsonl
    trained = table.query("random:100", epochs=2)    # or a Genotype
    print(trained.valid_top1, trained.cpu_seconds)

A row is one run: a cell, trained once with one seed. results/cells/README.md says what each field is.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from genotypes import (
    NODES,
    RANDOM,
    Genotype,
    canonical,
    genotype_from_dict,
    genotype_to_dict,
    get_genotype,
)
from utils import InputError, write_atomically

if TYPE_CHECKING:
    from evidence.plan import Study

ROWS = "rows.jsonl"
DEFAULT = Path(__file__).parent.parent / "results" / "cells" / ROWS

CURVES = ("train_loss", "valid_loss", "valid_top1", "cpu_seconds")
"""Fields of a row that hold a number of each epoch."""


@dataclass(frozen=True)
class Trained:
    """What is known of a cell after some epochs of one run. Losses in nats an image; accuracies in percent,
    `valid_top1` of held-out training images. `test_top1` is known after the last epoch only, and is of the
    epoch that was best on the held-out images. `images`, `cpu_seconds`: what it has cost so far."""

    epochs: int
    train_losses: tuple[float, ...]
    valid_loss: float
    valid_top1: float
    test_top1: float | None
    images: int
    cpu_seconds: float


class Table:
    """The rows of a file, or of `Table.of(rows)`.

    `cells` are the different cells, each in canonical form; `random` those of them that were drawn at random.
    """

    def __init__(self, path: Path | str | None = None):
        """Read a file of rows, by default the one that comes with this program. Raises InputError where there
        is no such file, or where a line is no row (it says which)."""
        path = Path(path or DEFAULT)
        try:
            lines = path.read_text().splitlines()
        except OSError as error:
            raise InputError(
                f"no table of cells: {path}: {error.strerror}; make it: study.py cells"
            ) from None
        rows = []
        for number, line in enumerate(lines, 1):
            try:
                rows.append(_checked(json.loads(line)))
            except (LookupError, TypeError, ValueError, InputError) as error:
                raise InputError(f"{path}, line {number}: not a row of the table: {error}") from None
        self._set(rows)

    @classmethod
    def of(cls, rows: Iterable[Mapping[str, Any]]) -> Table:
        """Raises LookupError, TypeError, ValueError or InputError on what is no row."""
        table = cls.__new__(cls)
        table._set([_checked(row) for row in rows])
        return table

    def _set(self, rows: list[dict[str, Any]]) -> None:
        if not rows:
            raise InputError("a table without a row")
        self.rows = rows
        self.runs: dict[Genotype, list[dict[str, Any]]] = defaultdict(list)
        for row in rows:
            self.runs[canonical(genotype_from_dict(row["genotype"]))].append(row)
        self.runs = {cell: sorted(runs, key=lambda row: row["seed"]) for cell, runs in self.runs.items()}
        self.epochs = min(len(row["valid_top1"]) for row in rows)

    @property
    def cells(self) -> list[Genotype]:
        return list(self.runs)

    @cached_property
    def random(self) -> list[Genotype]:
        return [cell for cell, runs in self.runs.items() if any(row["random"] for row in runs)]

    @property
    def named(self) -> dict[str, Genotype]:
        """By name the cells that are not random."""
        return {row["cell"]: cell for cell, runs in self.runs.items() for row in runs if not row["random"]}

    def find(self, cell: Genotype | str) -> Genotype:
        """The canonical form of a cell of the table, of a genotype or of its name there. Raises KeyError."""
        if isinstance(cell, str):
            if cell in self.named:
                return self.named[cell]
            try:
                cell = get_genotype(cell)
            except InputError:
                raise KeyError(cell) from None
        if (form := canonical(cell)) not in self.runs:
            raise KeyError(f"the table does not have {cell}")
        return form

    def query(self, cell: Genotype | str, epochs: int | None = None, *, run: int = 0) -> Trained:
        """What is known of `cell` after `epochs`, by default all, in its run number `run`, by seed.

        Raises KeyError where the table does not have the cell, IndexError where it has no such run,
        ValueError where a run is not that long.
        """
        row = self.runs[self.find(cell)][run]
        last = len(row["valid_top1"])
        epochs = last if epochs is None else epochs
        if not 1 <= epochs <= last:
            raise ValueError(f"{epochs} epochs of a run of {last}")
        return Trained(
            epochs=epochs,
            train_losses=tuple(row["train_loss"][:epochs]),
            valid_loss=row["valid_loss"][epochs - 1],
            valid_top1=row["valid_top1"][epochs - 1],
            test_top1=row["test_top1"] if epochs == last else None,
            images=epochs * row["images"],
            cpu_seconds=sum(row["cpu_seconds"][:epochs]),
        )

    def test_top1(self, cell: Genotype | str) -> float:
        """The mean test accuracy over a cell's runs. It measures a search, which may not look at it. Raises
        KeyError."""
        runs = self.runs[self.find(cell)]
        return sum(row["test_top1"] for row in runs) / len(runs)

    def nearest(self, cell: Genotype, among: Sequence[Genotype] | None = None) -> Genotype:
        """The random cell of the table, or of those `among` them, that differs from `cell` in the fewest
        edges; the first on a tie. With it a search over all cells can go on in a table of some."""
        return min(self.random if among is None else among, key=lambda other: distance(cell, other))


def distance(a: Genotype, b: Genotype) -> int:
    """How many of the 16 edges (node, operation, input) of one the other has not, both in canonical form."""
    return 4 * NODES - (_edges(a) & _edges(b)).total()


@lru_cache(100_000)
def _edges(cell: Genotype) -> Counter:
    cell = canonical(cell)
    return Counter(
        (kind, edge // 2, pair)
        for kind in ("normal", "reduce")
        for edge, pair in enumerate(getattr(cell, kind))
    )


def rows_of(study: Study, content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The rows of the finished runs of the study `cells`; of both stages where there are two."""
    rows = []
    records = content["jobs"]
    for arm in study.arms:
        for seed, job in arm.jobs.items():
            if job.key not in records or any(each.key not in records for each in job.chain):
                continue
            chain = [records[each.key] for each in job.chain]
            last = chain[-1]
            arch = last["flags"]["arch"]
            random = isinstance(arch, str) and arch.startswith(RANDOM)
            curves = {name: [n for record in chain for n in record["curve"][name]] for name in CURVES}
            rows.append(
                {
                    "cell": arch if random else arm.name,
                    "random": random,
                    "seed": seed,
                    "genotype": genotype_to_dict(canonical(genotype_from_dict(last["genotype"]))),
                    **curves,
                    "stage1_epochs": sum(len(record["curve"]["train_loss"]) for record in chain[:-1]),
                    "images": last["flags"]["train_images"] - last["flags"]["holdout"],
                    "test_top1": last["figures"]["test"]["top1"],
                    "test_epoch": last["figures"]["best"]["epoch"],
                    "parameters": last["cost"]["parameters"],
                    "ops": last["cost"]["ops"],
                    "packed_bytes": last["cost"]["packed_bytes"],
                    "commit": last["commit"],
                    "machine": {name: last["machine"][name] for name in ("device", "torch", "python")},
                }
            )
    return rows


def write_rows(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, "".join(json.dumps(row) + "\n" for row in rows).encode())


def _checked(row: Mapping[str, Any]) -> dict[str, Any]:
    """Raises LookupError, TypeError, ValueError or InputError."""
    genotype_from_dict(row["genotype"])
    lengths = {len(row[name]) for name in CURVES}
    if len(lengths) != 1 or 0 in lengths:
        raise ValueError(f"{', '.join(CURVES)} are of different epochs, or of none")
    numbers = [row[name] for name in ("seed", "images", "test_top1", "parameters", "ops", "packed_bytes")]
    for number in (*numbers, *(n for name in CURVES for n in row[name])):
        if type(number) not in (int, float):
            raise ValueError(f"{number!r} is not a number")
    if type(row["random"]) is not bool or not isinstance(row["cell"], str):
        raise ValueError("cell is not a name, or random is neither true nor false")
    return dict(row)
