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

from flags.genotype_text import find_genotype, looks_like_genotype, read_text
from search_space import ENTRIES, PRIMITIVES
from utils import InputError, one_line, write_atomically

_SKIP_AND_POOLS = PRIMITIVES[:3]
_SEPARABLE, _DILATED = ("sep_conv_3x3", "sep_conv_5x5"), ("dil_conv_3x3", "dil_conv_5x5")

OPERATIONS = {
    "ebnas": PRIMITIVES,
    "bnas": ("none", *PRIMITIVES[1:]),
    "bats": ("none", *_SKIP_AND_POOLS, *_SEPARABLE, "sep_conv_7x7", *_DILATED),
    "dcp": (*_SKIP_AND_POOLS, *_SEPARABLE, *_DILATED),
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


def operations_of(system: str) -> tuple[str, ...]:
    """The operations that a system's cells may have; for EBNAS all that have an entry."""
    return tuple(ENTRIES) if system == "ebnas" else OPERATIONS[system]


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


def random_genotype(seed: int, operations: tuple[str, ...] = PRIMITIVES) -> Genotype:
    """A uniform draw from what a search can derive: for each node two different inputs, in either order, and
    for each of these any of `operations`."""
    draw = random.Random(seed)

    def cell() -> tuple[tuple[str, int], ...]:
        return tuple(
            (draw.choice(operations), source)
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


def get_genotype(name: str, system: str | None = None, *, known: tuple[str, ...] | None = None) -> Genotype:
    """The genotype that `name` stands for, of the operations `known` (None: EBNAS's). It may be

    a registered name; `random:SEED`; a genotype as text (see flags/genotype_text.py); a file of JSON or
    text, of which the last genotype counts; a search run's folder; or `FOLDER@EPOCH`, what that search had
    found at the end of that epoch.

    For a `system` it may be any system's, and its convolutions are renamed to that system's.
    Raises InputError: unknown name (the known ones are listed), a file that holds no valid genotype, or an
    operation that the system does not have.
    """
    if system is not None:
        genotype = _named(name, known=(*EVERY_OPERATION, *ENTRIES), system=system)
        return translated(genotype, system, origin=one_line(name, 60))
    return _named(name, known=known)


def _named(name: str, **operations: Any) -> Genotype:
    """See get_genotype; `operations` are for genotype_from_dict."""
    if name in GENOTYPES:
        return GENOTYPES[name]
    if name.startswith(RANDOM):
        seed = name.removeprefix(RANDOM)
        if not seed.isdecimal():
            raise InputError(f"genotype {name!r}: {RANDOM} takes a seed, a whole number from 0")
        return random_genotype(int(seed))
    folder, _, epoch = name.rpartition("@")
    if is_path(name):
        fields, origin = _fields_of_path(Path(name))
    elif folder and epoch.isdecimal() and is_path(folder):
        fields, origin = _fields_of_epoch(Path(folder), int(epoch))
    elif looks_like_genotype(name):
        fields, origin = _fields_of_text(name, "the genotype given")
    else:
        raise InputError(
            f"unknown genotype {one_line(name, 60)!r}: choose from {', '.join(GENOTYPES)}, or give "
            f"{RANDOM}SEED, a genotype file, a search's folder (FOLDER@EPOCH: of an earlier epoch), or the "
            "text Genotype(...)"
        )
    return genotype_from_dict(fields, origin=origin, **operations)


def is_path(name: str) -> bool:
    """Whether `name` is that of a file or folder that is there."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or no name: a genotype as text
        return False


def _fields_of_path(path: Path) -> tuple[Any, str]:
    """The fields of a genotype file or of a search's folder, unchecked, and where they stand."""
    if path.is_dir():
        folder, path = path, path / "genotype.json"
        if not path.is_file():
            raise InputError(f"no genotype.json in {folder}: give the folder of a search run")
    try:
        text = read_text(path)
    except OSError as error:
        raise InputError(f"cannot read {path}: {one_line(error.strerror or error)}") from None
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        return _fields_of_text(text, str(path))
    if isinstance(fields, dict) and fields.keys() & set(Genotype._fields):
        return fields, str(path)
    return _fields_of_text(text, str(path))


def _fields_of_text(text: str, origin: str) -> tuple[Any, str]:
    """The fields of the last genotype in `text`, unchecked, and where they stand."""
    try:
        found = find_genotype(text)
    except InputError as error:
        raise InputError(f"{origin}: {error}") from None
    if found is None:
        raise InputError(
            f"{origin} holds no genotype: neither JSON with the fields {', '.join(Genotype._fields)} nor a "
            "text Genotype(normal=[...], ...)"
        )
    fields, line = found
    return fields, f"{origin}, line {line}" if "\n" in text.strip() else origin


def _fields_of_epoch(folder: Path, epoch: int) -> tuple[Any, str]:
    """The fields that a search's metrics.jsonl has of an epoch, unchecked, and where they stand."""
    path, epochs = folder / "metrics.jsonl", []
    if not path.is_file():
        raise InputError(f"no metrics.jsonl in {folder}: FOLDER@EPOCH takes the folder of a search run")
    for line in path.read_text("utf-8", "replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):  # the last one of a run that was killed
            continue
        if not isinstance(record, dict) or "genotype" not in record:
            continue
        if record.get("epoch") == epoch:
            return record["genotype"], f"{path}, epoch {epoch}"
        epochs.append(record.get("epoch"))
    if not epochs:
        raise InputError(f"{path} has no genotypes: FOLDER@EPOCH takes the folder of a search run")
    raise InputError(f"{path} has no epoch {epoch}: its epochs are {epochs[0]} to {epochs[-1]}")


def translated(genotype: Genotype, system: str, *, origin: str = "genotype") -> Genotype:
    """`genotype` with plain and dilated convolutions called as `system` calls them: `sep_conv_3x3` of BATS is
    `bin_conv_3x3` of BNAS. Raises InputError where the system lacks an operation."""
    cells = {}
    for kind in ("normal", "reduce"):
        pairs = []
        for operation, source in getattr(genotype, kind):
            own = _renamed(operation, system)
            if own not in operations_of(system):
                raise InputError(
                    f"{origin}: the blocks of {system} have no {operation}; choose from {OPERATIONS[system]}"
                )
            pairs.append((own, source))
        cells[kind] = tuple(pairs)
    return genotype._replace(**cells)


def _renamed(operation: str, system: str) -> str:
    """An operation, a plain or dilated convolution as `system` calls it."""
    prefix, _, size = operation.rpartition("_")
    for plain_and_dilated in CONVOLUTION_PREFIXES.values():
        if prefix in plain_and_dilated:
            return f"{CONVOLUTION_PREFIXES[system][plain_and_dilated.index(prefix)]}_{size}"
    return operation


def genotype_from_dict(
    fields: Any,
    *,
    origin: str = "genotype",
    known: tuple[str, ...] | None = None,
    system: str = "ebnas",
) -> Genotype:
    """A validated Genotype of the operations `known` (None: EBNAS's) from its JSON form; keys beyond
    the four fields are ignored. `system`: of whose operations the nearest is named where one is not known.

    Raises InputError that names the field and the pair: one is missing, not of its type, an unknown
    operation, an input state that does not exist where it is read, or a wrong number of pairs.
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
    genotype = Genotype(**cells)
    used = {name: None for name, _ in genotype.normal + genotype.reduce}  # in this order, each once
    if unknown := [name for name in used if name not in (ENTRIES if known is None else known)]:
        raise InputError(f"{origin}: {_unknown_operations(unknown, tuple(used), system)}")
    return genotype


def _unknown_operations(unknown: list[str], used: tuple[str, ...], system: str) -> str:
    """What to say of a genotype of the operations `used`, some of which are `unknown`: the nearest that the
    `system` has, and the --system whose blocks have all of them."""
    words = []
    for name in unknown:
        nearest = nearest_operation(name, operations_of(system))
        words.append(f"{name!r} (nearest: {nearest})" if nearest else f"{name!r} (there is none like it)")
    text = f"unknown operation{'s' if len(words) > 1 else ''} {', '.join(words)}"
    ways = []
    if system == "ebnas" and all(_renamed(name, system) in PRIMITIVES for name in used):
        ways.append("--system ebnas takes the nearest")
    if fitting := [name for name, operations in OPERATIONS.items() if set(used) <= set(operations)]:
        ways.append(f"--system {' or '.join(fitting)} has all of these operations")
    return f"{text}; {', '.join(ways) or f'choose from {operations_of(system)}'}"


def nearest_operation(name: str, choices: tuple[str, ...]) -> str | None:
    """The one of `choices` that does what `name`, an operation of another program, says: a pool or a
    convolution of that kind, of the nearest size. None where there is none of its kind."""
    kind = _kind(name)
    alike = [choice for choice in choices if kind and _kind(choice) == kind]
    return min(alike, key=lambda choice: abs(_size(choice) - _size(name)), default=None)


def _kind(operation: str) -> str | None:
    words = {"skip": "skip", "identity": "skip", "max": "max", "avg": "avg", "av": "avg"}
    words |= {"dil": "dilated", "conv": "plain", "res": "plain"}
    return next((kind for word, kind in words.items() if word in operation.lower()), None)


def _size(operation: str) -> int:
    sizes = re.findall(r"\d+", operation)
    return int(sizes[0][:4]) if sizes else 3


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
    """Two pairs for each node; also in a list for each node, as some programs write them."""
    wanted = f"{where} must list {2 * NODES} [operation, input] pairs, two for each of {NODES} nodes"
    if not isinstance(pairs, list | tuple):
        raise InputError(wanted)
    if all(isinstance(node, list | tuple) and node and isinstance(node[0], list | tuple) for node in pairs):
        pairs = [pair for node in pairs for pair in node]
    for position, pair in enumerate(pairs):
        fits = isinstance(pair, list | tuple) and len(pair) == 2 and isinstance(pair[0], str)
        if not fits:
            raise InputError(
                f"{where}[{position}] is {one_line(repr(pair), 60)}, not an [operation, input] pair"
            )
        if position == 2 * NODES:
            raise InputError(f"{wanted}; {where}[{position}] {tuple(pair)} is one too many")
        _, source = pair
        states = 2 + position // 2
        if type(source) is not int or not 0 <= source < states:
            raise InputError(
                f"{where}[{position}] is {tuple(pair)}: node {position // 2} takes input {source!r}, which "
                f"does not exist; its inputs are 0 to {states - 1}"
            )
    if len(pairs) < 2 * NODES:
        which = "second pair" if len(pairs) % 2 else "pairs"
        raise InputError(f"{wanted}; it ends after {len(pairs)}: node {len(pairs) // 2} lacks its {which}")
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
