"""The clock of the benchmarks, and fresh processes."""

import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch
from tqdm import tqdm

T = TypeVar("T")


def fresh_process(action: Callable[..., T], *arguments: Any) -> T:
    """Return `action(*arguments)`, called in a new process: its peak memory holds nothing from earlier work."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(action, *arguments).result()


def seconds(action: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds that `action(*arguments)` takes, until all its GPU kernels are done."""
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.synchronize()
    began = time.perf_counter()
    action(*arguments)
    if on_gpu:
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(actions: dict[str, Callable[[int], Any]], turns: int, title: str, warm_up: int) -> dict[str, list[float]]:
    """Time all actions once in each turn, so that other load on the machine falls on all of them -> name -> seconds.

    The first `warm_up` turns are not counted: they also pay for memory and compiled kernels.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in tqdm(range(warm_up + turns), desc=title, unit="turn"):
        for name, action in actions.items():
            times[name].append(seconds(action, turn))
    return {name: values[warm_up:] for name, values in times.items()}


def speedup(slower: list[float], faster: list[float]) -> float:
    """Return the median over the turns of slower / faster. Load that lasts a turn cancels out of its ratio."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
