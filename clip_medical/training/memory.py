"""Forecast the memory of a training step from two small trials, and choose chunk size and checkpointing from that.

Memory grows linearly with the pairs that are encoded at a time, so two small chunks predict a large one. On a GPU the
trials read torch's allocator; on a CPU, where there is none to read, they count live tensors.
"""

import ctypes
import os
import sys
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clip_medical.config import Config
from clip_medical.data.batches import Epoch
from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.training import distributed
from clip_medical.training.grad_cache import WHOLE, contrastive_backward, random_state, restore
from clip_medical.training.loss import BLOCK, Loss

GIB = 2**30
TRIALS = (4, 8)  # pairs in the two trials
HEAP = 1.5  # resident bytes for each byte of live tensors on a CPU: the C library frees late and in pieces
LEAST = 32  # smaller chunks leave a GPU idle, and cost more than checkpointing


@dataclass(frozen=True)
class Plan:
    """How a batch goes through the model. It changes the loss and its gradient by rounding only."""

    chunk_size: int = WHOLE  # pairs that this process encodes at a time
    checkpointing: bool = False
    forecast: int = 0  # peak bytes of a step: allocated on a GPU, resident on a CPU
    limit: int = 0  # bytes that it may take

    def describe(self, pairs: int) -> str:
        """For the log; pairs: the part of a batch that this process encodes."""
        chunks = -(-pairs // self.chunk_size)
        size = "in one chunk" if chunks == 1 else f"in {chunks} chunks of up to {self.chunk_size}"
        return f"{size}, {'with' if self.checkpointing else 'without'} checkpointing"


def make_plan(clip: Clip, epoch: Epoch, config: Config, loss: Loss) -> Plan:
    """Choose the cheapest plan for this process's share of a batch that fits into memory, and set the model to it.

    Extra forward passes compared with the plain step: none; one with checkpointing; one with chunks; two with both.
    Values that the configuration names are taken as given, "auto" is filled in. If nothing fits, the plan with the
    least memory is taken.
    """
    limit, batch = memory_limit(clip.device), distributed.divide(config.batch_size)
    whole = batch if config.chunk_size == "auto" else min(config.chunk_size, batch)
    candidates: list[tuple[int | None, bool]] = [(whole, False), (whole, True)]
    if config.chunk_size == "auto":
        candidates += [(None, False), (None, True)]  # None: the largest chunk that fits
    for chunk, checkpointing in candidates:
        if config.checkpointing in ("auto", "on" if checkpointing else "off"):
            trial = _trial_plan(clip, epoch, config, loss, chunk, checkpointing, limit)
            plan: Plan = distributed.all_gather_objects(trial)[0]  # the same on all processes
            large_enough = plan.chunk_size >= min(LEAST, batch) or config.checkpointing == "off" or chunk
            if plan.forecast <= limit and large_enough:
                break
    clip.set_checkpointing(plan.checkpointing)
    return plan


def _trial_plan(
    clip: Clip, epoch: Epoch, config: Config, loss: Loss, chunk: int | None, checkpointing: bool, limit: int
) -> Plan:
    """The plan for chunks of `chunk` pairs with its forecast; None: for the largest chunks within the limit."""
    clip.set_checkpointing(checkpointing)
    batch, width = distributed.divide(config.batch_size), clip.model.config.projection_dim
    trainable = sum(p.numel() for p in clip.model.parameters() if p.requires_grad)
    texts = 1 + config.fragments
    features = 4 * (5 * (1 + texts) * batch * width + 6 * texts * min(batch**2, BLOCK))  # and their gradients, logits
    fixed, per_pair = _linear_fit(clip, epoch, loss, one_chunk=chunk is not None and chunk >= batch)
    fixed += memory_in_use(clip.device) + 2 * 4 * trainable + features  # 2: AdamW's moments
    if chunk is None:
        most = min(batch, max(1, int((limit - fixed) / per_pair)))
        chunks = -(-batch // (most // 8 * 8 or most))
        chunk = -(-batch // chunks)  # equal chunks: no small one at the end
    return Plan(chunk, checkpointing, int(fixed + per_pair * chunk), limit)


def _linear_fit(clip: Clip, epoch: Epoch, loss: Loss, one_chunk: bool) -> tuple[float, float]:
    """(bytes, bytes a pair) of a step. Leaves gradients empty and the random state as it was."""
    state = random_state(clip.device)
    by_length = epoch.pairs.lengths.argsort()
    if clip.device.type == "cuda":  # libraries allocate their workspaces at the first step
        _peak(clip, epoch, loss, by_length[-TRIALS[0] :], TRIALS[0])
    peaks = []
    for chunk in TRIALS:  # short and long captions, as in a batch
        rows = by_length[torch.linspace(0, len(by_length) - 1, chunk).long()]
        peaks.append(_peak(clip, epoch, loss, rows if one_chunk else rows.repeat(2), chunk))
    restore(state)
    per_pair = (peaks[1] - peaks[0]) / (TRIALS[1] - TRIALS[0])
    return peaks[0] - per_pair * TRIALS[0], per_pair


def _peak(clip: Clip, epoch: Epoch, loss: Loss, rows: Tensor, chunk: int) -> int:
    """Peak bytes of a step on `rows`, beyond those in use before it."""
    world = distributed.world_size()
    batch = epoch.batch(rows.repeat(world), distributed.rank(), world)
    if clip.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contrastive_backward(clip, batch, loss, chunk)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with _LiveBytes() as live:
            contrastive_backward(clip, batch, loss, chunk)
        peak = int(HEAP * live.peak)
    clip.model.zero_grad(set_to_none=True)
    return peak


class _LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that operations inside the `with` have created and that are still alive."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch.compile, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for storage in {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)}:
            if storage._cdata not in inputs:  # else a view, or a result written in place
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _drop(self, size: int) -> None:
        self.now -= size


@contextmanager
def explain_out_of_memory(trainer: Any) -> Iterator[None]:
    """Turn each library's out-of-memory error into one sentence with the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        plan, pairs = trainer.plan, distributed.divide(trainer.config.batch_size)
        flags = [f"--chunk-size {max(1, min(plan.chunk_size, pairs) // 2)}"]
        flags += [] if plan.checkpointing else ["--checkpointing on"]
        raise UserError(
            f"Out of memory in step {trainer.done + 1} with {pairs} pairs {plan.describe(pairs)}. "
            f"Give {' or '.join(flags)}, which leaves the loss as it is. --resume continues from the last checkpoint."
        ) from error


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU under Linux, let the C library keep the memory of freed tensors for the next ones.

    By default glibc returns large blocks to the system, which clears and maps every page again at the next tensor.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
    if device.type == "cpu" and sys.platform == "linux" and hasattr(c_library := ctypes.CDLL(None), "mallopt"):
        c_library.mallopt(mmap_max, 0)
        c_library.mallopt(trim_threshold, -1)  # never


def memory_limit(device: torch.device) -> int:
    """Bytes that training may take: nine tenths of what is free on the GPU; half of the machine's memory on a CPU.

    On a CPU of all memory, not of what is free now, so that the same command takes the same chunks tomorrow.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        allowed = total * torch.cuda.get_per_process_memory_fraction()
        return int(0.9 * min(free + torch.cuda.memory_reserved(), allowed))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 4 * GIB


def memory_in_use(device: torch.device) -> int:
    """Bytes in use now: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak is the best known value
        return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """Peak bytes in use: on a GPU since the flight check, on a CPU since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status") as file:  # VmHWM is this process's; ru_maxrss starts at its parent's
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
