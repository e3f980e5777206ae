"""Running the jobs of a study as processes: several at once, shared between machines, ended and resumed."""

from __future__ import annotations

import hashlib
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from evidence.plan import BestOf, CellOf, FolderOf, Job, Study
from evidence.results import Results, is_whole
from flags.options import command_line
from genotypes import Genotype, describe, genotype_from_dict, save_genotype
from images.files import readable_classes
from networks.cost import measure_cost
from networks.lowering import lower
from networks.registry import trained_network
from packed import program_bytes
from run.checkpoint import load_checkpoint
from run.processes import PROGRAM, Stopped, claimed, end, environment, last_word, signals_to_interrupts, start
from run.runs import RESULT, RUNS, read_args, read_metrics, read_result
from utils import InputError, RunFailed, command_text

CURVES = ("train_loss", "valid_loss", "valid_top1", "seconds", "cpu_seconds")
"""What a record keeps of each epoch of a training."""


class Runner:
    """Runs what `results` lack, `at_once` jobs at a time; `data` says where the images are, on this machine.

    A signal ends it and its runs, each of which leaves a checkpoint to go on from.
    """

    def __init__(self, results: Results, *, data: str | None, at_once: int):
        self.results, self.data, self.at_once = results, data, at_once
        self.gpus = torch.cuda.device_count()
        self.slots: queue.SimpleQueue[int] = queue.SimpleQueue()
        for slot in range(at_once):
            self.slots.put(slot)
        self.processes: set[subprocess.Popen] = set()
        self.failed: dict[str, str] = {}
        self.stopped, self.starting = threading.Event(), threading.Lock()

    def run(self, study: Study, shard: tuple[int, int]) -> None:
        """Run what is not yet done of part I of N of a study. `failed` has a line of each job that failed: it
        is not tried again.

        Raises InputError where a script does not take what it was given: no other run would fare better.
        """
        part, parts = shard
        known = self.results.records()
        finals = [job for job in study.final_jobs()[part - 1 :: parts] if job.key not in known]
        jobs = {job.key for final in finals for job in final.chain}
        bar = tqdm(total=len(jobs), desc=study.name, unit=" runs", dynamic_ncols=True, disable=None)
        with bar, signals_to_interrupts(), ThreadPoolExecutor(self.at_once) as pool:
            chains = [pool.submit(self._run_chain, study, final, jobs, bar) for final in finals]
            try:
                running = set(chains)
                while running:  # Windows tells of no Ctrl-C within a wait, so each is short
                    done, running = wait(running, timeout=1, return_when=FIRST_COMPLETED)
                    for chain in done:
                        with suppress(RunFailed):
                            chain.result()
            except BaseException:
                self._stop(chains)
                raise

    def _stop(self, chains: list[Future]) -> None:
        with self.starting:  # whoever starts a run now sees that it must not, or its process is in the set
            self.stopped.set()
        for chain in chains:
            chain.cancel()
        for process in list(self.processes):
            end(process)

    def _run_chain(self, study: Study, final: Job, waiting: set[str], bar: tqdm) -> None:
        for job in final.chain:
            with claimed(f"study-{job.key}", stopped=self.stopped):
                records = self.results.records()
                if final.key in records:
                    return
                if job.key in final.missing(records, run_folder):
                    record = self._made(job, records)
                    _check_images(record, records.values())
                    self.results.keep(study, {job.key: record})
                    tqdm.write(f"{study.name}: {title(record)}", file=sys.stdout)
                if job.key in waiting:
                    waiting.discard(job.key)
                    bar.update()

    def _made(self, job: Job, records: Mapping[str, dict]) -> dict[str, Any]:
        """A job's record: of a run that is done, though a study that was killed did not note it, or of one
        that is made or goes on now. Raises RunFailed with the last line that it wrote, or where what it left
        is damaged; InputError where it says that it was given something wrong."""
        if job.key in self.failed:
            raise RunFailed(self.failed[job.key])
        try:
            if not run_folder(job):
                self._run(job, records)
            return _record(job)
        except RunFailed as error:
            self.failed[job.key] = str(error)
            tqdm.write(f"failed: {error}", file=sys.stderr)
            raise

    def _run(self, job: Job, records: Mapping[str, dict]) -> None:
        """Run or resume a job. Raises as `_made` does."""
        flags = {name: flag_text(value, records) for name, value in job.flags.items()}
        flags |= {"data": self.data, "save": f"study-{job.key}", "resume": "auto"}
        slot = self.slots.get()
        try:
            if self.gpus:
                flags["gpu"] = slot % self.gpus
            words = [sys.executable, str(PROGRAM / job.script), *command_line(flags)]
            with self.starting:
                if self.stopped.is_set():
                    raise Stopped
                process = start(words, env=environment(self.at_once), stderr=subprocess.PIPE)
                self.processes.add(process)
            _, errors = process.communicate()
        finally:
            self.slots.put(slot)
        self.processes.discard(process)
        if run_folder(job):  # whatever the code: a signal may have come after the end
            return
        code, reason = process.returncode, last_word(errors)
        if code < 0:
            reason = f"ended by {signal.Signals(-code).name}, as when memory runs out"
        elif code == 0:
            reason = f"it left no {RESULT}"
        kind = InputError if code == 2 else RunFailed
        raise kind(f"{command_text(['python', *words[1:]])}: {reason}")


def run_folder(job: Job) -> Path | None:
    """The folder of a job's finished run; None where there is none on this machine."""
    return next((path.parent for path in sorted(RUNS.glob(f"*-study-{job.key}-*/{RESULT}"))), None)


def title(record: Mapping[str, Any]) -> str:
    """One line on a finished run."""
    figures = record["figures"]
    top1 = figures["test"]["top1"] if "test" in figures else figures["valid_top1"]
    flags = {
        name: _place(value) if isinstance(value, dict) else value for name, value in record["flags"].items()
    }
    return f"{' '.join(command_line(flags))}: {top1:.2f} %, {record['seconds']:.0f} s"


def _place(others: Mapping[str, Any]) -> str:
    """Where the runs of a flag's other jobs are."""
    if "best_of" in others:
        return f"(best of {', '.join(others['best_of'])})"
    if "cell" in others:
        return f"({others['cell']})"
    return f"{RUNS}/*-study-{others['folder_of']}-*"


def flag_text(value: Any, records: Mapping[str, dict]) -> Any:
    """A flag's value as it stands on the command line."""
    if isinstance(value, FolderOf):
        return run_folder(value.job) or _found_genotype(value.job, records)
    if isinstance(value, BestOf):
        best = max(value.jobs, key=lambda job: records[job.key]["figures"]["best"]["score"])
        return flag_text(best.flags["arch"], records)
    if isinstance(value, CellOf):
        words = describe(value.genotype)
        return _genotype_file(hashlib.sha256(words.encode()).hexdigest()[:12], value.genotype)
    return value


def _found_genotype(job: Job, records: Mapping[str, dict]) -> Path:
    """A genotype file, of a search whose figures alone are on this machine."""
    return _genotype_file(job.key, genotype_from_dict(records[job.key]["figures"]["genotype"]))


def _genotype_file(key: str, genotype: Genotype) -> Path:
    path = RUNS / f"study-{key}.json"
    save_genotype(path, genotype)
    return path


def _record(job: Job) -> dict[str, Any]:
    """The record of a finished run. `seconds` are those of its epochs and evaluations. Raises RunFailed."""
    folder = run_folder(job)
    try:
        record = _read_record(job, folder)
    except (InputError, LookupError, TypeError, ValueError):
        record = None
    if not is_whole(record):
        raise RunFailed(f"{folder} is damaged; move it away, and the same command makes that run again")
    return record


def _read_record(job: Job, folder: Path) -> dict[str, Any]:
    args, metrics, checkpoint = read_args(folder), read_metrics(folder), load_checkpoint(folder)
    record = {
        **job.identity,
        "commit": args["commit"],
        "machine": args["machine"],
        "seconds": round(sum(epoch["seconds"] for epoch in metrics), 1),
        "figures": read_result(folder),
        "images": _images(checkpoint["data"]),
    }
    if job.script == "train.py":
        network = trained_network(checkpoint)
        cost = measure_cost(network, checkpoint["data"]["image_size"])
        size = cost.binary_bytes + cost.float_bytes
        record["cost"] = {"parameters": cost.parameters, "ops": cost.ops, "bytes": size}
        if packed := _packed_bytes(network, checkpoint["data"]):
            record["cost"]["packed_bytes"] = packed
        record["genotype"] = checkpoint["config"].get("genotype")
        record["curve"] = {name: [round(epoch[name], 4) for epoch in metrics] for name in CURVES}
    return record


def _packed_bytes(network: nn.Module, data: Mapping[str, Any]) -> int | None:
    """The size of the file that export.py makes of the network; None where it makes none, as of stage 1."""
    classes = readable_classes(data["classes"], Path(data["root"]))
    try:
        return len(program_bytes(lower(network, {**data, "classes": classes})))
    except InputError:
        return None


def _images(data: Mapping[str, Any]) -> dict[str, Any]:
    """What tells one set of images from another: their classes, and the statistics of those that a run trains
    on, which do not depend on where the images are."""
    classes = hashlib.sha256("\n".join(data["classes"]).encode()).hexdigest()[:12]
    return {"classes": classes, "mean": [round(value, 4) for value in data["mean"]]}


def _check_images(record: Mapping[str, Any], others: Iterable[Mapping[str, Any]]) -> None:
    """Raise InputError where a record is of other images than one that names the same set. A job's key has
    the set's name and not its images, which may be any for `--set folder`."""

    def named(other: Mapping[str, Any]) -> list[Any]:
        return [other["flags"].get(flag) for flag in ("set", "image_size", "train_images")]

    ours = record["images"]
    for other in others:
        if "images" not in other or named(other) != named(record):
            continue
        pairs = zip(other["images"]["mean"], ours["mean"], strict=True)
        if other["images"]["classes"] != ours["classes"] or any(abs(a - b) > 1e-3 for a, b in pairs):
            raise InputError(
                "the figures that are there are of other images than those of --data (their classes or mean "
                "colours differ); give another --out for these"
            )
