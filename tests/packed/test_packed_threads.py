"""Threads that share one image: bit for bit what one thread computes, whoever comes late."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from support.packed_programs import needs_kernel, random_program, skip_without

from packed import PackedNetwork
from packed import kernel as packed_kernel
from packed import network as packed_network

TESTS = Path(__file__).parents[1]


@pytest.fixture
def all_shared(monkeypatch):
    """Every step of every network in 16 chunks, and helpers who are asked again whatever happened."""
    monkeypatch.setattr(packed_kernel, "CHUNK", 1)
    monkeypatch.setattr(packed_kernel, "LEAST_SHARED", 0)
    monkeypatch.setattr(packed_network._Helpers, "LONG", 1 << 62)


@needs_kernel
def test_shared_images(kernel, all_shared):
    skip_without(kernel)
    for seed in range(60):
        rng = np.random.default_rng(seed)
        program = random_program(rng)
        image = rng.standard_normal((1, 3, *rng.integers(1, 40, 2)), np.float32)
        alone = PackedNetwork(program, kernel=kernel, threads=1)(image)
        for threads in (2, 5):
            net = PackedNetwork(program, kernel=kernel, threads=threads)
            for _ in range(2):
                np.testing.assert_array_equal(net(image), alone, err_msg=f"seed {seed}, {threads} threads")
            assert net._helpers._jobs, "the image was not shared"


def test_nobody_is_waited_for(all_shared, monkeypatch):
    """Helpers that never begin; they are not asked again before they have ended."""
    rng = np.random.default_rng(3)
    program, image = random_program(rng), rng.standard_normal((1, 3, 20, 30), np.float32)
    net = PackedNetwork(program, threads=3)
    with monkeypatch.context() as patched:
        patched.setattr(ThreadPoolExecutor, "submit", lambda *_: Future())
        first = net(image)
    assert len(net._helpers._jobs) == 2 and not net._helpers.ready()
    expected = PackedNetwork(program, threads=1)(image)
    np.testing.assert_array_equal(first, expected)
    np.testing.assert_array_equal(net(image), expected)


def test_after_a_fork(all_shared):
    rng = np.random.default_rng(4)
    net, image = PackedNetwork(random_program(rng), threads=2), rng.standard_normal((1, 3, 9, 9), np.float32)
    expected = net(image)
    child = os.fork()
    if child == 0:
        same = np.array_equal(net(image), expected) and bool(net._helpers._jobs)
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_long_waits_are_not_repeated():
    helpers = packed_network._Helpers(1)
    assert helpers.ready()
    helpers.run(lambda thread: 1000)
    helpers._jobs[0].result()
    assert [helpers.ready() for _ in range(40)].index(True) == 29


def test_small_networks_are_not_shared():
    net = PackedNetwork(random_program(np.random.default_rng(0)), threads=2)
    assert not net._plan(8, 8)[0].shared and net._plan(800, 800)[0].shared


@pytest.mark.sanitizer
def test_shared_images_under_the_thread_sanitizer():
    if shutil.which("gcc") is None:
        pytest.skip("there is no gcc")
    flags = (
        "-q",
        "-x",
        "-n",
        "0",
        "-p",
        "no:cacheprovider",
        "-p",
        "support.kernel_process",
        "-k",
        "shared_images",
    )
    environment = {
        **os.environ,
        "PYTHONPATH": str(TESTS),
        "EBNAS_MACHINE": "native",
        "EBNAS_CFLAGS": "-O1 -g -fsanitize=thread",
        "TSAN_OPTIONS": "halt_on_error=1",
    }
    command = [sys.executable, "-m", "pytest", *flags, __file__]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
