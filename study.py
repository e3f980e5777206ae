"""Studies of what the search, its parts and the two stages bring: many runs, one table and pictures each.

    python study.py search --scale small --data DIR     # DIR/train/<class>/*, DIR/test/<class>/*: CIFAR-10's
    python study.py search --scale full                 # the published settings: for GPUs
    python study.py all --scale tiny                    # does it run? minutes, embedded images
    python study.py search --scale full --shard 2/8     # every eighth chain of runs, on a machine of its own
    python study.py search --table                      # what results/ hold, without running or writing

Each run is an ordinary one of this program's scripts, in runs/, with its own resume: a study that was ended
anywhere goes on where it was, and no run is made again whose figures stand in results/. Machines that share
runs/ and results/ (SLURM arrays) do not get in each other's way. Of each study results/ gets NAME.json (every
run with its flags, seed, commit, hardware, versions, seconds and figures), NAME.md (the table) and pictures.
"""

from __future__ import annotations

if __name__ == "__main__":  # torch takes seconds to import
    from utils import end_on_interrupt

    end_on_interrupt()

import argparse
import re
from dataclasses import replace
from pathlib import Path

import options
from data import SETS, load_set
from evidence.pictures import draw_study
from evidence.report import report
from evidence.results import Results
from evidence.runner import Runner
from evidence.studies import SCALES, STUDIES, Scale
from utils import InputError, RunFailed, run_main, write_atomically


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
    flag("--jobs", type=options.integer(1, 1024), default=1, help="runs at once; GPUs are dealt out to them")
    flag("--shard", type=shard, default=(1, 1), metavar="I/N", help="part I of N of the runs, for a machine")
    flag("--set", choices=SETS, help="another set than the scale's")
    flag("--data", help="where the set is; of other images than those of the figures, with another --out")
    flag("--seeds", type=options.integer(1, 1000), help="at least so many runs of each arm")
    flag("--out", help="folder of the figures; default: results, and in it one for each other scale and set")
    flag("--table", action="store_true", help="run and write nothing: the table of what is there")
    return parser


def main(args: argparse.Namespace) -> None:
    scale, name = scale_of(args)
    studies = [
        make(scale)
        for key, make in STUDIES.items()
        if args.name in (key, "all") and (key != "transfer" or scale.larger)
    ]
    if not studies:
        raise InputError(f"transfer: no larger task is known for --set {args.set}; leave --set out")
    results = Results(Path(args.out or default_out(name)), name, STUDIES)
    if args.table:
        for study in studies:
            print(report(study, results.content(study)))
        return
    results.prepare()
    for images in {job.flags["set"] for study in studies for job in study.jobs().values()}:
        if images.startswith("cifar"):  # runs that begin at once would each download it
            load_set(images, args.data or "data", train=False)
    runner = Runner(results, data=args.data, at_once=args.jobs)
    for study in studies:
        runner.run(study, args.shard)
        with results.updated(study, {}) as content:
            text = report(study, content)
            print(text)
            write_atomically(results.folder / f"{study.name}.md", text.encode())
            for picture in draw_study(study, content, results.folder):
                print(f"picture {picture}")
    if failed := list(runner.failed.values()):
        raise RunFailed(f"{len(failed)} of the runs failed; the same command tries again. {failed[0]}")


def default_out(scale: str) -> Path:
    """results/ itself has the figures of the small scale that this program comes with."""
    return Path("results", "" if scale == "small" else scale.replace(" ", "-"))


def scale_of(args: argparse.Namespace) -> tuple[Scale, str]:
    """The scale, and its name, with the set's where that is another."""
    scale = SCALES[args.scale]
    if args.seeds:
        numbers = ("searches", "random_cells", "published", "seeds")
        scale = replace(scale, **{name: max(getattr(scale, name), args.seeds) for name in numbers})
    if args.set in (None, scale.images["set"]):
        return scale, args.scale
    other = {"set", "image_size"} if args.set.startswith("cifar") else {"set"}  # CIFAR has a size of its own
    images, larger = (
        {n: v for n, v in flags.items() if n not in other} for flags in (scale.images, scale.larger)
    )
    images["set"] = args.set
    return replace(scale, images=images, larger=larger), f"{args.scale} on {args.set}"


if __name__ == "__main__":
    run_main(main, parser)
