"""Training speed and memory beside peft and full fine-tuning: `python -m experiments.benchmark`, or `make bench`.

All contenders (contenders.py) take turns in one process, so that other load on the machine falls on all of them. Ratios
are medians of the ratios of the turns. Writes benchmark-DEVICE.json.
"""

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from clip_medical import cli
from clip_medical.data.cache import ROOT_VARIABLE
from clip_medical.errors import UserError
from clip_medical.evaluation.report import environment
from clip_medical.evaluation.table import as_text
from clip_medical.model import load_clip
from clip_medical.run_folder import make_folder, write_text
from clip_medical.training.device import choose_device
from experiments.benchmark.contenders import FULL, Task
from experiments.benchmark.inputs import write_rows
from experiments.benchmark.training import inference, peaks, training


@dataclass(frozen=True)
class Benchmark:
    """Compare this project, peft with the usual loop, and full fine-tuning on a CLIP of ViT-B/32's geometry."""

    # Pairs in a batch.
    batch_size: int = 64
    # PNG files in an epoch; at least one batch, on a GPU one for each loader process of the usual loop.
    images: int = 128
    # Turns of each contender.
    repeats: int = 5
    # Precision, as in train.py.
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    # Measure training steps alone, as for a further batch size or precision on the same machine.
    steps_only: bool = False
    # Folder for the results.
    output: str = "experiments/results"
    # Seed of the inputs.
    seed: int = 0

    def __post_init__(self) -> None:
        for name, lowest in (("batch_size", 2), ("images", 1), ("repeats", 1), ("seed", 0)):
            if getattr(self, name) < lowest:
                value = getattr(self, name)
                raise UserError(f"Found --{name.replace('_', '-')} {value}, expected {lowest} or more.")

    def perform(self) -> int:
        """Measure, print, and write the results. Returns the exit code."""
        folder, (device, dtype, _) = make_folder(Path(self.output)), choose_device(self.precision)
        loaders = (os.cpu_count() or 1) if device.type == "cuda" and not self.steps_only else 1
        with TemporaryDirectory() as images, TemporaryDirectory() as os.environ[ROOT_VARIABLE]:  # not the user's cache
            count = max(self.images, self.batch_size * loaders)
            rows = write_rows(Path(images), count, load_clip().processor.tokenizer, self.seed)
            task = Task(rows, self.batch_size, device, dtype)
            table, losses = training(task, self.repeats, epochs=not self.steps_only)
            of_each_step = zip(*(values for name, values in losses.items() if name != FULL), strict=True)
            difference = max(max(step) - min(step) for step in of_each_step)
            results: dict[str, Any] = {"contenders": table, "losses": losses, "dtype": str(task.dtype)}
            results["largest difference between losses of the same step, without full fine-tuning"] = difference
            if not self.steps_only:
                of_one_batch = Task(rows[: self.batch_size], self.batch_size, device, task.dtype)
                for name, peak in peaks(of_one_batch).items():
                    table[name] |= peak
                results |= inference(of_one_batch, self.repeats)
        cells = [["", *table], *([key, *(f"{row[key]:,.2f}" for row in table.values())] for key in table[FULL])]
        numbers = [f"{title}: {value:,.4g}" for title, value in results.items() if isinstance(value, int | float)]
        print("\n" + as_text(cells), *numbers, sep="\n")
        versions = {package: version(package) for package in ("peft", "torchvision", "datasets", "pillow")}
        command = shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]])
        facts = {"command": command, "settings": asdict(self), "environment": environment() | versions}
        file = folder / f"benchmark-{device.type}.json"
        write_text(file, json.dumps(facts | results, indent=2) + "\n")
        print(f"\nSaved    {file}")
        return 0


def main() -> int:
    command = "python -m experiments.benchmark"
    return cli.exit_code("benchmark", lambda: cli.parse(Benchmark, sys.argv[1:], command).perform())


if __name__ == "__main__":
    sys.exit(main())
