"""The C kernel, step by step, against PyTorch: the 1-bit convolution to the last bit, on every path."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from support.packed_programs import needs_kernel, one_step, random_program, result_of, skip_without
from support.scripts import ROOT
from torch.nn import functional as F

from packed import View, program_bytes

CONVOLUTIONS = [  # channels in and out, groups, kernel, stride, dilation, padding, height, width
    (3, 5, 1, 3, 1, 1, 1, 7, 9),
    (16, 16, 2, 3, 1, 1, 1, 8, 8),
    (84, 84, 14, 3, 1, 1, 1, 32, 32),
    (84, 84, 14, 5, 1, 1, 2, 16, 16),
    (84, 84, 14, 3, 1, 2, 2, 9, 17),
    (28, 42, 14, 5, 1, 2, 4, 13, 5),
    (24, 24, 24, 3, 1, 1, 1, 10, 11),
    (24, 24, 24, 5, 2, 2, 4, 11, 10),
    (28, 28, 14, 5, 2, 1, 2, 15, 13),
    (18, 18, 2, 3, 2, 2, 2, 33, 31),
    (336, 84, 1, 1, 1, 1, 0, 8, 8),
    (40, 20, 1, 1, 2, 1, 0, 9, 7),
    (40, 20, 1, 1, 2, 1, -1, 9, 7),
    (40, 20, 1, 1, 2, 1, -1, 8, 6),
    (1344, 17, 1, 1, 1, 1, 0, 3, 5),
    (300, 13, 1, 3, 1, 1, 1, 7, 7),
    (48, 48, 2, 5, 1, 2, 4, 8, 8),
    (10, 30, 2, 5, 1, 1, 2, 1, 1),
]


def awkward(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """float32 values of which some are zero of either sign, infinite, or the least there are."""
    x = rng.standard_normal(shape, np.float32)
    special = np.array([0.0, -0.0, np.inf, -np.inf, 1e-45, -1e-45], np.float32)
    chosen = rng.random(shape) < 0.3
    x[chosen] = rng.choice(special, int(chosen.sum()))
    return x


def binary_tensors(rng: np.random.Generator, weight: np.ndarray, c_in: int, *, plain: bool) -> dict:
    """The tensors of a step with the given signs; `plain`: threshold 0, scale 1, no bias, no PReLU."""
    filters = weight.shape[0]
    bits = (weight > 0).reshape(*weight.shape[:2], -1).transpose(0, 2, 1)
    one = np.ones(filters, np.float32)
    return {
        "threshold": np.zeros(c_in, np.float32) if plain else rng.standard_normal(c_in, np.float32),
        "bits": np.packbits(bits, axis=2, bitorder="little"),
        "affine": np.stack([one, 0 * one, one]) if plain else rng.standard_normal((3, filters), np.float32),
    }


def reference_dot(x, weight, *, stride, dilation, padding, groups) -> torch.Tensor:
    """PyTorch's convolution of tensors of +1 and -1, zero padded, ceil(size / 2) at stride 2."""
    signs = torch.where(x >= 0, 1.0, -1.0)[None]
    if padding < 0:  # the shifted half of a factorised reduction
        size = [-(-s // 2) for s in x.shape[1:]]
        y = F.conv2d(signs[:, :, 1:, 1:], weight, None, stride)
        return F.pad(y, (0, size[1] - y.shape[3], 0, size[0] - y.shape[2]))[0]
    return F.conv2d(signs, weight, None, stride, padding, dilation, groups)[0]


@needs_kernel
@pytest.mark.parametrize("case", CONVOLUTIONS, ids=str)
def test_binary_convolution_is_exact(case, kernel):
    skip_without(kernel)
    c_in, c_out, groups, size, stride, dilation, padding, height, width = case
    rng = np.random.default_rng(0)
    weight = rng.choice(np.array([-1, 1], np.float32), (c_out, c_in // groups, size, size))
    x = awkward(rng, c_in, height, width)
    shape = {"stride": stride, "dilation": dilation, "padding": padding, "groups": groups}
    program = one_step(
        "binary", c_in, c_out, binary_tensors(rng, weight, c_in, plain=True), kernel=size, **shape
    )
    expected = reference_dot(torch.from_numpy(x), torch.from_numpy(weight), **shape)
    np.testing.assert_array_equal(result_of(program, x, kernel), expected.numpy())


@needs_kernel
@pytest.mark.parametrize(("residual", "add"), [(False, False), (True, False), (True, True)])
def test_fused_unit(residual, add, kernel):
    """Thresholds, scale, bias, residual, PReLU and the sum of a node's two operations."""
    skip_without(kernel)
    rng = np.random.default_rng(1)
    c, height, width = 22, 9, 11
    weight = rng.choice(np.array([-1, 1], np.float32), (c, c // 2, 3, 3))
    tensors = binary_tensors(rng, weight, c, plain=False)
    x = rng.standard_normal((c, height, width), np.float32)
    fields = {"kernel": 3, "padding": 1, "groups": 2, "residual": View(0, 0, c) if residual else None}
    program = one_step("binary", c, c, tensors, add=add, **fields)

    image = torch.from_numpy(x)
    shifted = image - torch.from_numpy(tensors["threshold"])[:, None, None]
    dot = reference_dot(shifted, torch.from_numpy(weight), stride=1, dilation=1, padding=1, groups=2)
    scale, bias, slope = torch.from_numpy(tensors["affine"])[:, :, None, None]
    y = dot * scale + bias + (image if residual else 0)
    y = torch.where(y > 0, y, slope * y) + (image if add else 0)
    np.testing.assert_allclose(result_of(program, x, kernel), y.numpy(), rtol=1e-5, atol=1e-5)


@needs_kernel
@pytest.mark.parametrize("size", [(8, 8), (7, 9), (1, 1), (2, 5), (32, 32), (31, 2)], ids=str)
@pytest.mark.parametrize(
    ("average", "window", "stride", "add"),
    [
        *(
            (average, 3, stride, add)
            for average in (False, True)
            for stride in (1, 2)
            for add in (False, True)
        ),
        (True, 2, 2, False),
        (False, 1, 1, False),
        (False, 1, 1, True),
    ],
)
def test_pools(average, window, stride, add, size, kernel):
    skip_without(kernel)
    x = np.random.default_rng(2).standard_normal((5, *size), np.float32)
    fields = {"kernel": window, "stride": stride, "padding": window // 3, "average": average}
    program = one_step("pool", 5, 5, {}, add=add, **fields)
    image = torch.from_numpy(x)[None]
    if average:
        y = F.avg_pool2d(image, window, stride, window // 3, ceil_mode=window == 2, count_include_pad=False)
    else:
        y = F.max_pool2d(image, window, stride, window // 3)
    if add:
        y = y + (image if stride == 1 else F.max_pool2d(image, 3, 2, 1))
    atol = 1e-6 if average else 0
    np.testing.assert_allclose(result_of(program, x, kernel), y[0].numpy(), rtol=atol, atol=atol)


@needs_kernel
@pytest.mark.parametrize(
    ("c_in", "c_out", "groups", "stride", "size"),
    [(3, 9, 1, 1, (32, 32)), (3, 7, 1, 2, (33, 31)), (8, 20, 4, 2, (14, 15)), (6, 4, 2, 1, (1, 3))],
)
@pytest.mark.parametrize("relu", [False, True])
def test_float_convolution(c_in, c_out, groups, stride, size, relu, kernel):
    skip_without(kernel)
    rng = np.random.default_rng(3)
    weight = rng.standard_normal((c_out, c_in // groups, 3, 3), np.float32)
    bias = rng.standard_normal(c_out, np.float32)
    x = rng.standard_normal((c_in, *size), np.float32)
    fields = {"kernel": 3, "stride": stride, "padding": 1, "groups": groups, "relu": relu}
    program = one_step("float", c_in, c_out, {"weight": weight, "bias": bias}, **fields)
    tensors = (torch.from_numpy(array) for array in (x[None], weight, bias))
    y = F.conv2d(*tensors, stride, 1, 1, groups)[0]
    y = y.relu() if relu else y
    np.testing.assert_allclose(result_of(program, x, kernel), y.numpy(), rtol=1e-4, atol=1e-5)


def under_sanitizers(cache: Path, optimisation: str, *command: str) -> None:
    """Run Python with the kernel compiled under the address and undefined-behaviour sanitizers."""
    if "EBNAS_CFLAGS" in os.environ:
        pytest.skip("this is the run under sanitizers")
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    # with libstdc++ beside it, for the sanitizer must find what throws exceptions (and torch's imports throw)
    libraries = [
        subprocess.run(["gcc", f"-print-file-name={name}"], capture_output=True, text=True).stdout.strip()
        for name in ("libasan.so", "libstdc++.so.6")
    ]
    if not all(Path(library).is_absolute() for library in libraries):
        pytest.skip("gcc has no address sanitizer here")
    environment = {
        **os.environ,
        "EBNAS_CFLAGS": f"{optimisation} -fsanitize=address,undefined -fno-sanitize-recover=all",
        "XDG_CACHE_HOME": str(cache),
        "CC": "gcc",
        "LD_PRELOAD": " ".join(libraries),
        "ASAN_OPTIONS": "detect_leaks=0",
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    assert list((cache / "ebnas").glob("*.so")), "the kernel with sanitizers was not the one that ran"


RUN_ALL = """
import sys, pathlib, numpy, packed
for i, path in enumerate(sorted(pathlib.Path(sys.argv[1]).glob("*.ebnas"))):
    image = numpy.random.default_rng(i).standard_normal((1, 3, 1 + i % 19, 1 + i % 13), numpy.float32)
    for kernel in packed.available_kernels():
        packed.load(path, kernel=kernel, threads=1, any_size=True)(image)
"""


def test_random_programs_under_sanitizers(tmp_path):
    for seed in range(60):
        content = program_bytes(random_program(np.random.default_rng(seed)))
        (tmp_path / f"{seed}.ebnas").write_bytes(content)
    under_sanitizers(tmp_path, "-O0", "-c", RUN_ALL, str(tmp_path))  # built in a fifth of the time


@pytest.mark.sanitizer
def test_all_under_sanitizers(tmp_path):
    """This file's tests on every path once more, and the damaged files that are accepted."""
    tests = [__file__, str(Path(__file__).with_name("test_packed_fuzz.py"))]
    reaching = "not truncated and not lying and not no_numbers and not every_bit"  # the kernel, at least once
    pytest_run = ("-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", reaching, *tests)
    under_sanitizers(tmp_path, "-O1", *pytest_run)
