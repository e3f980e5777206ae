"""Damaged and hostile packed files: a PackedFileError, or a network that runs; never a crash."""

import dataclasses
import json
import os
import random
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support.packed_programs import SEVEN, data_entry, network, random_program, skip_without

from networks import lowering
from packed import (
    KERNELS,
    PackedFileError,
    PackedNetwork,
    Step,
    View,
    load,
    parse_program,
    program_bytes,
    read_program,
)
from packed.float_form import FloatForm
from packed.program import sealed

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
def attempt():
    """Reads the content of a file and, if it is accepted, runs it. Returns whether it was accepted."""
    images = np.random.default_rng(0).standard_normal((1, 3, 9, 8), np.float32)

    def attempt(content: bytes) -> bool:
        try:
            program = parse_program(content)
        except PackedFileError as error:
            assert "\n" not in str(error) and len(str(error)) < 300
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
    """The opposite of `split`, with the right checksum: it hides nothing of what else is wrong."""
    if isinstance(network, dict):  # the format and the checksum come first
        network = {**{key: network[key] for key in ("format", "sha256") if key in network}, **network}
    network = json.dumps(network, separators=(",", ":"))
    text = json.dumps({**header, "__metadata__": {"network": network}}).encode()
    return resealed(len(text).to_bytes(8, "little") + text + data)


def resealed(content: bytes) -> bytes:
    """With the right checksum, where there is still one."""
    try:
        return sealed(content)
    except ValueError:
        return content


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
        attempt(resealed(bytes(damaged)))


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


def steps_of(net: PackedNetwork, image: np.ndarray):
    """Each step, its result, and what the float form makes of the same inputs, all (channels, h, w).

    A step at a time: a sign that rounding takes across a threshold would make all that follows differ.
    """
    buffers = {0: torch.from_numpy(image)[None]}
    steps = FloatForm(net.program).steps
    for step, result, float_step in zip(net.program.steps, net.trace(image), steps, strict=True):
        inputs = [
            buffers[view.buffer][:, view.slice] if view else None for view in (step.source, step.residual)
        ]
        expected = float_step(*inputs).reshape(1, *result.shape)
        if step.target is not None:
            shape = (1, net.program.buffers[step.target.buffer][0], *result.shape[1:])
            target = buffers.setdefault(step.target.buffer, torch.zeros(shape))[:, step.target.slice]
            if step.add:
                expected = expected + target
            target[:] = torch.from_numpy(result)
        yield step, result, expected[0].numpy()


@pytest.mark.parametrize("kernel", KERNELS)
def test_random_programs(kernel):
    """The float form runs all that is accepted, and the kernel computes the same in every step."""
    skip_without(kernel)
    for seed in range(150):
        rng = np.random.default_rng([KERNELS.index(kernel), seed])
        program = parse_program(program_bytes(random_program(rng)))
        image = rng.standard_normal((3, *rng.integers(1, 20, 2)), np.float32)
        for step, result, expected in steps_of(PackedNetwork(program, kernel=kernel, threads=1), image):
            close = {"rtol": 1e-4, "atol": 1e-5 * (1 + np.abs(expected).max())}
            np.testing.assert_allclose(result, expected, **close, err_msg=f"seed {seed}: {step}")
        logits = PackedNetwork(program, kernel="torch")(image[None])
        assert logits.shape == (1, len(program.classes)) and np.isfinite(logits).all()


def test_every_bit_counts():
    """A file of a few kilobytes with any one bit flipped, in the header or in a tensor, is refused."""
    content = program_bytes(random_program(np.random.default_rng(8)))
    assert len(content) < 8000
    program = parse_program(content)
    assert {step.op for step in program.steps} == {"binary", "float", "pool", "linear"}
    damaged = bytearray(content)
    for place in range(8 * len(content)):
        damaged[place // 8] ^= 1 << place % 8
        with pytest.raises(PackedFileError):
            parse_program(bytes(damaged))
        damaged[place // 8] ^= 1 << place % 8


def test_numbers_that_overflow(content, attempt):
    """No weights are accepted with which finite images could give an infinite value."""
    header, network, data = split(content)
    for name, entry in header.items():
        if entry.get("dtype") == "F32" and not name.endswith("threshold"):
            begin, end = entry["data_offsets"]
            large = np.full((end - begin) // 4, 3.4e38, np.float32).tobytes()
            assert not attempt(join(header, network, data[:begin] + large + data[end:])), name
    for field, value in (("mean", 1e39), ("mean", 1e7), ("mean", 10**400), ("std", 1e-50), ("std", 0)):
        assert not attempt(join(header, {**network, field: [value, 0.5, 0.5]}, data)), (field, value)


def test_a_chain_that_overflows():
    """Each step is harmless, their product is not."""
    large = {"weight": np.full((3, 3, 1, 1), 1e5, np.float32), "bias": np.zeros(3, np.float32)}
    classifier = {"weight": np.ones((1, 3), np.float32), "bias": np.zeros(1, np.float32)}

    def chain(length: int) -> bytes:
        steps = [Step("float", View(i, 0, 3), View(i + 1, 0, 3), large) for i in range(length)]
        last = Step("linear", View(length, 0, 3), None, classifier)
        program = random_program(np.random.default_rng(0))
        return program_bytes(
            dataclasses.replace(
                program, buffers=((3, 0),) * (length + 1), steps=(*steps, last), classes=("a",)
            )
        )

    net = PackedNetwork(parse_program(chain(4)))
    assert np.isfinite(net(np.full((1, 3, 5, 5), 1e6, np.float32))).all()
    with pytest.raises(PackedFileError, match="overflow"):
        parse_program(chain(5))


def test_shuffles_and_blocks(attempt):
    """A shuffle parts the channels of a copy, and of nothing else; a float kernel of 2 is of blocks."""
    copy = {"op": "pool", "source": [0, 0, 3], "target": [1, 0, 3], "name": "", "add": False}
    copy |= {"kernel": 1, "stride": 1, "padding": 0, "average": False}
    for shuffle, window, right in (
        (3, {}, True),
        *((value, {}, False) for value in (2, 4, 1, 0, -1, 65, True, "3", None, 3.0)),
        (3, {"kernel": 3, "padding": 1}, False),
    ):
        program = random_program(np.random.default_rng(0))
        step = Step("pool", View(0, 0, 3), View(1, 0, 3), {})
        last = dataclasses.replace(program.steps[-1], source=View(1, 0, 3))
        last.tensors["weight"] = np.ones((len(program.classes), 3), np.float32)
        program = dataclasses.replace(program, buffers=((3, 0), (3, 0)), steps=(step, last))
        header, network, data = split(program_bytes(program))
        network["steps"][0] = copy | window | {"shuffle": shuffle}
        assert attempt(join(header, network, data)) == right, (shuffle, window)
    weight = {"weight": np.ones((3, 3, 2, 2), np.float32), "bias": np.zeros(3, np.float32)}
    for fields, right in (
        ({"stride": 2}, True),
        ({"stride": 1}, False),
        ({"stride": 2, "padding": 1}, False),
    ):
        level = fields["stride"] - 1
        step = Step("float", View(0, 0, 3), View(1, 0, 3), weight, kernel=2, **fields)
        program = dataclasses.replace(program, buffers=((3, 0), (3, level)), steps=(step, last))
        assert attempt(program_bytes(program)) == right, fields


def test_no_classes(content, attempt):
    header, network, data = split(content)
    last = len(network["steps"]) - 1
    weight, bias = header[f"{last}.weight"], header[f"{last}.bias"]
    kept = sorted((entry["data_offsets"], name) for name, entry in header.items() if name != "__metadata__")
    kept = [(offsets, name) for offsets, name in kept if not name.startswith(f"{last}.")]
    header, parts, end = {}, [], 0
    for (begin, stop), name in kept:
        header[name] = {**split(content)[0][name], "data_offsets": [end, end + stop - begin]}
        parts.append(data[begin:stop])
        end += stop - begin
    header[f"{last}.weight"] = {**weight, "shape": [0, weight["shape"][1]], "data_offsets": [end, end]}
    header[f"{last}.bias"] = {**bias, "shape": [0], "data_offsets": [end, end]}
    assert not attempt(join(header, {**network, "classes": []}, b"".join(parts)))


def test_format_1():
    """A file that the first version wrote: a warning, and the same logits. Format 2 is never taken for it."""
    path = Path(__file__).parents[1] / "reference" / "packed_format_1.ebnas"
    expected = np.load(path.with_suffix(".npz"))
    with pytest.warns(RuntimeWarning, match="of format 1"):
        net = load(path, any_size=True)
    images = expected["images"].astype(np.float32) / 4
    np.testing.assert_allclose(net(images), expected["logits"], rtol=1e-5, atol=1e-6)
    again = program_bytes(net.program)
    assert program_bytes(parse_program(again)) == again
    with pytest.raises(PackedFileError, match="sha256"):
        parse_program(again.replace(b"network 2", b"network 1"))


def test_not_a_packed_file(tmp_path):
    path = tmp_path / "model.ebnas"
    for content in (b"", b"12345678", b"\x00" * 100, b"\xff" * 100):
        path.write_bytes(content)
        with pytest.raises(PackedFileError, match=r"model\.ebnas is not a packed network"):
            read_program(path)
    pipe = tmp_path / "pipe.ebnas"
    os.mkfifo(pipe)
    for odd in (pipe, tmp_path, "/dev/zero"):
        with pytest.raises(PackedFileError, match="is not a regular file"):
            read_program(odd)
    with pytest.raises(FileNotFoundError):
        read_program(tmp_path / "absent")
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(PackedFileError, match="has 1099511627776 bytes"):
        read_program(path)


def test_memory_is_counted_before_it_is_taken():
    """Masks of many large convolutions, which a file of kilobytes asks for: refused, and none is made."""
    rng = np.random.default_rng(0)
    bits = {"threshold": np.zeros(1, np.float32), "bits": np.zeros((1, 49, 1), np.uint8)}
    bits["affine"] = rng.standard_normal((3, 1), np.float32)
    shapes = [{"kernel": 7, "padding": p, "dilation": d} for p in range(12) for d in range(1, 5)]
    steps = [Step("binary", View(0, 0, 1), View(1, 0, 1), bits, **shape) for shape in shapes]
    classifier = {"weight": np.ones((1, 1), np.float32), "bias": np.zeros(1, np.float32)}
    program = dataclasses.replace(
        random_program(rng),
        buffers=((1, 0), (1, 0)),
        steps=(*steps, Step("linear", View(1, 0, 1), None, classifier)),
        classes=("a",),
        mean=(0.0,),
        std=(1.0,),
    )
    content = program_bytes(program)
    assert len(content) < 30_000
    net = PackedNetwork(parse_program(content), threads=1, kernel="c")
    images = np.zeros((1, 1, 2048, 2048), np.float32)
    tracemalloc.start()
    try:
        with pytest.raises(ValueError, match="too large"):
            net(images)
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()
    assert net(images[:, :, :64, :64]).shape == (1, 1)
