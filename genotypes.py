"""Genotypes: what a search finds, and what a derived network is built from.

A genotype says, for each of the two cell types, which two (operation, input state) pairs feed each of the
four nodes. States 0 and 1 are the outputs of the two cells before (0 the older); state 2 + i is node i.
"""

from __future__ import annotations

import json
import random
import re
from itertools import permutations
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

OPERATIONS = {
    "ebnas": PRIMITIVES,
    "bnas": ("none", *PRIMITIVES[1:]),
    "bats": (
        *("none", *PRIMITIVES[:3], "sep_conv_3x3", "sep_conv_5x5", "sep_conv_7x7"),
        *("dil_conv_3x3", "dil_conv_5x5"),
    ),
    "dcp": (*PRIMITIVES[:3], "sep_conv_3x3", "sep_conv_5x5", "dil_conv_3x3", "dil_conv_5x5"),
}
"""What each system's cells are made of, by their own names. A `sep_conv` of BATS is one grouped convolution,
of DCP-NAS two depthwise separable ones."""

EVERY_OPERATION = tuple(dict.fromkeys(name for names in OPERATIONS.values() for name in names))

CONVOLUTION_PREFIXES = {  # (plain, dilated)
    "ebnas": ("bin_conv", "bin_dil_conv"),
    "bnas": ("bin_conv", "bin_dil_conv"),
    "bats": ("sep_conv", "dil_conv"),
    "dcp": ("sep_conv", "dil_conv"),
}
"""What the systems call their plain and their dilated convolutions."""

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


def _cell_pairs(text: str) -> tuple[tuple[str, int], ...]:
    """`conv 1, max 0 | ...` as `describe` prints it -> pairs."""
    return tuple((name, int(source)) for name, source in (pair.split() for pair in re.split(r"[,|]", text)))


def _genotype(normal: str, reduce: str) -> Genotype:
    every = tuple(range(2, 2 + NODES))
    return Genotype(_cell_pairs(normal), every, _cell_pairs(reduce), every)


BNAS_ZEROISE = _genotype(
    "none 1, bin_dil_conv_3x3 0 | bin_conv_3x3 1, none 2 | none 2, none 3 | none 3, none 4",
    "max_pool_3x3 0, none 1 | max_pool_3x3 0, none 2 | none 3, none 2 | none 3, none 4",
)
"""`latest_cell_zeroise` of BNAS's code, of its networks A and C: half of the nodes are zero."""

BNAS_LATEST = _genotype(
    "bin_conv_3x3 1, bin_dil_conv_3x3 0 | bin_conv_3x3 1, bin_conv_3x3 2 | "
    "bin_conv_3x3 2, bin_dil_conv_3x3 1 | bin_dil_conv_3x3 1, bin_conv_3x3 0",
    "max_pool_3x3 0, max_pool_3x3 1 | max_pool_3x3 0, bin_conv_3x3 2 | max_pool_3x3 0, bin_dil_conv_3x3 3 | "
    "max_pool_3x3 0, bin_dil_conv_3x3 4",
)
"""`latest_cell` of BNAS's code, of its networks D to H."""

BATS_SECOND_HAND = _genotype(
    "sep_conv_5x5 0, dil_conv_5x5 1 | max_pool_3x3 0, max_pool_3x3 2 | sep_conv_5x5 0, dil_conv_5x5 2 | "
    "sep_conv_3x3 0, dil_conv_5x5 1",
    "max_pool_3x3 0, sep_conv_3x3 1 | sep_conv_5x5 0, avg_pool_3x3 1 | sep_conv_5x5 1, max_pool_3x3 3 | "
    "sep_conv_5x5 0, sep_conv_5x5 1",
)
"""A third party's reading of the cell in BATS's paper; BATS's own code has none."""

DCP_NAS_L = _genotype(
    "sep_conv_5x5 1, max_pool_3x3 0 | dil_conv_3x3 2, skip_connect 0 | sep_conv_3x3 3, avg_pool_3x3 1 | "
    "dil_conv_3x3 4, avg_pool_3x3 3",
    "max_pool_3x3 0, sep_conv_3x3 1 | dil_conv_3x3 1, sep_conv_3x3 0 | max_pool_3x3 1, dil_conv_5x5 2 | "
    "dil_conv_5x5 2, sep_conv_5x5 1",
)
"""`DDPNAS_MCN_2` of DCP-NAS's code."""

GENOTYPES = {
    "EBNAS": _genotype(
        "bin_conv_3x3 0, max_pool_3x3 1 | max_pool_3x3 0, max_pool_3x3 1 | bin_conv_3x3 1, bin_conv_5x5 0 | "
        "max_pool_3x3 0, bin_dil_conv_3x3 1",
        "bin_conv_5x5 0, bin_conv_5x5 1 | bin_conv_3x3 1, bin_dil_conv_5x5 2 | bin_dil_conv_5x5 2, "
        "bin_conv_3x3 1 | max_pool_3x3 0, bin_conv_3x3 1",
    ),
    "BNAS-A": BNAS_ZEROISE,
    "BNAS-C": BNAS_ZEROISE,
    "BNAS-D": BNAS_LATEST,
    "BNAS-E": BNAS_LATEST,
    "BNAS-F": BNAS_LATEST,
    "BNAS-G": BNAS_LATEST,
    "BNAS-H": BNAS_LATEST,
    "BATS": BATS_SECOND_HAND,
    "BATS-2x": BATS_SECOND_HAND,
    "DCP-NAS-L": DCP_NAS_L,
}
"""The named genotypes, in the order in which messages list them. `EBNAS` is the cell published with the
paper, the others are those of its baselines (docs/rows.md)."""


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


def canonical(genotype: Genotype) -> Genotype:
    """The one form of all genotypes that make the same network under renaming.

    A node sums its two inputs, so their order does not matter. Nor does the order in which a cell lists its
    nodes, as long as each reads only states before it: what follows a cell convolves all its channels by 1x1,
    or classifies them, and takes them in any order. Of all these forms this is the first in sorting order.
    """
    cells = {}
    for kind in ("normal", "reduce"):
        pairs, concat = getattr(genotype, kind), getattr(genotype, f"{kind}_concat")
        forms = []
        for order in permutations(range(NODES)):  # order[i]: which node becomes node i
            names = {0: 0, 1: 1, **{2 + old: 2 + new for new, old in enumerate(order)}}
            nodes = [sorted((names[s], op) for op, s in pairs[2 * old : 2 * old + 2]) for old in order]
            if all(source < 2 + node for node, inputs in enumerate(nodes) for source, _ in inputs):
                forms.append((nodes, sorted(names[state] for state in concat)))
        nodes, states = min(forms)
        cells[kind] = tuple((operation, source) for inputs in nodes for source, operation in inputs)
        cells[f"{kind}_concat"] = tuple(states)
    return Genotype(**cells)


def get_genotype(name: str, system: str | None = None, *, known: tuple[str, ...] = PRIMITIVES) -> Genotype:
    """The genotype registered as `name`, a random one (`random:SEED`), or that in the JSON file or search run
    folder of that path, of the operations `known`.

    For a `system` it may be any system's, and its convolutions are renamed to that system's.
    Raises InputError: unknown name (the known ones are listed), a file that holds no valid genotype, or an
    operation that the system does not have.
    """
    if system is not None:
        return translated(get_genotype(name, known=EVERY_OPERATION), system, origin=name)
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
        raise InputError(
            f"unknown genotype {name!r}: choose from {', '.join(GENOTYPES)}, or give {RANDOM}SEED, a "
            "genotype file or a search's folder"
        )
    try:
        fields = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"genotype file {path} is not JSON: {error}") from None
    return genotype_from_dict(fields, origin=str(path), known=known)


def translated(genotype: Genotype, system: str, *, origin: str = "genotype") -> Genotype:
    """`genotype` with plain and dilated convolutions called as `system` calls them: `sep_conv_3x3` of BATS is
    `bin_conv_3x3` of BNAS. Raises InputError where the system lacks an operation."""
    ours = CONVOLUTION_PREFIXES[system]
    renamed = {
        theirs: own
        for prefixes in CONVOLUTION_PREFIXES.values()
        for theirs, own in zip(prefixes, ours, strict=True)
    }
    cells = {}
    for kind in ("normal", "reduce"):
        pairs = []
        for operation, source in getattr(genotype, kind):
            prefix, _, size = operation.rpartition("_")
            own = f"{renamed[prefix]}_{size}" if prefix in renamed else operation
            if own not in OPERATIONS[system]:
                raise InputError(
                    f"{origin}: the blocks of {system} have no {operation}; choose from {OPERATIONS[system]}"
                )
            pairs.append((own, source))
        cells[kind] = tuple(pairs)
    return genotype._replace(**cells)


def genotype_from_dict(
    fields: Any, *, origin: str = "genotype", known: tuple[str, ...] = PRIMITIVES
) -> Genotype:
    """A validated Genotype of the operations `known` from its JSON form; keys beyond the four fields are
    ignored.

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
        cells[kind] = _checked_pairs(fields[kind], f"{origin}: field {kind!r}", known)
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


def _checked_pairs(pairs: Any, where: str, known: tuple[str, ...]) -> tuple[tuple[str, int], ...]:
    if not isinstance(pairs, list | tuple) or len(pairs) != 2 * NODES:
        raise InputError(f"{where} must list {2 * NODES} [operation, input] pairs, two for each node")
    for position, pair in enumerate(pairs):
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise InputError(f"{where}[{position}] is {pair!r}, not an [operation, input] pair")
        operation, source = pair
        if operation not in known:
            raise InputError(f"{where}[{position}]: unknown operation {operation!r}; choose from {known}")
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
