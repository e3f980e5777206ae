"""One process or many (torchrun): set-up, exact means over processes, and who may write.

Gradients are averaged explicitly after the backward pass, in one flat all-reduce: the supernet's two
optimisers, and checkpoints without `module.` prefixes, then need no wrapper. Buckets that are sent while the
backward pass goes on would not pay: of a derived network, whose weights are binarised together, 93 % of the
bytes come in its last fiftieth; of the supernet there are 4 MB in all.
"""

from __future__ import annotations

import os
import socket
import time
import uuid
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from model import float_buffers
from utils import InputError, RunFailed, one_line

LONGEST_WAIT = timedelta(days=7)
"""For what one process does while others wait: a download may take hours."""


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes, and its device. A single process is a world of one."""

    device: torch.device
    rank: int = 0
    size: int = 1
    machine: str = field(default="", compare=False)  # the same on all that run on it
    local_rank: int = 0  # among those
    store: dist.Store | None = field(default=None, compare=False)  # in which they wait for each other

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def loss_factor(self, batch: Any) -> float:
        """What to scale a mean over this process's part of `batch` by, for the average over processes to be
        the mean over the whole batch, however unevenly it is split."""
        return len(batch.images) * self.size / batch.global_size

    @torch.no_grad()
    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes, exactly the same on all of them."""
        if self.size > 1:
            self._as_one_message([p.grad for p in parameters if p.grad is not None], self._average)

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, as a new tensor."""
        total = tensor.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    @torch.no_grad()
    def average_buffers(self, model: nn.Module) -> None:
        """Average floating-point buffers (BN statistics, which each process gathers from its own shard)."""
        if self.size > 1:
            self._as_one_message(float_buffers(model).values(), self._average)

    @torch.no_grad()
    def broadcast_model(self, model: nn.Module) -> None:
        """The main process's parameters and buffers, on every process."""
        if self.size > 1:
            self._as_one_message(model.state_dict().values(), partial(dist.broadcast, src=0))

    def _average(self, tensor: Tensor) -> None:
        dist.all_reduce(tensor)
        tensor /= self.size

    @staticmethod
    def _as_one_message(tensors: Iterable[Tensor], exchange: Callable[[Tensor], Any]) -> None:
        """Give all `tensors` of a type, as one flat tensor, to `exchange`, which changes it; copy it back."""
        by_type = defaultdict(list)
        for tensor in tensors:
            by_type[tensor.dtype].append(tensor)
        for alike in by_type.values():
            flat = torch.cat([tensor.reshape(-1) for tensor in alike])
            exchange(flat)
            parts = flat.split([tensor.numel() for tensor in alike])
            torch._foreach_copy_(alike, [p.view_as(t) for p, t in zip(parts, alike, strict=True)])

    def broadcast(self, value: Any) -> Any:
        """The main process's `value` (any picklable object), on every process."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, device=self.device if self.device.type == "cuda" else None)
        return box[0]

    def gather(self, value: Any) -> list:
        """Every process's `value`, by rank."""
        values = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value)
        return values

    def vote(self, flag: bool) -> Vote:
        """Begin to ask whether `flag` is set on any process. All processes ask at the same point."""
        return Vote(flag, self)

    @contextmanager
    def in_turn(self, what: str) -> Iterator[None]:
        """Rank 0 goes through the block first, then the first process of each other machine, then the rest;
        all leave it together.

        So a set is downloaded once, whether machines share a folder or not. `what` names the block, once in a
        run. Where one of them fails, this raises RunFailed on the others: nobody waits for it in vain. They
        wait in the store, not in a barrier of the devices, which would give up after minutes.
        """
        if self.size == 1:
            yield
            return
        first_here, failure = f"{what}: first of {self.machine}", ""

        def wait_for(*keys: str) -> None:
            nonlocal failure
            self.store.wait(list(keys), LONGEST_WAIT)
            failure = next(filter(None, (self.store.get(key).decode() for key in keys)), "")
            if failure:
                raise RunFailed(f"another process failed at {what}: {failure}")

        try:
            if not self.is_main:
                wait_for(first_here if self.local_rank else f"{what}: rank 0")
            yield
        except BaseException as error:
            failure = failure or one_line(error)
            raise
        finally:
            self.store.set(f"{what}: rank {self.rank}", failure)
            if self.local_rank == 0:
                self.store.set(first_here, failure)
        wait_for(*(f"{what}: rank {rank}" for rank in range(self.size)))

    def close(self) -> None:
        """Meet the others, and leave them."""
        if dist.is_initialized():
            # NCCL guesses the GPU, and warns, where it is not told. With torch 2.6 a process that goes while
            # another still works may hang for ever
            dist.barrier(device_ids=[self.device.index] if dist.get_backend() == "nccl" else None)
            dist.destroy_process_group()


class Vote:
    """Whether a flag is set on any process: asked when this is made, so that who reads it later need not wait
    for the others, nor for what a GPU has been given to do since."""

    def __init__(self, flag: bool, world: World):
        self.votes = torch.full((), float(flag), device=world.device)
        self.work = dist.all_reduce(self.votes, async_op=True) if world.size > 1 else None
        self.arrived = None
        if world.device.type == "cuda" and self.work is not None:
            self.work.wait()  # the GPU's stream does, not the host
            self.votes = torch.empty((), pin_memory=True).copy_(self.votes, non_blocking=True)
            self.arrived = torch.cuda.Event()
            self.arrived.record()

    def result(self) -> bool:
        if self.arrived is not None:
            self.arrived.synchronize()
        elif self.work is not None:
            self.work.wait()
        return bool(self.votes.item())


def setup(device: str | None = None, gpu: int = 0) -> World:
    """The World that torchrun's environment describes, or a single process, on `device`.

    `device` None: CUDA where there is one, else the CPU; under torchrun, each local process takes its own
    GPU, or the only one that it is shown (SLURM can give each task one). Raises InputError where a CUDA
    device is asked for and there is none.
    """
    available, local_rank = torch.cuda.is_available(), int(os.environ.get("LOCAL_RANK", "0"))
    try:
        chosen = torch.device(device or ("cuda" if available else "cpu"))
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda"):
        raise InputError(f"--device {device}: give cpu, cuda or cuda:N")
    if chosen.type == "cuda":
        if not available:
            raise InputError(
                f"--device {device}: this machine or this build of torch has no CUDA; use --device cpu"
            )
        index, count = gpu if chosen.index is None else chosen.index, torch.cuda.device_count()
        if "LOCAL_RANK" in os.environ:
            index = local_rank if count > 1 else 0
        if index >= count:
            raise InputError(f"there is no CUDA device {index}; this machine shows {count}")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" not in os.environ:
        return World(chosen)
    store, rank, size = next(dist.rendezvous("env://"))
    store = dist.PrefixStore(_agree_on_prefix(store, rank, size), store)
    backend = "nccl" if chosen.type == "cuda" and dist.is_nccl_available() else "gloo"  # Windows has no NCCL
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    machine = os.environ.get("GROUP_RANK") or socket.gethostname()
    return World(chosen, rank, size, machine, local_rank, dist.PrefixStore("turns", store))


def _agree_on_prefix(store: dist.Store, rank: int, size: int) -> str:
    """A name that these processes share, and no earlier ones.

    torchrun may keep its store when it restarts workers, and with it the addresses of those that are gone,
    which the new ones would wait for. (The number of the restart would not do: each machine counts its own.)
    """
    name = uuid.uuid4().hex
    store.set(f"member {rank}", name)
    if rank == 0:  # tell every member, again and again, for what stands there may be of an earlier process
        while store.add(f"members of {name}", 0) < size - 1:
            for other in range(1, size):
                store.set(f"prefix of {store.get(f'member {other}').decode()}", name)
            time.sleep(0.01)
        return name
    prefix = store.get(f"prefix of {name}").decode()
    store.add(f"members of {prefix}", 1)
    return prefix


def restarted() -> bool:
    """Whether torchrun has restarted this process after a worker failed."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


def launch_name() -> str:
    """A name of this start of the program, which no other start has. It stays when torchrun restarts its
    workers.

    torchrun's run id where it has one of its own, else the process that launched this one.
    """
    run_id = os.environ.get("TORCHELASTIC_RUN_ID", "none")
    return run_id if run_id != "none" else f"{socket.gethostname()} {os.getppid()}"
