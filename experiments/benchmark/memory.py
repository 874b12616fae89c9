"""Peak memory of a step over growing batches: `python -m experiments.benchmark.memory`, about 4 minutes on 2 cores.

The exact contrastive step of the tiny CLIP in chunks of 128 pairs, beside the plain step, which encodes all pairs at
once; each batch size in a fresh process. Peaks are counted from the memory in use before the steps: on a CPU that of
the process (VmHWM minus resident memory), on a GPU that of torch's allocator. On a CPU they include the pixels of the
batch. 4,096 pairs are trained on at each batch size. The C library returns memory in pieces, so that a later chunk with
captions of other lengths can take a few per cent more.

On a GPU also what fits into a T4: ViT-B/32 in fp16, with the allocator limited to the T4's 14.7 GiB. The largest batch
in one chunk without checkpointing and with it, and 8,192 pairs with cached gradients, each with the forecast of the
flight check beside the peak. Writes memory_curve.json and memory_curve.png.
"""

import sys
from bisect import bisect_left
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import CLIPImageProcessor

from clip_medical.config import Config
from clip_medical.data.batches import Epoch
from clip_medical.data.processor import Processor
from clip_medical.evaluation.table import as_text
from clip_medical.model import Clip, load_clip, place
from clip_medical.training.device import choose_device
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.loss import BLOCK, info_nce
from clip_medical.training.memory import GIB, keep_freed_memory, make_plan, memory_in_use, peak_memory
from clip_medical.training.optimizer import Optimizer
from experiments import figures
from experiments.benchmark.contenders import vit_b_32
from experiments.benchmark.inputs import random_pairs
from experiments.benchmark.measure import Benchmark, fresh_process, main, write_json
from lora import inject

CHUNK, BATCHES, PLAIN = 128, (256, 512, 1024, 2048, 4096), (128, 256, 512)
PAIRS = 4096  # pairs trained on at each batch size
T4 = 14.7  # GiB that a T4 leaves to its user
SIZES = range(16, 8193, 16)  # batches among which the largest that fits is searched

Chunk = int | Literal["auto"]
Checkpointing = Literal["auto", "on", "off"]


def peak_of_steps(batch: int, chunk: int, seed: int) -> int:
    """Return the peak bytes of steps of the tiny CLIP, in addition to model, pairs and libraries."""
    clip = load_clip(device=choose_device())
    keep_freed_memory(clip.device)  # as train.py does
    inject(clip.model)
    clip.model.train()
    epoch = Epoch(random_pairs(clip, PAIRS, seed), Config(fragments=0), 0)
    before = memory_in_use(clip.device)
    for rows in torch.arange(PAIRS).split(batch):
        contrastive_backward(clip, epoch.batch(rows), chunk_size=chunk)
        clip.model.zero_grad(set_to_none=True)
    return peak_memory(clip.device) - before


def curve(seed: int) -> dict[str, Any]:
    """Measure the peak of each batch in chunks, and of the smaller ones in the plain step; all values in bytes.

    "largest to smallest" compares the peak of the largest batch with that of the smallest plus all that must grow with
    the batch: features, one block of logits and, on a CPU, pixels. 1 or less: nothing else grows.
    """
    clip, on_cpu = load_clip(), choose_device().type == "cpu"
    chunks, grown = [], ("pixels", "features", "logits")
    for batch in BATCHES:
        row = {
            "batch": batch, "peak": fresh_process(peak_of_steps, batch, CHUNK, seed),
            "pixels": 3 * batch * clip.processor.image_size**2 * on_cpu,
            "features": 2 * 4 * batch * clip.model.config.projection_dim, "logits": 4 * min(batch**2, BLOCK),
        }  # fmt: skip
        print(f"{batch:,} pairs: {row['peak'] / GIB:.2f} GiB", flush=True)
        chunks.append(row)
    plain = [{"batch": batch, "peak": fresh_process(peak_of_steps, batch, batch, seed)} for batch in PLAIN]
    expected = chunks[0]["peak"] + sum(chunks[-1][key] - chunks[0][key] for key in grown)
    return {"chunk": CHUNK, "in chunks": chunks, "plain": plain, "largest to smallest": chunks[-1]["peak"] / expected}


def planned_step(clip: Clip, batch: int, chunk: Chunk, checkpointing: Checkpointing, seed: int) -> dict[str, Any]:
    """Train an adapted CLIP for two steps by the plan of `make_plan` -> {"batch", "plan", "forecast", "peak"}, bytes."""
    config = Config(batch_size=batch, chunk_size=chunk, checkpointing=checkpointing, fragments=1)  # as the roco preset
    optimizer = Optimizer(clip.model, config, steps=2, scaled=clip.dtype == torch.float16)
    epoch = Epoch(random_pairs(clip, batch, seed), config, 0)
    plan = make_plan(clip, epoch, config, info_nce)
    clip.model.train()
    for _ in range(2):  # AdamW allocates its moments in the first
        loaded = epoch.batch(torch.arange(batch))
        contrastive_backward(clip, loaded, info_nce, plan.chunk_size, optimizer.scaler.scale)
        optimizer.step(config.max_grad_norm)
    return {"batch": batch, "plan": plan.describe(batch), "forecast": plan.forecast, "peak": peak_memory(clip.device)}


def step_if_it_fits(
    clip: Clip, batch: int, chunk: Chunk, checkpointing: Checkpointing, seed: int
) -> dict[str, Any] | None:
    """Call `planned_step`; where memory runs out, free what it took and return None."""
    with suppress(torch.OutOfMemoryError):
        return planned_step(clip, batch, chunk, checkpointing, seed)
    clip.model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return None


def largest(step: Callable[[int], dict[str, Any] | None], sizes: Sequence[int] = SIZES) -> dict[str, Any] | None:
    """Return the result of `step` for the largest of the ascending `sizes` at which it is not None, by bisection."""
    results: dict[int, dict[str, Any] | None] = {}

    def too_large(size: int) -> bool:
        results[size] = step(size)
        return results[size] is None

    place = bisect_left(sizes, True, key=too_large)
    return results[sizes[place - 1]] if place else None


def on_a_t4(batch: int | None, chunk: Chunk, checkpointing: Checkpointing, seed: int) -> dict[str, Any] | None:
    """Measure ViT-B/32 in fp16 on this GPU within a T4's memory; batch None: the largest that fits into one chunk."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, T4 * GIB / total))
    tokenizer = load_clip().processor.tokenizer
    model: Any = vit_b_32(tokenizer)
    place(model, "cuda", torch.float16)
    inject(model)
    clip = Clip(model, Processor(tokenizer, CLIPImageProcessor(), model.config), "ViT-B/32")
    if batch is not None:
        return step_if_it_fits(clip, batch, chunk, checkpointing, seed)
    return largest(lambda size: step_if_it_fits(clip, size, size, checkpointing, seed))


T4_ROWS: dict[str, tuple[int | None, Chunk, Checkpointing]] = {
    "largest batch without checkpointing": (None, "auto", "off"),
    "largest batch with checkpointing": (None, "auto", "on"),
    "8,192 pairs with cached gradients": (8192, "auto", "auto"),
}


@dataclass(frozen=True)
class Memory(Benchmark):
    """Measure the peak memory of the exact step in chunks of 128 pairs, over batches of 256 to 4,096."""

    command = "benchmark.memory"

    def measure(self) -> dict[str, Any]:
        results: dict[str, Any] = {"curve": curve(self.seed), "T4": dict.fromkeys(T4_ROWS, "not measured")}
        if torch.cuda.is_available():
            for name, row in T4_ROWS.items():
                results["T4"][name] = fresh_process(on_a_t4, *row, self.seed) or "does not fit"
        columns, chunks = ("peak", "pixels", "features", "logits"), results["curve"]["in chunks"]
        table = [["pairs", *(f"{column}, MiB" for column in columns)]]
        table += [[f"{row['batch']:,}", *(f"{row[column] / 2**20:,.1f}" for column in columns)] for row in chunks]
        print(f"\nIn chunks of {CHUNK}\n{as_text(table)}\n\nPeak of the largest batch, relative to that of the smallest "
              f"plus what must grow: {results['curve']['largest to smallest']:.2f}")  # fmt: skip
        for name, row in results["T4"].items():
            if isinstance(row, dict):
                forecast, peak = row["forecast"] / GIB, row["peak"] / GIB
                row = f"{row['batch']:,} pairs {row['plan']}: forecast {forecast:.2f} GiB, peak {peak:.2f} GiB"
            print(f"ViT-B/32 in fp16 in {T4} GiB, {name}: {row}")
        return results

    def write(self, folder: Path, results: dict[str, Any]) -> list[str]:
        figures.memory_curve(results["curve"], folder / "memory_curve.png")
        return [write_json(folder, "memory_curve", results), "memory_curve.png"]


if __name__ == "__main__":
    sys.exit(main(Memory))
