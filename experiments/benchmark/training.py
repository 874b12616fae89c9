"""Measurements of `python -m experiments.benchmark`: steps, epochs, inference and peak memory of the contenders."""

import copy
import statistics
from functools import partial

import torch

from clip_medical.training.memory import GIB, memory_in_use
from experiments.benchmark.contenders import CONTENDERS, PEFT, Task, adapted_clip
from experiments.benchmark.measure import fresh_process, in_turns, speedup
from lora import merge, remove

Table = dict[str, dict[str, float]]  # contender -> measurement -> value


def training(task: Task, repeats: int, epochs: bool) -> tuple[Table, dict[str, list[float]]]:
    """Time all contenders in one process: single steps and, with `epochs`, later epochs from PNG files.

    Returns pairs/s with ratios to peft (above 1: faster), and the losses of the steps: contender -> one loss a turn.
    """
    contenders = {name: make(task) for name, make in CONTENDERS.items()}
    loaded = {name: list(contender.epoch()) for name, contender in contenders.items()}
    losses: dict[str, list[float]] = {name: [] for name in contenders}
    table: Table = {name: {} for name in contenders}

    def step(name: str, turn: int) -> None:
        batch = loaded[name][turn % len(loaded[name])]
        losses[name].append(contenders[name].step(batch))

    def epoch(name: str, turn: int) -> None:
        for batch in contenders[name].epoch():
            contenders[name].step(batch)

    kinds = [("step", step, task.batch_size, 2)]
    if epochs:
        kinds.append(("later epoch from PNG files", epoch, task.batch_size * len(loaded[PEFT]), 0))
    for title, action, pairs, warm_up in kinds:
        times = in_turns({name: partial(action, name) for name in contenders}, repeats, title, warm_up)
        for name, values in times.items():
            table[name][f"{title}, pairs/s"] = pairs / statistics.median(values)
            table[name][f"{title}, ratio to peft"] = speedup(times[PEFT], values)
    return table, losses


@torch.no_grad()
def inference(task: Task, repeats: int) -> dict[str, float]:
    """Time the fast image encoder on a batch, with the adapter merged into the weights, beside them, and removed."""
    adapted = adapted_clip(task.device, task.dtype, encoder="fast")
    clips = {"merged": copy.deepcopy(adapted), "adapted": adapted, "unadapted": copy.deepcopy(adapted)}
    merge(clips["merged"].model)
    remove(clips["unadapted"].model)
    pixels = torch.randint(0, 256, (task.batch_size, 3, 224, 224), dtype=torch.uint8, device=task.device)

    def encode(kind: str, turn: int) -> None:
        clips[kind].image_features(pixels)

    times = in_turns({kind: partial(encode, kind) for kind in clips}, 2 * repeats, "inference", warm_up=1)
    rates = {f"{kind}, images/s": len(pixels) / statistics.median(values) for kind, values in times.items()}
    return rates | {f"{kind} to unadapted": speedup(times["unadapted"], times[kind]) for kind in ("merged", "adapted")}


def peaks(task: Task) -> Table:
    """Measure the peak memory of training with each contender, in fresh processes."""
    found = {name: fresh_process(peak_of_two_steps, name, task) for name in CONTENDERS}
    return {
        name: {"peak memory, GiB": peak / GIB, "peak memory, ratio to peft": peak / found[PEFT]}
        for name, peak in found.items()
    }


def peak_of_two_steps(name: str, task: Task) -> int:
    """Return the peak bytes of two steps, weights included: allocated on a GPU; on a CPU the growth of the process."""
    before = memory_in_use(task.device)
    contender = CONTENDERS[name](task)
    batch = next(contender.epoch())
    for _ in range(2):  # AdamW allocates its moments in the first
        contender.step(batch)
    return memory_in_use(task.device, peak=True) - before
