"""The flight check: one batch forwards and backwards, and what can be known from it before anything is written."""

import math
import time

from clip_medical.config import Config
from clip_medical.data.batches import Pairs, row_batches
from clip_medical.model import Clip
from clip_medical.training import distributed
from clip_medical.training.contrastive import contrastive_backward, random_state, restore
from clip_medical.training.memory import GIB, Plan
from lora import count_parameters


def flight_check(clip: Clip, pairs: Pairs, config: Config, plan: Plan, steps: int) -> None:
    """Print size, first loss, where the gradient went, time and memory; stop where nothing could be learned.

    Leaves gradients empty and the random state as it was. Raises RuntimeError if a lora_B gets no gradient, if a frozen
    weight gets one, or if the loss is not finite.
    """
    clip.model.train()
    state, began, size = random_state(clip.device), time.perf_counter(), config.batch_size
    loss = contrastive_backward(clip, pairs, next(row_batches(len(pairs), size, config.seed)), plan.chunk_size)
    moved = {name for name, p in clip.model.named_parameters() if p.grad is not None and p.grad.any()}
    minutes = (time.perf_counter() - began) * steps / 60
    every_b = {name for name, _ in clip.model.named_parameters() if name.endswith("lora_B")}
    frozen = {name: p.numel() for name, p in clip.model.named_parameters() if not p.requires_grad}
    clip.model.zero_grad(set_to_none=True)
    restore(state)

    count = count_parameters(clip.model)
    much = "" if count.percent < 1 else " (not the less than 1 % that a smaller --rank would give)"
    print(f"Adapter  {len(every_b)} layers of rank {config.rank}: {count.trainable:,} trainable parameters beside")
    print(f"         {sum(frozen.values()):,} frozen ones, {count.percent:.2f} %{much}")
    reached, leaked = f"{len(moved & every_b)} of {len(every_b)}", f"{len(moved & frozen.keys())} of {len(frozen)}"
    print(f"Check    first loss {loss.item():.2f}, where knowing nothing costs ln {size} = {math.log(size):.2f};")
    print(f"         gradient in {reached} lora_B, in {leaked} frozen weights")
    processes = distributed.world_size()
    shared = f" on {processes} processes, each" if processes > 1 else ","
    print(f"Plan     {steps} steps of {size} pairs{shared} {plan.in_words(size // processes)};")
    print(
        f"         about {minutes:.1f} minutes and {plan.forecast / GIB:.1f} GiB of the {plan.limit / GIB:.1f} allowed"
    )
    if moved & every_b != every_b or moved & frozen.keys() or not loss.isfinite():
        raise RuntimeError("the gradients did not go where they belong: nothing would be learned, so nothing was begun")
