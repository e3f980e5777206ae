"""Measuring a call: its time, the tensor operations that it runs, the memory that it needs, the machine."""

from __future__ import annotations

import gc
import time
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
MEMORY = {"cuda": "peak", "cpu": "kept"}
"""What measure_memory gives. `peak`: the most that is allocated in a call, above what is held between calls.
`kept`: the most that autograd keeps at one time for the backward pass."""


@dataclass(frozen=True)
class Case:
    """What is timed: `run` handles `images` images, in `macs` multiply-accumulates, where these are of
    interest; `against` names the case that its rate is divided by."""

    name: str
    run: Callable[[], Any]
    images: int
    against: str | None = None
    macs: int = 0


def measure(
    cases: list[Case], *, repeats: int, warmup: int, clock: str, device: torch.device, count: bool
) -> list[dict]:
    """A row for each case: seconds of a call (median, min, max), images per second, memory and, with `count`,
    operations. Cases take turns; `ratio` is the median over the rounds of a case's rate over the other's."""
    now = CLOCKS[clock]
    gc.freeze()  # as training does
    memory = {case.name: measure_memory(case.run, device) for case in cases}
    operations = {case.name: count_operations(case.run) for case in cases} if count else {}
    seconds: dict[str, list[float]] = {case.name: [] for case in cases}
    for repeat in range(-warmup, repeats):
        for case in cases:
            synchronize(device)
            started = now()
            case.run()
            synchronize(device)
            if repeat >= 0:
                seconds[case.name].append(now() - started)

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
        if case.macs:
            row["gmacs_per_second"] = case.macs / row["median"] / 1e9
        if count:
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
    with KeptForBackward() as kept:
        run()
    return kept.peak


class KeptForBackward(torch.autograd.graph.saved_tensors_hooks):
    """Within it, the bytes of what autograd keeps, each storage once; `peak`: the most of them."""

    class Holder:
        """Lives as long as autograd keeps `tensor`."""

        def __init__(self, tensor: Tensor):
            self.tensor = tensor

    def __init__(self):
        super().__init__(self._pack, lambda holder: holder.tensor)
        # by storage, not by its address: on the meta device it has none
        self.holders: Counter[int] = Counter()
        self.bytes = self.peak = 0

    def __enter__(self) -> KeptForBackward:
        super().__enter__()
        return self

    def _pack(self, tensor: Tensor) -> Holder:
        storage, holder = tensor.untyped_storage(), self.Holder(tensor)
        self._count(storage._cdata, storage.nbytes(), 1)
        weakref.finalize(holder, self._count, storage._cdata, storage.nbytes(), -1)
        return holder

    def _count(self, storage: int, size: int, change: int) -> None:
        held = self.holders[storage] > 0
        self.holders[storage] += change
        self.bytes += size * ((self.holders[storage] > 0) - held)
        self.peak = max(self.peak, self.bytes)


def count_operations(run: Callable[[], Any]) -> int:
    """Tensor operations of one call that do work."""
    with OperationCount() as count:
        run()
    return count.operations


IDLE = ("empty", "new_empty", "_unsafe_view", "promote_types", "scalar_tensor")
"""Beginnings of the names of operations that only allocate, or only the host's."""


class OperationCount(TorchDispatchMode):
    """Within it, `operations` counts what is dispatched to a device, forward and backward, but views."""

    def __init__(self):
        super().__init__()
        self.operations = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        works = operation.namespace == "aten" and not operation.is_view
        self.operations += works and not operation.__name__.startswith(IDLE)
        return operation(*args, **(kwargs or {}))
