"""What is imported when: a flag is read before torch is there, and no small run waits for torchvision."""

import subprocess
import sys

import pytest
from support.scripts import ROOT, SCRIPTS, environment

from binary_ops import ACTIVATION_MODULES
from comparison.measure import CLOCKS
from flags import choices
from kernels import FORMS
from networks.registry import SYSTEMS
from networks.rows import CELL_SYSTEMS

READ = """
import runpy, sys
for script in sys.argv[1:]:
    for word in ("--help", "--no_such_flag"):
        sys.argv = [script, word]
        try:
            runpy.run_path(script, run_name="__main__")
        except SystemExit as end:
            assert end.code == (0 if word == "--help" else 2), (script, word, end.code)
        else:
            raise AssertionError(f"{script} {word} did not end")
    assert "torch" not in sys.modules, f"{script} imports torch"
"""

IMPORT = """
import sys
import benchmark, evaluate, export, train, train_imagenet, train_search
print([name for name in ("torchvision", "torch._dynamo", "matplotlib", "tensorboard") if name in sys.modules])
"""


def python(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-c", *words], cwd=ROOT, env=environment(), capture_output=True, text=True
    )


def test_help_and_wrong_flags_need_no_torch():
    result = python(READ, *SCRIPTS)
    assert result.returncode == 0, result.stderr
    assert len(SCRIPTS) >= 11 and result.stdout.count("usage:") == len(SCRIPTS)


def test_a_script_imports_no_more_than_its_run_needs():
    result = python(IMPORT)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


@pytest.mark.parametrize(
    ("names", "registry"),
    [
        (choices.ACTIVATIONS, ACTIVATION_MODULES),
        (choices.FORMS, FORMS),
        (choices.CLOCKS, CLOCKS),
        ({*CELL_SYSTEMS, "resnet"}, SYSTEMS),
    ],
)
def test_the_choices_are_what_there_is(names, registry):
    assert set(names) == set(registry)
