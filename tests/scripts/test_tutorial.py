"""docs/tutorial.md and its notebook: the commands, run with tiny sizes."""

import json
import re
import shlex

from support.scripts import ROOT, TINY_SEARCH, TINY_STAGE

PAGE = (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^python (.*)$", PAGE, re.MULTILINE)
SMALL = ["--image_size", "16", "--workers", "0", "--epochs", "1"]
TINY = {"train_search.py": [*TINY_SEARCH, *SMALL], "train.py": [*TINY_STAGE, *SMALL]}


def test_the_commands_lead_from_a_folder_to_a_page_and_a_board(scripts, monkeypatch, without_pictures):
    monkeypatch.chdir(scripts.folder)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(code.replace("600", "200"), {})
    assert len(COMMANDS) == 10
    for command in COMMANDS:
        script, *words = shlex.split(command)
        flags = [
            str(path.relative_to(scripts.folder)) if path else word
            for word in words
            for path in (sorted(scripts.folder.glob(word)) if "*" in word else [None])
        ]
        flags = ["photos/star" if flag.endswith(".png") else flag for flag in flags]
        scripts.run(script, *flags, *TINY.get(script, []))
    assert (scripts.folder / "page" / "index.html").is_file()
    assert (scripts.folder / "photos_board" / "src").is_dir()


def test_the_notebook_has_the_pages_commands_and_their_outputs():
    notebook = json.loads((ROOT / "docs" / "tutorial.ipynb").read_text(encoding="utf-8"))
    cells = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    lines = [line.strip() for cell in cells for line in cell["source"] if line.startswith("!")]
    assert lines == [f"!python {command}" for command in COMMANDS]
    assert all(cell["outputs"] for cell in cells if cell["source"][0].startswith("!"))
    text = "".join(line for cell in cells for output in cell["outputs"] for line in output["text"])
    for figure in re.findall(r"test top-1 [\d.]+ %|[\d,]{7} bytes|\d\d\.\d\d%  \w+", PAGE):
        assert figure in text
