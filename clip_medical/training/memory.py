"""Forecast the memory of a training step from a small trial, and choose chunk size and checkpointing from that.

What a step needs beyond weights and features are the activations that autograd saves for the backward pass. They grow
linearly with the pairs that are encoded at a time, so counting them for a few pairs predicts a large chunk.
"""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from clip_medical.config import Config
from clip_medical.data.batches import Epoch
from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.run_folder import STATE
from clip_medical.training.grad_cache import WHOLE, random_state, restore
from clip_medical.training.loss import BLOCK

GIB = 2**30
TRIAL = 8  # pairs
OVERHEAD = {"cuda": 1.25, "cpu": 1.5}  # peak bytes for each saved byte: temporary tensors, and a heap freed in pieces
LEAST = 32  # smaller chunks leave a GPU idle, and cost more than checkpointing


@dataclass(frozen=True)
class Plan:
    """How a batch goes through the model. It changes the loss and its gradient by rounding only."""

    chunk_size: int = WHOLE  # pairs that a process encodes at a time
    checkpointing: bool = False
    forecast: int = 0  # peak bytes of a step: allocated on a GPU, resident on a CPU
    limit: int = 0  # bytes that it may take

    def describe(self, pairs: int) -> str:
        """For the log; pairs: the part of a batch that a process encodes."""
        chunks = -(-pairs // self.chunk_size)
        size = "in one chunk" if chunks == 1 else f"in {chunks} chunks of up to {self.chunk_size}"
        return f"{size}, {'with' if self.checkpointing else 'without'} checkpointing"


def make_plan(clip: Clip, epoch: Epoch, config: Config, pairs: int) -> Plan:
    """Choose the cheapest plan that fits into memory for a process that encodes `pairs` of a batch.

    Extra forward passes compared with the plain step: none; one with checkpointing; one with chunks; two with both.
    Values that the configuration names are taken as given, "auto" is filled in. If nothing fits, the plan with the
    least memory is taken.
    """
    texts, width = 1 + config.fragments, clip.model.config.projection_dim
    features = 4 * (5 * (1 + texts) * config.batch_size * width + 6 * texts * min(config.batch_size**2, BLOCK))
    moments = 8 * sum(p.numel() for p in clip.model.parameters() if p.requires_grad)  # of AdamW, in fp32
    fixed, limit = memory_in_use(clip.device) + features + moments, memory_limit(clip.device)
    per_pair = {on: activation_bytes(clip, epoch, on) for on in (False, True)}
    layers = clip.model.config.vision_config.num_hidden_layers
    per_pair[True] += per_pair[False] / layers  # the layer that is being recomputed

    whole = pairs if config.chunk_size == "auto" else min(config.chunk_size, pairs)
    candidates = [(whole, False), (whole, True)]
    if config.chunk_size == "auto":
        for checkpointing in (False, True):
            largest = min(pairs, max(1, int((limit - fixed) / per_pair[checkpointing])))
            chunks = -(-pairs // (largest // 8 * 8 or largest))
            candidates.append((-(-pairs // chunks), checkpointing))  # equal chunks: no small one at the end
    for chunk, checkpointing in candidates:
        if config.checkpointing in ("auto", "on" if checkpointing else "off"):
            plan = Plan(chunk, checkpointing, int(fixed + per_pair[checkpointing] * chunk), limit)
            if plan.forecast <= limit and (chunk >= min(LEAST, whole) or config.checkpointing == "off"):
                break
    return plan


def activation_bytes(clip: Clip, epoch: Epoch, checkpointing: bool) -> float:
    """Bytes that a step needs for each pair that it encodes; measured on short and long captions."""
    clip.set_checkpointing(checkpointing)
    clip.encoder_choice()  # now, so that its own check is not counted
    state, by_length = random_state(clip.device), epoch.pairs.lengths.argsort()
    batch = epoch.batch(by_length[torch.linspace(0, len(by_length) - 1, TRIAL).long()])
    saved = list[Tensor](clip.model.parameters())
    with saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        clip.image_features(batch.pixels)
        for captions in batch.captions:
            clip.text_features(captions.tokens, captions.lengths)
    restore(state)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    weights = sum(p.untyped_storage().nbytes() for p in clip.model.parameters())
    activations: int = sum(storages.values()) - weights
    return OVERHEAD[clip.device.type] * activations / TRIAL


@contextmanager
def explain_out_of_memory(trainer: Any) -> Iterator[None]:
    """Turn each library's out-of-memory error into one sentence with the flags that help."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        plan, pairs = trainer.plan, trainer.pairs_per_process
        flags = [f"--chunk-size {max(1, min(plan.chunk_size, pairs) // 2)}"]
        flags += [] if plan.checkpointing else ["--checkpointing on"]
        raise UserError(
            f"Out of memory in step {trainer.done + 1} with {pairs} pairs {plan.describe(pairs)}. "
            f"Give {' or '.join(flags)}, which leaves the loss as it is"
            f"{'. --resume continues from the last checkpoint.' if (trainer.folder / STATE).is_file() else '.'}"
        ) from error


def memory_limit(device: torch.device) -> int:
    """Bytes that training may take: nine tenths of what is free on the GPU; half of the machine's memory on a CPU.

    On a CPU of all memory, not of what is free now, so that the same command takes the same chunks tomorrow.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info()
        allowed = total * torch.cuda.get_per_process_memory_fraction()
        return int(0.9 * min(free + torch.cuda.memory_reserved(), allowed))
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 if hasattr(os, "sysconf") else 4 * GIB


def memory_in_use(device: torch.device, peak: bool = False) -> int:
    """Bytes in use now: allocated on the GPU, or resident in this process.

    peak: the most so far, on a GPU since the flight check, on a CPU since the process began.
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated() if peak else torch.cuda.memory_allocated()
    try:
        with open("/proc/self/status") as file:  # VmHWM is this process's; ru_maxrss starts at its parent's
            field = "VmHWM" if peak else "VmRSS"
            return next(int(line.split()[1]) for line in file if line.startswith(field)) * 1024
    except (OSError, StopIteration):
        pass
    try:
        import resource  # not Linux: the peak is the best known value
    except ImportError:  # Windows
        return 0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
