"""What the program of commit 699bc97 wrote loads, resumes and gives the same bits: see fixtures/README.md."""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from packed import load
from run.checkpoint import load_checkpoint

ROOT = next(folder for folder in Path(__file__).parents if (folder / "train.py").is_file())
FIXTURES = ROOT / "tests" / "fixtures"
ARCHIVE, PACKED, EXPECTED = (FIXTURES / name for name in ("runs.tar.xz", "model.ebnas", "expected.json"))
RUNS = {
    "search-old": "train_search.py",
    "eval-old-stage1": "train.py",
    "eval-old-stage2": "train.py",
    "eval-imagenet-stage1": "train_imagenet.py",
}
ONE_CODE_PATH = {  # of torch, oneDNN, MKL and our kernel, whatever this processor has
    "ATEN_CPU_CAPABILITY": "default",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_CBWR": "COMPATIBLE",
    "EBNAS_KERNEL": "c",
    "OMP_NUM_THREADS": "1",  # a sum's order
    "CUDA_VISIBLE_DEVICES": "",
}
X86 = platform.machine().lower() in ("x86_64", "amd64")
TOLERANCE = {"train_loss": 0.01, "valid_loss": 0.05}
"""Where the bits differ: AVX2 and AVX-512 change these losses by up to 0.007 and 0.037. Resuming with other
random states, another order of the images, a step twice or a fresh optimiser changes the first by more than
0.01 in some run, mostly by 0.1."""

RUN_ALL = """
import json, runpy, sys

for sys.argv in json.loads(sys.argv[1]):
    runpy.run_path(sys.argv[0], run_name="__main__")
"""
FORM = {"train_search.py": "torch", "train.py": "plain", "train_imagenet.py": "plain"}
"""What that program computed with: units and pools module by module, the supernet in fewer operations."""


def finish(folder: Path, forms: dict[str, str]) -> str:
    """Resume the runs in `folder` to their end in these forms, where they are given, export and evaluate
    them; what the scripts print.

    One process for all of them, since torch takes seconds to import.
    """
    run = {name: str(find(folder, name).relative_to(folder)) for name in RUNS}
    commands = [
        (script, "--resume", run[name], *(["--kernels", forms[script]] if forms else []))
        for name, script in RUNS.items()
    ]
    commands.append(("export.py", run["eval-old-stage2"], "--output", "exported.ebnas"))
    commands.append(("evaluate.py", *list(run.values())[1:], "--workers", "0"))
    commands = json.dumps([(str(ROOT / script), *flags) for script, *flags in commands])
    return python(folder, "-c", RUN_ALL, commands)


def predictions(packed: Path, folder: Path) -> list[str]:
    """The CSV of infer.py on the test images, which have all sizes and modes."""
    return python(folder, str(ROOT / "infer.py"), str(packed), "images/val").splitlines()


def python(folder: Path, *arguments: str) -> str:
    """What Python prints, in `folder` and on the one code path."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, **ONE_CODE_PATH, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout


def find(folder: Path, name: str) -> Path:
    """The run of `folder` whose name, before its time, is `name`."""
    (run,) = folder.glob(f"runs/{name}-*")
    return run


def position(run: Path) -> dict:
    """What a run's checkpoint is, and where it stands."""
    checkpoint = load_checkpoint(run)
    return {entry: checkpoint[entry] for entry in ("kind", "script", "epoch", "step", "finished", "best")}


def digest(run: Path) -> str:
    """Of the names, types, shapes and bytes of a checkpoint's model."""
    content = hashlib.sha256()
    for name, tensor in sorted(load_checkpoint(run)["model"].items()):
        content.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
        content.update(tensor.contiguous().numpy().tobytes())
    return content.hexdigest()


def metrics(run: Path) -> list[dict]:
    """metrics.jsonl without its times, and without alpha and beta, which are in the model."""
    records = map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
    left_out = ("seconds", "cpu_seconds", "images_per_second", "arch")
    return [{name: value for name, value in record.items() if name not in left_out} for record in records]


def logits(packed: Path, folder: Path) -> np.ndarray:
    """Of the test images that need no resizing: float32 (14, 3)."""
    images = (Image.open(path) for path in sorted(folder.glob("images/val/*/*.png")))
    pictures = [np.asarray(image) for image in images if image.mode == "RGB" and image.size == (16, 16)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the first format has no checksum, which may be said
        network = load(packed, kernel="c")
    return network(network.preprocess(np.stack(pictures)))


@pytest.fixture(scope="module")
def expected() -> dict:
    return json.loads(EXPECTED.read_text())


@pytest.fixture(scope="module")
def same_bits(expected) -> bool:
    """Whether training may be compared bit by bit: this torch is the recorded one, but for a bug fix."""
    return X86 and torch.__version__.split(".")[:2] == expected["torch"].split(".")[:2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """The runs and their images, as they were packed."""
    folder = tmp_path_factory.mktemp("old")
    shutil.unpack_archive(ARCHIVE, folder, filter="data")
    return folder


@pytest.fixture(scope="module")
def finished(folder, tmp_path_factory) -> tuple[Path, str]:
    """A copy of `folder` with the runs at their end, and what the scripts have printed."""
    copy = tmp_path_factory.mktemp("finished")
    shutil.copytree(folder, copy, dirs_exist_ok=True)
    return copy, finish(copy, FORM)


@pytest.mark.parametrize("name", RUNS)
def test_a_checkpoint_loads(folder, expected, name):
    assert position(find(folder, name)) == expected["runs"][name]["started"]


@pytest.mark.parametrize("name", RUNS)
def test_a_run_resumes_to_the_same_end(finished, expected, same_bits, name):
    folder, output = finished
    run, end = find(folder, name), expected["runs"][name]
    checkpoint, records = load_checkpoint(run), metrics(run)
    assert checkpoint["finished"] and len(records) == len(end["metrics"]) == checkpoint["epoch"]
    if same_bits:
        known = zip(records, end["metrics"], strict=True)
        assert [{entry: new[entry] for entry in old} for new, old in known] == end["metrics"]
        assert digest(run) == end["digest"]
    else:
        for new, old in zip(records, end["metrics"], strict=True):
            for loss, tolerance in TOLERANCE.items():
                assert new[loss] == pytest.approx(old[loss], abs=tolerance), loss
    if name != "search-old":  # the table of evaluate.py
        (line,) = (line for line in output.splitlines() if line.startswith(f"runs/{run.name} "))
        assert f"{records[-1]['valid_top1']:.2f}" in line.split()


def test_the_packed_network_gives_the_same_logits(folder, expected):
    new, old = logits(PACKED, folder), np.float32(expected["logits"])
    assert np.array_equal(new.argmax(1), old.argmax(1))
    if X86:
        assert np.array_equal(new, old)
    else:
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-5)


def test_infer_sees_pictures_of_all_kinds_as_before(folder, expected):
    new, old = predictions(PACKED, folder), expected["predictions"]
    if X86:
        assert new == old
    else:
        assert [row.split(",")[:2] for row in new] == [row.split(",")[:2] for row in old]


def test_a_resumed_stage_2_is_exported_to_the_same_network(finished, expected, same_bits):
    if not same_bits:
        pytest.skip("a sign that turns in training makes another network")
    folder, _ = finished
    assert np.array_equal(logits(folder / "exported.ebnas", folder), np.float32(expected["logits"]))
