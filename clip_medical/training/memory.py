"""What a step will need in memory, tried on a few pairs; and from that the chunk size and whether to checkpoint.

Memory grows along a straight line with the pairs that are encoded at a time, so that two small trials tell where a
large chunk will end. On a GPU they ask its allocator; on a CPU, which keeps no such books, they count live tensors.
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
from clip_medical.data.batches import Pairs
from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.training import distributed
from clip_medical.training.contrastive import LOGITS, contrastive_backward, random_state, restore

GIB = 2**30
TRIALS = (4, 8)  # pairs in the two trials
HEAP = 1.5  # memory taken for a byte of tensors on a CPU: the C library gives back late and in pieces
LEAST = 32  # smaller chunks leave a GPU idle: checkpointing costs less than they do


@dataclass(frozen=True)
class Plan:
    """How a batch is put through the model; none of it changes what is learned, beyond rounding and dropout's draw."""

    chunk_size: int = 2**31  # pairs that this process encodes at a time; as it stands here, all of them
    checkpointing: bool = False
    forecast: int = 0  # bytes at the peak of a step: on a GPU all that is allocated, on a CPU the resident memory
    limit: int = 0  # bytes that it may have

    def in_words(self, pairs: int) -> str:
        """For the flight check; pairs: what this process encodes of a batch."""
        chunks = -(-pairs // self.chunk_size)
        how = "in one chunk" if chunks == 1 else f"in {chunks} chunks of up to {self.chunk_size}"
        checkpointing = "with" if self.checkpointing else "without"
        return f"{how}, {checkpointing} checkpointing"


def make_plan(clip: Clip, pairs: Pairs, config: Config, batch: int) -> Plan:
    """The cheapest way to encode `batch` pairs, this process's share of a batch, that fits; sets the model to it.

    A way costs so many forward passes more than the plain step: none; checkpointing one; chunks one; both two. What
    the configuration names is taken as given, and "auto" is filled in. If nothing fits, the most sparing way is taken.
    """
    limit = memory_limit(clip.device)
    asked = batch if config.chunk_size == "auto" else min(config.chunk_size, batch)
    ways = [(asked, False), (asked, True)]
    if config.chunk_size == "auto":
        ways += [(0, False), (0, True)]  # 0: as many as fit
    for chunk, checkpointing in ways:
        if config.checkpointing in ("auto", "on" if checkpointing else "off"):
            tried = _try(clip, pairs, config, batch, chunk, checkpointing, limit)
            made = distributed.from_everyone(tried)[0]  # all processes go the same way
            enough = made.chunk_size >= min(LEAST, batch) or config.checkpointing == "off" or chunk
            if made.forecast <= limit and enough:
                break
    clip.checkpointing = made.checkpointing
    return made


def _try(clip: Clip, pairs: Pairs, config: Config, batch: int, chunk: int, checkpointing: bool, limit: int) -> Plan:
    """What the step needs in chunks of `chunk` pairs; 0: in the largest ones that stay within the limit."""
    clip.checkpointing = checkpointing
    parameters = [p for p in clip.model.parameters() if p.requires_grad]
    moments = 2 * sum(4 * p.numel() for p in parameters)  # of Adam
    width = clip.model.config.projection_dim
    sides = 2 + config.fragments  # pictures, captions, fragments
    features = 4 * (5 * sides * batch * width + 6 * min(batch**2, LOGITS))  # of the batch, their gradients, logits
    fixed, each = _line(clip, pairs, whole=chunk >= batch)
    fixed += memory_in_use(clip.device) + moments + features
    if not chunk:
        most = min(batch, max(1, int((limit - fixed) / each)))
        chunks = -(-batch // (most // 8 * 8 or most))
        chunk = -(-batch // chunks)  # no last chunk of a few
    return Plan(chunk, checkpointing, int(fixed + each * chunk), limit)


def _line(clip: Clip, pairs: Pairs, whole: bool) -> tuple[float, float]:
    """(bytes, bytes a pair) of a step. Leaves gradients empty and the random state as it was."""
    state, mode = random_state(clip.device), clip.model.training
    clip.model.train()
    by_length = pairs.lengths.argsort()
    if clip.device.type == "cuda":  # libraries take their workspaces once
        _peak(clip, pairs, by_length[-TRIALS[0] :], TRIALS[0])
    peaks = []
    for chunk in TRIALS:  # long and short captions, as a batch has them
        rows = by_length[torch.linspace(0, len(by_length) - 1, chunk).long()]
        peaks.append(_peak(clip, pairs, rows if whole else rows.repeat(2), chunk))
    clip.model.train(mode)
    restore(state)
    each = (peaks[1] - peaks[0]) / (TRIALS[1] - TRIALS[0])
    return peaks[0] - each * TRIALS[0], each


def _peak(clip: Clip, pairs: Pairs, rows: Tensor, chunk: int) -> int:
    """The most bytes that a step holds at a time, beyond those that were there before. Every process does `rows`."""
    rows = rows.repeat(distributed.world_size())
    if clip.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contrastive_backward(clip, pairs, rows, chunk)
        peak = torch.cuda.max_memory_allocated() - before
    else:
        with _LiveBytes() as live:
            contrastive_backward(clip, pairs, rows, chunk)
        peak = int(HEAP * live.peak)
    clip.model.zero_grad(set_to_none=True)
    return peak


class _LiveBytes(TorchDispatchMode):
    """Counts, inside the `with`, the bytes of all tensors that operations have made and nobody has dropped yet."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here; True would import all of torch.compile, seconds of it

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for storage in {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)}:
            if storage._cdata not in given:  # else a view, or a result written in place
                self.now += storage.nbytes()
                weakref.finalize(storage, self._drop, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def _drop(self, size: int) -> None:
        self.now -= size


@contextmanager
def out_of_memory_in_words(job: Any) -> Iterator[None]:
    """Turns every library's own way to say "out of memory" into one sentence, with the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        known = isinstance(error, MemoryError | torch.OutOfMemoryError) or "can't allocate memory" in str(error)
        if not known:
            raise
        plan, batch = job.plan, job.config.batch_size // distributed.world_size()
        flags = [f"--chunk-size {max(1, min(plan.chunk_size, batch) // 2)}"]
        flags += [] if plan.checkpointing else ["--checkpointing on"]
        raise UserError(
            f"out of memory in step {job.done + 1}, with {batch} pairs {plan.in_words(batch)}: "
            f"give {' or '.join(flags)}; what is learned stays the same, and --resume goes on from the last checkpoint."
        ) from error


def keep_freed_memory(device: torch.device) -> None:
    """On a CPU under Linux: the C library keeps the memory of dropped tensors for the next, to the end of the process.

    glibc gives large pieces back to the system and asks for them again at the next tensor, whose every page is then
    cleared and mapped anew at its first touch.
    """
    trim_threshold, mmap_max = -1, -4  # M_TRIM_THRESHOLD and M_MMAP_MAX of glibc's malloc.h
    if device.type == "cpu" and sys.platform == "linux" and hasattr(c_library := ctypes.CDLL(None), "mallopt"):
        c_library.mallopt(mmap_max, 0)
        c_library.mallopt(trim_threshold, -1)  # never


def memory_limit(device: torch.device) -> int:
    """Bytes that training may take: nine tenths of what the GPU has to give; half of the machine's own memory.

    Not what happens to be free at the moment on a CPU: the same command is to take the same chunks tomorrow.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        allowed = total * torch.cuda.get_per_process_memory_fraction()
        return int(0.9 * min(free + torch.cuda.memory_reserved(), allowed))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 4 * GIB


def memory_in_use(device: torch.device) -> int:
    """Bytes that are taken now: allocated on the GPU, or resident in this process."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated()
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not Linux: the peak is the best that is known
        return peak_memory(device)


def peak_memory(device: torch.device) -> int:
    """The most bytes that were taken at a time: on a GPU since the flight check, on a CPU since the process began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        with open("/proc/self/status") as file:  # VmHWM is this program's own; ru_maxrss begins with its parent's
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
