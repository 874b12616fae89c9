"""What all benchmarks share: flags, the clock, fresh processes, and the results file."""

import json
import multiprocessing
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
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
    """A benchmark is a dataclass of flags with a method `measure`."""

    # Folder for the results.
    output: str = "experiments/results"
    # Seed of the inputs.
    seed: int = 0

    command: ClassVar[str]  # `python -m experiments.COMMAND`

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            lowest = {"seed": 0, "batch_size": 2}.get(name, 1)
            if isinstance(value, int) and not isinstance(value, bool) and value < lowest:
                raise UserError(f"Found --{name.replace('_', '-')} {value}, expected {lowest} or more.")

    def measure(self, folder: Path) -> dict[str, Any]:
        """Return the measurements: numbers, which are printed, and tables as JSON. Figures go into `folder`."""
        raise NotImplementedError

    def file(self) -> str:
        """Return the name of the results file, without .json."""
        return self.command.replace(".", "_")

    def facts(self) -> dict[str, Any]:
        """Return what is stored beside the measurements."""
        command = shlex.join(["python", "-m", f"experiments.{self.command}", *sys.argv[1:]])
        versions = {package: version(package) for package in ("peft", "torchvision", "datasets", "pillow")}
        return {"command": command, "settings": asdict(self), "environment": environment() | versions}

    def perform(self) -> int:
        """Measure, print, and write the results file. Returns the exit code."""
        folder = make_folder(Path(self.output))
        results = self.measure(folder)
        file = folder / f"{self.file()}.json"
        write_text(file, json.dumps(self.facts() | results, indent=2) + "\n")
        print("\n" + "\n".join(numbers(results)) + f"\n\nSaved    {file}")
        return 0


def numbers(results: dict[str, Any]) -> list[str]:
    """Format the entries that are numbers, one a line."""
    values = {title: value for title, value in results.items() if isinstance(value, int | float)}
    return [f"{title}: {value:,.0f}" if value >= 1000 else f"{title}: {value:.3g}" for title, value in values.items()]


def main(kind: type[Benchmark]) -> int:
    """Parse the flags of a benchmark, perform it, and return the exit code."""
    command = f"python -m experiments.{kind.command}"
    return cli.exit_code(kind.command, lambda: cli.parse(kind, sys.argv[1:], command).perform())


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
