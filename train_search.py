"""Search for a cell on a supernet with binary activations, and write its genotype.

    python train_search.py                                          # CIFAR-10, downloaded to data/
    python train_search.py --set folder --data DIR                  # your own images
    python train_search.py --stem imagenet --tmp_data_dir DIR       # ImageNet, or other large images
    python train_search.py --resume auto                            # go on after a crash
    torchrun --nproc_per_node=4 train_search.py                     # 4 GPUs, batch_size images in all

Leaves runs/search-EXP-TIME/genotype.json (rewritten every epoch), for train.py --arch.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from flags import options
from flags.choices import FAMILIES
from genotypes import (
    Genotype,
    describe,
    genotype_from_dict,
    genotype_to_dict,
    random_genotype,
    save_genotype,
)
from utils import InputError, check_usage, command_text, run_main, seed_everything

STEP = {"epochs": 50, "batch_size": 256, "learning_rate": 1e-3, "grad_clip": 5.0}


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    options.add_set_flags(parser)
    flag = parser.add_argument
    flag(
        "--tmp_data_dir", metavar="DIR", help="with --stem imagenet: where train/ and val/ are, as ImageNet's"
    )
    flag = parser.add_argument_group("supernet").add_argument
    flag(
        "--stem",
        choices=FAMILIES,
        default="cifar",
        help="imagenet: three halvings before the first cell, for large images, which are read from their "
        "files all the time; --image_size is then 224 by default",
    )
    flag("--init_channels", type=options.integer(1, 10_000), default=16, help="width of the first cell")
    flag("--layers", type=options.integer(3, 1_000), default=8, help="number of cells")
    for kind, k in (("normal", 8), ("reduce", 4)):
        flag(
            f"--k_{kind}",
            type=options.integer(2, 1_000),
            default=k,
            help=f"one in k channels of a {kind} cell goes through its operations",
        )
    options.add_operations_flag(flag)
    options.add_step_flags(parser, STEP)
    flag = parser.add_argument_group("search").add_argument
    flag("--weight_decay", type=options.non_negative_float, default=3e-4, help="of the weights")
    flag(
        "--train_portion",
        type=options.real(below=1, above=0),
        default=0.5,
        help="part of the training images that trains the weights; the rest trains the architecture",
    )
    flag("--arch_learning_rate", type=options.positive_float, default=6e-4, help="of alpha and beta")
    flag("--arch_weight_decay", type=options.non_negative_float, default=1e-3, help="of alpha and beta")
    flag(
        "--arch_start_epoch",
        type=options.integer(0),
        help="first epoch with architecture steps; default: half the epochs",
    )
    flag("--path_reg_weight", type=options.real(), default=1.5, help="of the L2 path regularisation")
    flag(
        "--edge_reg_weight",
        type=options.real(),
        default=0.8,
        help="of the variance-based edge regularisation",
    )
    options.add_most_skips_flag(parser)
    flag(
        "--score_random",
        type=options.integer(0, 10_000),
        default=0,
        metavar="N",
        help="at the end cut the supernet down to N random cells too: does it rank them as training does?",
    )
    options.add_run_flags(parser)
    parser.retire("learning_rate_min", "the learning rate of a search is constant, as in the original")
    parser.retire("drop_path_prob", "the supernet has no drop-path, as in the original")
    return parser


if __name__ == "__main__":
    check_usage(parser)

import torch
from torch import nn

from architect import Architect
from flags.settings import SearchSettings, settings_from
from images.augment import Augmentation
from images.loaders import Batch, BatchLoader, Loader, Shard, search_file_loaders
from images.sets import STATISTICS, ImageSet, split_halves
from kernels import Form, accelerate, choose_form
from kernels.compilation import compile_regions
from model_search import SearchConfig, Supernet
from networks.found import describe_found
from pictures import draw_curves, draw_genotype
from run.distributed import World, setup
from run.images import checked_range, describe_data, fit_batch, loader_settings, prepare_data
from run.resume import Origin, find_origin
from run.runs import Run
from training.engine import Training, evaluate, in_memory_format, precision_of, train_one_epoch
from training.session import Session
from training.stages import log_form


def main(flags: options.Flags) -> None:
    world = setup(flags.values.device, flags.values.gpu)
    origin = find_run(flags, world)
    notes = [*flags.idle, *fit_batch(origin, flags.given)]
    settings = settings_from(SearchSettings, origin.flags)
    recipe, step = settings.recipe, settings.step
    precision = precision_of(step, world.device)
    session = Session(origin, settings, world=world, precision=precision, notes=notes)
    if settings.network.stem == "imagenet":
        loaders, data = file_loaders(settings, origin, world)
    else:
        train_set, _, data = prepare_data(settings, origin, world, test=False)
        loaders = make_loaders(settings, train_set, data, world)
    weight_loader, arch_loader, valid_loader = loaders

    model, form = build_supernet(settings, len(data["classes"]), world)
    architect = Architect(
        model,
        learning_rate=recipe.arch_learning_rate,
        weight_decay=recipe.arch_weight_decay,
        path_reg_weight=recipe.path_reg_weight,
        edge_reg_weight=recipe.edge_reg_weight,
    )
    optimizer = torch.optim.Adam(
        model.weight_parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
    training = Training(
        model,
        nn.CrossEntropyLoss(),
        optimizer,
        world,
        precision,
        accumulate=step.accumulate,
        grad_clip=step.grad_clip,
    )
    stateful = {"optimizer": optimizer, "arch_optimizer": architect.optimizer}

    def validate(network: nn.Module) -> dict[str, float]:
        after_step = session.evaluating(valid_loader)
        return evaluate(network, valid_loader, world=world, precision=precision, after_step=after_step)

    def renewed_top1(discrete: Supernet) -> float:
        renew_statistics(discrete, weight_loader)
        world.average_buffers(discrete)
        return validate(discrete)["top1"]

    header = {"kind": "search", "config": model.config.to_dict(), "data": data, "kernels": form.name}
    with session.start(model=model, stateful=stateful, **header) as run:
        log_form(run, form, origin.checkpoint)
        for epoch in session.epochs():
            run.log(f"epoch {epoch} lr {recipe.learning_rate:e}")
            arch_step = None
            if epoch >= recipe.arch_start_epoch:
                arch_step = partial(
                    architect.step,
                    endless(arch_loader, epoch, session.position.step),
                    ramp=epoch / max(settings.run.epochs - 1, 1),
                    batch_size=step.batch_size,
                    accumulate=step.accumulate,
                    world=world,
                    precision=precision,
                )
            train = train_one_epoch(
                training,
                weight_loader,
                start=session.position,
                before_step=arch_step,
                after_step=session.training(weight_loader),
            )
            world.average_buffers(model)
            valid = validate(model)
            genotype = model.genotype(recipe.most_skips)
            record = epoch_record(architect, genotype, train, valid, before=run.last_record())
            log_epoch(run, epoch, record)
            session.finish_epoch(epoch, record, score=valid["top1"])
            write_genotype(session, genotype, data["set"])
        genotype = model.genotype(recipe.most_skips)
        write_genotype(session, genotype, data["set"])  # a kill may have come before the last one
        discrete = cut_down(model, genotype)
        figures = {"discrete_top1": validate(discrete)["top1"]}
        figures["discrete_top1_new_statistics"] = renewed_top1(discrete)
        if recipe.score_random:
            cells = (random_genotype(seed, model.config.operations) for seed in range(recipe.score_random))
            figures["random_cells"] = [renewed_top1(cut_down(model, cell)) for cell in cells]
        finish(session, genotype, figures)


def find_run(flags: options.Flags, world: World) -> Origin:
    """Which search this is; its flags are settled."""
    values = dict(vars(flags.values))
    if values["arch_start_epoch"] is None:
        values["arch_start_epoch"] = values["epochs"] // 2
    if values["stem"] == "imagenet" and "image_size" not in flags.given:
        values["image_size"] = 224
    name = f"search-{values['save']}"
    origin = find_origin(values, flags.given, script="train_search", name=name, parser=parser(), world=world)
    check_images(origin.flags)
    return origin


def check_images(flags: Mapping[str, Any]) -> None:
    """Raise InputError where the images do not go with the stem."""
    if flags["stem"] == "cifar":
        if flags["tmp_data_dir"]:
            raise InputError("--tmp_data_dir is for --stem imagenet; else give --set folder --data DIR")
        return
    if not flags["tmp_data_dir"] and flags["set"] != "folder":
        raise InputError(
            "--stem imagenet takes folders of images: give --tmp_data_dir DIR, or --set folder --data DIR"
        )
    if flags["cutout"]:
        raise InputError("--cutout is for --stem cifar: large images are cropped at random; leave it out")


def build_supernet(settings: SearchSettings, num_classes: int, world: World) -> tuple[Supernet, Form]:
    """The supernet on its device, in the form that is asked for."""
    network, step = settings.network, settings.step
    seed_everything(settings.run.seed)
    config = SearchConfig(
        network.init_channels,
        network.layers,
        num_classes,
        k_normal=network.k_normal,
        k_reduce=network.k_reduce,
        operations=tuple(network.operations),
        stem=network.stem,
    )
    form = choose_form(step.kernels, world.device, precision=step.precision, compiled=step.compile)
    model = accelerate(Supernet(config).to(world.device), form.name)
    form = form.told(model)
    in_memory_format(model, step.memory_format, auto="contiguous")  # channels-last is slower on a CPU
    if step.compile:
        compile_regions(model, mode=step.compile_mode)
    return model, form


def make_loaders(
    settings: SearchSettings, train_set: ImageSet, data: dict, world: World
) -> tuple[BatchLoader, BatchLoader, BatchLoader]:
    """The halves of the training set: the weights' and, in its own order, the architecture's, both augmented,
    and the architecture's again as it is, for evaluation."""
    images, batch_size, seed = settings.images, settings.step.batch_size, settings.run.seed
    weight_half, arch_half = split_halves(len(train_set), settings.recipe.train_portion, seed)
    augmentation = Augmentation(
        crop_padding=images.image_size // 8,
        flip=True,
        cutout_length=images.cutout_length if images.cutout else 0,
    )
    shared = loader_settings(data, seed, world)
    training = {"augmentation": augmentation, "shuffle": True, **shared}
    return (
        BatchLoader(train_set, batch_size, indices=weight_half, stream=0, **training),
        BatchLoader(train_set, batch_size, indices=arch_half, stream=1, **training),
        BatchLoader(train_set, batch_size, indices=arch_half, **shared),
    )


def file_loaders(
    settings: SearchSettings, origin: Origin, world: World
) -> tuple[tuple[Loader, Loader, Loader], dict[str, Any]]:
    """As make_loaders, of images that are read from their files; and what a checkpoint keeps of them."""
    images = settings.images
    name = "imagenet" if images.tmp_data_dir else "folder"
    root, value_range = images.tmp_data_dir or images.data, checked_range(images.value_range)
    *loaders, classes = search_file_loaders(
        root,
        settings.step.batch_size,
        train_portion=settings.recipe.train_portion,
        device=world.device,
        workers=settings.run.workers,
        seed=settings.run.seed,
        image_size=images.image_size,
        count=images.train_images,
        shard=Shard(world.rank, world.size),
        value_range=value_range,
    )
    statistics = STATISTICS["imagenet"]
    data = describe_data(name, root, images.image_size, classes, statistics, value_range=value_range)
    return tuple(loaders), origin.own_images(data)


def endless(loader: Loader, epoch: int, start: int) -> Iterator[Batch]:
    """The batches of `loader` from step `start` on, over and over, where its half is the smaller one."""
    while True:
        yield from loader.epoch(epoch, start % len(loader))
        start = 0


def epoch_record(
    architect: Architect, now: Genotype, train: dict, valid: dict, *, before: dict | None
) -> dict:
    """A search's line in metrics.jsonl for an epoch; alpha and beta in full, for visualize.py.

    `now` is the genotype at its end, `before` the record of the epoch before, None in the first one.
    """
    model = architect.model
    softmaxes = torch.cat([model.alphas_normal, model.alphas_reduce]).detach().softmax(1)
    entropy = torch.special.entr(softmaxes).sum(1).mean()
    old = genotype_from_dict(before.get("genotype")) if before else now
    pairs = zip(old.normal + old.reduce, now.normal + now.reduce, strict=True)
    return {
        "train_loss": train["loss"],
        "train_top1": train["top1"],
        "valid_loss": valid["loss"],
        "valid_top1": valid["top1"],
        **{f"{name}_regularizer": of(model).item() for name, (_, of) in architect.regularizers.items()},
        "alpha_entropy": entropy.item(),
        "changed": sum(was != is_ for was, is_ in pairs),
        "operations": dict(Counter(name for name, _ in now.normal + now.reduce)),
        "genotype": genotype_to_dict(now),
        "arch": {name: value.tolist() for name, value in model.arch_state().items()},
        "seconds": train["seconds"] + valid["seconds"],
        "images_per_second": train["images_per_second"],
    }


def log_epoch(run: Run, epoch: int, record: dict) -> None:
    run.log(f"genotype:\n{describe(genotype_from_dict(record['genotype']))}")
    run.log("operations " + ", ".join(f"{name} {n}" for name, n in sorted(record["operations"].items())))
    run.log(
        f"epoch {epoch} train_acc {record['train_top1']:.2f} loss {record['train_loss']:.4f} "
        f"valid_acc {record['valid_top1']:.2f} loss {record['valid_loss']:.4f} "
        f"path {record['path_regularizer']:.3f} edge {record['edge_regularizer']:.3f} "
        f"entropy {record['alpha_entropy']:.4f} changed {record['changed']} {record['seconds']:.1f} s"
    )


def write_genotype(session: Session, genotype: Genotype, set_name: str) -> None:
    """The search's result so far, with its settings; `epoch` is the last one that it comes from."""
    if session.world.is_main:
        epoch, search = session.position.epoch - 1, session.origin.flags
        path = session.folder / "genotype.json"
        save_genotype(path, genotype, epoch=epoch, search=search, data=set_name)


def cut_down(model: Supernet, genotype: Genotype) -> Supernet:
    """A copy of the supernet, its weights kept, that computes `genotype` alone. With the one that it stands
    for, what validation then loses is the gap that the regularisers are to close."""
    discrete = copy.deepcopy(model)
    discrete.make_discrete(genotype)
    return discrete


@torch.no_grad()
def renew_statistics(model: Supernet, loader: Loader) -> None:
    """Put the mean over the batches of an epoch into every BN: after cutting down, for the statistics of the
    mixture do not fit the single operations. Not torch's `update_bn`: it sets momentum to None, which
    SourceOperations does not take."""
    model.train()
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for step, batch in enumerate(loader.epoch(0)):
        for norm in norms:
            norm.momentum = 1 / (step + 1)
        model(batch.images)


def write_result(run: Run, discrete: dict[str, Any]) -> None:
    if last := run.last_record():
        names = ("valid_top1", "valid_loss", "alpha_entropy", "operations", "genotype")
        run.write_result({**{name: last[name] for name in names}, **discrete})
        run.log(
            f"supernet {last['valid_top1']:.2f} %; cut down to its genotype "
            f"{discrete['discrete_top1']:.2f} %, with new BN statistics "
            f"{discrete['discrete_top1_new_statistics']:.2f} %"
        )


def finish(session: Session, genotype: Genotype, discrete: dict[str, Any]) -> None:
    """Write result.json and mark the search as finished; pictures of the cells and of its course; what to do
    next."""
    run, images = session.run, session.settings.images
    with suppress(InputError, LookupError):  # of damaged metrics: said below, with the pictures
        write_result(run, discrete)
    session.finish()
    if run.folder is None:
        return
    try:
        for picture in [*draw_genotype(genotype, run.folder), *draw_curves(run.folder)]:
            run.log(f"picture {picture}")
    except (InputError, OSError) as error:  # the search is done, with pictures or without
        run.log(f"no pictures: {error}")
    for line in describe_found(genotype):
        run.log(line)
    run.log(f"genotype written to {run.folder / 'genotype.json'}; train it:")
    size = ["--image_size", str(images.image_size)]
    where = ["train.py", "--set", images.set, "--data", images.data, *size, "--cutout"]
    if session.settings.network.stem == "imagenet":
        where = ["train_imagenet.py", "--tmp_data_dir", images.tmp_data_dir or images.data, *size]
    where += options.command_line({"value_range": images.value_range})
    run.log(command_text(["python", *where, "--auxiliary", "--arch", str(run.folder)]))


if __name__ == "__main__":
    run_main(main, parser)
