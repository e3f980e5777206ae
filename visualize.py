"""Draw the two cells of a genotype, the curves of a run, and how a search's alpha and beta moved.

python visualize.py EBNAS                           # EBNAS-normal.png and EBNAS-reduce.png
python visualize.py BNAS-A                          # likewise, of any row of the published tables
python visualize.py genotype.json --out pictures    # a genotype from a file
python visualize.py "Genotype(normal=[...], ...)"    # a genotype as text; a log that has one works too
python visualize.py runs/search-EXP-TIME            # its cells, curves, alpha and beta, into its folder
python visualize.py runs/search-EXP-TIME@30         # the cells that it had found at the end of epoch 30
python visualize.py runs/search-EXP-TIME --most_skips 2 --output FILE  # what it finds with 2 skips at most
python visualize.py runs/eval-EXP-stage1-TIME       # a training run: its curves
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flags.options import Flags, Parser, add_most_skips_flag
from genotypes import (
    EVERY_OPERATION,
    GENOTYPES,
    RANDOM,
    describe,
    get_genotype,
    is_path,
    save_genotype,
)
from pictures import draw_curves, draw_genotype, draw_layers
from search_space import ENTRIES
from utils import InputError, check_output, run_main

RESNET = "ResNet18"
RESNET_STAGES = [
    ("conv1", "7x7, stride 2", "64, 112 x 112"),
    ("max pool", "3x3, stride 2", "64, 56 x 56"),
    *(
        (f"layer{stage + 1}", "2 blocks of two 3x3", f"{64 << stage}, {56 >> stage} x {56 >> stage}")
        for stage in range(4)
    ),
    ("fc", "mean, linear", "1000 classes"),
]


def parser() -> Parser:
    parser = Parser(__doc__)
    parser.add_argument("what", help="a registered genotype, a genotype file or text, or the folder of a run")
    parser.add_argument(
        "--out", metavar="DIR", help="where to; default: the run's folder, else the current one"
    )
    add_most_skips_flag(parser, "; of a search's folder or FOLDER@EPOCH")
    parser.add_argument(
        "--output", type=Path, metavar="FILE", help="with --most_skips: the genotype as JSON, for --arch"
    )
    parser.needs("output", "most_skips")
    return parser


def main(flags: Flags) -> None:
    args = flags.values
    for line in flags.idle:
        print(line)
    if args.most_skips is not None:
        paths = derive_again(args.what, args.most_skips, args.output, args.out)
    elif args.what == RESNET:
        paths = draw_layers(f"{RESNET}, ImageNet", RESNET_STAGES, Path(args.out or "."), name=RESNET)
    elif args.what not in GENOTYPES and is_path(args.what) and Path(args.what).is_dir():
        paths = draw_run(Path(args.what), Path(args.out or args.what))
    else:
        genotype = get_genotype(args.what, known=(*EVERY_OPERATION, *ENTRIES))
        folder, name = place_of(args.what)
        paths = draw_genotype(genotype, Path(args.out or folder), name=name)
    for path in paths:
        print(path)


def draw_run(run: Path, folder: Path) -> list[Path]:
    """The cells of a search's folder and the curves of any run's."""
    has_genotype, has_metrics = ((run / name).exists() for name in ("genotype.json", "metrics.jsonl"))
    if not has_genotype and not has_metrics:
        raise InputError(f"{run} is no run: it has neither genotype.json nor metrics.jsonl")
    genotype = get_genotype(str(run), known=(*EVERY_OPERATION, *ENTRIES)) if has_genotype else None
    curves = draw_curves(run, folder=folder) if has_metrics else []
    return ([] if genotype is None else draw_genotype(genotype, folder)) + curves


def derive_again(what: str, most_skips: int, output: Path | None, folder: str | None) -> list[Path]:
    """Of a search, or FOLDER@EPOCH of one: derive its genotype anew with at most so many skips in the normal
    cell, write it to `output`, say what it is, and draw it beside that file, or into `folder`.

    Raises InputError: there is no such search or epoch, or no file is named.
    """
    if output is None:
        raise InputError("--most_skips writes another genotype: say where to, with --output FILE")
    record, where = search_record(what)
    check_output(output, f"{where}/genotype.json", f"{where}/metrics.jsonl")
    arch = architecture(record, where)
    from model_search import derive
    from networks.found import describe_found  # torch takes seconds to import
    from run.runs import operations_of_run

    genotype = derive(arch, most_skips, operations_of_run(where))
    epoch = record["epoch"]
    save_genotype(output, genotype, epoch=epoch, most_skips=most_skips, search=str(where))
    print(f"epoch {epoch} of {where}, at most {most_skips} skips in the normal cell:")
    print(describe(genotype))
    print("\n".join(describe_found(genotype)))
    return [output, *draw_genotype(genotype, Path(folder or output.parent), name=output.stem)]


def search_record(what: str) -> tuple[dict[str, Any], Path]:
    """The last record of a search's metrics.jsonl, or that of the epoch in FOLDER@EPOCH; and the folder."""
    from run.runs import read_metrics

    folder, _, epoch = what.rpartition("@")
    named = not is_path(what) and epoch.isdecimal()
    where = Path(folder if named else what)
    if not where.is_dir():
        raise InputError(f"--most_skips takes the folder of a search, or FOLDER@EPOCH, and {what} is none")
    records = read_metrics(where)
    fitting = [record for record in records if not named or record["epoch"] == int(epoch)]
    if not fitting:
        raise InputError(f"{where}/metrics.jsonl has no epoch{f' {epoch}' if named else ''}")
    return fitting[-1], where


def architecture(record: dict[str, Any], where: Path) -> dict[str, Any]:
    """alpha and beta of a search's record as float32 tensors."""
    import torch

    from genotypes import EDGES
    from model_search import ARCH_PARAMETERS
    from run.runs import operations_of_run

    shapes = {"alphas": (len(EDGES), len(operations_of_run(where))), "betas": (len(EDGES) - 2,)}
    try:
        arch = {name: torch.tensor(record["arch"][name], dtype=torch.float32) for name in ARCH_PARAMETERS}
        fits = all(tensor.shape == shapes[name.split("_")[0]] for name, tensor in arch.items())
    except (KeyError, TypeError, ValueError):
        fits = False
    if not fits or not all(tensor.isfinite().all() for tensor in arch.values()):
        raise InputError(f"{where}/metrics.jsonl has no alpha and beta of epoch {record['epoch']}")
    return arch


def place_of(what: str) -> tuple[Path, str]:
    """Where the pictures of a genotype go, and what their names begin with."""
    if what in GENOTYPES:
        return Path("."), what
    if is_path(what):
        return Path("."), Path(what).stem
    folder, _, epoch = what.rpartition("@")
    if folder and is_path(folder):
        return Path(folder), f"epoch-{epoch}"
    return Path("."), what.replace(":", "-") if what.startswith(RANDOM) else "genotype"


if __name__ == "__main__":
    run_main(main, parser)
