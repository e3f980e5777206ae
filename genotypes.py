"""Genotypes: what a search finds, and what a derived network is built from.

A genotype says, for each of the two cell types, which two (operation, input state) pairs feed each of the
four nodes. States 0 and 1 are the outputs of the two cells before (0 the older); state 2 + i is node i.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, NamedTuple

from utils import InputError, write_atomically

PRIMITIVES = (
    "skip_connect",
    "max_pool_3x3",
    "avg_pool_3x3",
    "bin_conv_3x3",
    "bin_conv_5x5",
    "bin_dil_conv_3x3",
    "bin_dil_conv_5x5",
)
"""The candidate operations, in the order of a row of alpha. `none` is left out, and separable convolutions
are replaced by binary ones: the search space made simple and suited to binary networks (EBNAS, section 3)."""

NODES = 4
"""Intermediate nodes of a cell. Node i may read states 0 .. 1 + i, and its own state is 2 + i."""

EDGES = tuple((node, source) for node in range(NODES) for source in range(2 + node))
"""The 14 edges of a cell as (node, input state), node by node: a row of alpha each."""


def reduction_cells(layers: int) -> tuple[int, int]:
    """The indices, of `layers` cells, of the two that halve the size and double the channels."""
    return layers // 3, 2 * layers // 3


class Genotype(NamedTuple):
    """Two (operation, input state) pairs per node, node by node, and the states a cell concatenates."""

    normal: tuple[tuple[str, int], ...]
    normal_concat: tuple[int, ...]
    reduce: tuple[tuple[str, int], ...]
    reduce_concat: tuple[int, ...]


GENOTYPES = {
    "EBNAS": Genotype(
        normal=(
            ("bin_conv_3x3", 0),
            ("max_pool_3x3", 1),
            ("max_pool_3x3", 0),
            ("max_pool_3x3", 1),
            ("bin_conv_3x3", 1),
            ("bin_conv_5x5", 0),
            ("max_pool_3x3", 0),
            ("bin_dil_conv_3x3", 1),
        ),
        normal_concat=(2, 3, 4, 5),
        reduce=(
            ("bin_conv_5x5", 0),
            ("bin_conv_5x5", 1),
            ("bin_conv_3x3", 1),
            ("bin_dil_conv_5x5", 2),
            ("bin_dil_conv_5x5", 2),
            ("bin_conv_3x3", 1),
            ("max_pool_3x3", 0),
            ("bin_conv_3x3", 1),
        ),
        reduce_concat=(2, 3, 4, 5),
    ),
}
"""The named genotypes. `EBNAS` is the cell published with the paper."""


RANDOM = "random:"
"""`random:SEED` names the genotype that `random_genotype(SEED)` draws."""


def random_genotype(seed: int) -> Genotype:
    """A uniform draw from what a search can derive: for each node two different inputs, in either order, and
    for each of these any operation."""
    draw = random.Random(seed)

    def cell() -> tuple[tuple[str, int], ...]:
        return tuple(
            (draw.choice(PRIMITIVES), source)
            for node in range(NODES)
            for source in draw.sample(range(2 + node), 2)
        )

    concat = tuple(range(2, 2 + NODES))
    return Genotype(cell(), concat, cell(), concat)


def get_genotype(name: str) -> Genotype:
    """The genotype registered as `name`, a random one (`random:SEED`), or that in the JSON file or search run
    folder of that path.

    Raises InputError: unknown name (the known ones are listed), or a file that holds no valid genotype.
    """
    if name in GENOTYPES:
        return GENOTYPES[name]
    if name.startswith(RANDOM):
        seed = name.removeprefix(RANDOM)
        if not seed.isdecimal():
            raise InputError(f"genotype {name!r}: {RANDOM} takes a seed, a whole number from 0")
        return random_genotype(int(seed))
    path = Path(name)
    if path.is_dir():
        path = path / "genotype.json"
        if not path.is_file():
            raise InputError(f"no genotype.json in {name}: give the folder of a search run")
    if not path.is_file():
        known = ", ".join(sorted(GENOTYPES))
        raise InputError(
            f"unknown genotype {name!r}: choose from {known}, or give {RANDOM}SEED, a genotype file or a "
            "search's folder"
        )
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"genotype file {path} is not JSON: {error}") from None
    return genotype_from_dict(fields, origin=str(path))


def genotype_from_dict(fields: Any, *, origin: str = "genotype") -> Genotype:
    """A validated Genotype from its JSON form; keys beyond the four fields are ignored.

    Raises InputError that names the field: one is missing, not of its type, an unknown operation, an input
    state that does not exist where it is read, or a wrong number of pairs.
    """
    if not isinstance(fields, dict):
        raise InputError(
            f"{origin}: a genotype is a JSON object with the fields {', '.join(Genotype._fields)}"
        )
    for field in Genotype._fields:
        if field not in fields:
            raise InputError(f"{origin}: field {field!r} is missing")
    cells: dict[str, Any] = {}
    for kind in ("normal", "reduce"):
        cells[kind] = _checked_pairs(fields[kind], f"{origin}: field {kind!r}")
        cells[f"{kind}_concat"] = _checked_concat(
            fields[f"{kind}_concat"], f"{origin}: field '{kind}_concat'"
        )
    return Genotype(**cells)


def genotype_to_dict(genotype: Genotype) -> dict[str, list]:
    """The JSON form: lists only, so that it survives a round trip unchanged."""
    return json.loads(json.dumps(genotype._asdict()))


def save_genotype(path: Path, genotype: Genotype, **extra: Any) -> None:
    """Write `genotype` atomically as JSON, with `extra` (the search's settings, say) beside its fields."""
    write_atomically(path, json.dumps({**genotype_to_dict(genotype), **extra}, indent=1).encode())


def describe(genotype: Genotype) -> str:
    """Two lines a person can read: `normal bin_conv_3x3 0, max_pool_3x3 1 | ...`."""
    lines = []
    for kind in ("normal", "reduce"):
        pairs = [f"{operation} {source}" for operation, source in getattr(genotype, kind)]
        nodes = [", ".join(pairs[i : i + 2]) for i in range(0, len(pairs), 2)]
        lines.append(f"{kind} {' | '.join(nodes)}")
    return "\n".join(lines)


def _checked_pairs(pairs: Any, where: str) -> tuple[tuple[str, int], ...]:
    if not isinstance(pairs, list | tuple) or len(pairs) != 2 * NODES:
        raise InputError(f"{where} must list {2 * NODES} [operation, input] pairs, two for each node")
    for position, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"{where}[{position}] is {pair!r}, not an [operation, input] pair")
        operation, source = pair
        if operation not in PRIMITIVES:
            raise InputError(
                f"{where}[{position}]: unknown operation {operation!r}; choose from {PRIMITIVES}"
            )
        states = 2 + position // 2
        if type(source) is not int or not 0 <= source < states:
            raise InputError(
                f"{where}[{position}]: node {position // 2} takes input {source!r}, which does not exist; "
                f"its inputs are 0 to {states - 1}"
            )
    return tuple((operation, source) for operation, source in pairs)


def _checked_concat(concat: Any, where: str) -> tuple[int, ...]:
    valid = range(2, 2 + NODES)
    if (
        not isinstance(concat, list | tuple)
        or not concat
        or any(type(state) is not int or state not in valid for state in concat)
        or len(set(concat)) != len(concat)
    ):
        raise InputError(f"{where} is {concat!r}; it must list different states of {list(valid)}")
    return tuple(concat)
