"""What Windows lacks or refuses, as far as another system shows it: modules, signals, links, open files."""

import multiprocessing
import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from support.scripts import ROOT, SCRIPTS, TINY_STAGE, environment

import utils
from flags import options
from images import files as folders
from images import reader
from packed import compiler
from run import checkpoint, processes
from run.runs import Run

WITHOUT = """
import importlib, os, signal, sys
for name in ("fcntl", "grp", "pwd", "pty", "readline", "resource", "syslog", "termios", "tty"):
    sys.modules[name] = None
for name in ("SIGHUP", "SIGALRM", "SIGUSR1", "sigwaitinfo", "sigwait", "pthread_sigmask", "alarm"):
    delattr(signal, name)
for name in ("fork", "getuid", "killpg", "mkfifo", "sched_getaffinity", "setsid", "sysconf"):
    delattr(os, name)

def refuse(*_, **__):
    raise OSError("no links here")

os.symlink = os.link = refuse
"""


def test_every_script_starts_without_what_is_posix_alone(tmp_path, images):
    """And one of them trains, is found and goes on."""
    program = f"""{WITHOUT}
sys.path.insert(0, {str(ROOT)!r})
for script in {SCRIPTS}:
    module = importlib.import_module(script.removesuffix(".py"))
    assert "usage" in module.parser().format_usage(), script
import train
from utils import run_main
for more in ([], ["--resume", "auto", "--epochs", "1"]):
    sys.argv = ["train.py", *{[*TINY_STAGE, "--epochs", "1"]}, *more]
    sys.argv += ["--set", "folder", "--data", {str(images)!r}, "--image_size", "16", "--workers", "0"]
    run_main(train.main, train.parser)
import study
sys.argv = ["study.py", "search", "--table"]
run_main(study.main, study.parser)
"""
    command = [sys.executable, "-W", "ignore", "-c", program]
    done = subprocess.run(command, cwd=tmp_path, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(list(tmp_path.glob("runs/eval-EXP-stage1-*/result.json"))) == 2


@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_that_are_not_forked(images, method):
    """They get a copy of what they read from, and end when they are told to."""
    before, others = multiprocessing.get_start_method(), multiprocessing.active_children()
    multiprocessing.set_start_method(method, force=True)
    try:
        pictures = reader.FileReader(folders.list_images(images / "test"), 16, resize=16)
        items = reader.read_blocks(
            reader.block_loader(pictures, [(0, torch.arange(9)), (0, torch.arange(9))], 1)
        )
        pixels, labels, _ = next(items)
    finally:
        multiprocessing.set_start_method(before, force=True)
    expected = pictures[0, torch.arange(9)]
    assert torch.equal(pixels, expected[0]) and torch.equal(labels, expected[1])
    (worker,) = (child for child in multiprocessing.active_children() if child not in others)
    worker.terminate()
    worker.join(10)
    assert worker.exitcode == 0


def test_what_the_end_of_a_worker_would_signal_is_not_asked_for(monkeypatch):
    monkeypatch.delattr(signal, "SIGCHLD")
    assert list(reader.read_blocks([1, 2])) == [1, 2]


def test_a_file_that_is_being_read_is_replaced_a_moment_later(tmp_path, monkeypatch):
    """And no folder is opened, which Windows refuses."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"old")
    replace, refusals = os.replace, [PermissionError(13, "Permission denied")] * 3

    def busy(source, target):
        if refusals:
            raise refusals.pop()
        replace(source, target)

    monkeypatch.setattr(utils, "WINDOWS", True)
    monkeypatch.setattr(utils.os, "replace", busy)
    monkeypatch.setattr(utils.os, "open", lambda *_: pytest.fail("opened a folder"))
    monkeypatch.setattr(utils.time, "sleep", lambda _: None)
    utils.write_atomically(path, b"new\n")
    assert path.read_bytes() == b"new\n" and list(tmp_path.iterdir()) == [path]
    refusals += [PermissionError(13, "Permission denied")] * 9
    with pytest.raises(OSError, match="cannot write: permission denied"):
        utils.write_atomically(path, b"newer")
    assert path.read_bytes() == b"new\n" and list(tmp_path.iterdir()) == [path]


def test_a_checkpoint_that_is_to_be_replaced_is_not_mapped(interrupted, monkeypatch):
    asked, load = [], torch.load

    def noting(*args, **options):
        asked.append(options["mmap"])
        return load(*args, **options)

    monkeypatch.setattr(torch, "load", noting)
    for windows in (False, True):
        monkeypatch.setattr(checkpoint, "WINDOWS", windows)
        checkpoint.load_checkpoint(interrupted)
    assert asked == [True, False]


def test_commands_are_quoted_for_the_shell_that_is_there(monkeypatch):
    words = ["python", "train.py", "--data", "my images"]
    assert utils.command_text(words) == "python train.py --data 'my images'"
    monkeypatch.setattr(utils, "WINDOWS", True)
    assert utils.command_text(words) == 'python train.py --data "my images"'


def test_a_name_without_slashes_of_either_kind(monkeypatch):
    assert options.run_label(r"a\b") == r"a\b"
    monkeypatch.setattr(options.os, "sep", "\\")
    with pytest.raises(options.argparse.ArgumentTypeError, match="without slashes"):
        options.run_label(r"a\b")


def test_a_name_that_a_file_system_refuses_is_the_users_fault(tmp_path, scripts, monkeypatch, data_flags):
    def refuse(path, *_args, **_options):
        raise OSError(22, "Invalid argument", str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    line = scripts.run("train.py", *data_flags, *TINY_STAGE, "--save", "a:b", code=2).stderr
    assert line.startswith("error: ") and line.endswith("invalid argument\n")


def test_folders_without_numbers_are_told_apart_by_their_paths(tmp_path, monkeypatch):
    for name in ("cat", "dog"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").touch()
    stat = Path.stat

    def unnumbered(path, **options):
        found = stat(path, **options)
        return types.SimpleNamespace(st_dev=found.st_dev, st_ino=0, st_mode=found.st_mode)

    monkeypatch.setattr(Path, "stat", unnumbered)
    found = folders.list_images(tmp_path)
    assert (found.labels, found.left_out) == ([0, 1], "")


def test_a_process_is_started_and_told_to_end(monkeypatch):
    """By Ctrl-Break, in a group of its own, since there is no SIGTERM."""
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda command, **options: started.append(options))
    monkeypatch.setattr(subprocess, "CREATE_NEW_PROCESS_GROUP", 512, raising=False)
    monkeypatch.setattr(signal, "CTRL_BREAK_EVENT", 1, raising=False)
    for windows in (False, True):
        monkeypatch.setattr(processes, "WINDOWS", windows)
        processes.start(["x"], env={}, stderr=None, ends_with_us=True)
        sent = []
        processes.end(types.SimpleNamespace(poll=lambda: None, send_signal=sent.append))
        assert sent == ([1] if windows else [signal.SIGTERM])
    assert started[0]["start_new_session"] and "creationflags" not in started[0]
    assert started[1]["creationflags"] == 512
    assert not started[1].keys() & {"start_new_session", "preexec_fn", "pass_fds"}


def test_a_claim_waits_for_a_run_that_outlived_its_parent(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "runs" / "eval-study-0123-stage1-20260101-000000"
    folder.mkdir(parents=True)
    run = Run(folder)
    with pytest.raises(processes.Stopped), processes.claimed("study-0123", wait=False):
        pytest.fail("claimed")
    with processes.claimed("study-4567", wait=False):
        pass
    run.close()
    with (
        processes.claimed("study-0123", wait=False),
        pytest.raises(processes.Stopped),
        processes.claimed("study-0123", wait=False),
    ):
        pytest.fail("claimed twice")


def test_trials_are_kept_where_no_link_can_be_made(tmp_path, monkeypatch):
    """Under a lock that excludes the usual one."""
    journal = pytest.importorskip("optuna.storages.journal")
    from trials import storage

    path = tmp_path / "trials.journal"
    usual = storage._journal(journal, str(path))
    monkeypatch.setattr(Path, "symlink_to", lambda *_: (_ for _ in ()).throw(OSError("no links")))
    other = storage._journal(journal, str(path))
    assert isinstance(usual._lock, journal.JournalFileSymlinkLock)
    assert isinstance(other._lock, journal.JournalFileOpenLock)
    assert other._lock.acquire()
    with pytest.raises(FileExistsError):
        os.symlink(path, usual._lock._lock_file)
    other._lock.release()
    assert usual._lock.acquire()
    with pytest.raises(FileExistsError):
        os.open(other._lock._lock_file, os.O_CREAT | os.O_EXCL)
    usual._lock.release()


def test_the_compiler_of_windows_is_clang(monkeypatch):
    assert compiler._compilers()[-3:] == ["cc", "gcc", "clang"]
    monkeypatch.setattr(compiler, "os", types.SimpleNamespace(name="nt", environ={"CC": "gcc"}))
    assert compiler._compilers() == ["gcc", "clang"]


def test_records_have_the_same_bytes_everywhere(tmp_path):
    run = Run(tmp_path)
    run.metrics({"epoch": 0, "loss": 1.0})
    run.close()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b'{"epoch": 0, "loss": 1.0}\n'
