"""Measurements of `python -m experiments.benchmark`: training, inference, chunked batches and peak memory."""

import copy
import statistics
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch

from clip_medical.config import Config
from clip_medical.data.batches import Batch, Epoch
from clip_medical.model import Clip, load_clip
from clip_medical.training.device import choose_device, choose_precision
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.memory import memory_in_use, peak_memory
from experiments.benchmark.contenders import CONTENDERS, FAST, FULL, PEFT, Ours
from experiments.benchmark.inputs import Row, random_pairs
from experiments.benchmark.measure import fresh_process, in_turns, speedup
from lora import inject, merge, remove

CHUNK, BATCHES = 128, (256, 1024, 8192)  # pairs

Table = dict[str, dict[str, float]]  # contender -> measurement -> value


def train_in_turns(
    rows: Sequence[Row], batch_size: int, repeats: int, device: torch.device, dtype: torch.dtype, epochs: bool
) -> tuple[Table, dict[str, list[float]]]:
    """Time all contenders in one process: single steps and, with `epochs`, later epochs from PNG files.

    Returns pairs/s with ratios to peft (above 1: faster), and the losses of the steps: contender -> one loss a turn.
    """
    contenders = {name: make(rows, batch_size, device, dtype) for name, make in CONTENDERS.items()}
    loaded = {name: list(contender.epoch()) for name, contender in contenders.items()}
    losses: dict[str, list[float]] = {name: [] for name in contenders}

    def step(name: str, turn: int) -> None:
        batch = loaded[name][turn % len(loaded[name])]
        losses[name].append(contenders[name].step(batch))

    def epoch(name: str, turn: int) -> None:
        for batch in contenders[name].epoch():
            contenders[name].step(batch)

    actions = {name: partial(step, name) for name in contenders}
    times = {"step": (batch_size, in_turns(device, actions, repeats, "steps", warm_up=2))}
    if epochs:
        actions = {name: partial(epoch, name) for name in contenders}
        pairs = batch_size * len(loaded[PEFT])
        times["later epoch from PNG files"] = pairs, in_turns(device, actions, repeats, "epochs from PNG files")
    table: Table = {name: {} for name in contenders}
    for title, (pairs, measured) in times.items():
        for name in contenders:
            table[name][f"{title}, pairs/s"] = pairs / statistics.median(measured[name])
            table[name][f"{title}, ratio to peft"] = speedup(measured[PEFT], measured[name])
    return table, losses


def largest_difference(losses: dict[str, list[float]]) -> float:
    """Return the largest difference between losses of the same step, over all contenders with an adapter."""
    steps = zip(*(values for name, values in losses.items() if name != FULL), strict=True)
    return max(max(step) - min(step) for step in steps)


def inference(rows: Sequence[Row], repeats: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Time the image encoder with the adapter merged, with the adapter, and without; all rows are one batch."""
    ours = CONTENDERS[FAST](rows, len(rows), device, dtype)
    assert isinstance(ours, Ours)
    pixels = next(ours.epoch()).pixels.to(device)
    clips = {kind: copy.deepcopy(ours.clip) for kind in ("merged", "adapted", "unadapted")}
    merge(clips["merged"].model)
    remove(clips["unadapted"].model)

    def encode(clip: Clip, turn: int) -> None:
        clip.image_features(pixels)

    with torch.no_grad():
        actions = {kind: partial(encode, clip) for kind, clip in clips.items()}
        for clip in clips.values():
            clip.model.eval()
        times = in_turns(device, actions, 2 * repeats, "inference", warm_up=1)
    rates = {f"{kind}, images/s": len(rows) / statistics.median(measured) for kind, measured in times.items()}
    ratios = {f"{kind} to unadapted": speedup(times["unadapted"], times[kind]) for kind in ("merged", "adapted")}
    return rates | ratios


def chunked(device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Time exact steps of the tiny CLIP over batches of growing size, in chunks of CHUNK pairs."""
    clip = load_clip(device=device, dtype=dtype)
    inject(clip.model)
    clip.model.train()
    epoch = Epoch(random_pairs(clip, max(BATCHES), seed=0), Config(fragments=0), 0)
    rows = torch.arange(max(BATCHES))
    batches = {size: [epoch.batch(part) for part in rows[: max(2048, size)].split(size)] for size in BATCHES}

    def steps(batches: list[Batch], turn: int) -> None:
        for batch in batches:
            contrastive_backward(clip, batch, chunk_size=CHUNK)

    contrastive_backward(clip, epoch.batch(rows[: 2 * CHUNK]), chunk_size=CHUNK)  # warm-up
    actions = {f"batch of {size:,}, ms per pair": partial(steps, batches[size]) for size in BATCHES}
    times = in_turns(device, actions, 2, "chunked batches")
    pairs = [sum(len(batch.rows) for batch in batches[size]) for size in BATCHES]
    return {name: 1000 * statistics.median(times[name]) / count for name, count in zip(times, pairs, strict=True)}


def peak_memory_table(rows: Sequence[Row], batch_size: int, precision: str) -> Table:
    """Measure the peak memory of training, each contender in a fresh process."""
    peaks = {name: fresh_process(peak_of_two_steps, name, rows[:batch_size], precision) for name in CONTENDERS}
    return {
        name: {"peak memory, GiB": peak / 2**30, "peak memory, ratio to peft": peak / peaks[PEFT]}
        for name, peak in peaks.items()
    }


def peak_of_two_steps(name: str, rows: Sequence[Row], precision: str) -> int:
    """Return the peak bytes of two steps on one batch: allocated on a GPU, on a CPU the growth of the process.

    Weights are included. Two steps, because AdamW allocates its moments in the first.
    """
    device = choose_device()
    dtype, _ = choose_precision(precision, device)
    before = memory_in_use(device)
    contender = CONTENDERS[name](rows, len(rows), device, dtype)
    (batch,) = contender.epoch()
    for _ in range(2):
        contender.step(batch)
    return peak_memory(device) - before
