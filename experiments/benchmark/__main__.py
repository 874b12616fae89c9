"""Training speed and memory beside peft and full fine-tuning: `python -m experiments.benchmark`, or `make bench`.

All contenders (contenders.py) take turns in one process, so that other load on the machine falls on all of them. Ratios
are medians of the ratios of the turns. Writes benchmark-DEVICE.md and benchmark-DEVICE.json.
"""

import os
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from clip_medical.config import Config
from clip_medical.data.cache import ROOT_VARIABLE
from clip_medical.evaluation.table import as_markdown, as_text
from clip_medical.model import load_clip
from clip_medical.run_folder import write_text
from clip_medical.training.device import choose_device, choose_precision
from experiments.benchmark.contenders import FULL, Task
from experiments.benchmark.inputs import write_rows
from experiments.benchmark.measure import Benchmark, fresh_process, main, numbers
from experiments.benchmark.memory import CHUNK, train
from experiments.benchmark.training import inference, peaks, training

CHUNKED = (256, 1024)  # batch sizes


@dataclass(frozen=True)
class Training(Benchmark):
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

    command = "benchmark"

    def file(self) -> str:
        return f"benchmark-{choose_device().type}"

    def measure(self, folder: Path) -> dict[str, Any]:
        device = choose_device()
        loaders = (os.cpu_count() or 1) if device.type == "cuda" and not self.steps_only else 1
        with TemporaryDirectory() as images, TemporaryDirectory() as os.environ[ROOT_VARIABLE]:  # not the user's cache
            count = max(self.images, self.batch_size * loaders)
            rows = write_rows(Path(images), count, load_clip().processor.tokenizer, self.seed)
            task = Task(rows, self.batch_size, device, choose_precision(self.precision, device)[0])
            table, losses = training(task, self.repeats, epochs=not self.steps_only)
            of_each_step = zip(*(values for name, values in losses.items() if name != FULL), strict=True)
            difference = max(max(step) - min(step) for step in of_each_step)
            results: dict[str, Any] = {"contenders": table, "losses": losses, "dtype": str(task.dtype)}
            results["largest difference between losses of the same step, without full fine-tuning"] = difference
            if not self.steps_only:
                of_one_batch = Task(rows[: self.batch_size], self.batch_size, device, task.dtype)
                for name, peak in peaks(of_one_batch).items():
                    table[name] |= peak
                results |= inference(of_one_batch, self.repeats) | self.chunked()
        cells = [["", *table], *([key, *(f"{row[key]:,.2f}" for row in table.values())] for key in table[FULL])]
        print("\n" + as_text(cells))
        facts = self.facts()
        setup = facts["settings"] | facts["environment"] | {"command": f"`{facts['command']}`"}
        lists = "\n".join(f"- {line}" for line in [*numbers(results), *(f"{key}: {setup[key]}" for key in setup)])
        write_text(folder / f"{self.file()}.md", f"# Benchmark on {device}\n\n{as_markdown(cells)}\n\n{lists}\n")
        return results

    def chunked(self) -> dict[str, float]:
        """Time exact steps of the tiny CLIP over growing batches in two turns -> title -> ms per pair."""
        settings: dict[str, Any] = dict(chunk_size=CHUNK, fragments=0, precision=self.precision, seed=self.seed)
        times: dict[int, list[float]] = {size: [] for size in CHUNKED}
        for size in 2 * CHUNKED:
            result: Any = fresh_process(train, Config(batch_size=size, **settings))
            times[size].append(result["ms"])
        title = f"tiny CLIP in chunks of {CHUNK}, ms per pair in a batch of"
        return {f"{title} {size:,}": statistics.median(values) for size, values in times.items()}


if __name__ == "__main__":
    sys.exit(main(Training))
