"""Measurements for a few minutes on a GPU: the most wanted come first, and each is kept as soon as it is
there."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import nan
from pathlib import Path
from statistics import mean, median
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from comparison.engines import Logits, float_network
from comparison.original_network import original_network
from comparison.original_search import OriginalSupernet
from comparison.steps import (
    original_search_steps,
    random_batch,
    release_memory,
    search_steps,
    step_of,
    until_it_fits,
)
from genotypes import GENOTYPES
from images.loaders import Batch
from images.shapes import draw_shapes
from kernels import accelerate
from kernels.compilation import compile_regions
from model import ModelConfig, build_model
from model_search import SearchConfig, Supernet
from packed import PackedNetwork, load
from run.distributed import World
from run.runs import machine
from training.engine import choose_precision, has_bf16, in_memory_format
from training.memory import GB, PUBLISHED, StepMemory, count_bytes
from utils import RunFailed, one_line, write_atomically

PROGRAM = Path(__file__).parent.parent


@dataclass(frozen=True)
class Kind:
    """A step of a published run. `both`: an architecture step and a weight step, of a search."""

    name: str
    step: StepMemory
    both: bool = False

    @property
    def is_search(self) -> bool:
        return isinstance(self.step.config, SearchConfig)


def _stage1(step: StepMemory) -> StepMemory:
    return replace(step, config=replace(step.config, activation_bits=32))


KINDS = (
    Kind("search, weights", PUBLISHED["search"]),
    Kind("search, architecture + weights", PUBLISHED["search"], both=True),
    Kind("CIFAR stage 1", _stage1(PUBLISHED["CIFAR"])),
    Kind("CIFAR stage 2", PUBLISHED["CIFAR"]),
    Kind("ImageNet stage 1", _stage1(PUBLISHED["ImageNet"])),
    Kind("ImageNet stage 2", PUBLISHED["ImageNet"]),
)


@dataclass(frozen=True)
class Variant:
    """A way to compute a step; `original`: the original program's form of it."""

    name: str
    precision: str = "fp32"
    tf32: bool = False
    cudnn_benchmark: bool = False
    memory_format: str = "contiguous"
    compile_mode: str | None = None
    original: bool = False


VARIANTS = (
    Variant("fp32"),
    Variant("original", original=True),
    Variant("bf16", "bf16"),
    Variant("TF32", tf32=True),
    Variant("channels-last", memory_format="channels_last"),
    Variant("cuDNN's search", cudnn_benchmark=True),
    Variant("bf16, channels-last", "bf16", memory_format="channels_last"),
    Variant("fp16", "fp16"),
    Variant("compiled", compile_mode="default"),
    Variant("compiled, CUDA graphs", compile_mode="reduce-overhead"),
    Variant("bf16, compiled", "bf16", compile_mode="default"),
)
"""The most wanted first: where the time ends, the last are left out."""


class Card:
    """The GPU, as far as this needs it; tests put a pretended one in its place."""

    def __init__(self, device: torch.device):
        self.device = device

    def describe(self) -> dict[str, Any]:
        properties = torch.cuda.get_device_properties(self.device)
        return {
            **machine(self.device),
            "gigabytes": round(properties.total_memory / GB, 1),
            "capability": f"{properties.major}.{properties.minor}",
            "cuda": torch.version.cuda or f"HIP {torch.version.hip}",
            "cudnn": torch.backends.cudnn.version(),
            "bf16": has_bf16(),
        }

    def synchronize(self) -> None:
        torch.cuda.synchronize(self.device)

    def forget_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats(self.device)

    def peak(self) -> dict[str, int]:
        """The most bytes that tensors had, that the allocator had, and that this process has beside it."""
        free, total = torch.cuda.mem_get_info(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return {
            "peak_bytes": torch.cuda.max_memory_allocated(self.device),
            "reserved_bytes": torch.cuda.max_memory_reserved(self.device),
            "other_bytes": max(0, total - free - reserved),
        }


@dataclass
class Report:
    """The measurements so far, each written to `path`, if there is one; `ends` is when the time is over."""

    path: Path | None
    ends: float
    content: dict[str, Any] = field(default_factory=dict)

    def left(self) -> float:
        """Seconds."""
        return self.ends - time.monotonic()

    def add(self, part: str, result: Any) -> None:
        """A part's result, or one more of the rows of a part."""
        if isinstance(result, list):
            self.content.setdefault(part, []).extend(result)
        else:
            self.content[part] = result
        if self.path is not None:
            write_atomically(self.path, (json.dumps(self.content, indent=1) + "\n").encode())


def run(
    card: Card,
    *,
    minutes: float,
    out: Path | None,
    kinds: Sequence[Kind] = KINDS,
    variants: Sequence[Variant] = VARIANTS,
    steps: int = 200,
) -> dict[str, Any]:
    """All parts, in order; a part that fails says why in its place, and the next one follows."""
    report = Report(out, time.monotonic() + 60 * minutes)
    parts: dict[str, Callable[[], Any]] = {
        "machine": card.describe,
        "tests": lambda: run_tests(0.3 * report.left()),
        "steps": lambda: time_steps(card, kinds, variants, report),
        "memory": lambda: reserve(report.content["steps"]),
        "learning": lambda: learning(card, steps, report),
        "batch norm": lambda: time_batch_norms(card),
        "packed": packed_beside_eager,
    }
    for name, part in parts.items():
        print(f"{name} ...", file=sys.stderr, flush=True)
        if name != "machine" and report.left() < 0:
            report.add(f"{name}: left out", "the time was over")
            continue
        try:
            result = part()
        except Exception as error:  # whatever it is: the other parts are worth having
            report.add(f"{name}: failed", f"{type(error).__name__}: {one_line(error)}")
            continue
        if result is not None:
            report.add(name, result)
    report.add("summary", sentences(report.content))
    return report.content


def run_tests(seconds: float) -> dict[str, Any]:
    """tests/kernels/test_cuda.py, which only a GPU can run, in a process of its own."""
    command = [sys.executable, "-m", "pytest", "-q", "-rf", "tests/kernels/test_cuda.py"]
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=PROGRAM, capture_output=True, text=True, timeout=seconds)
        lines, code = done.stdout.splitlines(), done.returncode
    except subprocess.TimeoutExpired as error:
        lines, code = _text(error.stdout).splitlines(), None
    failed = [line for line in lines if line.startswith("FAILED")]
    last = lines[-1] if lines else "no output"
    return {"code": code, "seconds": time.monotonic() - started, "failed": failed, "last line": last}


def _text(output: str | bytes | None) -> str:
    """The output of a process that subprocess ended, as text."""
    return output.decode(errors="replace") if isinstance(output, bytes) else output or ""


def make_step(kind: Kind, variant: Variant, images: int, device: torch.device) -> Callable[[], Any]:
    """The step of a kind, computed in a variant's way, on random images."""
    torch.manual_seed(0)
    world = World(device)
    precision = choose_precision(
        variant.precision, device, tf32=variant.tf32, cudnn_benchmark=variant.cudnn_benchmark
    )
    config = kind.step.config
    batch = random_batch(images, kind.step.image_size, config.num_classes, device)
    network = (Supernet if kind.is_search else build_model)(config).to(device)
    if variant.original:
        if kind.is_search:
            of_original = original_search_steps(OriginalSupernet(network), batch, precision, world)
            return of_original[kind.both]
        network = original_network(network)
        return step_of(network, list(network.parameters()), batch, precision, world, fused_adam=False)
    in_memory_format(accelerate(network), variant.memory_format, auto="contiguous")
    if variant.compile_mode is not None:
        compile_regions(network, mode=variant.compile_mode)
    if kind.is_search:
        return search_steps(network, batch, precision, world)[kind.both]
    return step_of(network, list(network.parameters()), batch, precision, world)


def time_steps(
    card: Card, kinds: Sequence[Kind], variants: Sequence[Variant], report: Report, *, portion: float = 0.75
) -> None:
    """A row for each kind in each variant, while `portion` of what is left of the time lasts."""
    ends = report.left() * (1 - portion)
    for variant in variants:
        for kind in kinds:
            row = {"step": kind.name, "variant": variant.name}
            if report.left() < ends:
                row["left out"] = "the time was over"
            else:
                print(f"  {kind.name}, {variant.name}", file=sys.stderr, flush=True)
                try:
                    row |= time_step(card, kind, variant)
                except Exception as error:  # a compiler's, the allocator's, cuDNN's
                    row["failed"] = f"{type(error).__name__}: {one_line(error)}"
                release_memory()
            report.add("steps", [row])


def time_step(card: Card, kind: Kind, variant: Variant, *, seconds: float = 0.3) -> dict[str, Any]:
    """Of the largest batch that fits, at most the published one: `ms`, a step's median over three rows of
    steps; memory; and, not of compiled steps, `host_ms`, a step of two images: about what the host takes."""
    compiled = variant.compile_mode is not None
    if compiled:
        torch.compiler.reset()
    step, images = until_it_fits(lambda n: make_step(kind, variant, n, card.device), kind.step.images)
    card.forget_peak()
    step()
    memory = card.peak()
    ms = time_call(card, step, seconds)
    step = None
    release_memory()
    row = {"images": images, "ms": ms, "images_per_second": 1000 * images / ms, **memory}
    if not variant.original:
        row["counted_bytes"] = count_bytes(replace(kind.step, images=images, precision=variant.precision))
    if compiled:  # for two images again, which takes long
        return row
    few = make_step(kind, variant, 2, card.device)
    few()
    few()
    return {**row, "host_ms": time_call(card, few, seconds / 2)}


def time_call(card: Card, call: Callable[[], Any], seconds: float) -> float:
    """Milliseconds: the median over three rows of calls, each of about `seconds`, without a wait between."""

    def row(calls: int) -> float:
        card.synchronize()
        started = time.perf_counter()
        for _ in range(calls):
            call()
        card.synchronize()
        return 1000 * (time.perf_counter() - started) / calls

    calls = max(1, min(200, round(1000 * seconds / row(1))))
    return median(row(calls) for _ in range(3))


def reserve(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """What training/memory.py would have to set aside for the counts to cover all that was measured here."""
    counted = [row for row in rows if "counted_bytes" in row]
    if not counted:
        raise RunFailed("no step was timed")
    return {
        "context_bytes": max(row["other_bytes"] for row in counted),
        "workspace_bytes": max(0, *(row["peak_bytes"] - row["counted_bytes"] for row in counted)),
        "fragmentation": max(row["reserved_bytes"] / row["peak_bytes"] for row in counted),
        "least_of_count": min(row["peak_bytes"] / row["counted_bytes"] for row in counted),
    }


TINY = ModelConfig(GENOTYPES["EBNAS"], init_channels=14, layers=3, num_classes=10)
LEARNERS = (
    Kind("search", StepMemory(SearchConfig(8, 3), 16, 50), both=True),
    Kind("stage 1", StepMemory(replace(TINY, activation_bits=32), 16, 50)),
    Kind("stage 2", StepMemory(TINY, 16, 50)),
)


def learning(card: Card, steps: int, report: Report) -> None:
    """A row for each of LEARNERS: the mean losses of the first, the middle and the last tenth of `steps`, on
    this GPU and on the CPU, from the same weights and on the same images of `shapes`."""
    n = LEARNERS[0].step.images
    images, labels = draw_shapes(n * min(20, steps), LEARNERS[0].step.image_size, seed=0)
    images = torch.from_numpy(images).float().sub_(128).div_(64)
    batches = [
        Batch(pixels, targets, n)
        for pixels, targets in zip(images.split(n), torch.from_numpy(labels).split(n), strict=True)
    ]
    for kind in LEARNERS:
        curves = {
            place: losses(kind, device, batches, steps)
            for place, device in (("gpu", card.device), ("cpu", torch.device("cpu")))
        }
        tenth = max(1, steps // 10)
        starts = (0, (steps - tenth) // 2, steps - tenth)
        means = {
            place: [mean(curve[first : first + tenth]) for first in starts] for place, curve in curves.items()
        }
        report.add("learning", [{"run": kind.name, "steps": steps, **means}])


def losses(kind: Kind, device: torch.device, batches: Sequence[Batch], steps: int) -> list[float]:
    torch.manual_seed(0)
    world, precision = World(device), choose_precision("fp32", device)
    network = accelerate((Supernet if kind.is_search else build_model)(kind.step.config)).to(device)
    images, targets = (torch.empty_like(tensor, device=device) for tensor in batches[0][:2])
    batch = Batch(images, targets, batches[0].global_size)
    if kind.is_search:
        step = search_steps(network, batch, precision, world)[kind.both]
    else:
        step = step_of(network, list(network.parameters()), batch, precision, world)
    found = []
    for number in range(steps):
        images.copy_(batches[number % len(batches)].images)
        targets.copy_(batches[number % len(batches)].targets)
        found.append(step())
    return torch.stack(found).tolist()


BATCH_NORM = (64, 84, 32, 32)
"""Of the published CIFAR network, with a quarter of its batch."""


def time_batch_norms(card: Card) -> list[dict[str, Any]]:
    """Forward and backward of a BN: torch's own kernels, which our functions call, and cuDNN's, which modules
    take."""
    rows = []
    for dtype in (torch.float32, torch.bfloat16):
        for layout in (torch.contiguous_format, torch.channels_last):
            x = torch.randn(BATCH_NORM, device=card.device, dtype=dtype)
            x = x.contiguous(memory_format=layout).requires_grad_()
            norm = nn.BatchNorm2d(x.shape[1]).to(card.device)
            grad = torch.randn_like(x)

            def both(x: torch.Tensor = x, norm: nn.BatchNorm2d = norm, grad: torch.Tensor = grad) -> None:
                running = norm.running_mean, norm.running_var
                y = F.batch_norm(x, *running, norm.weight, norm.bias, True)
                torch.autograd.grad(y, (x, norm.weight, norm.bias), grad)

            row = {"dtype": str(dtype).removeprefix("torch."), "layout": str(layout).removeprefix("torch.")}
            for name, enabled in (("torch_ms", False), ("cudnn_ms", True)):
                with torch.backends.cudnn.flags(enabled=enabled, benchmark=False, allow_tf32=False):
                    both()
                    row[name] = time_call(card, both, 0.05)
            rows.append(row)
    return rows


def packed_beside_eager() -> dict[str, float]:
    """The shipped network of shapes on this machine's CPU, one image at a time, one thread."""
    network = load(PROGRAM / "models" / "shapes.ebnas")
    size = network.program.image_size
    image, model = torch.randn(1, 3, size, size), Logits(float_network(network.program)).eval()
    packed = PackedNetwork(network.program, threads=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            cpu = _Processor()
            eager_ms = time_call(cpu, lambda: model(image), 0.1)
            packed_ms = time_call(cpu, lambda: packed(image.numpy()), 0.1)
    finally:
        torch.set_num_threads(threads)
    return {"eager_ms": eager_ms, "packed_ms": packed_ms, "ratio": eager_ms / packed_ms}


class _Processor(Card):
    """The CPU, which is never behind."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))

    def synchronize(self) -> None:
        pass


# What is printed at the end


def table(content: dict[str, Any]) -> Iterator[str]:
    """Markdown: the rows of `steps`, with their rate over that of the original's form."""
    columns = ("step", "variant", "batch", "ms", "images/s", "peak GB", "counted GB", "host ms", "ratio")
    yield "| " + " | ".join(columns) + " |"
    yield "|---|---|" + "---:|" * (len(columns) - 2)
    rows = content.get("steps", [])
    original = {
        row["step"]: row["images_per_second"] for row in rows if row["variant"] == "original" and "ms" in row
    }
    for row in rows:
        cells = [row["step"], row["variant"]]
        if "ms" in row:
            counted = f"{row['counted_bytes'] / GB:.2f}" if "counted_bytes" in row else ""
            ratio = row["images_per_second"] / original[row["step"]] if row["step"] in original else None
            cells += [str(row["images"]), f"{row['ms']:.1f}", f"{row['images_per_second']:.0f}"]
            cells += [f"{row['peak_bytes'] / GB:.2f}", counted, f"{row.get('host_ms', nan):.1f}"]
            cells.append("" if ratio is None else f"{ratio:.2f}")
        else:
            cells += [row.get("failed") or row["left out"], *[""] * (len(columns) - 3)]
        yield "| " + " | ".join(cells) + " |"


def sentences(content: dict[str, Any]) -> list[str]:
    """Sentences about it: what fits, how long the published runs take, what is slow, what failed."""
    rows = content.get("steps", [])
    timed = [row for row in rows if "ms" in row]
    found = []
    tests = content.get("tests", {})
    if "code" in tests:
        outcome = "pass" if tests["code"] == 0 else "do not all pass"
        found.append(f"The tests that need a GPU {outcome}: {tests['last line']}.")
    plain = {row["step"]: row for row in timed if row["variant"] == "fp32"}
    if plain:
        fits = ", ".join(f"{name} {row['images']}" for name, row in plain.items())
        found.append(f"Batches that fit in fp32, at most the published 256: {fits}.")
    for variant in sorted({row["variant"] for row in timed} - {"original"}):
        rates = {row["step"]: row["images_per_second"] for row in timed if row["variant"] == variant}
        hours = {name: seconds(rates) / 3600 for name, seconds in PUBLISHED_RUNS.items() if seconds(rates)}
        if hours:
            words = ", ".join(f"{name} {value:.1f} hours" for name, value in hours.items())
            found.append(f"The published runs in {variant}, loading left out: {words}.")
    if waiting := [row for row in timed if row.get("host_ms", 0) > 0.8 * row["ms"]]:
        words = ", ".join(f"{row['step']} in {row['variant']}" for row in waiting)
        found.append(f"The host, not the GPU, takes the time of {words}; CUDA graphs could save it.")
    for row in content.get("learning", []):
        found.append(
            f"{row['run']}: losses over {row['steps']} steps "
            f"{', '.join(f'{value:.3f}' for value in row['gpu'])} on the GPU, "
            f"{', '.join(f'{value:.3f}' for value in row['cpu'])} on the CPU."
        )
    if slow := [row for row in content.get("batch norm", []) if row["torch_ms"] > 1.1 * row["cudnn_ms"]]:
        words = ", ".join(f"{row['dtype']} {row['layout']}" for row in slow)
        found.append(f"torch's own batch normalisation is slower than cuDNN's for {words}.")
    if "ratio" in content.get("packed", {}):
        found.append(f"Packed is {content['packed']['ratio']:.1f} times as fast as eager on this CPU.")
    if failed := [row for row in rows if "failed" in row]:
        words = "; ".join(f"{row['step']} in {row['variant']} ({row['failed']})" for row in failed)
        found.append(f"Failed: {words}.")
    found += [f"{name}: {why}." for name, why in content.items() if name.endswith((": failed", ": left out"))]
    return found


def _search_seconds(rates: dict[str, float]) -> float | None:
    """50 epochs of 25,000 images; from the 25th on with architecture steps."""
    names = ("search, weights", "search, architecture + weights")
    return sum(25 * 25_000 / rates[name] for name in names) if rates.keys() >= set(names) else None


def _stages_seconds(family: str, epochs: int, images: int) -> Callable[[dict[str, float]], float | None]:
    names = (f"{family} stage 1", f"{family} stage 2")

    def seconds(rates: dict[str, float]) -> float | None:
        return sum(epochs * images / rates[name] for name in names) if rates.keys() >= set(names) else None

    return seconds


PUBLISHED_RUNS = {
    "search": _search_seconds,
    "CIFAR": _stages_seconds("CIFAR", 600, 50_000),
    "ImageNet": _stages_seconds("ImageNet", 100, 1_281_167),
}
"""By name: the seconds of a published run, of its steps' images per second; None where a step is lacking."""
