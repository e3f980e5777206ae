"""study.py with the real scripts, at a size of seconds."""

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable

import pytest
from support.scripts import TINY

import study
from evidence.plan import Study
from evidence.studies import Scale, arm, network_job, searched_job


@pytest.fixture
def one_study(monkeypatch, data_flags) -> Study:
    """A search's cell against the published one, one seed each."""
    images = dict(zip((f.removeprefix("--") for f in data_flags[::2]), data_flags[1::2], strict=True))
    del images["data"]
    common = dict(zip((f.removeprefix("--") for f in TINY[::2]), TINY[1::2], strict=True)) | {"epochs": "1"}
    scale = Scale(
        images={**images, **common},
        search={"init_channels": 8},
        network={"init_channels": 4, "groups": 2, "holdout": 30},
        **dict.fromkeys(("stage1_epochs", "stage2_epochs", "candidates"), 1),
        **dict.fromkeys(("searches", "random_cells", "published", "seeds", "ema"), 1),
        trial={},
        rows={},
        larger={},
        larger_epochs=(1, 1),
    )
    arms = (
        arm("published", 1, lambda s: network_job(scale, s)),
        arm("searched", 1, lambda s: searched_job(scale, s)),
    )
    made = Study("search", "Is it better?", arms)
    monkeypatch.setattr(study, "STUDIES", {"search": lambda _: made})
    return made


def test_a_study_goes_on_where_it_was_ended(one_study, scripts, images):
    flags = ["search", "--scale", "tiny", "--data", images]
    assert "0 of 2 runs" in scripts.run("study.py", *flags, "--table").stdout
    line = scripts.run("study.py", *flags[:-1], "nowhere", code=2).stderr.splitlines()[-1]
    assert "no folder 'train' in nowhere" in line

    assert "1 of 2 runs" in scripts.run("study.py", *flags, "--shard", "1/2").stdout
    output = scripts.run("study.py", *flags, "--jobs", 2).stdout
    assert "2 of 2 runs" in output and "The searches" in output
    assert len(scripts.runs("*-study-*")) == 5, "two stages, then a search and two stages, and nothing again"
    file = scripts.folder / "results" / "tiny" / "search.json"
    content = json.loads(file.read_text())
    assert len(content["jobs"]) == 5
    for record in content["jobs"].values():
        assert record["commit"] and record["machine"]["torch"] and record["seconds"] > 0
    assert file.with_suffix(".png").exists()

    file.unlink()  # as if it was killed before it noted what was done
    assert "2 of 2 runs" in scripts.run("study.py", *flags).stdout
    assert len(scripts.runs("*-study-*")) == 5
    assert json.loads(file.read_text())["jobs"].keys() == content["jobs"].keys()
    shutil.rmtree(scripts.folder / "runs")  # another machine, which has the figures alone
    assert "2 of 2 runs" in scripts.run("study.py", *flags).stdout
    assert not scripts.runs("*-study-*")


@pytest.mark.parametrize("end", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_ends_a_study_and_its_runs_go_on_later(one_study, scripts, images, end):
    """Of a study that is killed the run lives on: the next one waits for it, and takes what it made."""
    flags = ["search", "--scale", "tiny", "--data", images, "--shard", "1/2"]
    pid = os.fork()
    if not pid:
        with contextlib.suppress(BaseException):
            scripts.run("study.py", *flags)
        os._exit(0)
    wait_for(lambda: any(run.joinpath("last.pt").exists() for run in scripts.runs("*-study-*")))
    (run,) = scripts.runs("*-study-*")
    os.kill(pid, end)
    os.waitpid(pid, 0)
    assert "1 of 2 runs" in scripts.run("study.py", *flags).stdout
    stages = sorted(each.name.split("-")[3] for each in scripts.runs("*-study-*"))
    assert stages == ["stage1", "stage2"] and run in scripts.runs("*-study-*")


def wait_for(event: Callable[[], bool], seconds: float = 240) -> None:
    started = time.monotonic()
    while not event():
        assert time.monotonic() < started + seconds
        time.sleep(0.05)


def test_bad_flags_are_one_line(scripts):
    assert "choose from" in scripts.fails("study.py", "nothing")
    assert "--shard is 3/2" in scripts.fails("study.py", "search", "--shard", "3/2")
    assert "choose from" in scripts.fails("study.py", "search", "--set", "nothing")
    larger = ("transfer", "--scale", "full", "--set", "cifar100", "--table")
    assert "no larger task is known for scale full on cifar100" in scripts.fails("study.py", *larger)
    (scripts.folder / "taken").touch()
    assert "taken is a file" in scripts.fails("study.py", "search", "--out", "taken", "--table")
