"""One process or many (torchrun): set-up, exact means over processes, and who may write.

Gradients are averaged explicitly after the backward pass, in one flat all-reduce: the supernet's two
optimisers, and checkpoints without `module.` prefixes, then need no wrapper.
"""

from __future__ import annotations

import os
import time
import uuid
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from utils import InputError


@dataclass(frozen=True)
class World:
    """This process's place among `size` processes, and its device. A single process is a world of one."""

    device: torch.device
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def share(self, batch: Any) -> float:
        """What to scale a mean over this process's part of `batch` by, for the average over processes to be
        the mean over the whole batch, however unevenly it is split."""
        return len(batch.images) * self.size / batch.global_size

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Replace each gradient by its mean over the processes, exactly the same on all of them."""
        if self.size == 1:
            return
        gradients = [p.grad for p in parameters if p.grad is not None]
        flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
        dist.all_reduce(flat)
        flat /= self.size
        for gradient, mean in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over processes, as a new tensor."""
        total = tensor.clone()
        if self.size > 1:
            dist.all_reduce(total)
        return total

    def average_buffers(self, model: nn.Module) -> None:
        """Average floating-point buffers (BN statistics, which each process gathers from its own shard)."""
        if self.size > 1:
            for buffer in model.buffers():
                if buffer.is_floating_point():
                    dist.all_reduce(buffer)
                    buffer /= self.size

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

    def any(self, flag: bool) -> bool:
        """Whether `flag` is set on any process."""
        if self.size == 1:
            return flag
        votes = torch.tensor([float(flag)], device=self.device)
        dist.all_reduce(votes)
        return bool(votes.item())

    @contextmanager
    def first_on_machine(self) -> Iterator[None]:
        """The first process of each machine goes through the block before its others."""
        first = int(os.environ.get("LOCAL_RANK", "0")) == 0
        if self.size > 1 and not first:
            dist.barrier()
        yield
        if self.size > 1 and first:
            dist.barrier()

    def close(self) -> None:
        if self.size > 1:
            dist.barrier()  # with torch 2.6 a process that goes while another still works may hang for ever
            dist.destroy_process_group()


def setup(device: str | None = None, gpu: int = 0) -> World:
    """The World that torchrun's environment describes, or a single process, on `device`.

    `device` None: CUDA where there is one, else the CPU; under torchrun, each local process takes its own
    GPU. Raises InputError where a CUDA device is asked for and there is none.
    """
    available = torch.cuda.is_available()
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
        index = int(os.environ.get("LOCAL_RANK", chosen.index if chosen.index is not None else gpu))
        if index >= torch.cuda.device_count():
            raise InputError(f"there is no CUDA device {index}; this machine has {torch.cuda.device_count()}")
        chosen = torch.device("cuda", index)
        torch.cuda.set_device(chosen)
    if "WORLD_SIZE" not in os.environ:
        return World(chosen)
    if not dist.is_initialized():
        store, rank, size = next(dist.rendezvous("env://"))
        store = dist.PrefixStore(_agree_on_prefix(store, rank, size), store)
        dist.init_process_group(
            "nccl" if chosen.type == "cuda" else "gloo", store=store, rank=rank, world_size=size
        )
    return World(chosen, rank=dist.get_rank(), size=dist.get_world_size())


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
