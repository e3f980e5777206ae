"""Time what runs often, beside what a user would otherwise run: a table, and one line of JSON at the end.

    python benchmark.py search                      # the steps of a search, and those of the original program
    python benchmark.py train                       # a step of stage 2 at CIFAR's size, and the original's
    python benchmark.py train --family imagenet
    python benchmark.py data                        # the loaders' rates beside those of the networks
    python benchmark.py gpu --out FILE.json         # all that a GPU can tell in 8 minutes
    python benchmark.py memory                      # what the published runs need of a GPU, counted
    python benchmark.py train --arch BNAS-A         # of another row of the tables (docs/rows.md)
    python benchmark.py infer model.ebnas           # a packed network beside its float form in other engines
    python benchmark.py infer --arch BATS           # the same of a row, with random weights
    python benchmark.py search --device cuda --precision bf16 --compile --batch_size 256

The original program's forms stand in comparison/: its modules with our weights, its gradients of everything
in every step, its Adam. Cases take turns, round by round; `ratio` is the median over the rounds of a case's
images per second over those of the case that it is set against. `operations` counts the tensor operations of
a call that do work (no views), the optimisers' too: on a GPU each is a kernel to launch, or a few.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import itertools
import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from flags import options
from flags.choices import CLOCKS, COMPILE_MODES, FAMILIES, RIVALS, WEIGHT_BINARIZATIONS
from utils import InputError, check_output, check_usage, one_line, run_main

BITS = {"w1a1": (1, 1), "w1a32": (1, 32), "w32a1": (32, 1)}


def add_search_flags(parser: options.Parser) -> None:
    flag = parser.add_argument
    flag("--init_channels", type=options.integer(1, 10_000), default=16)
    flag("--layers", type=options.integer(3, 1_000), default=8)
    flag("--batch_size", type=options.integer(1), default=64)
    flag("--image_size", type=options.integer(16, 4096), default=32)


def add_size_flags(parser: options.Parser) -> None:
    flag = parser.add_argument
    size = "default: as published, and so with layers, groups and image_size"
    flag("--init_channels", type=options.integer(1, 10_000), help=size)
    flag("--layers", type=options.integer(3, 1_000))
    flag("--groups", type=options.integer(1, 10_000))
    flag("--image_size", type=options.integer(16, 4096))
    flag("--variant", help="of BNAS as_run or intended, of BATS learned or mean; default: the first")


def add_network_flags(parser: options.Parser) -> None:
    flag = parser.add_argument
    flag("--arch", default="EBNAS", help="a row of the published tables, or a genotype")
    flag("--bits", choices=BITS, default="w1a1", help="of weights and activations")
    add_size_flags(parser)
    flag("--batch_size", type=options.integer(1), default=32)
    flag("--weight_binarization", choices=WEIGHT_BINARIZATIONS)


def add_family_flag(parser: options.Parser) -> None:
    parser.add_argument("--family", choices=FAMILIES, default="cifar", help="of images")


def add_train_flags(parser: options.Parser) -> None:
    add_family_flag(parser)
    add_network_flags(parser)


def add_data_flags(parser: options.Parser) -> None:
    add_network_flags(parser)
    parser.add_argument("--images", type=options.integer(1), default=256, help="JPEG files that are made")
    parser.add_argument("--width", type=options.integer(16, 10_000), default=500, help="theirs; height: 3/4")
    options.add_worker_flag(parser)


def add_infer_flags(parser: options.Parser) -> None:
    flag = parser.add_argument
    flag("model", nargs="?", help="a packed network (export.py)")
    flag("--arch", help="instead of a file: a network of random weights, BN spread as after training")
    add_family_flag(parser)
    add_size_flags(parser)
    flag("--batch_size", type=options.integer(1), default=1)
    parser.add_argument("--threads", type=options.integer(1, 1024), default=1)
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=RIVALS)


def add_kernel_flags(parser: options.Parser) -> None:
    flag = parser.add_argument
    flag("--init_channels", type=options.integer(1, 10_000), default=84, help="of a normal cell")
    flag("--groups", type=options.integer(1, 10_000), default=14)
    flag("--image_size", type=options.integer(1, 4096), default=32)
    flag("--batch_size", type=options.integer(1), default=16)


BENCHMARKS = {
    "search": (
        add_search_flags,
        "a weight step, and an architecture step with a weight step: ours, and the original's",
    ),
    "train": (
        add_train_flags,
        "a training step: of our network, and of EBNAS's original's (its binarization plain)",
    ),
    "kernels": (
        add_kernel_flags,
        "a unit of each kind, forward and backward, in C and in torch's form, beside what a core can do",
    ),
    "data": (
        add_data_flags,
        "the loaders of CIFAR and of ImageNet, and beside each a training step of its network",
    ),
    "infer": (
        add_infer_flags,
        "a packed network, on every path of its kernel that runs here, and its float form elsewhere",
    ),
}
"""By name: a function that adds its flags, and what is timed."""


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    benchmarks.add_parser("memory", help="the GPU memory that a training step needs, counted")
    words = "all that minutes on a GPU can tell, each part kept as it comes"
    flag = benchmarks.add_parser("gpu", help=words, description=words).add_argument
    flag("--minutes", type=options.positive_float, default=8.0, help="what there is not time for is left out")
    flag("--out", type=options.path, metavar="FILE.json", help="where each part's result is kept at once")
    for name, (add_flags, words) in BENCHMARKS.items():
        benchmark = benchmarks.add_parser(name, help=words, description=words)
        add_flags(benchmark)
        flag = benchmark.add_argument
        flag("--repeats", type=options.integer(1), default=5, help="rounds that are timed")
        flag("--warmup", type=options.integer(0), default=1, help="rounds before them that are not")
        flag("--clock", choices=CLOCKS, default="wall", help="cpu: this process's time on a busy machine")
        if name in ("infer", "kernels"):  # always float32, on the CPU
            benchmark.set_defaults(device="cpu")
            continue
        if name in ("search", "train"):
            flag("--threads", type=options.integer(2, 1024), help="time our steps on so many threads, too")
        flag("--compile", action="store_true", help="torch.compile of our form")
        flag("--compile_mode", choices=COMPILE_MODES, default="default", help="of torch.compile")
        benchmark.needs("compile_mode", "compile")
        options.add_device_flags(benchmark)
        options.add_layout_flags(benchmark)
        options.add_kernels_flag(benchmark)
        parser.idle |= benchmark.idle
    return parser


if __name__ == "__main__":
    check_usage(parser)

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from comparison import gpu
from comparison.engines import Logits, float_network, make_runner
from comparison.measure import MEMORY, Case, measure
from comparison.original_network import original_network
from comparison.original_search import OriginalSupernet
from comparison.steps import original_search_steps, random_batch, search_steps, step_of, until_it_fits
from genotypes import get_genotype
from images.augment import Augmentation, Normalize
from images.loaders import Batch, BatchLoader, Loader, imagenet_loaders
from images.sets import ImageSet
from kernels import Form, accelerate, choose_form
from kernels.compilation import compile_regions
from kernels.library import library, unavailable
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet
from networks.lowering import lower
from networks.registry import make_config, settings_of
from networks.rows import system_of
from operations import CONVOLUTIONS
from packed import PackedNetwork, Program, available_kernels, load, program_bytes
from run.distributed import World, setup
from run.runs import machine
from training import memory
from training.engine import in_memory_format, parts_of, precision_of

IMAGES = {"cifar": (32, 10), "imagenet": (224, 1000)}
"""Usual size, and number of classes."""


def main(flags: options.Flags) -> None:
    args = flags.values
    if args.benchmark == "memory":
        print("\n".join(memory.table()))
        return
    if args.benchmark == "gpu":
        on_gpu(args.minutes, args.out)
        return
    world = setup(args.device)
    print_head(args, world.device)
    for line in flags.idle:
        print(line)
    torch.manual_seed(0)
    cases = CASES[args.benchmark]
    if args.benchmark == "infer":
        check_network_given(flags)
    with cases(args, world) as to_time:
        if args.benchmark in ("search", "train") and args.threads:
            to_time = [*to_time, *on_more_threads(to_time, args.threads)]
        rows = measure(
            to_time,
            repeats=args.repeats,
            warmup=args.warmup,
            clock=args.clock,
            device=world.device,
            # what compiled code and other engines do is not dispatched
            count=args.benchmark not in ("infer", "kernels") and not args.compile,
        )
    print_table(rows, world.device)
    print(json.dumps({"settings": vars(args), "machine": machine(world.device), "rows": rows}))


def on_more_threads(cases: list[Case], threads: int) -> Iterator[Case]:
    """Our cases once more, each beside itself on the threads that torch has: give OMP_NUM_THREADS=1."""
    alone = torch.get_num_threads()

    def run_on_more(run: Callable[[], Any]) -> None:
        torch.set_num_threads(threads)
        run()
        torch.set_num_threads(alone)

    for case in cases:
        if case.against is not None:
            name, run = f"{case.name}, {threads} threads", partial(run_on_more, case.run)
            yield Case(name, run, case.images, against=case.name)


def on_gpu(minutes: float, out: Path | None) -> None:
    if not torch.cuda.is_available():
        raise InputError("there is no CUDA GPU here, or this build of torch has no CUDA")
    if out is not None:
        check_output(out)
    content = gpu.run(gpu.Card(setup("cuda").device), minutes=minutes, out=out)
    print("\n".join([*gpu.table(content), "", *content["summary"]]))


# What is timed


@contextmanager
def search_cases(args: argparse.Namespace, world: World) -> Iterator[list[Case]]:
    """a weight step, and an architecture step with a weight step: ours, and the original's"""
    ours = Supernet(SearchConfig(args.init_channels, args.layers)).to(world.device)
    original = OriginalSupernet(copy.deepcopy(ours))
    form = form_of(args, world.device)
    in_memory_format(accelerate(ours, form.name), args.memory_format, auto="contiguous")
    if args.compile:
        compile_regions(ours, mode=args.compile_mode)
    precision = precision_of(args, world.device)
    batch = random_batch(args.batch_size, args.image_size, 10, world.device)
    weight_step, both_steps = search_steps(ours, batch, precision, world)
    original_weight_step, original_both_steps = original_search_steps(original, batch, precision, world)
    n = args.batch_size
    yield [
        Case("weight", weight_step, n, against="weight, original"),
        Case("weight, original", original_weight_step, n),
        Case("architecture + weight", both_steps, n, against="architecture + weight, original"),
        Case("architecture + weight, original", original_both_steps, n),
    ]


@contextmanager
def train_cases(args: argparse.Namespace, world: World) -> Iterator[list[Case]]:
    """a training step: of our network, and of EBNAS's original's (its binarization plain)"""
    ours, batch = network_and_batch(args, args.family, world.device)
    original = original_network(ours) if ours.config.system == "ebnas" else None
    ours = as_trained(ours, args, world.device)
    precision = precision_of(args, world.device)
    our_step = step_of(ours, list(ours.parameters()), batch, precision, world)
    if original is None:
        yield [Case("training", our_step, args.batch_size)]
        return

    def original_step_on(images: int) -> Callable[[], Any]:
        part = next(parts_of(batch, args.batch_size // images))
        return step_of(original, list(original.parameters()), part, precision, world, fused_adam=False)

    original_step, images = until_it_fits(original_step_on, args.batch_size)
    if images < args.batch_size:
        print(f"the original's form does not fit at {args.batch_size} images: it is timed at {images}")
    yield [
        Case("training", our_step, args.batch_size, against="training, original"),
        Case("training, original", original_step, images),
    ]


@contextmanager
def kernel_cases(args: argparse.Namespace, world: World) -> Iterator[list[Case]]:
    """A training step's work on each kind of unit: the signs' product, and both gradients of it."""
    if reason := unavailable():
        raise InputError(f"there are no native kernels here: {reason}")
    c, size, n = args.init_channels, args.image_size, args.batch_size
    config = ModelConfig(get_genotype("EBNAS"), init_channels=c, groups=args.groups)  # or it says what fits
    network = build_model(config)
    units = {name: network.operation(name, c, 1) for name in CONVOLUTIONS}
    units["1x1, 4 C to C"] = network.preprocess(4 * c, c)
    cases = []
    for name, unit in units.items():
        macs = 3 * n * size**2 * unit.conv.weight.numel()  # forward, of the input, of the weights
        x = torch.randn(n, unit.conv.in_channels, size, size)
        run = partial(forward_and_backward, accelerate(copy.deepcopy(unit), "native"), x)
        other = accelerate(unit, "torch").to(memory_format=torch.channels_last)
        run_torch = partial(forward_and_backward, other, x.to(memory_format=torch.channels_last))
        cases.append(Case(name, run, n, against=f"{name}, torch", macs=macs))
        cases.append(Case(f"{name}, torch", run_torch, n, macs=macs))
    multiply_adds, rounds = library(torch.float32).multiply_adds, 10_000_000
    start = (ctypes.c_float * 16)()
    macs = multiply_adds(ctypes.c_int64(1), start) * rounds
    alone = partial(multiply_adds, ctypes.c_int64(rounds), start)
    yield [*cases, Case("multiply-adds alone", alone, 1, macs=macs)]


def forward_and_backward(unit: nn.Module, x: Tensor) -> None:
    y = unit(x.requires_grad_())
    torch.autograd.grad(y, [x, *unit.parameters()], torch.ones_like(y))


@contextmanager
def data_cases(args: argparse.Namespace, world: World) -> Iterator[list[Case]]:
    """the loaders of CIFAR and of ImageNet, and beside each a training step of its network"""
    precision = precision_of(args, world.device)
    steps = {}
    for family in FAMILIES:
        model, batch = network_and_batch(args, family, world.device)
        model = as_trained(model, args, world.device)
        steps[family] = step_of(model, list(model.parameters()), batch, precision, world)
    with tempfile.TemporaryDirectory() as folder:
        make_jpegs(Path(folder), args.images, args.width)
        settings = {"device": world.device, "workers": args.workers, "seed": 0}
        loaders = {
            "cifar": cifar_loader(args.batch_size, world.device),
            "imagenet": imagenet_loaders(folder, args.batch_size, **settings)[0],
        }
        cases = []
        for family, loader in loaders.items():
            cases += [
                Case(f"{family} loader", epochs_of(loader), loader.num_samples, f"{family} training"),
                Case(f"{family} training", steps[family], args.batch_size),
            ]
        yield cases


@contextmanager
def infer_cases(args: argparse.Namespace, world: World) -> Iterator[list[Case]]:
    """a packed network, on every path of its kernel that runs here, and its float form elsewhere"""
    torch.set_num_threads(args.threads)
    program, network, size = program_and_network(args)
    images = torch.randn(args.batch_size, 3, program.image_size, program.image_size)
    model = Logits(network).eval()
    n = args.batch_size
    with torch.inference_mode():
        cases = [Case("eager", lambda: model(images).numpy(), n)]
        for rival in args.rivals:
            try:
                runner = make_runner(rival, model, images, args.threads)
                runner()
            except Exception as error:  # each engine has its own; one that fails must not end the rest
                print(f"{rival} is left out: {type(error).__name__}: {one_line(error, 100)}")
            else:
                cases.append(Case(rival, runner, n, against="eager"))
        for kernel in available_kernels():
            packed = PackedNetwork(program, threads=args.threads, kernel=kernel)
            cases.append(Case(f"packed, {kernel}", partial(packed, images.numpy()), n, against="eager"))
        if args.threads > 1:  # of the best path
            alone = partial(PackedNetwork(program, threads=1, kernel=kernel), images.numpy())
            cases.append(Case("packed, one thread", alone, n, against=cases[-1].name))
        expected = cases[0].run()
        for case in cases[1:]:
            logits = case.run()
            same = (logits.argmax(1) == expected.argmax(1)).mean()
            print(f"{case.name}: top-1 as eager {same:.1%}, logits within {abs(logits - expected).max():.1e}")
        weights = 4 * sum(parameter.numel() for parameter in network.parameters())
        print(f"file {size:,} bytes, {weights / size:.1f} times less than float32's {weights:,}")
        yield cases


CASES = {
    "search": search_cases,
    "train": train_cases,
    "kernels": kernel_cases,
    "data": data_cases,
    "infer": infer_cases,
}
"""By name of a benchmark: a context that gives what it times."""


# What the cases are made of


def network_of(args: argparse.Namespace, family: str, **settings: Any) -> tuple[nn.Module, int]:
    """The network of the flags, as published where they say nothing, on the CPU, and its images' size."""
    usual_size, classes = IMAGES[family]
    settings |= {name: getattr(args, name) for name in ("init_channels", "layers", "groups", "variant")}
    config = make_config(args.arch, family=family, num_classes=classes, **settings)
    image_size = args.image_size or usual_size
    config.check_image_size(image_size)
    return build_model(config), image_size


def network_and_batch(args: argparse.Namespace, family: str, device: torch.device) -> tuple[nn.Module, Batch]:
    """The network of the flags, and images for it."""
    weight_bits, activation_bits = BITS[args.bits]
    model, image_size = network_of(
        args,
        family,
        auxiliary=True if "auxiliary" in settings_of(system_of(args.arch)) else None,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_binarization=args.weight_binarization,
    )
    return model.to(device), random_batch(args.batch_size, image_size, model.config.num_classes, device)


def check_network_given(flags: options.Flags) -> None:
    """Raise InputError where `infer` is given no network, two, or the size of one that has its own."""
    if (flags.values.model is None) == (flags.values.arch is None):
        raise InputError("give a packed network or --arch, one of the two")
    of_arch = {"family", "init_channels", "layers", "groups", "image_size", "variant"}
    if flags.values.model is not None and (idle := flags.given & of_arch):
        raise InputError(f"--{min(idle)} has no use here: it needs --arch")


def program_and_network(args: argparse.Namespace) -> tuple[Program, nn.Module, int]:
    """What `infer` compares: a packed program, its float network, and the bytes of its file."""
    if args.model is not None:
        try:
            program = load(args.model).program
        except ValueError as error:
            raise InputError(str(error)) from None
        return program, float_network(program), Path(args.model).stat().st_size
    model, image_size = network_of(args, args.family)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean, 0, 0.1)
            if module.affine:
                nn.init.normal_(module.bias, 0, 0.3)
    data = {"set": args.family, "image_size": image_size, "mean": (0.5,) * 3, "std": (0.25,) * 3}
    data["classes"] = [str(label) for label in range(model.config.num_classes)]
    program = lower(model.eval(), data)
    return program, model, len(program_bytes(program))


def form_of(args: argparse.Namespace, device: torch.device) -> Form:
    return choose_form(args.kernels, device, precision=args.precision, compiled=args.compile)


def as_trained(model: nn.Module, args: argparse.Namespace, device: torch.device) -> nn.Module:
    form = form_of(args, device)
    channels_last = device.type == "cpu" and form.name != "native"
    auto = "channels_last" if channels_last else "contiguous"
    in_memory_format(accelerate(model, form.name), args.memory_format, auto=auto)
    if args.compile:
        compile_regions(model, mode=args.compile_mode)
    return model


def cifar_loader(batch_size: int, device: torch.device) -> BatchLoader:
    """A loader of 20 batches of random images."""
    images = torch.randint(256, (20 * batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (len(images),), device=device)
    return BatchLoader(
        ImageSet(images, labels, tuple("0123456789")),
        batch_size,
        normalize=Normalize((0.5,) * 3, (0.25,) * 3),
        augmentation=Augmentation(crop_padding=4, flip=True, cutout_length=16),
        shuffle=True,
    )


def make_jpegs(root: Path, n: int, width: int) -> None:
    """ImageNet-like files, smooth noise of a photograph's proportions: `n` in train, two in val."""
    rng = np.random.default_rng(0)
    for part, count in (("train", n), ("val", 2)):
        for index in range(count):
            folder = root / part / f"noise{index % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(rng.integers(0, 256, (47, 63, 3), dtype=np.uint8))
            size = width, width * 3 // 4
            coarse.resize(size, Image.Resampling.BICUBIC).save(folder / f"{index}.jpg")


def epochs_of(loader: Loader) -> Callable[[], None]:
    """A call runs through the next epoch."""
    numbers = itertools.count()

    def epoch() -> None:
        for _ in loader.epoch(next(numbers)):
            pass

    return epoch


def print_head(args: argparse.Namespace, device: torch.device) -> None:
    print(", ".join(f"{name} {value}" for name, value in machine(device).items()))
    settings = vars(args).items()
    print(
        ", ".join(f"{name} {value}" for name, value in settings if value is not None and value is not False)
    )
    print()


def print_table(rows: list[dict], device: torch.device) -> None:
    column = MEMORY[device.type]
    columns = ["case", "median ms", "min", "max", "images/s"]
    columns += [f"{column} MiB", "operations", "ratio", f"{column} ratio", "GMAC/s"]
    print("| " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * (len(columns) - 1))
    for row in rows:
        cells = [row["case"], *(f"{1e3 * row[name]:.1f}" for name in ("median", "min", "max"))]
        cells += [
            f"{row['images_per_second']:.1f}",
            f"{row['memory_bytes'] / 2**20:.0f}",
            str(row.get("operations", "")),
        ]
        numbers = ("ratio", "memory_ratio", "gmacs_per_second")
        cells += [f"{row[name]:.2f}" if name in row else "" for name in numbers]
        print("| " + " | ".join(cells) + " |")
    print()


if __name__ == "__main__":
    run_main(main, parser)
