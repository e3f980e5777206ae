"""Train a derived network on ImageNet, or on any folders like it, in two stages.

    python train_imagenet.py --tmp_data_dir DIR --save log_path --auxiliary --note note_of_this_run
    python train_imagenet.py --tmp_data_dir DIR --save log_path --auxiliary --binary --note note_of_this_run
    torchrun --nproc_per_node=8 train_imagenet.py --tmp_data_dir DIR ... --batch_size 1024

DIR, or its ILSVRC2012 or ImageNet-ILSVRC2012, holds train/<class>/* and val/<class>/*.
"""

from __future__ import annotations

if __name__ == "__main__":  # torch takes seconds to import
    from utils import end_on_interrupt

    end_on_interrupt()

import argparse

import options
import stages
from data import STATISTICS, Share, imagenet_loaders
from distributed import setup
from engine import evaluate, train_one_epoch
from recipes import EBNAS
from session import Session, describe_data
from utils import InputError, run_main


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    options.add_run_flags(parser, **EBNAS["imagenet"].flags)
    options.add_network_flags(parser, init_channels=112, layers=14, drop_path_prob=0.0, label_smooth=0.1)
    options.add_beyond_flags(parser)
    flag = parser.add_argument
    flag("--tmp_data_dir", metavar="DIR", help="where train/ and val/ are")
    flag(
        "--warmup_epochs",
        type=options.integer(0),
        default=5,
        help="of rising learning rate, where the batch exceeds 256",
    )
    flag("--image_size", type=options.integer(16, 4096), default=224)
    flag(
        "--jpeg_draft",
        action="store_true",
        help="decode large JPEGs at 1/2, 1/4 or 1/8 where the crop allows it: faster, other pixels "
        "(docs/performance.md)",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    args = stages.settle(args, family="imagenet")
    world = setup(args.device, args.gpu)
    session = Session(args, parser=parser(), script="train_imagenet", name=stages.run_name, world=world)
    args, precision = session.args, session.precision
    if args.tmp_data_dir is None:
        raise InputError("--tmp_data_dir is missing: give the folder where train/ and val/ are")
    train_loader, valid_loader, classes = imagenet_loaders(
        args.tmp_data_dir,
        args.batch_size,
        device=world.device,
        workers=args.workers,
        seed=args.seed,
        image_size=args.image_size,
        jpeg_draft=args.jpeg_draft,
        share=Share(world.rank, world.size),
        color_jitter=stages.recipe_of(args, "imagenet").color_jitter,
    )
    data = session.own_images(
        describe_data("imagenet", args.tmp_data_dir, args.image_size, classes, STATISTICS["imagenet"])
    )
    warmup = args.warmup_epochs if args.batch_size > 256 else 0
    training = stages.build(session, train_loader, family="imagenet", data=data, warmup=warmup)
    model = training.model

    with session.start(model=training.network, stateful=training.stateful, **training.header) as run:
        stages.log_start(run, args, training, session.checkpoint)
        for epoch in session.epochs():
            learning_rate = training.scheduler.get_last_lr()[0]
            run.log(f"epoch {epoch} lr {learning_rate:e}")
            model.drop_path_prob = args.drop_path_prob * epoch / args.epochs
            train = train_one_epoch(
                model,
                train_loader,
                training.optimizer,
                training.criterion,
                start=session.position,
                world=world,
                precision=precision,
                grad_clip=args.grad_clip,
                auxiliary_weight=args.auxiliary_weight,
                targets_of=training.targets_of,
                accumulate=args.accumulate,
                after_step=session.training(train_loader),
            )
            training.end_epoch()
            for network in training.networks:
                world.average_buffers(network)
            valid = evaluate(
                training.network,
                valid_loader,
                world=world,
                precision=precision,
                after_step=session.evaluating(valid_loader),
            )
            run.log(
                f"train_acc {train['top1']:.2f} valid_acc {valid['top1']:.2f} top5 {valid['top5']:.2f} "
                f"loss {valid['loss']:.4f}"
            )
            session.finish_epoch(epoch, stages.epoch_record(train, valid, learning_rate), score=valid["top1"])
        stages.finish(session, held_out="validation")


if __name__ == "__main__":
    run_main(main, parser)
