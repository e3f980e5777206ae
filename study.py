"""Studies of what the search, its parts and the two stages bring: many runs, one table and pictures each.

    python study.py search --scale small --data DIR     # DIR/train/<class>/*, DIR/test/<class>/*: CIFAR-10's
    python study.py search --scale full                 # the published settings: for GPUs
    python study.py all --scale tiny                    # does it run? minutes, embedded images
    python study.py search --scale full --shard 2/8     # every eighth chain of runs, on a machine of its own
    python study.py search --table                      # what results/ hold, without running or writing
    python study.py cells --data DIR                    # the table of trained cells, results/cells/; hours
    python study.py medium --data DIR                   # what decided how its cells are trained
    python study.py strategies                          # searches by trials on that table; an hour

Each run is an ordinary one of this program's scripts, in runs/, with its own resume: a study that was ended
anywhere goes on where it was, and no run is made again whose figures stand in results/. Machines that share
runs/ and results/ (SLURM arrays) do not get in each other's way. Of each study results/ gets NAME.json (every
run with its flags, seed, commit, hardware, versions, seconds and figures), NAME.md (the table) and pictures.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from evidence.plan import Study
from evidence.studies import INSTRUMENTS, SCALES, STUDIES, Scale
from flags import options
from flags.choices import SETS
from genotypes import Genotype, get_genotype
from utils import InputError, RunFailed, check_usage, run_main, write_atomically


def shard(text: str) -> tuple[int, int]:
    """The type of --shard: `2/8`."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if not match or not 1 <= int(match[1]) <= int(match[2]):
        raise argparse.ArgumentTypeError(f"is {text}; it must be I/N with I from 1 to N")
    return int(match[1]), int(match[2])


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    flag = parser.add_argument
    names = [*STUDIES, "all", *INSTRUMENTS, "strategies"]
    flag(
        "name",
        metavar="NAME",
        choices=names,
        help=f"{', '.join(STUDIES)}, or all of these; medium; cells; strategies",
    )
    flag(
        "--scale",
        choices=SCALES,
        help="sizes, epochs, numbers of runs; of medium and cells medium, else small",
    )
    flag("--jobs", type=options.integer(1, 1024), default=1, help="runs at once; GPUs are dealt out to them")
    flag("--shard", type=shard, default=(1, 1), metavar="I/N", help="part I of N of the runs, for a machine")
    flag("--set", choices=SETS, help="another set than the scale's")
    flag("--data", help="where the set is; of other images than those of the figures, with another --out")
    flag("--seeds", type=options.integer(1, 1000), help="at least so many runs of each arm")
    flag("--out", help="folder of the figures; default: results, and in it one for each other scale and set")
    flag("--table", action="store_true", help="run and write nothing: the table of what is there")
    return parser


if __name__ == "__main__":
    check_usage(parser)

from evidence import strategies
from evidence.analysis import scores_of, what_it_shows
from evidence.cell_pictures import draw_cells
from evidence.cells import ROWS, Table, rows_of, write_rows
from evidence.pictures import draw_study
from evidence.report import report
from evidence.results import Results
from evidence.runner import Runner
from images.sets import load_set


def main(flags: options.Flags) -> None:
    args = flags.values
    if args.name == "strategies":
        compare_strategies(args.out, recompute=not args.table)
        return
    scale, name = scale_of(args.name, args.scale, args.set, args.seeds)
    out = Path(args.out or default_out(name))
    table_folder = out / "cells" if args.out or name != "medium" else Path("results", "cells")
    scale = replace(scale, found=found_cells(table_folder / "found"))
    studies = studies_of(args.name, scale, name)
    results = Results(out, name, [*STUDIES, *INSTRUMENTS])
    if args.table:
        for study in studies:
            content = results.content(study)
            print(
                report_cells(study, content, table_folder)
                if study.analysis == "table"
                else report(study, content)
            )
        return
    results.prepare()
    for images in {job.flags["set"] for study in studies for job in study.jobs().values()}:
        if images.startswith("cifar"):  # runs that begin at once would each download it
            load_set(images, args.data or "data", train=False)
    runner = Runner(results, data=args.data, at_once=args.jobs)
    for study in studies:
        try:
            runner.run(study, args.shard)
        finally:
            if study.analysis == "table":  # what is there so far, however this ends
                with results.updated(study, {}) as content:
                    write_rows(rows_of(study, content), table_folder / ROWS)
        with results.updated(study, {}) as content:
            if study.analysis == "table":
                write_cells(study, content, table_folder)
                continue
            text = report(study, content)
            print(text)
            write_atomically(results.folder / f"{study.name}.md", text.encode())
            for picture in draw_study(study, content, results.folder):
                print(f"picture {picture}")
    if failed := list(runner.failed.values()):
        raise RunFailed(f"{len(failed)} of the runs failed; the same command tries again. {failed[0]}")


def compare_strategies(out: str | None, *, recompute: bool) -> None:
    """Compare search strategies on the table of trained cells, in results/cells/ or in cells/ of --out."""
    folder = Path(out or "results", "cells")
    path = folder / "strategies.md"
    if recompute:
        for written in strategies.run(strategies.trained_cells(Table(folder / ROWS)), folder):
            print(f"written {written}")
    elif not path.exists():
        raise InputError(f"there is no {path} yet; leave --table out")
    print(path.read_text())


def studies_of(wanted: str, scale: Scale, name: str) -> list[Study]:
    """The studies that are asked for, at a scale of this name. Raises InputError where there is none."""
    if wanted in INSTRUMENTS:
        if scale.instrument is None:
            raise InputError(f"{wanted}: scale {name} has no table of cells; leave --scale out")
        return [INSTRUMENTS[wanted](scale)]
    keys = [key for key in STUDIES if wanted in (key, "all") and (key != "transfer" or scale.larger)]
    if not keys:
        raise InputError(f"transfer: no larger task is known for scale {name}; give another --scale or --set")
    return [STUDIES[key](scale) for key in keys]


def found_cells(folder: Path) -> dict[str, Genotype]:
    """The genotype files of a folder, of searches whose cells are to stand in the table, by name."""
    return {path.stem: get_genotype(str(path)) for path in sorted(folder.glob("*.json"))}


def write_cells(study: Study, content: Mapping[str, Any], folder: Path) -> None:
    """Write the page and the pictures of what the rows show."""
    text = report_cells(study, content, folder)
    print(text)
    write_atomically(folder / "cells.md", text.encode())
    if rows := rows_of(study, content):
        for picture in draw_cells(Table.of(rows), folder):
            print(f"picture {picture}")


def report_cells(study: Study, content: Mapping[str, Any], folder: Path) -> str:
    wanted = [job.key for job in study.final_jobs()]
    done = sum(key in content["jobs"] for key in wanted)
    text = f"## {study.name} ({content['scale']}): {study.question}\n\n{done} of {len(wanted)} runs.\n"
    rows = rows_of(study, content)
    return text + (what_it_shows(Table.of(rows), scores_of(folder)) if rows else "")


def default_out(scale: str) -> Path:
    """results/ itself has the figures of the small scale that this program comes with."""
    return Path("results", "" if scale == "small" else scale.replace(" ", "-"))


def scale_of(wanted: str, name: str | None, images: str | None, seeds: int | None) -> tuple[Scale, str]:
    """The scale, and its name, with the set's where that is another."""
    name = name or ("medium" if wanted in INSTRUMENTS else "small")
    scale = SCALES[name]
    if seeds:
        numbers = ("searches", "random_cells", "published", "seeds")
        scale = replace(scale, **{number: max(getattr(scale, number), seeds) for number in numbers})
    if images in (None, scale.images["set"]):
        return scale, name
    other = {"set", "image_size"} if images.startswith("cifar") else {"set"}  # CIFAR has a size of its own
    small, larger = (
        {n: v for n, v in flags.items() if n not in other} for flags in (scale.images, scale.larger)
    )
    small["set"] = images
    return replace(scale, images=small, larger=larger), f"{name} on {images}"


if __name__ == "__main__":
    run_main(main, parser)
