"""What a script's user sees: one line and an exit code. Files whole or not there. Each script here is a few
lines, in a process that imports no torch."""

import errno
import os
import subprocess
import sys

import pytest
from support.scripts import ROOT

from utils import InputError, check_output, printable, write_atomically

PROGRAM = """
import sys
from flags.options import Parser
from utils import InputError, RunFailed, run_main

def main(args):
    {}

run_main(main, Parser)
"""


def run(body: str, command: str = "exec {}", **environment: str) -> subprocess.CompletedProcess:
    """A script with this main, started by a shell `command`."""
    program = [sys.executable, "-c", PROGRAM.format(body)]
    environment = {**os.environ, "PYTHONUNBUFFERED": "", **environment}
    shell = ["sh", "-c", command.format('"$@"'), "sh", *program]
    return subprocess.run(shell, cwd=ROOT, env=environment, capture_output=True, text=True)


ENDINGS = [
    ("raise InputError('a\\nb \\x1b[31m')", 2, r"a\nb \x1b[31m"),
    ("raise RunFailed('no more')", 1, "no more"),
    ("raise KeyboardInterrupt", 130, "interrupted"),
    ("raise MemoryError", 1, "there is not enough memory; smaller batches, images or networks need less"),
    ("raise RuntimeError('CUDA out of memory. Tried')", 1, "there is not enough memory; smaller"),
    ("raise RuntimeError('DefaultCPUAllocator: can\\'t allocate memory')", 1, "there is not enough memory"),
    ("open('nowhere')", 2, "nowhere: no such file or directory"),
    ("open('x' * 300)", 2, "file name too long"),
    ("with open('/dev/full', 'w') as file: file.write('x')", 1, "no space left on device"),
]


@pytest.mark.parametrize(("body", "code", "line"), ENDINGS, ids=[body for body, *_ in ENDINGS])
def test_what_ends_a_script_is_one_line(body, code, line):
    result = run(body)
    assert result.returncode == code and result.stdout == ""
    assert result.stderr.startswith("error: ") and line in result.stderr and result.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    assert "Traceback" in run("raise RuntimeError('a bug')").stderr


UNREAD = "{{ {}; echo $? >&2; }} | true"
LATE = "import time; time.sleep(0.2); "  # `true` has gone


@pytest.mark.parametrize(
    ("command", "body", "code", "stderr"),
    [
        ("exec {} >&-", "print('seen by nobody')", 0, ""),
        ("exec {} 2>&-", "raise InputError('seen by nobody')", 2, ""),
        ("exec {} >&- 2>&- <&-", "print(open('utils.py').read())", 0, ""),
        ("exec {} >/dev/full", "print('lost')", 1, "error: no space left on device\n"),
        ("exec {} 2>/dev/full", "raise InputError('lost')", 2, ""),
        (UNREAD, LATE + "print('x')", 0, "error: nobody reads standard output any more\n1\n"),
        (UNREAD, LATE + "print('x'); raise InputError('y')", 0, "error: y\n2\n"),
    ],
)
def test_streams_that_are_closed_full_or_unread(command, body, code, stderr):
    result = run(body, command)
    assert (result.returncode, result.stderr) == (code, stderr)


def test_a_terminal_that_knows_only_ascii():
    result = run("print('ü ñ'); raise InputError('ü ñ')", PYTHONIOENCODING="ascii")
    assert (result.returncode, result.stdout) == (2, "\\xfc \\xf1\n")
    assert result.stderr == "error: \\xfc \\xf1\n"


def test_what_is_not_printable_is_escaped():
    assert printable("ü\n\x1b\udcff") == r"ü\n\x1b\udcff"


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "last.pt"
    write_atomically(path, b"old")

    def full(_descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="cannot write: no space left on device"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "file", b"")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_only_regular_files_are_replaced(tmp_path):
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("fifo", "."):
        with pytest.raises(InputError, match="not a regular file"):
            write_atomically(tmp_path / name, b"")
        with pytest.raises(InputError, match="not a regular file"):
            check_output(tmp_path / name)
    write_atomically(tmp_path / "link", b"through the link")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "file").read_bytes() == b"through the link"
    with pytest.raises(InputError, match="is what is read"):
        check_output(tmp_path / "link", tmp_path / "file")
    with pytest.raises(InputError, match="no folder"):
        check_output(tmp_path / "nowhere" / "file")
