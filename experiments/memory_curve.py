"""What a step over ever larger batches takes in memory: `python -m experiments.memory_curve`, about 4 minutes.

The exact contrastive step of the tiny CLIP in chunks of 128 pairs, beside the plain step that encodes all at once; each
batch in a fresh process. The peak is what is taken beyond what was there before the steps: on a CPU by the process
(VmHWM against the resident memory), on a GPU by torch (max_memory_allocated). The pixels of a whole batch are not
in it, neither here nor in training: they lie in the image cache on disk, and a chunk of them is read at a time. The
same 4,096 pairs pass through in batches of each size: on a CPU the heap is given back in pieces, and a chunk whose
captions have other lengths can take a few per cent more than those before.

On a GPU also what a T4 would hold, the allocator capped at its 14.7 GiB: ViT-B/32 in fp16, the largest batch in one
chunk without checkpointing and with it, 8,192 pairs with cached gradients; the flight check's forecast beside the peak.
"""

import json
import shlex
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import CLIPImageProcessor

from clip_medical import cli
from clip_medical.config import Config
from clip_medical.errors import UserError
from clip_medical.evaluation.report import as_text, environment
from clip_medical.model import Clip, load_clip, place
from clip_medical.run_folder import make_folder, write_text
from clip_medical.training.grad_cache import LOGITS, contrastive_backward
from clip_medical.training.optimizer import Learner
from clip_medical.training.memory import GIB, keep_freed_memory, make_plan, memory_in_use, peak_memory
from clip_medical.training.device import choose_device
from experiments import figures
from experiments.benchmark_parts import fresh_process
from experiments.contenders import made_pairs, vit_b_32
from lora import adapter_parameters, inject

CHUNK, BATCHES, PLAIN = 128, (256, 512, 1024, 2048, 4096), (128, 256, 512)
PAIRS = 4096  # that the steps of each batch have in all
T4 = 14.7  # GiB that a T4 has for its user
NOT_YET = "not yet measured"


@dataclass(frozen=True)
class Options:
    """Peak memory of the exact step in chunks of 128 pairs, over batches of 256 to 4,096."""

    output: str = "experiments/results"
    """Folder for memory_curve.json and .png."""
    seed: int = 0
    """Draws the captions."""

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: give a whole number of 0 or more.")


def step_peak(batch: int, chunk: int, seed: int) -> int:
    """Bytes that steps of the tiny CLIP take at their height, beyond model, pairs and libraries."""
    clip = load_clip(device=choose_device())
    keep_freed_memory(clip.device)  # as train.py does
    inject(clip.model)
    clip.model.train()
    pairs = made_pairs(clip, PAIRS, seed)
    before = memory_in_use(clip.device)
    for rows in torch.arange(PAIRS).split(batch):
        contrastive_backward(clip, pairs, rows, chunk)
        clip.model.zero_grad(set_to_none=True)
    return peak_memory(clip.device) - before


def curve(seed: int) -> dict[str, Any]:
    """The peak of each batch in chunks and, for the smaller ones, of the plain step; in bytes."""
    width = load_clip().model.config.projection_dim
    rows = []
    for batch in BATCHES:
        features, logits = 2 * 4 * batch * width, 4 * min(batch**2, LOGITS)
        peak = fresh_process(step_peak, batch, CHUNK, seed)
        rows.append({"batch": batch, "peak": peak, "features": features, "logits": logits})
        print(f"{batch:,} pairs: {peak / GIB:.2f} GiB", flush=True)
    plain = [{"batch": batch, "peak": fresh_process(step_peak, batch, batch, seed)} for batch in PLAIN]
    allowed = rows[0]["peak"] + rows[-1]["features"] + rows[-1]["logits"]
    return {"chunk": CHUNK, "in chunks": rows, "plain": plain, "largest to smallest": rows[-1]["peak"] / allowed}


def planned_step(clip: Clip, batch: int, chunk: Any, checkpointing: Any, seed: int) -> dict[str, Any]:
    """Training steps of an adapted CLIP as `make_plan` plans them: the plan, its forecast and the peak, in bytes."""
    config = Config(batch_size=batch, chunk_size=chunk, checkpointing=checkpointing, fragments=1)  # as roco has it
    scaled = clip.dtype == torch.float16
    learner = Learner(adapter_parameters(clip.model), clip.model.logit_scale, config, steps=2, scaled=scaled)
    pairs = made_pairs(clip, batch, seed).in_epoch(config, 0)
    plan = make_plan(clip, pairs, config, batch)
    clip.model.train()
    for _ in range(2):  # the moments of Adam are made in the first
        contrastive_backward(clip, pairs, torch.arange(batch), plan.chunk_size, learner.scaler.scale)
        learner.step(1.0)
    peak = peak_memory(clip.device)
    return {"batch": batch, "plan": plan.in_words(batch), "forecast": plan.forecast, "peak": peak}


def clip_on_a_t4() -> Clip:
    """An adapted ViT-B/32 in fp16 on this GPU, of which this process may take what a T4 has."""
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(min(1.0, T4 * GIB / total))
    tokenizer = load_clip().tokenizer
    model: Any = vit_b_32(tokenizer)
    place(model, "cuda", torch.float16)
    inject(model)
    return Clip(model, tokenizer, CLIPImageProcessor(), "ViT-B/32")


def step_if_it_fits(clip: Clip, batch: int, chunk: Any, checkpointing: str, seed: int) -> dict[str, Any] | None:
    """`planned_step`, or None where memory ends; then what it had taken is free again."""
    with suppress(torch.OutOfMemoryError):
        return planned_step(clip, batch, chunk, checkpointing, seed)
    clip.model.zero_grad(set_to_none=True)
    torch.cuda.empty_cache()
    return None


def largest_on_a_t4(checkpointing: str, seed: int) -> dict[str, Any] | None:
    clip = clip_on_a_t4()
    return largest(lambda batch: step_if_it_fits(clip, batch, batch, checkpointing, seed))


def in_chunks_on_a_t4(batch: int, seed: int) -> dict[str, Any] | None:
    return step_if_it_fits(clip_on_a_t4(), batch, "auto", "auto", seed)


def largest(step: Callable[[int], dict[str, Any] | None], first: int = 64) -> dict[str, Any] | None:
    """What `step` gives for the largest batch that it does not refuse, to 2 %: doubled, then halved."""
    best, low, high = None, 0, first
    while found := step(high):
        best, low, high = found, high, 2 * high
    while high - low > max(1, low // 50):
        middle = (low + high) // 2
        if found := step(middle):
            best, low = found, middle
        else:
            high = middle
    return best


def on_a_t4(seed: int) -> dict[str, Any]:
    """The three rows of a T4; without a GPU each is still to be measured."""
    rows: dict[str, Callable[[], Any]] = {
        "largest batch without checkpointing": lambda: fresh_process(largest_on_a_t4, "off", seed),
        "largest batch with checkpointing": lambda: fresh_process(largest_on_a_t4, "on", seed),
        "8,192 pairs with cached gradients": lambda: fresh_process(in_chunks_on_a_t4, 8192, seed),
    }
    if not torch.cuda.is_available():
        return dict.fromkeys(rows, NOT_YET)
    return {name: measure() or "does not fit" for name, measure in rows.items()}


def show(results: dict[str, Any]) -> None:
    found = results["curve"]
    table = [["pairs", f"peak in chunks of {CHUNK}", "features", "logits"]]
    for row in found["in chunks"]:
        table.append([f"{row['batch']:,}", *(f"{row[key] / 2**20:,.1f} MiB" for key in ("peak", "features", "logits"))])
    print("\n" + as_text(table))
    first, last = (f"{found['in chunks'][i]['batch']:,}" for i in (0, -1))
    ratio = found["largest to smallest"]
    print(f"\nPeak of {last} pairs: {ratio:.2f} times that of {first} with the features and logits of {last}")
    for name, row in results["T4"].items():
        said = row
        if isinstance(row, dict):
            forecast, peak = row["forecast"] / GIB, row["peak"] / GIB
            said = f"{row['batch']:,} pairs {row['plan']}: forecast {forecast:.2f} GiB, peak {peak:.2f} GiB"
        print(f"{T4} GiB, ViT-B/32 in fp16, {name}: {said}")


def run(options: Options) -> int:
    folder = make_folder(Path(options.output))
    results: dict[str, Any] = {
        "command": shlex.join(["python", "-m", "experiments.memory_curve", *sys.argv[1:]]),
        "seed": options.seed,
        "environment": environment(),
        "curve": curve(options.seed),
        "T4": on_a_t4(options.seed),
    }
    write_text(folder / "memory_curve.json", json.dumps(results, indent=2) + "\n")
    figures.memory_curve(results["curve"], folder / "memory_curve.png")
    show(results)
    print(f"\nSaved    {folder}: memory_curve.json, memory_curve.png")
    return 0


def main() -> int:
    command = "python -m experiments.memory_curve"
    return cli.exit_code("memory_curve", lambda: run(cli.parse(Options, sys.argv[1:], command)))


if __name__ == "__main__":
    sys.exit(main())
