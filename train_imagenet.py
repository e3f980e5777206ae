"""Train a derived network on ImageNet, or on any folders like it, in two stages.

    python train_imagenet.py --tmp_data_dir DIR --save log_path --auxiliary --note note_of_this_run
    python train_imagenet.py --tmp_data_dir DIR --save log_path --auxiliary --binary --note note_of_this_run
    torchrun --nproc_per_node=8 train_imagenet.py --tmp_data_dir DIR ... --batch_size 1024

DIR, or its ILSVRC2012 or ImageNet-ILSVRC2012, holds train/<class>/* and val/<class>/*.
"""

from __future__ import annotations

from torch import nn

import options
import stages
from data import STATISTICS, Share, imagenet_loaders
from distributed import setup
from engine import Precision, evaluate, train_one_epoch
from session import Session
from utils import InputError, run_main


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    options.add_run_flags(parser, save="EXP", epochs=100, batch_size=256)
    options.add_network_flags(parser, init_channels=112, layers=14)
    flag = parser.add_argument
    flag("--tmp_data_dir", help="where train/ and val/ are")
    flag("--warmup_epochs", type=int, default=5, help="of rising learning rate, where the batch exceeds 256")
    flag("--image_size", type=int, default=224)
    flag("--drop_path_prob", type=float, default=0.0, help="at the last epoch; it grows from 0")
    flag("--label_smooth", type=float, default=0.1)
    parser.retire("momentum", "model_path")
    return parser


def main() -> None:
    args, explicit = options.parse(parser())
    world = setup(args.device, args.gpu)
    args.precision = Precision(args.precision, world.device).name  # as a resumed run will keep it
    session = Session(args, explicit, script="train_imagenet", name=stages.run_name, world=world)
    if args.tmp_data_dir is None:
        raise InputError("--tmp_data_dir is missing: give the folder where train/ and val/ are")
    precision = Precision(args.precision, world.device)
    train_loader, valid_loader, classes = imagenet_loaders(
        args.tmp_data_dir,
        args.batch_size,
        device=world.device,
        workers=args.workers,
        seed=args.seed,
        image_size=args.image_size,
        share=Share(world.rank, world.size),
    )
    mean, std = STATISTICS["imagenet"]
    data = {
        "set": "imagenet",
        "root": args.tmp_data_dir,
        "image_size": args.image_size,
        "classes": list(classes),
        "mean": list(mean),
        "std": list(std),
    }
    warmup = args.warmup_epochs if args.batch_size > 256 else 0
    training = stages.build(args, session, family="imagenet", data=data, warmup=warmup)
    model, optimizer, scheduler = training.model, training.optimizer, training.scheduler
    parameters = list(model.parameters())
    criterion = nn.CrossEntropyLoss(label_smoothing=args.label_smooth)
    stateful = {"optimizer": optimizer, "scheduler": scheduler, "scaler": precision.scaler}

    header = {"kind": stages.stage(args), "config": training.config.to_dict(), "data": data}
    with session.start(model=model, stateful=stateful, **header) as run:
        options.log_retired(run, args, explicit)
        stages.log_start(run, args, training)
        shared = {"world": world, "precision": precision, "run": run}
        for epoch in session.epochs(args.epochs):
            learning_rate = scheduler.get_last_lr()[0]
            run.log(f"epoch {epoch} lr {learning_rate:e}")
            model.drop_path_prob = args.drop_path_prob * epoch / args.epochs
            train = train_one_epoch(
                model,
                train_loader,
                optimizer,
                criterion,
                parameters=parameters,
                epoch=epoch,
                grad_clip=args.grad_clip,
                auxiliary_weight=args.auxiliary_weight,
                stop=session.stop,
                **session.position(),
                **shared,
            )
            scheduler.step()
            world.average_buffers(model)
            valid = evaluate(model, valid_loader, **shared)
            run.log(
                f"train_acc {train['top1']:.2f} valid_acc {valid['top1']:.2f} top5 {valid['top5']:.2f} "
                f"loss {valid['loss']:.4f}"
            )
            session.finish_epoch(epoch, stages.epoch_record(train, valid, learning_rate), score=valid["top1"])
        stages.finish(run, args, session.best, held_out="validation")
    world.close()


if __name__ == "__main__":
    run_main(main)
