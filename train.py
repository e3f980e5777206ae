"""Train a derived network on CIFAR-10/100, on your own images, or on the embedded shapes, in two stages.

python train.py --auxiliary --cutout                       # stage 1: binary weights
python train.py --auxiliary --cutout --binary              # stage 2: binary weights and activations
python train.py --auxiliary --cutout --arch runs/search-EXP-TIME
python train.py --set cifar100 --auxiliary --cutout --mixup
python train.py --resume auto                              # with the flags of before: go on after a crash
torchrun --nproc_per_node=4 train.py --auxiliary --cutout  # 4 GPUs, batch_size images in all
"""

from __future__ import annotations

if __name__ == "__main__":  # torch takes seconds to import
    from utils import end_on_interrupt

    end_on_interrupt()

import argparse

import options
import stages
from augment import Augmentation
from baselines import trained_network
from checkpoint import BEST, load_checkpoint
from data import SETS, BatchLoader, ImageSet, holdout_split
from distributed import World, setup
from engine import evaluate, train_one_epoch
from kernels import accelerate
from recipes import EBNAS
from session import Session, loader_settings, prepare_data
from utils import run_main


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    options.add_run_flags(parser, **EBNAS["cifar"].flags)
    options.add_set_flags(parser, SETS)
    options.add_network_flags(parser, init_channels=84, layers=16, drop_path_prob=0.2, label_smooth=0.0)
    options.add_beyond_flags(parser)
    flag = parser.add_argument
    flag("--mixup", action="store_true")
    flag("--alpha", type=options.positive_float, default=0.2, help="parameter of mixup's Beta distribution")
    parser.needs("alpha", "mixup")
    flag(
        "--holdout",
        type=options.integer(0),
        default=0,
        help="training images that pick the best epoch, instead of the test set",
    )
    return parser


def main(args: argparse.Namespace) -> None:
    args = stages.settle(args, family="cifar")
    world = setup(args.device, args.gpu)
    session = Session(args, parser=parser(), script="train", name=stages.run_name, world=world)
    args, precision = session.args, session.precision
    train_set, test_set, data = prepare_data(session, test=True)
    train_loader, valid_loader, test_loader = make_loaders(args, train_set, test_set, data, world)
    training = stages.build(session, train_loader, family="cifar", data=data, warmup=0)
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
            run.log(f"train_acc {train['top1']:.2f} valid_acc {valid['top1']:.2f} loss {valid['loss']:.4f}")
            session.finish_epoch(epoch, stages.epoch_record(train, valid, learning_rate), score=valid["top1"])
        test = None
        if args.holdout:
            test = evaluate(
                accelerate(trained_network(load_checkpoint(session.folder, BEST)), training.form.name).to(
                    world.device
                ),
                test_loader,
                world=world,
                precision=precision,
                after_step=session.evaluating(test_loader),
            )
            run.log(
                f"epoch {session.best['epoch']}, the best on {args.holdout} held-out training images: "
                f"test top-1 {test['top1']:.2f} %, top-5 {test['top5']:.2f} %"
            )
        stages.finish(session, held_out="held-out" if args.holdout else "test", test=test)


def make_loaders(
    args: argparse.Namespace, train_set: ImageSet, test_set: ImageSet, data: dict, world: World
) -> tuple[BatchLoader, ...]:
    """For training, for choosing an epoch (held-out training images, or the test set), and for testing."""
    augmentation = Augmentation(
        crop_padding=data["image_size"] // 8,
        flip=True,
        cutout_length=args.cutout_length if args.cutout else 0,
        mixup_alpha=args.alpha if args.mixup else 0.0,
    )
    shared = loader_settings(args, data, world)
    training = {"augmentation": augmentation, "shuffle": True, **shared}
    test_loader = BatchLoader(test_set, args.batch_size, **shared)
    if not args.holdout:
        return BatchLoader(train_set, args.batch_size, **training), test_loader, test_loader
    kept, held_out = holdout_split(len(train_set), args.holdout, args.seed)
    return (
        BatchLoader(train_set, args.batch_size, indices=kept, **training),
        BatchLoader(train_set, args.batch_size, indices=held_out, **shared),
        test_loader,
    )


if __name__ == "__main__":
    run_main(main, parser)
