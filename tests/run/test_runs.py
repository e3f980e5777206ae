"""What looks into runs/: making a run's folder, its log and metrics, finding the run to go on with."""

import os
import shutil

import pytest
import torch
from support.scripts import TINY_STAGE
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from run import runs
from run.runs import Run, create_run, find_launched, newest_checkpoint, read_args, read_metrics


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_runs_of_one_second_do_not_collide(here, monkeypatch):
    monkeypatch.setattr(runs.time, "strftime", lambda _format: "20260101-000000")
    folders = [create_run("search-EXP", {"seed": 3}, torch.device("cpu")) for _ in range(3)]
    assert [folder.name for folder in folders] == [f"search-EXP-20260101-000000{n}" for n in ("", "-2", "-3")]
    assert read_args(folders[2])["seed"] == 3


def test_a_run_that_cannot_be_made(here, fails, data_flags):
    (here / "runs").write_text("a file where the folder should be")
    assert "cannot make the run folder" in fails("train.py", *data_flags, *TINY_STAGE)
    (here / "runs").unlink()
    (here / "runs").mkdir()
    assert "file name too long" in fails("train.py", *data_flags, *TINY_STAGE, "--save", "x" * 300)
    assert r"--save is a\nb\x1b[31m" in fails("train.py", "--save", "a\nb\x1b[31m")


def test_the_log_has_a_line_for_a_line(here, capsys):
    run = Run(here)
    run.log("first\nü \x1b[31m")
    run.close()
    printed = capsys.readouterr().out
    assert (here / "log.txt").read_text(encoding="utf-8") == printed
    assert [line[len("01/01 00:00:00 AM ") :] for line in printed.splitlines()] == ["first", r"ü \x1b[31m"]


def test_metrics_are_rewound_with_their_events(here):
    for start in (0, 2):
        run = Run(here)
        run._events = run._events.with_name(f"events.out.tfevents.{start}")  # as of another process
        run.rewind(start)
        for epoch in range(start, 4):
            run.metrics({"epoch": epoch, "loss": float(start), "operations": {"skip": 1}})
        assert run.last_record()["epoch"] == 3
        run.close()
    assert [(record["epoch"], record["loss"]) for record in read_metrics(here)] == [
        (0, 0),
        (1, 0),
        (2, 2),
        (3, 2),
    ]
    events = EventAccumulator(str(here / "tensorboard")).Reload()
    assert events.Tags()["scalars"] == ["loss"]
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(0, 0), (1, 0), (2, 2), (3, 2)]


def test_a_damaged_run_hides_no_older_good_one(interrupted, here):
    newer = interrupted.with_name("eval-EXP-stage1-99999999-000000")
    shutil.copytree(interrupted, newer)
    os.utime(newer / "last.pt", (2e9, 2e9))
    assert newest_checkpoint("eval-EXP-*", lambda _: True)[0].parent.name == newer.name
    (newer / "last.pt").write_bytes(b"nonsense")
    os.utime(newer / "last.pt", (2e9, 2e9))
    assert newest_checkpoint("eval-EXP-*", lambda _: True)[0].parent.name == interrupted.name
    assert newest_checkpoint("eval-EXP-*", lambda checkpoint: checkpoint["finished"]) is None


def test_a_restart_goes_on_with_the_run_of_its_own_launch(here):
    def run(name: str, launch: str, when: float, *, saved: bool = True):
        folder = here / "runs" / name
        folder.mkdir(parents=True)
        Run(folder, launch=launch).close()
        if saved:
            (folder / "last.pt").touch()
        os.utime(folder / ".launch", (when, when))

    run("search-EXP-1", "host 1", 1.0)  # of an earlier container, say
    run("search-EXP-2", "host 1", 2.0)
    run("search-EXP-3", "host 2", 3.0)
    run("search-EXP-4", "host 1", 4.0, saved=False)
    run("search-OTHER-5", "host 1", 5.0)
    found = find_launched("host 1", "search-EXP-[0-9]*")
    assert found.parent.name == "search-EXP-2"
    assert find_launched("host 3", "search-EXP-[0-9]*") is None
