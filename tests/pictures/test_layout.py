"""The architecture page is true: every module stands in its table, and imports only from those above it."""

import pytest
from support.scripts import SCRIPTS

from pictures.layout import imported, imports_of_parts, layout_figure, modules, parts

ORDER = [name for files in parts().values() for name in files]


def place(module: str) -> int:
    """Of a file in the table: its own row, or that of its folder; before all others a folder's own file that
    has no row, and so imports nothing."""
    folder = module.split("/")[0] + "/"
    if module == f"{folder}__init__.py" and folder not in ORDER:
        return -1
    return ORDER.index(module if module in ORDER else folder)


@pytest.mark.parametrize("module", modules())
def test_a_module_imports_only_from_those_above_it(module):
    for other in imported(module):
        if other.split("/")[0] != module.split("/")[0]:
            assert place(other) < place(module), f"{module} imports {other}"
            assert other not in SCRIPTS, f"{module} imports the script {other}"


def test_the_scripts_are_those_that_users_type():
    assert {"train_search.py", "train.py", "train_imagenet.py", "infer.py"} <= set(SCRIPTS)


def test_the_picture_shows_what_imports_what():
    assert "networks" in imports_of_parts()["kernels"]
    assert imports_of_parts()["packed"] == set()
    texts = {text.get_text() for text in layout_figure().axes[0].texts}
    assert texts == set(parts())
