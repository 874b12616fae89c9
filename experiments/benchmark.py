"""Speed and memory beside peft and full fine-tuning: `python -m experiments.benchmark`, or `make bench`.

All contenders (experiments/contenders.py) take turns in one run, so that whatever else the machine does falls on all of
them; ratios are medians over the turns. Each row of the table says what was measured on this machine and nothing else.
"""

import json
import os
import shlex
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from clip_medical import cli
from clip_medical.data.cache import ROOT_VARIABLE
from clip_medical.errors import UserError
from clip_medical.evaluation.report import as_markdown, as_text, environment
from clip_medical.model import load_clip
from clip_medical.run_folder import make_folder, write_text
from clip_medical.training.device import choose_device, choose_precision
from experiments import benchmark_parts as parts
from experiments.contenders import make_rows


@dataclass(frozen=True)
class Benchmark:
    """Measure this project, peft with the usual loop, and full fine-tuning on a CLIP of ViT-B/32's geometry."""

    batch_size: int = 64
    """Pairs in a batch."""
    pictures: int = 128
    """PNG files in an epoch."""
    repeats: int = 5
    """Turns of each contender."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Number format, as in train.py."""
    memory: float = 14.7
    """GiB for which the largest batch is worked out: what a T4 has for its user."""
    steps_only: bool = False
    """Only the training steps, as for a further batch size or format on the same machine."""
    output: str = "experiments/results"
    """Folder for benchmark-DEVICE.md and .json."""

    def __post_init__(self) -> None:
        if self.batch_size < 2 or self.repeats < 1 or not 0 < self.memory < float("inf"):
            raise UserError("give --batch-size of 2, --repeats of 1 or more, and a --memory above 0.")


def run(options: Benchmark) -> int:
    device, folder = choose_device(), make_folder(Path(options.output))
    dtype, _ = choose_precision(options.precision, device)
    with TemporaryDirectory() as pictures, TemporaryDirectory() as cache:
        os.environ[ROOT_VARIABLE] = cache  # and not the user's own
        rows = make_rows(Path(pictures), max(options.pictures, options.batch_size), load_clip().tokenizer)
        results: dict[str, Any] = {
            "command": shlex.join(["python", "-m", "experiments.benchmark", *sys.argv[1:]]),
            "environment": environment() | {"peft": version("peft"), "torchvision": version("torchvision")},
            "settings": {"model": "ViT-B/32 geometry, random weights, seed 0", "batch size": options.batch_size,
                         "precision": str(dtype).removeprefix("torch."), "repeats": options.repeats,
                         "pictures": len(rows)},
            "contenders": parts.training(rows, options.batch_size, options.repeats, device, dtype),
        }  # fmt: skip
        ours, peft = results["contenders"]["ours"], results["contenders"]["peft"]
        results["ratios_to_peft"] = ours.pop("ratios to peft")
        if not options.steps_only:
            results["inference"] = parts.inference(rows[: options.batch_size], options.repeats, device, dtype)
            results["chunked"] = parts.chunks(device, dtype)
            results["start"] = parts.start()
            for name, peak in parts.memory(rows, options.batch_size, options.precision, options.memory).items():
                results["contenders"][name] |= peak
            results["ratios_to_peft"]["peak_memory"] = ours["peak bytes"] / peft["peak bytes"]
    results["losses"] = {"ours": ours.pop("losses"), "peft": peft.pop("losses")}
    publish(results, folder, device.type)
    return 0


def publish(results: dict[str, Any], folder: Path, device: str) -> None:
    """One table on the terminal and in Markdown; everything in JSON."""
    rows = [["", *(c["name"] for c in results["contenders"].values())]]
    measures = [key for key in results["contenders"]["full"] if key != "name"]
    for key in measures:
        unit = 2**30 if key == "peak bytes" else 1
        label = "peak memory, GiB" if unit > 1 else key
        rows.append(
            [label, *(f"{c[key] / unit:,.{0 if 'batch' in key else 2}f}" for c in results["contenders"].values())]
        )
    ours = results["contenders"]["ours"]
    done, published = (100 * ours[f"share of ceiling{suffix}"] for suffix in ("", ", as published"))
    facts = [
        "This project to peft: "
        + ", ".join(f"{name.replace('_', ' ')} {ratio:.2f} x" for name, ratio in results["ratios_to_peft"].items()),
        f"Share of the measured matrix-product ceiling: {done:.0f} % in the operations done, {published:.0f} % in "
        "those of CLIP as published, without padding",
        "Losses of the same steps, this project: " + ", ".join(f"{x:.4f}" for x in results["losses"]["ours"]),
        "Losses of the same steps, peft:         " + ", ".join(f"{x:.4f}" for x in results["losses"]["peft"]),
        *(f"{key}: {value:.3g}" for part in ("inference", "chunked") for key, value in results.get(part, {}).items()),
        *(f"{key}: {value:.2f} s" for key, value in results.get("start", {}).items()),
    ]  # fmt: skip
    print("\n" + as_text(rows) + "\n\n" + "\n".join(facts))
    where = {**results["settings"], **results["environment"], "command": f"`{results['command']}`"}
    lines = [f"# Benchmark on {device}", "", as_markdown(rows), "", *(f"- {fact}" for fact in facts), ""]
    lines += ["## Where", "", *(f"- {key}: {value}" for key, value in where.items()), ""]
    write_text(folder / f"benchmark-{device}.md", "\n".join(lines))
    write_text(folder / f"benchmark-{device}.json", json.dumps(results, indent=2) + "\n")


def main() -> int:
    command = "python -m experiments.benchmark"
    return cli.exit_code("benchmark", lambda: run(cli.parse(Benchmark, sys.argv[1:], command)))


if __name__ == "__main__":
    sys.exit(main())
