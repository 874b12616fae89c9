"""Peak memory of a step over growing batches: `python -m experiments.benchmark.memory`, about 4 minutes on 2 cores.

The exact contrastive step of the tiny CLIP in chunks of 128 pairs, beside the plain step, which encodes all pairs at
once; each batch size in a fresh process. Peaks are counted from the memory in use before the steps: on a CPU that of
the process (VmHWM minus resident memory), on a GPU that of torch's allocator. On a CPU they include the pixels of the
batch. 4,096 pairs are trained on at each batch size. The C library returns memory in pieces, so that a later chunk with
captions of other lengths can take a few per cent more.

On a GPU also what fits into a T4, with the allocator limited to its 14.7 GiB: ViT-B/32 in fp16 with a fragment of each
caption, in the roco preset's batch of 256, and in a batch of 8,192 in the largest chunks that the flight check plans
without checkpointing and with it. Its forecast stands beside the peak.

Writes memory_curve.json and memory_curve.png.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from clip_medical.config import Config
from clip_medical.data.batches import Epoch
from clip_medical.evaluation.table import as_text
from clip_medical.model import load_clip
from clip_medical.training.device import choose_device, choose_precision
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.loss import BLOCK, info_nce
from clip_medical.training.memory import GIB, keep_freed_memory, make_plan, memory_in_use, peak_memory
from clip_medical.training.optimizer import Optimizer
from experiments import figures
from experiments.benchmark.contenders import adapted_clip
from experiments.benchmark.inputs import random_pairs
from experiments.benchmark.measure import Benchmark, fresh_process, main
from lora import inject

CHUNK, BATCHES, PLAIN = 128, (256, 512, 1024, 2048, 4096), (128, 256, 512)
PAIRS = 4096  # pairs trained on at each batch size
T4 = 14.7  # GiB that a T4 leaves to its user

Result = dict[str, Any]


def train(config: Config, t4: bool = False) -> Result | None:
    """Train on random pairs as the trainer does, and measure time and memory. None where a GPU runs out of memory.

    t4: ViT-B/32 within the memory of a T4 instead of the tiny CLIP.
    Returns {"batch", "plan", "forecast", "peak" (bytes), "growth" (of the peak since the first step), "ms" (per pair)}.
    """
    device = choose_device()
    dtype, _ = choose_precision(config.precision, device)
    keep_freed_memory(device)
    if t4:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, T4 * GIB / total))
        clip = adapted_clip(device, dtype)
    else:
        clip = load_clip(device=device, dtype=dtype)
        inject(clip.model)
    clip.model.train()
    optimizer = Optimizer(clip.model, config, steps=10**9, scaled=dtype == torch.float16)
    epoch = Epoch(random_pairs(clip, max(PAIRS, config.batch_size), config.seed), config, 0)
    before = memory_in_use(device)
    try:
        plan = make_plan(clip, epoch, config, config.batch_size)
        clip.set_checkpointing(plan.checkpointing)
        began = time.perf_counter()
        for rows in torch.arange(len(epoch.pairs)).split(config.batch_size):
            contrastive_backward(clip, epoch.batch(rows), info_nce, plan.chunk_size, optimizer.scaler.scale)
            optimizer.step(config.max_grad_norm)
        ms = 1000 * (time.perf_counter() - began) / len(epoch.pairs)
    except torch.OutOfMemoryError:
        return None
    peak, plan_text = peak_memory(device), plan.describe(config.batch_size)
    return {"batch": config.batch_size, "plan": plan_text, "forecast": plan.forecast, "peak": peak,
            "growth": peak - before, "ms": ms}  # fmt: skip


def curve(seed: int) -> Result:
    """Measure the peak of each batch size in chunks, and of the smaller ones in the plain step; all values in bytes.

    "largest to smallest" compares the peak of the largest batch with that of the smallest plus what must grow with the
    batch: features, logits up to one block and, on a CPU, pixels. 1 or less: nothing else grows.
    """
    clip, on_cpu = load_clip(), choose_device().type == "cpu"

    def peak(batch: int, chunk: int) -> Result:
        config = Config(batch_size=batch, chunk_size=chunk, fragments=0, precision="fp32", seed=seed)
        grows = {
            "features": 2 * 4 * batch * clip.model.config.projection_dim, "logits": 4 * min(batch**2, BLOCK),
            "pixels": 3 * batch * clip.processor.image_size**2 * on_cpu,
        }  # fmt: skip
        return {"batch": batch, "peak": cast(Result, fresh_process(train, config))["growth"], **grows}

    chunks, plain = [peak(batch, CHUNK) for batch in BATCHES], [peak(batch, batch) for batch in PLAIN]
    expected = chunks[0]["peak"] + sum(chunks[-1][key] - chunks[0][key] for key in ("features", "logits", "pixels"))
    return {"chunk": CHUNK, "in chunks": chunks, "plain": plain, "largest to smallest": chunks[-1]["peak"] / expected}


@dataclass(frozen=True)
class Memory(Benchmark):
    """Measure the peak memory of the exact step in chunks of 128 pairs, over batches of 256 to 4,096."""

    command = "benchmark.memory"

    def file(self) -> str:
        return "memory_curve"

    def measure(self, folder: Path) -> Result:
        results, columns = curve(self.seed), ("peak", "pixels", "features", "logits")
        table = [[f"in chunks of {CHUNK}, MiB", *columns]]
        for row in results["in chunks"]:
            table.append([f"{row['batch']:,} pairs", *(f"{row[key] / 2**20:,.1f}" for key in columns)])
        print(as_text(table))
        figures.memory_curve(results, folder / "memory_curve.png")
        t4: Result = {}
        for batch, checkpointing in ((256, "auto"), (8192, "off"), (8192, "on")):
            settings: Result = dict(batch_size=batch, checkpointing=checkpointing, fragments=1, precision="fp16")
            name = f"ViT-B/32 in {T4} GiB, {batch:,} pairs, --checkpointing {checkpointing}"
            t4[name] = "not measured"
            if torch.cuda.is_available():
                t4[name] = fresh_process(train, Config(seed=self.seed, **settings), True) or "does not fit"
            print(f"{name}: {t4[name]}")
        return {"curve": results, "T4": t4}


if __name__ == "__main__":
    sys.exit(main(Memory))
