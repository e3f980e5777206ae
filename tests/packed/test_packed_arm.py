"""The packed kernel of 64-bit ARM under an emulator: a part of what `make test-arm` runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import kernel_process

TESTS = Path(__file__).parents[1]


def test_the_neon_path():
    """Counts to the last bit, random programs in every step, a file's logits: the tests of any path."""
    if reason := kernel_process.missing():
        pytest.skip(reason)
    files = (TESTS / "packed" / name for name in ("test_packed_kernel.py", "test_packed_fuzz.py"))
    chosen = "neon and (is_exact or fused or random_programs) or format_1"
    flags = ("-q", "-x", "-n", "0", "-p", "no:cacheprovider", "-p", "support.kernel_process")
    environment = {**os.environ, "PYTHONPATH": str(TESTS)}
    environment.pop("EBNAS_CFLAGS", None)
    command = [sys.executable, "-m", "pytest", *flags, "-k", chosen, *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "skipped" not in done.stdout, (done.stdout + done.stderr)[-3000:]
