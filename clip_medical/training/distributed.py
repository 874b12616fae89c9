"""One training on several processes, each with its own GPU (or on gloo, its own CPU): `torchrun train.py ...`.

A contrastive batch is shared out: each process encodes its share of the pairs, all of them see all features, and the
gradients of the adapter, a few megabytes, are added up. Every process then takes the same step from the same weights,
so there is nothing to copy back and no wrapper around the model. Run without torchrun there is one process, and
everything here does nothing.
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
    """How many processes train together; 1 without torchrun."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """The number of this process; 0 is the one that prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


@contextmanager
def processes() -> Iterator[None]:
    """Inside the `with`, the processes that torchrun started know of each other."""
    if "WORLD_SIZE" not in os.environ:  # torchrun's mark
        yield
        return
    if torch.cuda.is_available():
        local, here = int(os.environ["LOCAL_RANK"]), torch.cuda.device_count()
        if local >= here:
            raise UserError(f"there is no GPU for process {local + 1} of this machine, which has {here}: start fewer.")
        torch.cuda.set_device(local)
    # torch waits ten minutes for a process; the first to read 80,000 pictures keeps the others waiting for longer
    dist.init_process_group("nccl" if torch.cuda.is_available() else "gloo", timeout=timedelta(hours=3))
    yield
    dist.destroy_process_group()  # not after an exception: then the process ends, and torchrun ends the others


@contextmanager
def first_on_rank_0() -> Iterator[None]:
    """The body runs on rank 0, then on the others: they find what it has cached on disk."""
    if rank() > 0:
        dist.barrier()
    yield
    if rank() == 0 and world_size() > 1:
        dist.barrier()


def divide(batch_size: int) -> int:
    """How many pairs of a batch each process encodes."""
    if batch_size % world_size():
        raise UserError(f"--batch-size {batch_size} is shared by {world_size()} processes: give a multiple of that.")
    return batch_size // world_size()


def share(rows: Tensor) -> slice:
    """The part of a batch (N,) that this process encodes: its slice of N / world_size neighbours."""
    size = len(rows) // world_size()
    return slice(rank() * size, (rank() + 1) * size)


def gather(features: Tensor) -> Tensor:
    """(n, D) of this process -> (N, D) of all, in the order of their ranks, outside the graph."""
    if world_size() == 1:
        return features.detach()
    everyone = features.new_empty(world_size() * len(features), *features.shape[1:])
    dist.all_gather_into_tensor(everyone, features.detach().contiguous())
    return everyone


def add_up(*tensors: Tensor) -> None:
    """Replace each tensor by its sum over all processes."""
    for tensor in tensors if world_size() > 1 else ():
        dist.all_reduce(tensor)


def add_up_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Give every process the gradient of the whole batch. Gradients travel as one vector: latency is what it costs."""
    if world_size() == 1:
        return
    learned = [p for p in parameters if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in learned])  # type: ignore[union-attr]
    dist.all_reduce(flat)
    for p, total in zip(learned, flat.split([p.numel() for p in learned]), strict=True):
        p.grad = total.view_as(p)


def any_process(*wishes: bool, device: torch.device) -> tuple[bool, ...]:
    """For each wish, whether some process has it. What only some did would leave the others waiting for ever."""
    if world_size() == 1:
        return wishes
    votes = torch.tensor(wishes, dtype=torch.float, device=device)
    dist.all_reduce(votes)
    return tuple(votes.bool().tolist())


def from_rank_0(make: Callable[[], T]) -> T:
    """What rank 0 makes, on every process; the others make nothing, so that a mistake is told once."""
    if world_size() == 1:
        return make()
    box = [make() if rank() == 0 else None]
    dist.broadcast_object_list(box)
    return box[0]  # type: ignore[return-value]


def from_everyone(value: Any) -> list[Any]:
    """What each process has, in the order of their ranks."""
    if world_size() == 1:
        return [value]
    box: list[Any] = [None] * world_size()
    dist.all_gather_object(box, value)
    return box
