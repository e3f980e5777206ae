"""Draw the two cells of a genotype, the curves of a run, and how a search's alpha and beta moved.

python visualize.py EBNAS                           # EBNAS-normal.png and EBNAS-reduce.png
python visualize.py BNAS-A                          # likewise, of any row of the published tables
python visualize.py genotype.json --out pictures    # a genotype from a file
python visualize.py "Genotype(normal=[...], ...)"    # a genotype as text; a log that has one works too
python visualize.py runs/search-EXP-TIME            # its cells, curves, alpha and beta, into its folder
python visualize.py runs/search-EXP-TIME@30         # the cells that it had found at the end of epoch 30
python visualize.py runs/eval-EXP-stage1-TIME       # a training run: its curves
"""

from __future__ import annotations

from pathlib import Path

from figures import draw_curves, draw_genotype, draw_layers
from genotypes import EVERY_OPERATION, GENOTYPES, RANDOM, get_genotype, is_path
from options import Flags, Parser
from utils import InputError, run_main

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
    return parser


def main(flags: Flags) -> None:
    args = flags.values
    if args.what == RESNET:
        paths = draw_layers(f"{RESNET}, ImageNet", RESNET_STAGES, Path(args.out or "."), name=RESNET)
    elif args.what not in GENOTYPES and is_path(args.what) and Path(args.what).is_dir():
        paths = draw_run(Path(args.what), Path(args.out or args.what))
    else:
        genotype = get_genotype(args.what, known=EVERY_OPERATION)
        folder, name = place_of(args.what)
        paths = draw_genotype(genotype, Path(args.out or folder), name=name)
    for path in paths:
        print(path)


def draw_run(run: Path, folder: Path) -> list[Path]:
    """The cells of a search's folder and the curves of any run's."""
    has_genotype, has_metrics = ((run / name).exists() for name in ("genotype.json", "metrics.jsonl"))
    if not has_genotype and not has_metrics:
        raise InputError(f"{run} is no run: it has neither genotype.json nor metrics.jsonl")
    genotype = get_genotype(str(run), known=EVERY_OPERATION) if has_genotype else None
    curves = draw_curves(run, folder=folder) if has_metrics else []
    return ([] if genotype is None else draw_genotype(genotype, folder)) + curves


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
