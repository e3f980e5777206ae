"""Train a derived network on ImageNet, or on any folders like it, in two stages.

    python train_imagenet.py --tmp_data_dir DIR --save log_path --auxiliary --note note_of_this_run
    python train_imagenet.py --tmp_data_dir DIR --save log_path --auxiliary --binary --note note_of_this_run
    torchrun --nproc_per_node=8 train_imagenet.py --tmp_data_dir DIR ... --batch_size 1024

DIR, or its ILSVRC2012 or ImageNet-ILSVRC2012, holds train/<class>/* and val/<class>/*.
"""

from __future__ import annotations

from flags import options
from networks.rows import EBNAS_ROW
from training.recipes import EBNAS
from utils import InputError, check_usage, run_main


def parser() -> options.Parser:
    parser, usual = options.Parser(__doc__), EBNAS["imagenet"].flags
    flag = parser.add_argument
    flag("--tmp_data_dir", metavar="DIR", help="where train/ and val/ are")
    flag("--image_size", type=options.integer(16, 4096), default=224, help="side of a crop, in pixels")
    options.add_value_range_flag(flag)
    parser.retire("jpeg_draft", "at 224 pixels it brought nothing", action="store_true")
    options.add_network_flags(parser, usual, EBNAS_ROW["imagenet"])
    options.add_step_flags(parser, usual, of_recipe=True)
    flag(
        "--warmup_epochs",
        type=options.integer(0),
        help="of rising learning rate, where the batch exceeds 256; "
        + options.of_ebnas(usual["warmup_epochs"]),
    )
    options.add_beyond_flags(parser)
    options.add_run_flags(parser)
    return parser


if __name__ == "__main__":
    check_usage(parser)

from flags.settings import ImageNetSettings, settings_from
from images.loaders import Shard, imagenet_loaders
from images.sets import STATISTICS
from run.distributed import setup
from run.images import checked_range, describe_data
from training import stages
from training.engine import precision_of
from training.session import Session
from training.stage_flags import find_run


def main(flags: options.Flags) -> None:
    world = setup(flags.values.device, flags.values.gpu)
    origin = find_run(flags, parser=parser(), script="train_imagenet", family="imagenet", world=world)
    settings = settings_from(ImageNetSettings, origin.flags)
    images, batch_size = settings.images, settings.step.batch_size
    precision = precision_of(settings.step, world.device)
    session = Session(origin, settings, world=world, precision=precision, notes=flags.idle)
    if images.tmp_data_dir is None:
        raise InputError("--tmp_data_dir is missing: give the folder where train/ and val/ are")
    value_range = checked_range(images.value_range)
    train_loader, valid_loader, classes = imagenet_loaders(
        images.tmp_data_dir,
        batch_size,
        device=world.device,
        workers=settings.run.workers,
        seed=settings.run.seed,
        image_size=images.image_size,
        shard=Shard(world.rank, world.size),
        color_jitter=stages.recipe_of(settings).color_jitter,
        value_range=value_range,
    )
    statistics = STATISTICS["imagenet"]
    what = ("imagenet", images.tmp_data_dir, images.image_size, classes, statistics)
    data = describe_data(*what, value_range=value_range)
    data = origin.own_images(data)

    teacher = stages.build_teacher(settings, data, world)
    network = stages.build_network(settings, origin, data, world)
    optimizer = stages.build_optimizer(settings, network.model)
    warmup = settings.recipe.warmup_epochs if batch_size > 256 else 0
    schedule = stages.build_schedule(settings, optimizer, steps=len(train_loader), warmup=warmup)
    training = stages.build_training(
        settings, network.model, optimizer, schedule, teacher, precision=precision, world=world
    )
    header = stages.header_of(origin, network, data)
    with session.start(model=training.evaluated, stateful=training.stateful, **header):
        stages.log_start(session, network)
        stages.train_epochs(session, training, train_loader, valid_loader)
        stages.finish(session, held_out="validation")


if __name__ == "__main__":
    run_main(main, parser)
