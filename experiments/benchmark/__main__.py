"""Training speed and memory beside peft and full fine-tuning: `python -m experiments.benchmark`, or `make bench`.

All contenders (contenders.py) take turns in one process, so that other load on the machine falls on all of them. Ratios
are medians of the ratios of the turns. Writes benchmark-DEVICE.md and benchmark-DEVICE.json.
"""

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from clip_medical.data.cache import ROOT_VARIABLE
from clip_medical.evaluation.table import as_markdown, as_text
from clip_medical.model import load_clip
from clip_medical.run_folder import write_text
from clip_medical.training.device import choose_device, choose_precision
from experiments.benchmark import measure, training
from experiments.benchmark.inputs import write_rows


@dataclass(frozen=True)
class Training(measure.Benchmark):
    """Compare this project, peft with the usual loop, and full fine-tuning on a CLIP of ViT-B/32's geometry."""

    batch_size: int = 64
    """Pairs in a batch."""
    images: int = 128
    """PNG files in an epoch; at least a batch, on a GPU a batch for each loader process of the usual loop."""
    repeats: int = 5
    """Turns of each contender."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision, as in train.py."""
    steps_only: bool = False
    """Measure training steps alone, as for a further batch size or precision on the same machine."""

    command = "benchmark"
    packages = ("peft", "torchvision")
    minimum = {"batch_size": 2, "images": 1, "repeats": 1}

    def measure(self) -> dict[str, Any]:
        device = choose_device()
        dtype, _ = choose_precision(self.precision, device)
        loaders = (os.cpu_count() or 1) if device.type == "cuda" and not self.steps_only else 1
        count = max(self.images, self.batch_size * loaders)
        with TemporaryDirectory() as folder:
            os.environ[ROOT_VARIABLE] = str(Path(folder, "cache"))  # not the user's own
            rows = write_rows(Path(folder), count, load_clip().processor.tokenizer)
            epochs = not self.steps_only
            table, losses = training.train_in_turns(rows, self.batch_size, self.repeats, device, dtype, epochs)
            results: dict[str, Any] = {
                "settings": {"model": "ViT-B/32 geometry, random weights", "precision": str(dtype).removeprefix("torch."),
                             "batch size": self.batch_size, "images": count, "repeats": self.repeats},
                "contenders": table, "losses": losses, "largest difference of losses": training.largest_difference(losses),
            }  # fmt: skip
            if not self.steps_only:
                for name, peak in training.peak_memory_table(rows, self.batch_size, self.precision).items():
                    table[name] |= peak
                results["inference"] = training.inference(rows[: self.batch_size], self.repeats, device, dtype)
                results["chunked"] = training.chunked(device, dtype)
        return results

    def write(self, folder: Path, results: dict[str, Any]) -> list[str]:
        """Print the table, and write it in Markdown beside the JSON."""
        contenders = results["contenders"]
        rows = [["", *contenders]]
        for title in next(iter(contenders.values())):
            rows.append([title, *(f"{table[title]:,.2f}" for table in contenders.values())])
        difference, steps = results["largest difference of losses"], len(next(iter(results["losses"].values())))
        facts = [f"losses of the same {steps} steps, fast, reference and peft: largest difference {difference:.1e}"]
        for part in ("inference", "chunked"):
            facts += [f"{part}, {title}: {value:.3g}" for title, value in results.get(part, {}).items()]
        print("\n" + as_text(rows) + "\n\n" + "\n".join(facts))
        name = f"benchmark-{choose_device().type}"
        setup = results["settings"] | results["environment"] | {"command": f"`{results['command']}`"}
        lists = [[f"- {fact}" for fact in facts], [f"- {key}: {value}" for key, value in setup.items()]]
        lines = [f"# {name}", "", as_markdown(rows), "", *lists[0], "", "## Setup", "", *lists[1], ""]
        write_text(folder / f"{name}.md", "\n".join(lines))
        return [measure.write_json(folder, name, results), f"{name}.md"]


if __name__ == "__main__":
    sys.exit(measure.main(Training))
