"""Studies of what the search, its parts and the two stages bring: many runs, one table and pictures each.

    python study.py search --scale small --data DIR     # DIR/train/<class>/*, DIR/test/<class>/*: CIFAR-10's
    python study.py search --scale full                 # the published settings: for GPUs
    python study.py all --scale tiny                    # does it run? minutes, embedded images
    python study.py search --scale full --shard 2/8     # every eighth chain of runs, on a machine of its own
    python study.py search --table                      # what stands in results/, without running anything

Each run is an ordinary one of this program's scripts, in runs/, with its own resume: a study that was ended
anywhere goes on where it was, and never repeats what stands in results/. Machines that share runs/ and
results/ (SLURM arrays) do not get in each other's way. Of each study results/ gets NAME.json (every run with
its flags, seed, commit, hardware, versions, seconds and figures), NAME.md (the table) and pictures.
"""

from __future__ import annotations

if __name__ == "__main__":  # torch takes seconds to import
    from utils import end_on_interrupt

    end_on_interrupt()

import argparse
import fcntl
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import replace
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from tqdm import tqdm

import options
from baselines import trained_network
from checkpoint import load_checkpoint
from comparison.measure import machine
from cost import measure_cost
from evidence.plan import BestOf, FolderOf, Job, Study
from evidence.report import report
from evidence.store import Store
from evidence.studies import SCALES, STUDIES
from figures import draw_study
from genotypes import genotype_from_dict, save_genotype
from options import command_line
from runs import RESULT, RUNS, read_args, read_metrics, read_result
from utils import RunFailed, run_main, write_atomically

HERE = Path(__file__).parent


def shard(text: str) -> tuple[int, int]:
    """The type of --shard: `2/8`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"is {text}; it must be I/N with I from 1 to N")
    return int(match[1]), int(match[2])


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    flag("name", metavar="NAME", choices=[*STUDIES, "all"], help=f"{', '.join(STUDIES)}, or all of them")
    flag("--scale", choices=SCALES, default="small", help="sizes, epochs and numbers of runs")
    flag("--jobs", type=options.integer(1, 1024), default=1, help="runs at once; on GPUs each takes its own")
    flag("--shard", type=shard, default=(1, 1), metavar="I/N", help="part I of N of the runs, for a machine")
    flag("--set", help="another set than the scale's")
    flag("--data", help="where the set is")
    flag("--out", default="results", help="folder of the figures")
    flag("--table", action="store_true", help="run nothing: tables and pictures of what is there")
    return parser


def main(args: argparse.Namespace) -> None:
    scale = SCALES[args.scale]
    if args.set is not None:
        scale = replace(scale, images={**scale.images, "set": args.set})
    names = list(STUDIES) if args.name == "all" else [args.name]
    studies = [STUDIES[name](scale) for name in names]
    store = Store(Path(args.out), args.scale, STUDIES)
    failed = []
    if not args.table:
        runner = Runner(store, data=args.data, jobs=args.jobs)
        for study in studies:
            failed += runner.run(study, args.shard)
    for study in studies:
        content = store.keep(study, {})
        text = report(study, content)
        write_atomically(store.folder / f"{study.name}.md", text.encode())
        print(text)
        for picture in draw_study(study, content, store.folder):
            print(f"picture {picture}")
    if failed:
        raise RunFailed(f"{len(failed)} runs failed; the same command tries them again. {failed[0]}")


class Runner:
    """Runs jobs as processes, `jobs` at once; `data` says where the images are, on this machine.

    A signal ends it and its runs, each with a checkpoint to go on from.
    """

    def __init__(self, store: Store, *, data: str | None, jobs: int):
        self.store, self.data, self.jobs = store, data, jobs
        self.gpus = torch.cuda.device_count()
        self.slots: SimpleQueue[int] = SimpleQueue()
        for slot in range(jobs):
            self.slots.put(slot)
        self.processes: set[subprocess.Popen] = set()
        self.ended = threading.Event()

    def run(self, study: Study, part: tuple[int, int]) -> list[str]:
        """Run what is not yet done of this part of a study; what failed, a line each."""
        index, parts = part
        last = study.jobs()[index - 1 :: parts]
        known, failed = self.store.records(), []
        open_jobs = {job.key: job for end in last if end.key not in known for job in end.chain}
        bar = tqdm(total=len(open_jobs), desc=study.name, unit=" runs", dynamic_ncols=True, disable=None)
        previous = signal.signal(signal.SIGTERM, lambda *_: signal.raise_signal(signal.SIGINT))
        with bar, ThreadPoolExecutor(self.jobs) as pool:
            chains = [pool.submit(self._run_chain, study, end, bar) for end in last if end.key not in known]
            try:
                for chain in as_completed(chains):
                    try:
                        chain.result()
                    except RunFailed as error:
                        failed.append(str(error))
                        tqdm.write(f"failed: {error}", file=sys.stderr)
            except KeyboardInterrupt:
                self._end(chains)
                raise
            finally:
                signal.signal(signal.SIGTERM, previous)
        return failed

    def _end(self, chains: list) -> None:
        self.ended.set()
        for chain in chains:
            chain.cancel()
        for process in list(self.processes):
            process.send_signal(signal.SIGTERM)
        for process in list(self.processes):
            process.wait()

    def _run_chain(self, study: Study, end: Job, bar: tqdm) -> None:
        for job in dict.fromkeys(end.chain):
            if self.ended.is_set():
                return
            RUNS.mkdir(exist_ok=True)
            with open(RUNS / f".study-{job.key}", "a") as lock:  # other shards may need the same job
                fcntl.flock(lock, fcntl.LOCK_EX)
                records = self.store.records()
                if not self._is_done(job, records):
                    record = self._run(job, records)
                    self.store.keep(study, {job.key: record})
                    tqdm.write(f"{study.name}: {title(record)}", file=sys.stdout)
            bar.update()

    def _is_done(self, job: Job, records: Mapping[str, dict]) -> bool:
        """Of a first stage its weights must be here, too, where its second stage is not done."""
        figures_suffice = job.script == "train_search.py" or job.flags.get("binary")
        return job.key in records and bool(figures_suffice or run_folder(job))

    def _run(self, job: Job, records: Mapping[str, dict]) -> dict[str, Any]:
        """Run a job, or go on with it; its record. Raises RunFailed with the last line that it wrote."""
        flags = {name: self._value(value, records) for name, value in job.flags.items()}
        flags |= {"data": self.data, "save": f"study-{job.key}", "resume": "auto"}
        slot = self.slots.get()
        if self.gpus:
            flags["gpu"] = slot % self.gpus
        words = [sys.executable, str(HERE / job.script), *command_line(flags)]
        environment = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // self.jobs)), **os.environ}
        process = subprocess.Popen(
            words,
            env=environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a terminal's Ctrl-C comes to us, and from us to it
        )
        self.processes.add(process)
        _, errors = process.communicate()
        self.processes.discard(process)
        self.slots.put(slot)
        if process.returncode:
            line = (errors.strip().splitlines() or ["no word of why"])[-1]
            raise RunFailed(f"{shlex.join(['python', *words[1:]])}: {line}")
        return self._record(job)

    def _value(self, value: Any, records: Mapping[str, dict]) -> Any:
        if isinstance(value, FolderOf):
            return run_folder(value.job) or self._found_genotype(value.job, records)
        if isinstance(value, BestOf):
            best = max(value.jobs, key=lambda job: records[job.key]["figures"]["best"]["score"])
            return best.flags["arch"]
        return value

    def _found_genotype(self, job: Job, records: Mapping[str, dict]) -> Path:
        """A genotype file, of a search whose figures alone are on this machine."""
        path = RUNS / f"study-{job.key}.json"
        save_genotype(path, genotype_from_dict(records[job.key]["figures"]["genotype"]))
        return path

    def _record(self, job: Job) -> dict[str, Any]:
        folder = run_folder(job)
        record = {
            **job.identity,
            "commit": read_args(folder)["commit"],
            "machine": machine(torch.device("cuda" if self.gpus else "cpu")),
            "seconds": round(sum(epoch["seconds"] for epoch in read_metrics(folder)), 1),
            "figures": read_result(folder),
        }
        if job.script == "train.py":
            checkpoint = load_checkpoint(folder)
            cost = measure_cost(trained_network(checkpoint), checkpoint["data"]["image_size"])
            record["cost"] = {
                "parameters": cost.parameters,
                "ops": cost.ops,
                "bytes": cost.binary_bytes + cost.float_bytes,
            }
            record["genotype"] = checkpoint["config"]["genotype"]
        return record


def run_folder(job: Job) -> Path | None:
    """The folder of a job's finished run; None where there is none on this machine."""
    return next((path.parent for path in sorted(RUNS.glob(f"*-study-{job.key}-*/{RESULT}"))), None)


def title(record: Mapping[str, Any]) -> str:
    """One line on a finished run."""
    figures = record["figures"]
    shown = figures["test"] or figures["best"] if "best" in figures else figures
    top1 = shown.get("top1", shown.get("score", shown.get("valid_top1")))
    return f"{shlex.join(command_line(record['flags']))}: {top1:.2f} %, {record['seconds']:.0f} s"


if __name__ == "__main__":
    run_main(main, parser)
