"""Search for a cell on a supernet with binary activations, and write its genotype.

    python train_search.py                                          # CIFAR-10, downloaded to data/
    python train_search.py --set folder --data DIR                  # your own images
    python train_search.py --resume auto                            # go on after a crash
    torchrun --nproc_per_node=4 train_search.py                     # 4 GPUs, batch_size images in all

Leaves runs/search-EXP-TIME/genotype.json (rewritten every epoch), for train.py --arch.
"""

from __future__ import annotations

import argparse
import shlex
from collections import Counter
from collections.abc import Iterator
from functools import partial

import torch
from torch import nn

import options
from architect import Architect
from augment import Augmentation
from data import SETS, Batch, BatchLoader, ImageSet, split_halves
from distributed import World, setup
from engine import Precision, evaluate, train_one_epoch
from genotypes import Genotype, describe, genotype_from_dict, genotype_to_dict, save_genotype
from logger import Run
from model_search import SearchConfig, Supernet
from pictures import draw_curves, draw_genotype
from session import Session, loader_settings, prepare_data
from utils import InputError, run_main, seed_everything


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    options.add_run_flags(parser, save="EXP", epochs=50, batch_size=256)
    options.add_set_flags(parser, SETS)
    flag = parser.add_argument
    flag("--init_channels", type=int, default=16)
    flag("--layers", type=int, default=8, help="number of cells")
    flag("--weight_decay", type=float, default=3e-4)
    flag(
        "--train_portion", type=float, default=0.5, help="part of the training images that trains the weights"
    )
    flag("--arch_learning_rate", type=float, default=6e-4)
    flag("--arch_weight_decay", type=float, default=1e-3)
    flag("--arch_start_epoch", type=int, help="first epoch with architecture steps; default: half the epochs")
    flag("--path_reg_weight", type=float, default=1.5, help="of the L2 path regularisation")
    flag("--edge_reg_weight", type=float, default=0.8, help="of the variance-based edge regularisation")
    parser.retire("momentum", "model_path", "learning_rate_min", "drop_path_prob")
    return parser


def main() -> None:
    args, explicit = options.parse(parser())
    if args.arch_start_epoch is None:
        args.arch_start_epoch = args.epochs // 2
    world = setup(args.device, args.gpu)
    args.precision = Precision(args.precision, world.device).name  # as a resumed run will keep it
    session = Session(
        args, explicit, script="train_search", name=lambda args: f"search-{args.save}", world=world
    )
    precision = Precision(args.precision, world.device)
    train_set, _, data = prepare_data(args, world, test=False)
    weight_loader, arch_loader, valid_loader = make_loaders(args, train_set, data, world)

    seed_everything(args.seed)
    config = SearchConfig(args.init_channels, args.layers, len(data["classes"]))
    model = Supernet(config).to(world.device)
    if args.compile:
        model.compile()
    optimizer = torch.optim.Adam(
        model.weight_parameters(),
        lr=args.learning_rate,
        weight_decay=args.weight_decay,
        fused=True,
    )
    architect = Architect(
        model,
        learning_rate=args.arch_learning_rate,
        weight_decay=args.arch_weight_decay,
        path_reg_weight=args.path_reg_weight,
        edge_reg_weight=args.edge_reg_weight,
    )
    stateful = {"optimizer": optimizer, "arch_optimizer": architect.optimizer, "scaler": precision.scaler}
    criterion = nn.CrossEntropyLoss()

    header = {"kind": "search", "config": config.to_dict(), "data": data}
    with session.start(model=model, stateful=stateful, **header) as run:
        options.log_retired(run, args, explicit)
        shared = {"world": world, "precision": precision, "run": run}
        for epoch in session.epochs(args.epochs):
            run.log(f"epoch {epoch} lr {args.learning_rate:e}")
            start = session.position()
            arch_step = None
            if epoch >= args.arch_start_epoch:
                batches = endless(arch_loader, epoch, start["start_step"])
                ramp = epoch / max(args.epochs - 1, 1)
                arch_step = partial(architect.step, batches, ramp=ramp, world=world, precision=precision)
            train = train_one_epoch(
                model,
                weight_loader,
                optimizer,
                criterion,
                parameters=model.weight_parameters(),
                epoch=epoch,
                before_step=arch_step,
                grad_clip=args.grad_clip,
                stop=session.stop,
                **start,
                **shared,
            )
            world.average_buffers(model)
            valid = evaluate(model, valid_loader, **shared)

            genotype = model.genotype()
            record = epoch_record(architect, train, valid, genotype, before=run.last_record())
            log_epoch(run, epoch, record, genotype)
            if world.is_main:
                save_genotype(
                    session.path("genotype.json"), genotype, epoch=epoch, search=vars(args), data=data["set"]
                )
            session.finish_epoch(epoch, record, score=valid["top1"])
        if world.is_main:
            finish(run, args, genotype)
    world.close()


def make_loaders(
    args: argparse.Namespace, train_set: ImageSet, data: dict, world: World
) -> tuple[BatchLoader, BatchLoader, BatchLoader]:
    """The halves of the training set: the weights' and, in its own order, the architecture's, both augmented,
    and the architecture's again as it is, for evaluation."""
    weight_half, arch_half = split_halves(len(train_set), args.train_portion, args.seed)
    augmentation = Augmentation(
        crop_padding=args.image_size // 8, flip=True, cutout_length=args.cutout_length if args.cutout else 0
    )
    shared = loader_settings(args, data, world)
    training = {"augmentation": augmentation, "shuffle": True, **shared}
    return (
        BatchLoader(train_set, args.batch_size, indices=weight_half, stream=0, **training),
        BatchLoader(train_set, args.batch_size, indices=arch_half, stream=1, **training),
        BatchLoader(train_set, args.batch_size, indices=arch_half, **shared),
    )


def endless(loader: BatchLoader, epoch: int, start: int) -> Iterator[Batch]:
    """The batches of `loader` from step `start` on, over and over, where its half is the smaller one."""
    while True:
        yield from loader.epoch(epoch, start % len(loader))
        start = 0


def epoch_record(
    architect: Architect, train: dict, valid: dict, now: Genotype, *, before: dict | None
) -> dict:
    """What metrics.jsonl keeps of an epoch of a search; alpha and beta in full, for visualize.py.

    `before` is the record of the epoch before, None in the first one.
    """
    model = architect.model
    path, edge = architect.regularizers()
    softmaxes = torch.cat([model.alphas_normal, model.alphas_reduce]).detach().softmax(1)
    entropy = torch.special.entr(softmaxes).sum(1).mean()
    old = genotype_from_dict(before["genotype"]) if before else now
    pairs = zip(old.normal + old.reduce, now.normal + now.reduce, strict=True)
    return {
        "train_loss": train["loss"],
        "train_top1": train["top1"],
        "valid_loss": valid["loss"],
        "valid_top1": valid["top1"],
        "path_regularizer": path.item(),
        "edge_regularizer": edge.item(),
        "alpha_entropy": entropy.item(),
        "changed": sum(was != is_ for was, is_ in pairs),
        "operations": dict(Counter(name for name, _ in now.normal + now.reduce)),
        "genotype": genotype_to_dict(now),
        "arch": {name: value.tolist() for name, value in model.arch_state().items()},
        "seconds": train["seconds"] + valid["seconds"],
        "images_per_second": train["images_per_second"],
    }


def log_epoch(run: Run, epoch: int, record: dict, genotype: Genotype) -> None:
    run.log(f"genotype:\n{describe(genotype)}")
    run.log("operations " + ", ".join(f"{name} {n}" for name, n in sorted(record["operations"].items())))
    run.log(
        f"epoch {epoch} train_acc {record['train_top1']:.2f} loss {record['train_loss']:.4f} "
        f"valid_acc {record['valid_top1']:.2f} loss {record['valid_loss']:.4f} "
        f"path {record['path_regularizer']:.3f} edge {record['edge_regularizer']:.3f} "
        f"entropy {record['alpha_entropy']:.4f} changed {record['changed']} {record['seconds']:.1f} s"
    )


def finish(run: Run, args: argparse.Namespace, genotype: Genotype) -> None:
    """Pictures of the cells and of the search's course, and what to do next."""
    try:
        for picture in [*draw_genotype(genotype, run.folder), *draw_curves(run.folder)]:
            run.log(f"picture {picture}")
    except InputError as error:  # the search is done, with pictures or without
        run.log(f"no pictures: {error}")
    run.log(f"genotype written to {run.folder / 'genotype.json'}; train it:")
    where = ["--set", args.set, "--data", args.data, "--image_size", str(args.image_size)]
    run.log(shlex.join(["python", "train.py", *where, "--auxiliary", "--cutout", "--arch", str(run.folder)]))


if __name__ == "__main__":
    run_main(main)
