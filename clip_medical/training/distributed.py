"""Data-parallel training on several processes, each with its own GPU (or, over gloo, on CPUs): `torchrun train.py ...`.

Each process encodes its share of a contrastive batch, all_gather gives the features of all pairs to every process, and
all_reduce adds up the gradients of the adapter, a few megabytes. Every process then takes the same optimizer step from
the same weights, so no wrapper around the model is needed. The functions below `rank_0_first` communicate: they are
called only where there are several processes.
"""

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from clip_medical.errors import UserError

T = TypeVar("T")


def world_size() -> int:
    """Number of processes that train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Number of this process; rank 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def processes() -> Iterator[None]:
    """Connect the processes that torchrun started, inside the `with`."""
    if "WORLD_SIZE" not in os.environ:  # set by torchrun
        yield
        return
    if torch.cuda.is_available():
        local, gpus = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= gpus:
            raise UserError(
                f"Found {gpus} GPUs for process {local + 1} of this machine. Start at most {gpus} processes."
            )
        torch.cuda.set_device(local)
    # torch's default is ten minutes, less than rank 0 may take to decode 80,000 images while the others wait
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=3))
    yield
    dist.destroy_process_group()  # not after an exception: then the process ends, and torchrun ends the others


@contextmanager
def rank_0_first() -> Iterator[None]:
    """Run the body on rank 0, then on the other processes, which find what rank 0 has cached on disk."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


def gather(features: Tensor) -> Tensor:
    """all_gather: (n, D) of this process -> (N, D) of all, in the order of their ranks, outside the graph."""
    gathered = features.new_empty(world_size() * len(features), *features.shape[1:])
    dist.all_gather_into_tensor(gathered, features.detach().contiguous())
    return gathered


def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """all_reduce: replace each gradient by its sum over all processes, as one vector, as latency is what it costs."""
    trained = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in trained])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    for p, total in zip(trained, flat.split([p.numel() for p in trained]), strict=True):
        p.grad = total.view_as(p)


def any_process(*flags: bool, device: torch.device) -> tuple[bool, ...]:
    """For each flag, whether it is set on some process, so that all of them act on it together."""
    votes = torch.tensor(flags, dtype=torch.float, device=device)
    dist.all_reduce(votes)
    return tuple(votes.bool().tolist())


def from_rank_0(make: Callable[[], T]) -> T:
    """Call `make` on rank 0 and return its result on every process, so that an error is reported once."""
    if world_size() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def all_gather_objects(value: Any) -> list[Any]:
    """The `value` of each process, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box
