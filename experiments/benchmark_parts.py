"""What experiments/benchmark.py measures, one function each: training, inference, chunks, start, memory."""

import copy
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from clip_medical.data.cache import ROOT_VARIABLE
from clip_medical.model import load_clip
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.memory import memory_in_use, peak_memory
from clip_medical.training.device import choose_device, choose_precision
from experiments.contenders import CONTENDERS, Ours, Peft, Row, made_pairs
from experiments.flops import count_flops, matrix_product_rate, published_flops, timed
from lora import inject, merge, remove

T = TypeVar("T")
WARM_UP = 2  # turns: the first steps also pay for set-up and memory, the usual loops' second one as well on a CPU


def fresh_process(action: Callable[..., T], *arguments: Any) -> T:
    """What `action(*arguments)` returns in a process of its own, whose memory holds nothing of what went before."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(action, *arguments).result()


def training(
    rows: list[Row], batch_size: int, repeats: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Pairs/s of the step alone and from PNG files, in turns; the losses; the share of the matrix-product ceiling.

    From PNG files only where there is a batch for each worker of the usual loops' loaders: they are not to idle.
    """
    contenders: dict[str, Any] = {name: kind(rows, batch_size, device, dtype) for name, kind in CONTENDERS.items()}
    ours, peft = contenders["ours"], contenders["peft"]
    assert isinstance(ours, Ours) and isinstance(peft, Peft)
    peft.start_from(ours)
    ready = {name: contender.prepared() for name, contender in contenders.items()}
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    steps: dict[str, list[float]] = {name: [] for name in contenders}
    epochs: dict[str, list[float]] = {name: [] for name in contenders}
    ceiling: list[float] = []

    for turn in tqdm(range(WARM_UP + repeats), desc="steps", unit="turn"):
        for name, contender in contenders.items():
            batch = ready[name][turn % len(ready[name])]
            if contender is ours:
                ours.pixels.announce(batch).result()  # in memory, as the others' are
            seconds = timed(device, lambda c, b, to: to.append(c.step(b)), contender, batch, losses[name])
            if turn >= WARM_UP:
                steps[name].append(seconds)
        if turn >= WARM_UP:
            ceiling.append(matrix_product_rate(device, dtype))
    enough = device.type == "cpu" or len(ready["peft"]) >= (os.cpu_count() or 1)
    for _ in tqdm(range(repeats if enough else 0), desc="epochs from PNG", unit="turn"):
        for name, contender in contenders.items():
            epochs[name].append(timed(device, lambda c: [c.step(b) for b in c.epoch()], contender))

    published = torch.tensor(published_flops(ours.pairs.lengths))
    counted = {  # of each batch, as captions differ in length
        "": [count_flops(partial(ours.step, batch)) for batch in ready["ours"]],
        ", as published": [int(published[batch].sum()) for batch in ready["ours"]],
    }
    result: dict[str, Any] = {}
    for name in contenders:
        result[name] = {
            "name": contenders[name].name,
            "pairs per second, step": batch_size / statistics.median(steps[name]),
            "losses": losses[name],
        }
        if enough:
            result[name]["pairs per second, from PNG"] = len(rows) / statistics.median(epochs[name])
    result["full"].pop("losses")
    ratios = {"step": _ratio(steps["peft"], steps["ours"])}
    if enough:
        ratios["end_to_end"] = _ratio(epochs["peft"], epochs["ours"])
    result["ours"] |= {"ratios to peft": ratios, "FLOP/s of a matrix product": max(ceiling)}
    for suffix, flops in counted.items():
        rates = [flops[turn % len(flops)] / seconds for turn, seconds in enumerate(steps["ours"], start=WARM_UP)]
        # of each turn, as a machine that others share is not equally fast in all of them
        shares = [rate / best for rate, best in zip(rates, ceiling, strict=True)]
        result["ours"] |= {
            f"FLOP per step{suffix}": statistics.mean(flops),
            f"FLOP/s{suffix}": statistics.median(rates),
            f"share of ceiling{suffix}": statistics.median(shares),
        }
    return result


def _ratio(theirs: list[float], ours: list[float]) -> float:
    """Median over the turns of theirs / ours: above 1 where ours is faster."""
    return statistics.median(a / b for a, b in zip(theirs, ours, strict=True))


def inference(rows: list[Row], repeats: int, device: torch.device, dtype: torch.dtype) -> dict[str, float]:
    """Images/s without an adapter, with one beside the weights, and with one merged into them."""
    adapted = Ours(rows, len(rows), device, dtype)
    adapted.step(adapted.prepared()[0])  # so that B is not zero
    pixels = adapted.pairs.pictures(torch.arange(len(rows)), device)
    kinds = {"adapted": adapted.clip, "merged": copy.deepcopy(adapted.clip), "unadapted": copy.deepcopy(adapted.clip)}
    merge(kinds["merged"].model)
    remove(kinds["unadapted"].model)
    seconds: dict[str, list[float]] = {name: [] for name in kinds}
    with torch.inference_mode():
        for turn in range(2 * repeats + 1):
            for name, clip in kinds.items():
                clip.model.eval()
                spent = timed(device, clip.image_features, pixels)
                if turn:
                    seconds[name].append(spent)
    rates = {f"images per second, {name}": len(rows) / statistics.median(s) for name, s in seconds.items()}
    return rates | {
        "merged to unadapted": _ratio(seconds["unadapted"], seconds["merged"]),
        "adapted to unadapted": _ratio(seconds["unadapted"], seconds["adapted"]),
    }


def chunks(device: torch.device, dtype: torch.dtype, chunk: int = 128) -> dict[str, float]:
    """Milliseconds per pair of one exact step over ever larger batches, in chunks of one size (tiny CLIP)."""
    clip = load_clip(device=device, dtype=dtype)
    inject(clip.model)
    clip.model.train()
    sizes = (256, 1024, 8192)
    pairs, number = made_pairs(clip, max(sizes), seed=0), torch.arange(max(sizes))
    spent: dict[int, list[float]] = {size: [] for size in sizes}
    contrastive_backward(clip, pairs, number[: 2 * chunk], chunk)  # what the first step pays for is no batch's own
    for _ in tqdm(range(2), desc="chunked batches", unit="turn"):
        for size in sizes:  # in turns, so that what else the machine does falls on all of them
            steps = number[: max(2048, size)].split(size)
            spent[size] += [timed(device, contrastive_backward, clip, pairs, rows, chunk) for rows in steps]
    return {f"ms per pair, batch {size}": 1000 * statistics.median(each) / size for size, each in spent.items()}


def start() -> dict[str, float]:
    """Seconds from the start of a process: imports, and the demo to the end of its first training step. Medians of
    starts taken in turns, as what else the machine does is more than some of the differences."""
    spent: dict[str, list[float]] = defaultdict(list)
    for _ in range(7):
        for code in ("import torch", "import lora"):
            began = time.perf_counter()
            subprocess.run([sys.executable, "-c", code], check=True)
            spent[code].append(time.perf_counter() - began)
    for _ in range(3):
        with TemporaryDirectory() as folder:
            for pictures in ("still to be drawn", "in the cache"):
                spent[f"demo to the first step, its pictures {pictures}"].append(first_step(Path(folder), pictures))
    return {name: statistics.median(each) for name, each in spent.items()}


def first_step(folder: Path, name: str) -> float:
    """Seconds from the start of the demo, with an image cache in the folder, to the end of its first step."""
    metrics = folder / name / "metrics.jsonl"
    began = time.perf_counter()
    command, quiet = [sys.executable, "train.py", "--output", str(metrics.parent)], subprocess.DEVNULL
    own_cache = os.environ | {ROOT_VARIABLE: str(folder / "cache")}
    with subprocess.Popen(command, stdout=quiet, stderr=quiet, env=own_cache) as demo:
        while demo.poll() is None and not (metrics.is_file() and metrics.stat().st_size):
            time.sleep(0.02)
        spent = time.perf_counter() - began
        demo.kill()
    if not (metrics.is_file() and metrics.stat().st_size):
        raise RuntimeError("the demo ended before its first step: run train.py to see why")
    return spent


def memory(rows: list[Row], batch_size: int, precision: str, budget: float) -> dict[str, dict[str, float]]:
    """Peak memory of two steps, each contender in processes of its own, and the largest batch that would fit."""
    result: dict[str, dict[str, float]] = {}
    for name in tqdm(CONTENDERS, desc="memory", unit="contender"):
        peaks = [fresh_process(peak_of, name, rows, size, precision) for size in (batch_size // 2, batch_size)]
        result[name] = {"peak bytes": peaks[1]}
        per_pair = (peaks[1] - peaks[0]) / (batch_size - batch_size // 2)
        # of a few pairs it can be lost in what else the process takes: then it tells nothing of many
        fits = batch_size + (budget * 2**30 - peaks[1]) / per_pair if per_pair > 0 else math.nan
        result[name][f"largest batch in {budget} GiB, extrapolated"] = fits
    if any(math.isnan(value) for row in result.values() for value in row.values()):
        return {name: {"peak bytes": row["peak bytes"]} for name, row in result.items()}
    return result


def peak_of(name: str, rows: list[Row], batch_size: int, precision: str) -> int:
    """Bytes at the height of two training steps: on a GPU what torch allocated, on a CPU what the process grew by."""
    device = choose_device()
    dtype, _ = choose_precision(precision, device)
    before = memory_in_use(device)
    contender: Any = CONTENDERS[name](rows[:batch_size], batch_size, device, dtype)
    batch = contender.prepared()[0]
    for _ in range(2):
        contender.step(batch)
    return peak_memory(device) - before
