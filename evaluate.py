"""Accuracy and cost of trained networks: each checkpoint knows its network, its data and its classes.

python evaluate.py runs/eval-EXP-stage2-TIME             # a run's folder: its last checkpoint
python evaluate.py runs/eval-EXP-stage2-TIME/best.pt     # or a checkpoint file
python evaluate.py runs/eval-*-stage?-*                  # several, in one table
python evaluate.py RUN --data DIR                        # where the images are now
python evaluate.py runs/eval-EXP-stage2-TIME --packed    # and as packed bits: do the two agree?
python evaluate.py model_best.pth.tar --arch GENOTYPE    # of the original EBNAS program, or of BNAS's
python evaluate.py RUN --confusion                       # each class, and the pictures that are wrong
python evaluate.py --costs                               # what the rows of the published tables cost
python evaluate.py --costs runs/search-EXP-TIME          # what networks of these genotypes cost
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from flags import options
from flags.choices import STAGE1_BITS
from genotypes import describe
from networks.rows import CELL_SYSTEMS, NOT_PUBLIC, ROWS, Published
from utils import InputError, check_usage, human, run_main


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    parser.add_argument(
        "checkpoints",
        nargs="*",
        metavar="CHECKPOINT",
        help="a checkpoint file or a run's folder; with --costs a genotype, as train.py --arch takes it",
    )
    parser.add_argument(
        "--costs", action="store_true", help="count the published networks, or those of the genotypes given"
    )
    parser.add_argument(
        *options.SYSTEM_FLAG,
        dest="family",
        choices=CELL_SYSTEMS,
        help="whose blocks --costs builds the genotypes in; default: their own",
    )
    parser.needs("family", "costs")
    parser.add_argument("--data", help="where the images are; default: where they were in training")
    parser.add_argument("--batch_size", type=options.integer(1), default=256)
    options.add_worker_flag(parser)
    options.add_original_flags(parser)
    parser.add_argument(
        "--stage1",
        choices=tuple(STAGE1_BITS),
        help="that it is a checkpoint of stage 1, and what that made binary; default: W1A1, of stage 2",
    )
    parser.add_argument(
        "--packed", action="store_true", help="run W1A1 networks as packed bits too, on the CPU"
    )
    parser.add_argument(
        "--confusion",
        action="store_true",
        help="each class's recall and precision, and which pictures are wrong: as CSV and pictures, in the "
        "run's folder",
    )
    parser.add_argument("--out", metavar="DIR", help="where --confusion writes; default: the run's folder")
    parser.needs("out", "confusion")
    options.add_device_flags(parser)
    return parser


if __name__ == "__main__":
    check_usage(parser)

import torch
from torch import nn
from tqdm import tqdm

from images.augment import Normalize
from images.loaders import BatchLoader, Loader, imagenet_val_loader
from images.sets import load_set
from kernels import accelerate, choose_form
from model import build_model
from networks.cost import Cost, measure_cost
from networks.lowering import lower
from networks.registry import Config, label, make_config, trained_network
from packed import PackedNetwork
from pictures import draw_confusion
from run.checkpoint import LAST, network_config
from run.distributed import World, setup
from run.images import checked_range
from run.originals import Said, find_file, load_as_said, named
from training import confusion
from training.engine import Precision, choose_precision, evaluate


def main(flags: options.Flags) -> None:
    args = flags.values
    if args.costs:
        options.check_alone(flags, "costs", beside=("checkpoints", "family"))
        print("\n".join(cost_table(args.checkpoints, args.family)))
        return
    if not args.checkpoints:
        raise InputError("give checkpoints or run folders, or --costs")
    if args.out and len(args.checkpoints) > 1:
        raise InputError("--out takes the files of one checkpoint; leave it out, or give one")
    for line in flags.idle:
        print(line)
    world = setup(args.device)
    precision = choose_precision(args.precision, world.device, tf32=args.tf32)
    said = Said(args.arch, args.variant, args.stage1, args.set, args.image_size, args.data)
    checkpoints = [(path, load_as_said(path, said)) for path in args.checkpoints]
    loaders: dict[str, Loader] = {}
    rows = []
    for path, checkpoint in checkpoints:
        model = trained_network(checkpoint)
        data = checkpoint["data"]
        packed = PackedNetwork(lower(model, data)) if args.packed else None
        key = json.dumps(data)
        if key not in loaders:
            loaders[key] = test_loader(data, args.data or data["root"], args.batch_size, args.workers, world)
        cost = measure_cost(model, data["image_size"])
        # as its run computed it, so that its figures come out to the last bit
        native = checkpoint.get("kernels") == "native"
        form = choose_form("auto" if native else "torch", world.device, precision=args.precision)
        accelerate(model.to(world.device), form.name)
        means = evaluate_with_bar(model, loaders[key], world, precision, label=path)
        rows.append((path, checkpoint, means, cost))
        if packed is not None:
            compare_packed(path, model, packed, loaders[key])
        if args.confusion:
            show_confusion(path, args.out, model, loaders[key], data["classes"], precision)
    print_table(rows)


def evaluate_with_bar(
    model: nn.Module, loader: Loader, world: World, precision: Precision, *, label: str
) -> dict[str, float]:
    with tqdm(total=len(loader), desc=label, leave=False, disable=not sys.stderr.isatty()) as bar:
        return evaluate(model, loader, world=world, precision=precision, after_step=lambda *_: bar.update())


@torch.no_grad()
def compare_packed(path: str, model: nn.Module, network: PackedNetwork, loader: Loader) -> None:
    """Print the packed network's top-1, and on how many images it names the class of the float form."""
    right = same = images = 0
    for batch in loader.epoch(0):
        packed = network(batch.images.cpu().contiguous()).argmax(1)
        floating = model(batch.images)[0].argmax(1).cpu()
        right += (packed == batch.targets.cpu()).sum().item()
        same += (packed == floating).sum().item()
        images += len(packed)
    print(
        f"{path} packed ({network.kernel}): top-1 {100 * right / images:.2f} %, "
        f"the class of the float form on {100 * same / images:.2f} % of {images} images"
    )


def show_confusion(
    path: str, out: str | None, model: nn.Module, loader: Loader, classes: list[str], precision: Precision
) -> None:
    """Print what the network of a checkpoint confuses, and write it into `out`, by default its folder."""
    file = find_file(path)
    folder, prefix = Path(out or file.parent), "" if file.name == LAST else f"{file.stem}-"
    folder.mkdir(parents=True, exist_ok=True)
    result = confusion.measure_confusion(model, loader, classes, precision=precision)
    print(f"{path}:")
    print("\n".join(confusion.table(result)))
    written = confusion.write_tables(result, folder, prefix=prefix, paths=paths_of(loader))
    for file in written + draw_confusion(result, folder, prefix=prefix):
        print(file)
    print()


def paths_of(loader: Loader) -> list[str]:
    """The files of its images, in its order; none where they are not files."""
    return [os.fsdecode(path) for path in loader.source.paths]


def test_loader(data: dict, root: str, batch_size: int, workers: int, world: World) -> Loader:
    """The images that a checkpoint's training was tested on, as it saw them."""
    value_range = checked_range(data.get("value_range"))
    how = {"image_size": data["image_size"], "workers": workers, "value_range": value_range}
    if data["set"] == "imagenet":
        loader, classes = imagenet_val_loader(root, batch_size, device=world.device, **how)
    else:
        test_set = load_set(data["set"], root, train=False, test_files=data.get("test_files", ()), **how)
        classes = test_set.classes
        normalize = Normalize(data["mean"], data["std"])
        loader = BatchLoader(test_set.to(world.device), batch_size, normalize=normalize)
    if list(classes) != named(data, classes)["classes"]:
        raise InputError(
            f"{root} has the classes {', '.join(classes[:5])}, ...; the network was trained on "
            f"{', '.join(data['classes'][:5])}, ...: give its images with --data"
        )
    return loader


def print_table(rows: list[tuple[str, dict, dict, Cost]]) -> None:
    """Accuracy and cost of each checkpoint, and the genotypes they are of."""
    columns = "checkpoint,set,stage,epochs,top-1 %,top-5 %,params,OPs,OPs conv,1-bit,float"
    lines = [tuple(columns.split(","))]
    for path, checkpoint, means, cost in rows:
        config = network_config(checkpoint)
        lines.append(
            (
                path,
                checkpoint["data"]["set"],
                f"{checkpoint['kind']} W{config.weight_bits}A{config.activation_bits}",
                "-" if checkpoint["epoch"] is None else str(checkpoint["epoch"]),
                f"{means['top1']:.2f}",
                f"{means['top5']:.2f}" if config.num_classes >= 6 else "-",
                human(cost.parameters),
                human(cost.ops),
                human(cost.convolution_ops),
                human(cost.binary_bytes) + "B",
                human(cost.float_bytes) + "B",
            )
        )
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        texts = [cell.ljust(width) for cell, width in zip(line[:3], widths[:3], strict=True)]
        numbers = [cell.rjust(width) for cell, width in zip(line[3:], widths[3:], strict=True)]
        print("  ".join(texts + numbers))
    print(
        "\nOPs of one image: 1-bit MACs / 64 + float MACs + 2 per BN, 1 per PReLU and average-pool element;"
    )
    print(
        "`conv` without the last three. 1-bit and float: bytes of the weights, stored a bit and 32 bits each."
    )
    for network in sorted({described(network_config(checkpoint)) for _, checkpoint, _, _ in rows}):
        print(f"\n{network}")


def described(config: Config) -> str:
    """The name of a network, and its genotype."""
    lines = ["genotype", describe(config.genotype)] if hasattr(config, "genotype") else []
    return "\n".join([label(config), *lines])


TABLES = {"cifar10": ("CIFAR-10", "cifar", 32, 10), "imagenet": ("ImageNet", "imagenet", 224, 1000)}


def cost_table(genotypes: Sequence[str] = (), system: str | None = None) -> Iterator[str]:
    """Markdown: what the rows of the published tables cost by this program's count, beside their figures; or
    what networks of these `genotypes` cost in the blocks of `system`, at its usual sizes.

    BNAS's rows of these tables twice: as its code runs, and as intended.
    """
    columns = (
        "images,network,params,binary MACs (1e8),float MACs (1e8),OPs (1e8),without BN and the like (1e8),"
        "stored,published params,published OPs (1e8)"
    )
    yield "| " + " | ".join(columns.split(",")) + " |"
    yield "|---|---|" + "---:|" * (columns.count(",") - 1)
    for name, (title, family, size, classes) in TABLES.items():
        for arch in genotypes:
            with torch.device("meta"):
                config = make_config(arch, system, family=family, num_classes=classes)
                cost = measure_cost(build_model(config), size)
            yield cost_line(title, label(config), cost, None)
        for arch, row in () if genotypes else ROWS.items():
            published = row.published.get(name)
            in_a_table = row.published or row.label != "{name}"  # or is a stand-in for one that is
            if family not in row.sizes or not in_a_table:
                continue
            twice = row.system == "bnas" and published.error
            variants = ("as_run", "intended") if twice else (None,)
            for variant in variants:
                with torch.device("meta"):
                    config = make_config(arch, family=family, num_classes=classes, variant=variant)
                    cost = measure_cost(build_model(config), size)
                note = f", {variant.replace('_', ' ')}" if variant else ""
                yield cost_line(title, label(config) + note, cost, published)
        for network, published in () if genotypes else NOT_PUBLIC.items():
            yield cost_line(title, network, None, published.get(name))


def cost_line(images: str, network: str, cost: Cost | None, published: Published | None) -> str:
    numbers = ["-"] * 6
    if cost is not None:
        numbers = [
            f"{cost.parameters:,}",
            *(f"{value / 1e8:.3f}" for value in (cost.binary_macs, cost.float_macs)),
            *(f"{value / 1e8:.3f}" for value in (cost.ops, cost.convolution_ops)),
            f"{(cost.binary_bytes + cost.float_bytes) / 2**20:.2f} MiB",
        ]
    theirs = ["", ""]
    if published is not None:
        theirs = [
            f"{published.params}M" if published.params else "",
            f"{published.ops}" if published.ops else "",
        ]
    return "| " + " | ".join((images, network, *numbers, *theirs)) + " |"


if __name__ == "__main__":
    run_main(main, parser)
