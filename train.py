"""Train a derived network on CIFAR-10/100, on your own images, or on the embedded shapes, in two stages.

python train.py --auxiliary --cutout                       # stage 1: binary weights
python train.py --auxiliary --cutout --binary              # stage 2: binary weights and activations
python train.py --auxiliary --cutout --arch runs/search-EXP-TIME
python train.py --set cifar100 --auxiliary --cutout --mixup
python train.py --resume auto                              # with the flags of before: go on after a crash
torchrun --nproc_per_node=4 train.py --auxiliary --cutout  # 4 GPUs, batch_size images in all
"""

from __future__ import annotations

from flags import options
from networks.rows import EBNAS_ROW
from training.recipes import EBNAS
from utils import check_usage, run_main


def parser() -> options.Parser:
    parser, usual = options.Parser(__doc__), EBNAS["cifar"].flags
    options.add_set_flags(parser)
    flag = parser.add_argument
    flag("--mixup", action="store_true", help="mix each image with another one of its batch, and the labels")
    flag("--alpha", type=options.positive_float, default=0.2, help="parameter of mixup's Beta distribution")
    parser.needs("alpha", "mixup")
    flag(
        "--holdout",
        type=options.integer(0),
        default=0,
        help="training images that pick the best epoch, instead of the test set",
    )
    options.add_network_flags(parser, usual, EBNAS_ROW["cifar"])
    options.add_step_flags(parser, usual, of_recipe=True)
    options.add_beyond_flags(parser)
    options.add_run_flags(parser)
    return parser


if __name__ == "__main__":
    check_usage(parser)

from flags.settings import TrainSettings, settings_from
from images.augment import Augmentation
from images.loaders import BatchLoader
from images.sets import ImageSet, holdout_split
from kernels import accelerate
from networks.registry import trained_network
from run.checkpoint import BEST, load_checkpoint
from run.distributed import World, setup
from run.images import fit_batch, loader_settings, prepare_data, write_split
from training import stages
from training.engine import evaluate, precision_of
from training.session import Session
from training.stage_flags import find_run


def main(flags: options.Flags) -> None:
    world = setup(flags.values.device, flags.values.gpu)
    origin = find_run(flags, parser=parser(), script="train", family="cifar", world=world)
    notes = [*flags.idle, *fit_batch(origin, flags.given)]
    settings = settings_from(TrainSettings, origin.flags)
    precision = precision_of(settings.step, world.device)
    session = Session(origin, settings, world=world, precision=precision, notes=notes)
    train_set, test_set, data = prepare_data(settings, origin, world, test=True)
    train_loader, valid_loader, test_loader = make_loaders(settings, train_set, test_set, data, world)

    teacher = stages.build_teacher(settings, data, world)
    network = stages.build_network(settings, origin, data, world)
    optimizer = stages.build_optimizer(settings, network.model)
    schedule = stages.build_schedule(settings, optimizer, steps=len(train_loader), warmup=0)
    training = stages.build_training(
        settings, network.model, optimizer, schedule, teacher, precision=precision, world=world
    )
    header = stages.header_of(origin, network, data)
    with session.start(model=training.evaluated, stateful=training.stateful, **header) as run:
        stages.log_start(session, network)
        if world.is_main:
            write_split(session.folder, data, train_set, test_set)
        stages.train_epochs(session, training, train_loader, valid_loader)
        test = None
        if holdout := settings.images.holdout:
            best = accelerate(trained_network(load_checkpoint(session.folder, BEST)), network.form.name)
            after_step = session.evaluating(test_loader)
            test = evaluate(
                best.to(world.device), test_loader, world=world, precision=precision, after_step=after_step
            )
            run.log(
                f"epoch {session.best['epoch']}, the best on {holdout} held-out training images: "
                f"test top-1 {test['top1']:.2f} %, top-5 {test['top5']:.2f} %"
            )
        stages.finish(session, held_out="held-out" if holdout else "test", test=test)


def make_loaders(
    settings: TrainSettings, train_set: ImageSet, test_set: ImageSet, data: dict, world: World
) -> tuple[BatchLoader, ...]:
    """Loaders for training, for choosing an epoch (held-out training images or the test set), for testing."""
    images, batch_size, seed = settings.images, settings.step.batch_size, settings.run.seed
    augmentation = Augmentation(
        crop_padding=data["image_size"] // 8,
        flip=True,
        cutout_length=images.cutout_length if images.cutout else 0,
        mixup_alpha=images.alpha if images.mixup else 0.0,
    )
    shared = loader_settings(data, seed, world)
    training = {"augmentation": augmentation, "shuffle": True, **shared}
    test_loader = BatchLoader(test_set, batch_size, **shared)
    if not images.holdout:
        return BatchLoader(train_set, batch_size, **training), test_loader, test_loader
    kept, held_out = holdout_split(len(train_set), images.holdout, seed)
    return (
        BatchLoader(train_set, batch_size, indices=kept, **training),
        BatchLoader(train_set, batch_size, indices=held_out, **shared),
        test_loader,
    )


if __name__ == "__main__":
    run_main(main, parser)
