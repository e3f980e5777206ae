"""The architecture page is true: every module stands in its table, and imports only from those above it."""

import ast
import re

import pytest
from conftest import ROOT

PAGE = (ROOT / "docs" / "architecture.md").read_text()
ROWS = [line.split("|")[2] for line in PAGE.splitlines() if line.startswith("|")]
ORDER = [name for row in ROWS for name in re.findall(r"`([\w/]+(?:\.py|/))`", row)]
SCRIPTS = [path.name for path in ROOT.glob("*.py") if "\n    run_main(main," in path.read_text()]
MODULES = [
    path.relative_to(ROOT).as_posix()
    for pattern in (
        *("*.py", "baselines/*.py", "trials/*.py", "packed/*.py", "figures/*.py"),
        *("comparison/*.py", "web/*.py", "board/*.py", "kernels/*.py", "evidence/*.py"),
    )
    for path in sorted(ROOT.glob(pattern))
]


def place(module: str) -> int:
    """Of a file in the table: its own row, or that of its folder."""
    return ORDER.index(module if module in ORDER else module.split("/")[0] + "/")


def imported(module: str) -> set[str]:
    """The project's own files that a module imports, anywhere but for type checking alone."""
    tree = ast.parse((ROOT / module).read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = [ast.Pass()]
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    files = {name.replace(".", "/") + ".py" for name in names}
    packages = {f"{name}/__init__.py" for name in names}
    return {file for file in files | packages if file in MODULES}


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_those_above_it(module):
    for other in imported(module):
        if other.split("/")[0] != module.split("/")[0]:
            assert place(other) < place(module), f"{module} imports {other}"
            assert other not in SCRIPTS, f"{module} imports the script {other}"


def test_the_scripts_are_those_that_users_type():
    assert {"train_search.py", "train.py", "train_imagenet.py", "infer.py"} <= set(SCRIPTS)
