"""What looks into runs/: making a run's folder, its log and metrics, the run to resume or to start from."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Iterable
from itertools import count
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from tqdm import tqdm

from run.checkpoint import LAST, load_checkpoint, resolve_checkpoint
from search_space import PRIMITIVES, checked_operations
from utils import InputError, command_text, os_error_message, printable, remove_asides, write_atomically

RUNS = Path("runs")
METRICS, ARGS, RESULT = "metrics.jsonl", "args.json", "result.json"
LOCK, LAUNCH = ".lock", ".launch"

LOCATION = (
    "resume device gpu compile compile_mode workers kernels report_freq save_freq note model_path data "
    "tmp_data_dir"
).split()
"""Flags that say where or how a run is made, not what it computes: they may differ when it is resumed."""


class Run:
    """A run's folder, or on other processes than the main one (folder None) nothing at all.

    log.txt holds what is printed, metrics.jsonl one object an epoch, args.json the flags and the code's
    commit, result.json what a finished run has to show. While a Run is open its folder is locked, so that no
    second process resumes it; .launch holds the name of the `launch` that had it last.
    """

    def __init__(self, folder: Path | None, *, launch: str = ""):
        self.folder = folder
        if folder is None:
            return
        self._lock = FileLock(folder / LOCK)
        try:
            self._lock.acquire(timeout=0)
        except Timeout:
            raise InputError(f"{folder} is in use by another process") from None
        (folder / LAUNCH).write_text(launch, encoding="utf-8")
        remove_asides(folder)
        self._events = folder / "tensorboard" / f"events.out.tfevents.{time.time():.0f}.{os.getpid()}"
        self._text = open(folder / "log.txt", "a", buffering=1, encoding="utf-8")  # noqa: SIM115

    def log(self, text: str) -> None:
        """Append to log.txt, with the time, and print."""
        if self.folder is not None:
            for line in text.splitlines():
                line = f"{time.strftime('%m/%d %I:%M:%S %p')} {printable(line)}"
                self._text.write(line + "\n")
                tqdm.write(line, file=sys.stdout)
            sys.stdout.flush()

    def metrics(self, record: dict[str, Any]) -> None:
        """Append an epoch's record, with its key `epoch`, to metrics.jsonl and its numbers to TensorBoard."""
        if self.folder is None:
            return
        with open(self.folder / METRICS, "a", encoding="utf-8", newline="\n") as file:
            file.write(json.dumps(record) + "\n")
        self._write_events(record)

    def _write_events(self, record: dict[str, Any]) -> None:
        """Append to this process's file of TensorBoard events: here, and not by a SummaryWriter, whose thread
        ends with a traceback where it cannot write."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog  # takes a while to import
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.summary.writer.record_writer import RecordWriter

        numbers = {name: value for name, value in record.items() if isinstance(value, int | float)}
        epoch = numbers.pop("epoch")
        values = [Summary.Value(tag=name, simple_value=value) for name, value in numbers.items()]
        events = [Event(summary=Summary(value=values))]
        if not self._events.exists():  # `START`: what an earlier process wrote from this epoch on is void
            start = Event(session_log=SessionLog(status=SessionLog.START))
            events = [Event(file_version="brain.Event:2"), start, *events]
        self._events.parent.mkdir(exist_ok=True)
        with open(self._events, "ab") as file:
            for event in events:
                event.step, event.wall_time = epoch, time.time()
                RecordWriter(file).write(event.SerializeToString())

    def last_record(self) -> dict[str, Any] | None:
        """The newest record of metrics.jsonl; None before the first epoch's end, and off the main process."""
        if self.folder is None or not (self.folder / METRICS).exists():
            return None
        return (read_metrics(self.folder) or [None])[-1]

    def write_result(self, figures: dict[str, Any]) -> None:
        """Write result.json: what the run has to show for itself, once it is done."""
        if self.folder is not None:
            write_atomically(self.folder / RESULT, json.dumps(figures, indent=1).encode())

    def rewind(self, epoch: int) -> None:
        """Forget metrics from `epoch` on, which a resumed run is about to measure again."""
        if self.folder is not None and (path := self.folder / METRICS).exists():
            kept = [record for record in read_metrics(self.folder) if record["epoch"] < epoch]
            write_atomically(path, "".join(json.dumps(record) + "\n" for record in kept).encode())

    def progress(self, label: str, *, total: int, start: int = 0) -> tqdm:
        """A progress bar over steps: on a terminal only, never in a file or a pipe."""
        hidden = self.folder is None or not sys.stderr.isatty()
        return tqdm(total=total, initial=start, desc=label, leave=False, disable=hidden, dynamic_ncols=True)

    def close(self) -> None:
        if self.folder is not None:
            self._text.close()
            self._lock.release()


def create_run(name: str, args: dict[str, Any], device: torch.device) -> Path:
    """Make the folder runs/NAME-TIME (with a number behind it where that exists), with args.json in it.

    Raises InputError where `runs` is a file, OSError where it cannot be written.
    """
    stamp = f"{name}-{time.strftime('%Y%m%d-%H%M%S')}"
    for attempt in count(1):
        folder = RUNS / (stamp if attempt == 1 else f"{stamp}-{attempt}")
        try:
            RUNS.mkdir(exist_ok=True)
            folder.mkdir()
            break
        except FileExistsError:
            if not RUNS.is_dir():
                raise InputError(f"cannot make the run folder {folder}: {RUNS} is a file") from None
    command = command_text(["python", *sys.argv])
    record = {**args, "command": command, "commit": code_commit(), "machine": machine(device)}
    write_atomically(folder / ARGS, json.dumps(record, indent=1).encode())
    return folder


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The records of metrics.jsonl, each with its epoch, without a last line that a crash cut short.

    Raises InputError: it cannot be read, or has a line that is no such record (which one).
    """
    path, records = Path(folder) / METRICS, []
    lines = _read(path).split(b"\n")
    for number, line in enumerate(lines, 1):
        try:
            record = _json_object(line, path, first_line=number)
        except InputError:
            if number == len(lines):  # what follows the last newline: nothing, or a line cut short
                break
            raise
        if type(record.get("epoch")) is not int:
            raise InputError(f"{path}, line {number}: field 'epoch' must be a whole number")
        records.append(record)
    return records


def read_result(folder: Path) -> dict[str, Any]:
    """result.json: the figures of a finished run. Raises InputError: which file and line."""
    path = Path(folder) / RESULT
    return _json_object(_read(path), path)


def read_args(folder: Path) -> dict[str, Any]:
    """args.json: the flags of a run, its command and its commit. Raises InputError: which file and line."""
    path = Path(folder) / ARGS
    return _json_object(_read(path), path)


def operations_of_run(folder: Path) -> tuple[str, ...]:
    """The search space of a search; the seven operations, where it does not say. Raises InputError."""
    args = read_args(folder) if (Path(folder) / ARGS).exists() else {}
    names = args.get("operations", PRIMITIVES)
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise InputError(f"{Path(folder) / ARGS}: field 'operations' must be a list of names")
    return checked_operations(names)


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {os_error_message(error)}") from None


def _json_object(content: bytes, path: Path, *, first_line: int = 1) -> dict[str, Any]:
    """The object in `content`, which is the text of `path` from `first_line` on."""
    try:
        value = json.loads(content.decode())
    except UnicodeDecodeError as error:
        line = first_line + content.count(b"\n", 0, error.start)
        raise InputError(f"{path}, line {line}: not UTF-8 text") from None
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {first_line + error.lineno - 1}: not JSON: {error.msg}") from None
    except (ValueError, RecursionError):
        raise InputError(f"{path}, line {first_line}: a number too long, or nested too deeply") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}, line {first_line}: not a JSON object")
    return value


def code_commit() -> str | None:
    """The git commit of this program's own folder, marked `-dirty` where files differ, those of results/ left
    out; None outside git."""

    def git(*words: str) -> subprocess.CompletedProcess:
        command = ["git", "-C", str(Path(__file__).parent.parent), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=10)

    try:
        commit = git("rev-parse", "HEAD")
        dirty = git("diff", "--quiet", "HEAD", "--", ".", ":(exclude)results").returncode
    except (OSError, subprocess.SubprocessError):
        return None
    return f"{commit.stdout.strip()}{'-dirty' if dirty else ''}" if commit.returncode == 0 else None


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and the versions. `vectors`: the widest instructions of the processor that torch uses."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "vectors": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without that line
        return platform.processor() or platform.machine()


# Finding runs


def newest_checkpoint(pattern: str, fits: Callable[[dict], bool]) -> tuple[Path, dict] | None:
    """The newest last checkpoint, of the run folders whose name fits `pattern`, that `fits`: (path, content).

    A run that is damaged hides no older good one.
    """
    paths = [folder / LAST for folder in RUNS.glob(pattern) if (folder / LAST).is_file()]
    for path in sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True):
        try:
            checkpoint = load_checkpoint(path)
        except InputError as error:
            print(printable(f"warning: passed over: {error}"), file=sys.stderr)
            continue
        if fits(checkpoint):
            return path, checkpoint
    return None


def differing_flags(saved: dict, args: dict, names: Iterable[str]) -> list[str]:
    """`--layers 8, not 16` for each flag of `names` that a checkpoint saved otherwise."""
    return [
        f"--{name} {saved[name]}, not {args[name]}"
        for name in sorted(names)
        if name not in LOCATION and name in saved and saved[name] != args[name]
    ]


def find_resumable(resume: str, *, script: str, args: dict, given: Collection[str], runs: str) -> Path | None:
    """The checkpoint to go on from: of the folder `resume`, or for `auto` of the newest unfinished run of
    `runs` (a pattern of folder names) with the same flags, None where there is none.

    Raises InputError: of another script, already finished, or run with other flags than those given.
    """
    if resume == "auto":
        found = newest_checkpoint(
            runs, lambda saved: not saved["finished"] and not differing_flags(saved["args"], args, args)
        )
        return found[0] if found else None
    path = resolve_checkpoint(resume)
    if path.name != LAST or not (path.parent / ARGS).is_file():
        raise InputError(f"{path} is not the last checkpoint of a run; --resume takes a run's folder")
    checkpoint = load_checkpoint(path)
    if checkpoint["script"] != script:
        raise InputError(
            f"{path} is a checkpoint of {checkpoint['script']}.py, not of {script}.py: resume it there"
        )
    if checkpoint["finished"]:
        raise InputError(f"{path} is of a finished run; to train it further, give --pretrained {path.parent}")
    saved = checkpoint["args"]
    if saved.get("teacher"):  # it may have been moved: a checksum tells whether it is the same
        given = set(given) - {"teacher"}
    if differing := differing_flags(saved, args, given):
        raise InputError(
            f"{path} was run with {', '.join(differing)}: leave these flags out, or start a new run"
        )
    return path


def find_launched(launch: str, runs: str) -> Path | None:
    """The last checkpoint of the run of `runs` (a pattern) that `launch` made or resumed: where its workers,
    restarted, go on. None where it had not yet made one."""
    noted = [file for file in RUNS.glob(f"{runs}/{LAUNCH}") if (file.parent / LAST).is_file()]
    noted.sort(key=lambda file: file.stat().st_mtime_ns, reverse=True)  # containers give the same name twice
    return next((file.parent / LAST for file in noted if file.read_bytes() == launch.encode()), None)
