"""Search for a cell by trials: train candidates for a while, the better ones for longer, and keep the best.

    python search_trials.py                                            # CIFAR-10, downloaded to data/
    python search_trials.py --strategy halving --set folder --data DIR # your own images
    python search_trials.py --most_kilobytes 90 --init_channels 16,24,32 --layers 5,8
    python search_trials.py --objective accuracy,kilobytes             # a front
    python search_trials.py --resume auto                              # go on after a crash
    python search_trials.py --storage runs/search-EXP-TIME/trials.journal  # one more process on that search

Leaves runs/search-EXP-TIME/genotype.json (rewritten after every trial), for train.py --arch. Needs Optuna
(pip install optuna). Its pages show a search while it runs: optuna-dashboard PATH/TO/trials.journal
"""

from __future__ import annotations

import argparse
import shlex
import sys
import time
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from itertools import product
from pathlib import Path
from typing import Any

from flags import options
from flags.choices import COSTS
from genotypes import describe, get_genotype, save_genotype
from training.recipes import EBNAS
from trials.cells import Space
from trials.strategies import FIGURES, STRATEGIES, Judge, Strategy, Trial, front
from utils import InputError, RunFailed, check_usage, command_text, human, run_main

JOURNAL = "trials.journal"
OWN = ("resume", "storage", "save", "budget", "note")
"""Flags that processes on one search, or one that goes on with it, may have of their own."""

FULL_TRAININGS = 10
MOST_FAILURES = 3
"""Trials in a row that may fail before the search does."""


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    flag = parser.add_argument_group("the search").add_argument
    flag("--strategy", choices=STRATEGIES, default="predictor", help="docs/search.md says which one when")
    flag(
        "--budget",
        metavar="IMAGES",
        type=options.integer(1),
        help=f"images of all epochs of all trials; default: those of {FULL_TRAININGS} full trainings",
    )
    flag(
        "--judge",
        choices=FIGURES,
        default="accuracy",
        help="what trials of equal length are ranked by: held-out accuracy or loss, or all epochs' sum of "
        "training losses; default: accuracy",
    )
    flag(
        "--cost_weight",
        metavar="W",
        type=options.real(),
        default=0.0,
        help="rank by that less W times the logarithm of the OPs, both in standard deviations; default: 0",
    )
    flag("--eta", type=options.integer(2, 100), default=4, help="one in ETA goes on in halving; default: 4")
    flag(
        "--least_epochs",
        type=options.integer(1),
        default=1,
        help="epochs before halving compares first; default: 1",
    )
    flag(
        "--storage",
        metavar="FILE|URL",
        help="where the trials are kept, for several processes or machines on one search: a journal file, or "
        f"a database of Optuna's; default: {JOURNAL} in the run's folder",
    )
    flag = parser.add_argument_group("limits and fronts").add_argument
    for name, what in (
        ("kilobytes", "of the packed file, 1,000 bytes each"),
        ("ram", "kilobytes of memory that the packed network computes in"),
        ("ops", "OPs of an image"),
    ):
        flag(
            f"--most_{name}", metavar="N", type=options.positive_float, help=f"{what}, at most; default: any"
        )
    flag(
        "--objective",
        type=objectives,
        default=(),
        metavar="accuracy,COST",
        help=f"seek a front: accuracy against any of {', '.join(COSTS)}; default: accuracy alone",
    )
    group = parser.add_argument_group("what a trial trains: train.py's stages")
    flag = group.add_argument
    options.add_operations_flag(flag)
    flag("--init_channels", type=sizes, default=(24,), metavar="C[,C...]", help="one or several; default: 24")
    flag("--layers", type=sizes, default=(5,), metavar="N[,N...]", help="cells, one or several; default: 5")
    flag(
        "--groups", type=options.integer(1, 10_000), default=4, help="of the cells' convolutions; default: 4"
    )
    flag(
        "--stage1_epochs",
        type=options.integer(0),
        default=2,
        help="of a full training, before the --epochs of stage 2; 0: none, W1A1 from scratch; default: 2",
    )
    flag(
        "--holdout",
        type=options.integer(1),
        default=5_000,
        help="training images that trials are judged on; default: 5000",
    )
    flag("--train", type=str, default="", metavar="'FLAGS'", help="further flags of train.py, for all trials")
    options.add_set_flags(parser)
    options.add_step_flags(parser, {**EBNAS["cifar"].flags, "epochs": 6})
    options.add_run_flags(parser)
    return parser


def sizes(text: str) -> tuple[int, ...]:
    """The type of --init_channels and --layers: `16,24`."""
    return tuple(sorted({options.integer(1, 10_000)(part) for part in text.split(",")}))


def objectives(text: str) -> tuple[str, ...]:
    """The type of --objective: the costs after `accuracy`."""
    first, *costs = text.split(",")
    if first != "accuracy" or set(costs) - set(COSTS) or len(set(costs)) < len(costs):
        raise argparse.ArgumentTypeError(
            f"is {text}; it is accuracy, then any of {', '.join(COSTS)}, with commas between"
        )
    return tuple(costs)


if __name__ == "__main__":
    check_usage(parser)

import numpy as np
import torch

from images.sets import channel_statistics, load_set
from pictures import draw_genotype
from run.images import checked_range, describe_data, test_files_of
from run.processes import PATIENCE, claimed, signals_to_interrupts
from run.runs import LOCATION, RESULT, RUNS, Run, create_run, differing_flags, read_args
from trials.costs import Costs
from trials.pictures import draw_search
from trials.storage import Ledger, Taken, own_lock, require_optuna
from trials.training import Trainer


def main(flags: options.Flags) -> None:
    require_optuna()
    folder, ledger, args = find_search(flags.values, flags.given)
    train_set = load_set(
        args.set,
        args.data,
        train=True,
        image_size=args.image_size,
        workers=args.workers,
        count=args.train_images,
        value_range=checked_range(args.value_range),
        test_files=test_files_of(args.set, args.data, args.test_part),
    )
    images = len(train_set) - args.holdout
    if images <= 0:
        raise InputError(f"--holdout {args.holdout} leaves none of {len(train_set)} images to train on")
    statistics = channel_statistics(args.set, train_set)
    value_range = checked_range(args.value_range)
    data = describe_data(
        args.set, args.data, args.image_size, train_set.classes, statistics, value_range=value_range
    )
    del train_set  # the trainings read their own
    search = Search(args, data, images)
    if folder is None:
        folder = create_run(f"search-{args.save}", vars(args), torch.device("cpu"))
        if ledger is None:
            ledger = Ledger(str(folder / JOURNAL), args.save)
    ledger.open(settings_of(args), search.budget * images, search.space, args.objective)
    run = Run(folder)
    with ExitStack() as stack:
        stack.callback(run.close)
        stack.enter_context(claimed(own_lock()))
        try:
            with signals_to_interrupts():
                search.start(run, ledger, flags.idle)
                while (taken := search.take(ledger)) is not None:
                    search.train(run, ledger, taken)
                search.finish(run, ledger)
        except (KeyboardInterrupt, SystemExit) as error:
            run.log("stopped; to go on:")
            run.log(command_text(["python", sys.argv[0], "--resume", str(folder)]))
            sys.exit(error.code if isinstance(error, SystemExit) else 130)
        except (InputError, RunFailed, OSError) as error:
            run.log(f"stopped: {error}")
            raise


class Search:
    """One process's part in a search: it asks the strategy, trains, and notes what came of it."""

    def __init__(self, args: argparse.Namespace, data: dict[str, Any], images: int):
        self.args, self.data, self.images = args, data, images
        self.space = Space(args.init_channels, args.layers, tuple(args.operations))
        self.costs = Costs(data, groups=args.groups)
        for channels, layers in product(args.init_channels, args.layers):
            self.costs.config(get_genotype("EBNAS"), channels, layers)  # says what makes no network
        self.failures = 0
        epochs = args.stage1_epochs + args.epochs
        self.budget = (args.budget or FULL_TRAININGS * epochs * images) // images
        own = {"eta": args.eta, "least": min(args.least_epochs, epochs), "costs_of": self.costs.of}
        kind = STRATEGIES[args.strategy]
        known = kind.__dataclass_fields__
        self.strategy: Strategy = kind(
            self.space,
            Judge(args.judge, args.cost_weight, args.objective),
            epochs,
            self.budget,
            self.fits,
            **{name: value for name, value in own.items() if name in known},
        )
        least = self.strategy.shortest
        if self.budget < least:
            raise InputError(
                f"--budget pays for {self.budget} epochs of {images:,} images; a trial has {least} at least: "
                f"give {least * images:,} or more"
            )
        self.trainer = Trainer(training_flags(args), shlex.split(args.train), args.stage1_epochs, args.epochs)

    def fits(self, candidate: Any) -> bool:
        """Whether a candidate is within the limits that the user gave."""
        limits = {name: getattr(self.args, f"most_{name}") for name in ("ops", "kilobytes", "ram")}
        return all(
            self.costs.value(candidate, name) <= limit for name, limit in limits.items() if limit is not None
        )

    def start(self, run: Run, ledger: Ledger, notes: Sequence[str]) -> None:
        trials = ledger.trials()
        spent = sum(trial.job.cost for trial in trials)
        if spent:
            run.log(f"{len(trials)} trials are there, {human(spent * self.images)} images trained")
        run.log(f"run folder {run.folder}; trials in {ledger.shown}, study {ledger.name}")
        run.log(
            f"{self.args.strategy}, by {self.args.judge}: {human(self.budget * self.images)} images, "
            f"{self.budget / self.strategy.epochs:.1f} full trainings of {self.strategy.epochs} epochs"
        )
        for line in notes:
            run.log(line)
        self.bar = run.progress("epochs of all trials", total=self.budget, start=spent)

    def take(self, ledger: Ledger) -> Taken | None:
        """The next trial for this process: one that was left behind, one that waits, or the strategy's. None
        once the budget is spent and no other process is at work."""
        while True:
            if (taken := ledger.take_orphan()) is not None:
                return taken
            if ledger.waits():
                if (taken := ledger.take_waiting()) is not None:
                    return taken
                continue
            trials = ledger.trials()
            job = self.strategy.next(trials, np.random.default_rng([self.args.seed, len(trials)]))
            if job is None:
                if not trials:
                    raise InputError(self._why_none_fits())
                if not ledger.others():
                    return None
                time.sleep(PATIENCE)  # what they find may let a candidate go on, or the search end
            elif (taken := ledger.begin(job, self.costs.of(job.candidate))) is not None:
                return taken

    def _why_none_fits(self) -> str:
        found = [self.costs.of(self.space.draw(np.random.default_rng(number))) for number in range(20)]
        least = {name: min(costs[name] for costs in found) for name in COSTS}
        words = ", ".join(f"{name} {value:,.0f}" for name, value in least.items())
        return f"no cell that was drawn is within the limits; of 20 others the least are: {words}"

    def train(self, run: Run, ledger: Ledger, taken: Taken) -> None:
        job = taken.trial.job
        before = self.bar.n
        run.log(
            f"trial {taken.number}: {job.candidate.key}, epochs {job.start} to {job.epochs}, "
            f"{taken.trial.costs['kilobytes']:.1f} kB, {human(taken.trial.costs['ops'])} OPs"
        )

        def progress(done: int) -> None:
            self.bar.n = before + max(done - job.start, 0)
            self.bar.refresh()

        try:
            curve = self.trainer.train(job.candidate, job.epochs, progress)
        except (RunFailed, InputError) as error:
            ledger.fail(taken, str(error))
            self.failures += 1
            if isinstance(error, InputError) or self.failures == MOST_FAILURES:
                raise
            run.log(f"trial {taken.number} failed: {error}")
            return
        self.failures = 0
        last = curve[-1]
        ledger.finish(taken, curve, [last.valid_top1, *(taken.trial.costs[c] for c in self.args.objective)])
        run.log(
            f"trial {taken.number}: held-out top-1 {last.valid_top1:.2f} %, loss {last.valid_loss:.4f}, "
            f"training loss {last.train_loss:.4f}"
        )
        self.write_best(run, ledger.trials())

    def write_best(self, run: Run, trials: Sequence[Trial]) -> Trial:
        """The search's result so far, with its settings."""
        best = self.strategy.best(trials)
        save_genotype(
            run.folder / "genotype.json",
            best.job.candidate.genotype,
            epoch=best.job.epochs,
            search=vars(self.args),
            data=self.data["set"],
            network={name: getattr(best.job.candidate, name) for name in ("init_channels", "layers")}
            | {"groups": self.args.groups},
        )
        return best

    def finish(self, run: Run, ledger: Ledger) -> None:
        """Write the result and pictures; what to do next."""
        self.bar.close()
        trials = ledger.trials()
        if not any(trial.curve for trial in trials):
            raise RunFailed("no trial has come to its end; the log has the reason of each")
        best = self.write_best(run, trials)
        spent = sum(trial.job.cost for trial in trials)
        cells = len({trial.key for trial in trials})
        run.log(f"the best of {cells} cells, after {human(spent * self.images)} images:")
        run.log(describe(best.job.candidate.genotype))
        run.log(summary(best))
        result = {"best": record(best), "images": spent * self.images, "trials": len(trials)}
        if self.args.objective:
            members = front(trials, self.strategy.judge)
            result["front"] = [record(trial) for trial in members]
            (run.folder / "front").mkdir(exist_ok=True)
            for number, trial in enumerate(members, 1):
                path = run.folder / "front" / f"{number}.json"
                extra = {k: v for k, v in record(trial).items() if k != "genotype"}
                save_genotype(path, trial.job.candidate.genotype, **extra)
                run.log(f"front {path}: {summary(trial)}")
        run.write_result(result)
        try:
            pictures = [
                *draw_genotype(best.job.candidate.genotype, run.folder),
                *draw_search(trials, self.strategy.judge, self.images, run.folder),
            ]
            for picture in pictures:
                run.log(f"picture {picture}")
        except (InputError, OSError) as error:  # the search is done, with pictures or without
            run.log(f"no pictures: {error}")
        run.log(f"genotype written to {run.folder / 'genotype.json'}; train it:")
        where = ["--set", self.args.set, "--data", self.args.data, "--image_size", str(self.args.image_size)]
        where += options.command_line({"value_range": self.args.value_range})
        size = []
        if len(self.args.init_channels) * len(self.args.layers) > 1 or limited(self.args):
            chosen = best.job.candidate
            size = ["--init_channels", chosen.init_channels, "--layers", chosen.layers]
            size += ["--groups", self.args.groups]
        words = ["python", "train.py", *where, "--auxiliary", "--cutout", *map(str, size), "--arch"]
        run.log(command_text([*words, str(run.folder)]))


def limited(args: argparse.Namespace) -> bool:
    return bool(args.objective) or any(getattr(args, f"most_{name}") is not None for name in COSTS)


def summary(trial: Trial) -> str:
    costs, candidate = trial.costs, trial.job.candidate
    return (
        f"held-out top-1 {trial.curve[-1].valid_top1:.2f} % after {trial.job.epochs} epochs, "
        f"C {candidate.init_channels}, {candidate.layers} cells, {costs['kilobytes']:.1f} kB, "
        f"RAM {costs['ram']:.1f} kB, {human(costs['ops'])} OPs"
    )


def record(trial: Trial) -> dict[str, Any]:
    """A trial as result.json and a front's files keep it."""
    return {
        **trial.job.candidate.to_dict(),
        "epochs": trial.job.epochs,
        "valid_top1": trial.curve[-1].valid_top1,
        "costs": dict(trial.costs),
    }


def training_flags(args: argparse.Namespace) -> dict[str, Any]:
    """The flags for train.py: those that the user gave here, or whose defaults differ there."""
    shared = options.Parser()
    options.add_set_flags(shared)
    options.add_step_flags(shared, EBNAS["cifar"].flags)
    options.add_run_flags(shared)
    own = {*OWN, "epochs", "momentum", "model_path"}
    usual = vars(shared.parse_args([]))
    flags = {name: getattr(args, name) for name in usual if name not in own}
    flags = {name: value for name, value in flags.items() if value != usual[name]}
    return {**flags, "groups": args.groups, "holdout": args.holdout}


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that all processes of a search must agree on."""
    flags = vars(args).items()
    return {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in flags
        if name not in (*LOCATION, *OWN)
    }


def find_search(
    args: argparse.Namespace, given: Collection[str]
) -> tuple[Path | None, Ledger | None, argparse.Namespace]:
    """The run's folder, None for a new one; what keeps its trials, where that is there; and the flags, of
    which those that the user has not given are the search's own.

    Raises InputError where the flags given are others than those of the search.
    """
    folder = ledger = None
    if args.resume:
        folder = find_folder(args)
        if folder is not None:
            saved = read_args(folder)
            args = with_saved(args, saved, given, f"{folder} was run")
            storage = saved.get("storage") or str(folder / JOURNAL)
            ledger = Ledger(storage, saved.get("save"))
            if (folder / RESULT).exists() and "budget" not in given:
                raise InputError(f"{folder} is of a finished search; give a larger --budget to go on with it")
    if ledger is None and args.storage:
        ledger = Ledger(args.storage, args.save if "save" in given else None)
    if ledger is not None and ledger.settings is not None:
        args = with_saved(args, ledger.settings, given, f"the search {ledger.name} in {ledger.shown} runs")
    return folder, ledger, args


def find_folder(args: argparse.Namespace) -> Path | None:
    """The folder of --resume; for `auto` of the newest unfinished search of the same flags, None where there
    is none."""
    if args.resume != "auto":
        folder = Path(args.resume)
        if not (folder / "args.json").is_file() or "strategy" not in read_args(folder):
            raise InputError(f"{folder} is not the folder of a search by trials")
        return folder
    found = [path.parent for path in RUNS.glob(f"search-{args.save}-[0-9]*/args.json")]
    wanted = settings_of(args)
    for folder in sorted(found, key=lambda each: each.stat().st_mtime_ns, reverse=True):
        saved = read_args(folder)
        unfinished = "strategy" in saved and not (folder / RESULT).exists()
        if unfinished and not differing_flags(saved, wanted, wanted):
            return folder
    return None


def with_saved(
    args: argparse.Namespace, saved: dict[str, Any], given: Collection[str], where: str
) -> argparse.Namespace:
    """The flags, with what a search has `saved` for those that were not given."""
    names = settings_of(args)
    if differing := differing_flags(saved, names, given & names.keys()):
        raise InputError(f"{where} with {', '.join(differing)}: leave these flags out, or start a new search")
    own = vars(args) | {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in saved.items()
        if name in (*names, "save", "budget", "data", "storage") and name not in given
    }
    return argparse.Namespace(**own)


if __name__ == "__main__":
    run_main(main, parser)
