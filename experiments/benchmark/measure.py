"""What all benchmarks share: flags, the clock, fresh processes, and the results file."""

import json
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from tqdm import tqdm

from clip_medical import cli
from clip_medical.errors import UserError
from clip_medical.evaluation.report import environment
from clip_medical.run_folder import make_folder, write_text

T = TypeVar("T")


@dataclass(frozen=True)
class Benchmark:
    """A benchmark is a dataclass of flags, and `measure`, which prints and returns the results."""

    output: str = "experiments/results"
    """Folder for the results."""
    seed: int = 0
    """Seed of the inputs."""

    command: ClassVar[str]  # `python -m experiments.COMMAND`
    packages: ClassVar[tuple[str, ...]] = ()  # whose versions are stored, besides those of every report
    minimum: ClassVar[dict[str, int]] = {}  # flag -> its lowest value

    def __post_init__(self) -> None:
        for name, lowest in {"seed": 0, **self.minimum}.items():
            if getattr(self, name) < lowest:
                raise UserError(f"Found --{name.replace('_', '-')} {getattr(self, name)}, expected {lowest} or more.")

    def measure(self) -> dict[str, Any]:
        """Print the measurements and return them, as JSON."""
        raise NotImplementedError

    def perform(self) -> int:
        """Measure, and write the results with command, seed, versions and hardware. Returns the exit code."""
        folder = make_folder(Path(self.output))
        facts = {
            "command": shlex.join(["python", "-m", f"experiments.{self.command}", *sys.argv[1:]]),
            "seed": self.seed,
            "environment": environment() | {name: version(name) for name in self.packages},
        }
        files = self.write(folder, facts | self.measure())
        print(f"\nSaved    {folder}: {', '.join(files)}")
        return 0

    def write(self, folder: Path, results: dict[str, Any]) -> list[str]:
        """Write the results file and return the names of all files written; by default `benchmark_NAME.json`."""
        return [write_json(folder, self.command.replace(".", "_"), results)]


def write_json(folder: Path, name: str, results: dict[str, Any]) -> str:
    """Write NAME.json atomically; returns the name of the file."""
    write_text(folder / f"{name}.json", json.dumps(results, indent=2) + "\n")
    return f"{name}.json"


def main(kind: type[Benchmark]) -> int:
    """Parse the flags of a benchmark, perform it, and return the exit code."""
    command = f"python -m experiments.{kind.command}"
    return cli.exit_code(kind.command, lambda: cli.parse(kind, sys.argv[1:], command).perform())


def fresh_process(action: Callable[..., T], *arguments: Any) -> T:
    """Return `action(*arguments)`, called in a new process, whose peak memory holds nothing from earlier work."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(action, *arguments).result()


def seconds(device: torch.device, action: Callable[..., Any], *arguments: Any) -> float:
    """Return the seconds that `action(*arguments)` takes, until all its GPU kernels are done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began


def in_turns(
    device: torch.device, actions: Mapping[str, Callable[[int], Any]], turns: int, title: str, warm_up: int = 0
) -> dict[str, list[float]]:
    """Time all actions in each turn, so that other load on the machine falls on all of them -> name -> seconds.

    The first `warm_up` turns, which also pay for memory and compiled kernels, are not counted.
    """
    times: dict[str, list[float]] = {name: [] for name in actions}
    for turn in tqdm(range(warm_up + turns), desc=title, unit="turn"):
        for name, action in actions.items():
            elapsed = seconds(device, action, turn)
            if turn >= warm_up:
                times[name].append(elapsed)
    return times


def speedup(slower: list[float], faster: list[float]) -> float:
    """Return the median over the turns of slower / faster. A ratio within a turn does not see slow minutes."""
    return statistics.median(a / b for a, b in zip(slower, faster, strict=True))
