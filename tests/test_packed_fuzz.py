"""Damaged and hostile packed files: a PackedFileError, or a network that runs; never a crash."""

import json
import random
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from packed_programs import SEVEN, data_entry, network

from packed import PackedFileError, PackedNetwork, lowering, program_bytes, read_program

ODD_VALUES = (
    None,
    True,
    -1,
    0,
    1,
    2,
    3,
    7,
    10**6,
    2**31,
    2**63,
    10**400,
    0.5,
    1e308,
    float("nan"),
    "",
    "x",
    [],
    {},
)


@pytest.fixture(scope="module")
def content() -> bytes:
    torch.set_num_threads(1)
    model = network(genotype=SEVEN, init_channels=4, layers=3, groups=2, num_classes=3)
    return program_bytes(lowering.lower(model, data_entry(3, image_size=8)))


@pytest.fixture
def attempt(tmp_path):
    """Writes a file, loads it and, if it is accepted, runs it. Returns whether it was accepted."""
    path = tmp_path / "model.ebnas"
    images = np.random.default_rng(0).standard_normal((1, 3, 9, 8), np.float32)

    def attempt(content: bytes) -> bool:
        path.write_bytes(content)
        try:
            program = read_program(path)
        except PackedFileError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            return False
        if program.buffers[0][0] == 3:
            PackedNetwork(program, threads=1)(images)
        return True

    return attempt


def split(content: bytes) -> tuple[dict, dict, bytes]:
    """The safetensors header, the network in it, and the tensors' bytes."""
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    return header, json.loads(header["__metadata__"]["network"]), content[end:]


def join(header: dict, network: object, data: bytes) -> bytes:
    header = {**header, "__metadata__": {"network": json.dumps(network)}}
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def test_the_file_itself_is_accepted(content, attempt):
    assert attempt(content) and attempt(join(*split(content)))


def test_truncated(content, attempt):
    lengths = [*range(0, 600), *range(600, len(content), len(content) // 300), len(content) - 1]
    assert not any([attempt(content[:length]) for length in lengths])
    assert not attempt(content + b"\0")


def test_damaged_bytes(content, attempt):
    """Bits flipped, bytes overwritten and stretches removed, in the header and in the tensors."""
    rng = random.Random(0)
    header = 8 + int.from_bytes(content[:8], "little")
    for turn in range(800):
        damaged = bytearray(content)
        for _ in range(rng.choice((1, 1, 1, 5))):
            place = rng.randrange(header if turn % 4 else len(content))
            if turn % 3 == 0:
                damaged[place] ^= 1 << rng.randrange(8)
            elif turn % 3 == 1:
                damaged[place] = rng.choice(b'\x00\xff0123456789-"{}[],:x')
            else:
                del damaged[place : place + rng.randrange(1, 9)]
        attempt(bytes(damaged))


def fields_of(node: object, path: tuple = ()) -> list[tuple]:
    """The paths of all fields and items of a JSON value."""
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    return [found for key, value in items for found in ((*path, key), *fields_of(value, (*path, key)))]


@contextmanager
def changed(node: object, path: tuple, value: object):
    """`node` with another `value` at a path, or nothing there for `...`; put back at the end."""
    for key in path[:-1]:
        node = node[key]
    before = node[path[-1]]
    if value is not ...:
        node[path[-1]] = value
        yield
        node[path[-1]] = before
    elif isinstance(node, dict):
        del node[path[-1]]
        yield
        node[path[-1]] = before
    else:
        del node[path[-1]]
        yield
        node.insert(path[-1], before)


def test_wrong_fields(content, attempt):
    """Every field of the network replaced or left out; what is accepted has the right type."""
    header, network, data = split(content)
    free = {"classes", "config", "name", "mean", "std"}
    rng = random.Random(1)
    paths = [path for path in fields_of(network) if path[0] != "config"]
    assert len(paths) > 400
    for path in paths:
        with changed(network, path, ...):
            assert not attempt(join(header, network, data)), path
        for value in rng.sample(ODD_VALUES, 2):
            with changed(network, path, value):
                accepted = attempt(join(header, network, data))
            if accepted and not free.intersection(path):
                assert type(value) in (int, bool, type(None)), (path, value)
    assert attempt(join(header, network, data))
    assert not attempt(join(header, [], data)) and not attempt(join(header, {**network, "format": "x"}, data))


def test_lying_tensors(content, attempt):
    """Types, shapes and offsets of tensors that do not fit each other, the file, or the program."""
    header, network, data = split(content)
    rng = random.Random(2)
    names = [name for name in header if name != "__metadata__"]
    for name in names:
        entry = header[name]
        begin, end = entry["data_offsets"]
        lies = [
            {"dtype": rng.choice(("F64", "F16", "BF16", "I8", "U8", "F32", "BOOL", "F8_E4M3", "X"))},
            {"shape": [*entry["shape"], rng.choice((1, 2, 2**62))]},
            {"shape": [2**32, 2**32, *entry["shape"]]},
            {"shape": entry["shape"][::-1]},
            {"shape": [-1]},
            {"data_offsets": [begin, end + 4]},
            {"data_offsets": [end, begin]},
            {"data_offsets": [0, 2**63]},
        ]
        for lie in lies:
            accepted = attempt(join({**header, name: {**entry, **lie}}, network, data))
            assert not accepted or {**entry, **lie} == entry or lie.get("shape") == entry["shape"][::-1], (
                name,
                lie,
            )
        other = {key: value for key, value in header.items() if key != name}
        assert not attempt(join(other, network, data)), name


def test_values_that_are_no_numbers(content, attempt):
    header, network, data = split(content)
    for name, entry in header.items():
        if entry.get("dtype") == "F32":
            begin = entry["data_offsets"][0]
            for value in (np.nan, np.inf):
                spoilt = data[:begin] + np.float32(value).tobytes() + data[begin + 4 :]
                assert not attempt(join(header, network, spoilt)), name


def test_steps_in_another_order(content, attempt):
    """Steps exchanged, or with the views of others: a program that reads what no step wrote is refused."""
    header, network, data = split(content)
    rng = random.Random(3)
    for _ in range(150):
        steps = [{**step} for step in network["steps"]]
        i, j = rng.randrange(len(steps)), rng.randrange(len(steps))
        steps[i], steps[j] = steps[j], steps[i]
        attempt(join(header, {**network, "steps": steps}, data))
        steps[i][rng.choice(("source", "target", "residual"))] = steps[j].get(
            rng.choice(("source", "target"))
        )
        attempt(join(header, {**network, "steps": steps}, data))
    unfinished = {**network, "steps": network["steps"][:-1]}
    backwards = {**network, "steps": [*network["steps"][-2::-1], network["steps"][-1]]}
    assert not attempt(join(header, unfinished, data)) and not attempt(join(header, backwards, data))


def test_deep_nesting(content, attempt):
    header, _, data = split(content)
    nested = {**header, "__metadata__": {"network": "[" * 100_000}}
    text = json.dumps(nested).encode()
    assert not attempt(len(text).to_bytes(8, "little") + text + data)
