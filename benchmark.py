"""Time what runs often, each beside its obvious form: a table, and one line of JSON at the end.

    python benchmark.py search                      # the steps of a search, fused and edge by edge
    python benchmark.py train                       # a step of stage 2 at CIFAR's size, lean and plain
    python benchmark.py train --family imagenet
    python benchmark.py data                        # the loaders' rates beside those of the networks
    python benchmark.py infer model.ebnas           # a packed network beside its float form in other engines
    python benchmark.py search --device cuda --precision bf16 --compile --batch_size 256

The obvious forms stand in tests/: the supernet edge by edge, binarisation in float tensors by autograd, the
gradients of everything in every step. Cases take turns, round by round; `ratio` is the median over the rounds
of a case's images per second over those of the case that it is set against. `operations` counts the tensor
operations of a call that do work (no views): on a GPU each is a kernel to launch, or a few.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import os
import platform
import sys
import tempfile
import time
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import options
from architect import Architect, edge_regularizer, path_regularizer
from augment import Augmentation, Normalize
from binary_ops import WEIGHT_BINARIZATIONS
from data import Batch, BatchLoader, ImageSet, Loader, imagenet_loaders
from distributed import World, setup
from engine import PRECISIONS, Precision
from genotypes import get_genotype
from model import FAMILIES, ModelConfig, Network, build_model
from model_search import SearchConfig, Supernet
from packed import PackedNetwork, available_kernels, load
from rivals import RIVALS, Logits, float_network, make_runner
from utils import InputError, run_main

PUBLISHED = {
    "cifar": {"init_channels": 84, "layers": 16, "image_size": 32, "num_classes": 10},
    "imagenet": {"init_channels": 112, "layers": 14, "image_size": 224, "num_classes": 1000},
}
BITS = {"w1a1": (1, 1), "w1a32": (1, 32), "w32a1": (32, 1)}
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MEMORY = {"cuda": "peak", "cpu": "kept"}
"""The memory column. `peak`: the most that is allocated in a step, above what is held between steps. `kept`:
the most that autograd keeps at one time for the backward pass."""


@dataclass(frozen=True)
class Case:
    """What is timed: `run` handles `images` images; `against` names the case that its rate is divided by."""

    name: str
    run: Callable[[], Any]
    images: int
    against: str | None = None


def parser() -> options.Parser:
    parser = options.Parser(__doc__)
    benchmarks = parser.add_subparsers(dest="benchmark", required=True)
    for name, (add_flags, cases) in BENCHMARKS.items():
        benchmark = benchmarks.add_parser(name, help=cases.__doc__, description=cases.__doc__)
        add_flags(benchmark)
        flag = benchmark.add_argument
        flag("--repeats", type=int, default=5, help="rounds that are timed")
        flag("--warmup", type=int, default=1, help="rounds before them that are not")
        flag("--clock", choices=CLOCKS, default="wall", help="cpu: this process's time on a busy machine")
        if name == "infer":  # always float32, on the CPU
            benchmark.set_defaults(precision="fp32", device="cpu")
            continue
        flag("--precision", choices=PRECISIONS, help="default: bf16 on a CUDA GPU that has it, else fp32")
        flag("--compile", action="store_true", help="torch.compile of our form")
        flag("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    return parser


def main() -> None:
    args, _ = options.parse(parser())
    world = setup(args.device)
    args.precision = Precision(args.precision, world.device).name
    torch.manual_seed(0)
    _, cases = BENCHMARKS[args.benchmark]
    with cases(args, world) as to_time:
        rows = measure(to_time, args, world.device)
    print_table(rows, args, world.device)
    print(json.dumps({"settings": vars(args), "machine": machine(world.device), "rows": rows}))


# What is timed


def add_search_flags(parser: options.Parser) -> None:
    parser.add_argument("--init_channels", type=int, default=16)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--image_size", type=int, default=32)


@contextmanager
def search_cases(args: argparse.Namespace, world: World) -> Iterator[list[Case]]:
    """a weight step, and an architecture step with a weight step: the fused supernet, and edge by edge"""
    fused = Supernet(SearchConfig(args.init_channels, args.layers)).to(world.device)
    per_edge = obvious_form("per_edge_supernet").PerEdgeSupernet(copy.deepcopy(fused))
    if args.compile:
        fused.compile()
    precision = Precision(args.precision, world.device)
    batch = random_batch(args.batch_size, args.image_size, 10, world.device)
    architect = Architect(
        fused, learning_rate=6e-4, weight_decay=1e-3, path_reg_weight=1.5, edge_reg_weight=0.8
    )
    weight_step = training_step(fused, fused.weight_parameters(), batch, precision, world)

    def both_steps() -> None:
        architect.step(itertools.repeat(batch), ramp=1.0, world=world, precision=precision)
        weight_step()

    plain_weight_step, plain_both_steps = per_edge_steps(per_edge, batch, precision)
    n = args.batch_size
    yield [
        Case("weight", weight_step, n, against="weight, per edge"),
        Case("weight, per edge", plain_weight_step, n),
        Case("architecture + weight", both_steps, n, against="architecture + weight, per edge"),
        Case("architecture + weight, per edge", plain_both_steps, n),
    ]


def per_edge_steps(
    network: nn.Module, batch: Batch, precision: Precision
) -> tuple[Callable[[], None], Callable[[], None]]:
    """The weight step, and both steps, as in DARTS: each computes the gradients of all parameters."""
    weights, arch = network.weight_parameters(), network.arch
    weight_optimizer = torch.optim.Adam(weights, lr=1e-3, weight_decay=3e-4)
    arch_optimizer = torch.optim.Adam(arch.values(), lr=6e-4, betas=(0.5, 0.999), weight_decay=1e-3)

    def backward(regularizer: Tensor | float = 0.0) -> None:
        network.zero_grad()
        with precision.autocast():
            logits, _ = network(batch.images)
        (F.cross_entropy(logits.float(), batch.targets) + regularizer).backward()

    def weight_step() -> None:
        backward()
        nn.utils.clip_grad_norm_(weights, 5.0)
        weight_optimizer.step()

    def both_steps() -> None:
        path = path_regularizer(arch["alphas_normal"]) + path_regularizer(arch["alphas_reduce"])
        edge = edge_regularizer(arch["betas_normal"]) + edge_regularizer(arch["betas_reduce"])
        backward(1.5 * path + 0.8 * edge)
        arch_optimizer.step()
        weight_step()

    return weight_step, both_steps


def add_network_flags(parser: options.Parser) -> None:
    flag = parser.add_argument
    flag("--arch", default="EBNAS")
    flag("--bits", choices=BITS, default="w1a1", help="of weights and activations")
    flag("--init_channels", type=int, help="default: as published, and so with layers and image_size")
    flag("--layers", type=int)
    flag("--groups", type=int, default=14)
    flag("--image_size", type=int)
    flag("--batch_size", type=int, default=32)
    flag("--weight_binarization", choices=WEIGHT_BINARIZATIONS, default="plain")


def add_train_flags(parser: options.Parser) -> None:
    parser.add_argument("--family", choices=FAMILIES, default="cifar")
    add_network_flags(parser)


@contextmanager
def train_cases(args: argparse.Namespace, world: World) -> Iterator[list[Case]]:
    """a training step: the network as it is trained, and with binarisation in float tensors by autograd"""
    ours, batch = network_and_batch(args, args.family, world.device)
    plain = obvious_form("plain_forms").use_plain_convolutions(copy.deepcopy(ours))
    ours = as_trained(ours, args, world.device)
    precision = Precision(args.precision, world.device)
    our_step, plain_step = (
        training_step(model, list(model.parameters()), batch, precision, world) for model in (ours, plain)
    )
    yield [
        Case("training", our_step, args.batch_size, against="training, plain"),
        Case("training, plain", plain_step, args.batch_size),
    ]


def add_data_flags(parser: options.Parser) -> None:
    add_network_flags(parser)
    parser.add_argument("--images", type=int, default=256, help="JPEG files of 500 x 375 that are made")
    parser.add_argument("--workers", type=int, default=os.cpu_count() or 1, help="processes that read them")


@contextmanager
def data_cases(args: argparse.Namespace, world: World) -> Iterator[list[Case]]:
    """the loaders of CIFAR and of ImageNet, and beside each a training step of its network"""
    precision = Precision(args.precision, world.device)
    steps = {}
    for family in FAMILIES:
        model, batch = network_and_batch(args, family, world.device)
        model = as_trained(model, args, world.device)
        steps[family] = training_step(model, list(model.parameters()), batch, precision, world)
    with tempfile.TemporaryDirectory() as folder:
        make_jpegs(Path(folder), args.images)
        imagenet, _, _ = imagenet_loaders(
            folder, args.batch_size, device=world.device, workers=args.workers, seed=0
        )
        loaders = {"cifar": cifar_loader(args.batch_size, world.device), "imagenet": imagenet}
        cases = []
        for family, loader in loaders.items():
            cases += [
                Case(f"{family} loader", epochs_of(loader), loader.num_samples, f"{family} training"),
                Case(f"{family} training", steps[family], args.batch_size),
            ]
        yield cases


def add_infer_flags(parser: options.Parser) -> None:
    parser.add_argument("model", help="a packed network (export.py)")
    parser.add_argument("--batch_size", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rivals", nargs="*", default=list(RIVALS), choices=RIVALS)


@contextmanager
def infer_cases(args: argparse.Namespace, world: World) -> Iterator[list[Case]]:
    """a packed network, on every path of its kernel that this processor runs, and its float form elsewhere"""
    torch.set_num_threads(args.threads)
    try:
        packed = load(args.model)
    except ValueError as error:
        raise InputError(str(error)) from None
    images = torch.randn(args.batch_size, 3, packed.image_size, packed.image_size)
    model = Logits(float_network(packed.program)).eval()
    n = args.batch_size
    with torch.inference_mode():
        cases = [Case("eager", lambda: model(images).numpy(), n)]
        for rival in args.rivals:
            try:
                runner = make_runner(rival, model, images, args.threads)
                runner()
            except (
                Exception
            ) as error:  # each engine has errors of its own; one that fails must not end the rest
                print(f"{rival} is left out: {type(error).__name__}: {str(error).splitlines()[0][:100]}")
            else:
                cases.append(Case(rival, runner, n, against="eager"))
        for kernel in available_kernels():
            network = PackedNetwork(packed.program, threads=args.threads, kernel=kernel)
            cases.append(
                Case(f"packed, {kernel}", lambda network=network: network(images.numpy()), n, "eager")
            )
        expected = cases[0].run()
        for case in cases[1:]:
            logits = case.run()
            same = (logits.argmax(1) == expected.argmax(1)).mean()
            print(f"{case.name}: top-1 as eager {same:.1%}, logits within {abs(logits - expected).max():.1e}")
        weights = 4 * sum(parameter.numel() for parameter in float_network(packed.program).parameters())
        size = Path(args.model).stat().st_size
        print(f"file {size:,} bytes, {weights / size:.1f} times less than float32's {weights:,}")
        yield cases


BENCHMARKS = {
    "search": (add_search_flags, search_cases),
    "train": (add_train_flags, train_cases),
    "data": (add_data_flags, data_cases),
    "infer": (add_infer_flags, infer_cases),
}
"""By name: a function that adds its flags, and a context that gives its cases."""


# What the cases are made of


def obvious_form(module: str) -> Any:
    """A module of tests/. Raises InputError where the tests are not beside this script."""
    tests = str(Path(__file__).resolve().parent / "tests")
    if tests not in sys.path:
        sys.path.append(tests)
    try:
        return __import__(module)
    except ModuleNotFoundError:
        raise InputError(
            f"{module}.py, the form to compare with, is not in {tests}; run the script in a full checkout"
        ) from None


def random_batch(n: int, size: int, classes: int, device: torch.device) -> Batch:
    images = torch.randn(n, 3, size, size, device=device)
    return Batch(images, torch.randint(classes, (n,), device=device), n)


def network_and_batch(args: argparse.Namespace, family: str, device: torch.device) -> tuple[Network, Batch]:
    """The network of the flags, as published where they say nothing, and images for it."""
    size = {name: getattr(args, name, None) or value for name, value in PUBLISHED[family].items()}
    image_size = size.pop("image_size")
    weight_bits, activation_bits = BITS[args.bits]
    config = ModelConfig(
        get_genotype(args.arch),
        family,
        **size,
        groups=args.groups,
        auxiliary=True,
        weight_bits=weight_bits,
        activation_bits=activation_bits,
        weight_binarization=args.weight_binarization,
    )
    batch = random_batch(args.batch_size, image_size, config.num_classes, device)
    return build_model(config).to(device), batch


def as_trained(model: Network, args: argparse.Namespace, device: torch.device) -> Network:
    if device.type == "cpu":
        model.to(memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    return model


def training_step(
    model: nn.Module, parameters: list[nn.Parameter], batch: Batch, precision: Precision, world: World
) -> Callable[[], None]:
    """Forward, backward, clipping and Adam, as in engine.train_one_epoch."""
    optimizer = torch.optim.Adam(parameters, lr=1e-3, fused=True)

    def step() -> None:
        with precision.autocast():
            logits = [output.float() for output in model(batch.images) if output is not None]
            loss = sum(F.cross_entropy(output, batch.targets) for output in logits)
        precision.step(loss, optimizer, parameters, world=world, grad_clip=5.0)

    return step


def cifar_loader(batch_size: int, device: torch.device) -> BatchLoader:
    """Of 20 batches."""
    images = torch.randint(256, (20 * batch_size, 3, 32, 32), dtype=torch.uint8, device=device)
    labels = torch.randint(10, (len(images),), device=device)
    return BatchLoader(
        ImageSet(images, labels, tuple("0123456789")),
        batch_size,
        normalize=Normalize((0.5,) * 3, (0.25,) * 3),
        augmentation=Augmentation(crop_padding=4, flip=True, cutout_length=16),
        shuffle=True,
    )


def make_jpegs(root: Path, n: int) -> None:
    """ImageNet-like files, smooth noise of an average photograph's size: `n` in train, one in val."""
    rng = np.random.default_rng(0)
    for part, count in (("train", n), ("val", 1)):
        folder = root / part / "noise"
        folder.mkdir(parents=True)
        for index in range(count):
            coarse = rng.integers(0, 256, (47, 63, 3), dtype=np.uint8)
            Image.fromarray(coarse).resize((500, 375), Image.Resampling.BICUBIC).save(folder / f"{index}.jpg")


def epochs_of(loader: Loader) -> Callable[[], None]:
    """A call runs through the next epoch."""
    numbers = itertools.count()

    def epoch() -> None:
        for _ in loader.epoch(next(numbers)):
            pass

    return epoch


# Measuring


def measure(cases: list[Case], args: argparse.Namespace, device: torch.device) -> list[dict]:
    """A row for each case: seconds of a call (median, min, max), images per second, memory, operations."""
    clock = CLOCKS[args.clock]
    memory = {case.name: measure_memory(case.run, device) for case in cases}
    # what compiled code and other engines do is not dispatched
    counted = args.benchmark != "infer" and not args.compile
    operations = {case.name: count_operations(case.run) for case in cases} if counted else {}
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for repeat in range(-args.warmup, args.repeats):
        for case in cases:
            synchronize(device)
            started = clock()
            case.run()
            synchronize(device)
            if repeat >= 0:
                seconds[case.name].append(clock() - started)

    per_image = {case.name: [s / case.images for s in seconds[case.name]] for case in cases}
    rows = []
    for case in cases:
        row = {
            "case": case.name,
            "median": median(seconds[case.name]),
            "min": min(seconds[case.name]),
            "max": max(seconds[case.name]),
            "images_per_second": 1 / median(per_image[case.name]),
            "memory_bytes": memory[case.name],
        }
        if counted:
            row["operations"] = operations[case.name]
        if case.against is not None:
            turns = zip(per_image[case.against], per_image[case.name], strict=True)
            row["ratio"] = median(theirs / ours for theirs, ours in turns)
            if memory[case.name]:
                row["memory_ratio"] = memory[case.name] / memory[case.against]
        rows.append(row)
    return rows


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_memory(run: Callable[[], Any], device: torch.device) -> int:
    """Bytes of one call, see MEMORY."""
    run()  # what is held from now on (gradients, the optimiser's state) does not count
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - held
    kept = KeptForBackward()
    with torch.autograd.graph.saved_tensors_hooks(kept.pack, kept.unpack):
        run()
    return kept.peak


class KeptForBackward:
    """Hooks that count the bytes of the tensors that autograd keeps, each storage once, and their peak."""

    class Holder:
        """Lives as long as autograd keeps `tensor`."""

        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    def __init__(self):
        self.holders: Counter[int] = Counter()  # by the address of a storage
        self.bytes = self.peak = 0

    def pack(self, tensor: Tensor) -> Holder:
        storage, holder = tensor.untyped_storage(), self.Holder(tensor)
        self._count(storage.data_ptr(), storage.nbytes(), 1)
        weakref.finalize(holder, self._count, storage.data_ptr(), storage.nbytes(), -1)
        return holder

    def unpack(self, holder: Holder) -> Tensor:
        return holder.tensor

    def _count(self, address: int, size: int, change: int) -> None:
        held = self.holders[address] > 0
        self.holders[address] += change
        self.bytes += size * ((self.holders[address] > 0) - held)
        self.peak = max(self.peak, self.bytes)


def count_operations(run: Callable[[], Any]) -> int:
    """Tensor operations of one call that do work."""
    with OperationCount() as count:
        run()
    return count.operations


IDLE = ("empty", "new_empty", "_unsafe_view", "promote_types", "scalar_tensor")
"""Beginnings of the names of operations that only allocate, or only the host's."""


class OperationCount(TorchDispatchMode):
    """Within it, `operations` counts what is dispatched to a device, forward and backward."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        works = operation.namespace == "aten" and not operation.is_view
        self.operations += works and not operation.__name__.startswith(IDLE)
        return operation(*args, **(kwargs or {}))


def machine(device: torch.device) -> dict[str, Any]:
    """The hardware and the versions."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    return {
        "device": name,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": platform.system(),
    }


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):  # not Linux, or a processor without that line
        return platform.processor() or platform.machine()


def print_table(rows: list[dict], args: argparse.Namespace, device: torch.device) -> None:
    print(", ".join(f"{name} {value}" for name, value in machine(device).items()))
    print(", ".join(f"{name} {value}" for name, value in vars(args).items() if value not in (None, False)))
    print()
    memory = MEMORY[device.type]
    columns = (
        "case",
        "median ms",
        "min",
        "max",
        "images/s",
        f"{memory} MiB",
        "operations",
        "ratio",
        f"{memory} ratio",
    )
    print("| " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * (len(columns) - 1))
    for row in rows:
        cells = [row["case"], *(f"{1e3 * row[name]:.1f}" for name in ("median", "min", "max"))]
        cells += [
            f"{row['images_per_second']:.1f}",
            f"{row['memory_bytes'] / 2**20:.0f}",
            str(row.get("operations", "")),
        ]
        cells += [f"{row[name]:.2f}" if name in row else "" for name in ("ratio", "memory_ratio")]
        print("| " + " | ".join(cells) + " |")
    print()


if __name__ == "__main__":
    run_main(main)
