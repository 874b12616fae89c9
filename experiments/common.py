"""What the experiments share: which models, which pictures, and where the results go.

An experiment is `python -m experiments.NAME --run runs/x`. It measures the adapted model and, beside it, the unadapted
one on the same held-out pictures, prints a table, and writes NAME.json and NAME.png.
"""

import json
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from clip_medical import command_line
from clip_medical.data.sources import Data, load_data
from clip_medical.errors import UserError
from clip_medical.evaluation.report import environment, percent
from clip_medical.model import Clip, load_clip
from clip_medical.provenance import data_fingerprint
from clip_medical.runs import PROVENANCE, load_run, make_folder, read_json, write_text
from clip_medical.training.precision import choose_device

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Common:
    run: str | None = None
    """A run of train.py, or an exported adapter: measure it and, beside it, its unadapted base."""
    model: str | None = None
    """Instead of --run, an unadapted CLIP alone: tiny-clip, a Hugging Face CLIP folder or a name on the Hub."""
    data: str | None = None
    """Whose held-out pictures to take, named as for train.py; default: those of the run, for a --model phantoms."""
    limit: int | None = None
    """Take at most so many held-out pictures, drawn by --seed; default: as the run did, of other data all."""
    output: str | None = None
    """Folder for the results; default: the run, for a --model experiments/results."""
    seed: int = 0
    """Decides random draws and, of data other than the run's, what is held out."""

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model is None):
            raise UserError("give either --run, a run of train.py, or --model, a CLIP as it was published.")
        if self.limit is not None and self.limit < 2:
            raise UserError(f"--limit is {self.limit}: give a whole number of 2 or more.")
        if self.seed < 0:
            raise UserError(f"--seed is {self.seed}: give a whole number of 0 or more.")


Options = TypeVar("Options", bound=Common)


class Setup(NamedTuple):
    """What an experiment works with."""

    models: dict[str, Clip]  # "unadapted" and, of a run, "adapted", in eval mode
    folder: Path  # where results go
    facts: dict[str, Any]  # command, seed, models, data, environment: what stands beside the results

    @property
    def best(self) -> Clip:
        """The adapted model, where there is one."""
        return list(self.models.values())[-1]


def load_models(name: str, options: Common) -> Setup:
    """The models of an experiment called `name`, each on the GPU where there is one, in fp32."""
    device = choose_device()
    if options.run is not None:
        adapted = load_run(options.run, device)
        # loaded afresh and not switched off: a temperature that was trained belongs to the adapted model alone
        models = {"unadapted": load_clip(adapted.name, device, revision=adapted.revision), "adapted": adapted}
        folder = Path(options.output or (options.run if Path(options.run).is_dir() else RESULTS))  # a run on the Hub
    else:
        models = {"unadapted": load_clip(options.model or "", device)}
        folder = Path(options.output or RESULTS)
    make_folder(folder)
    base = models["unadapted"]
    facts = {
        "command": shlex.join(["python", "-m", f"experiments.{name}", *sys.argv[1:]]),
        "seed": options.seed,
        "model": {"run": options.run, "base": base.name, "revision": base.revision, "fingerprint": base.fingerprint},
        "environment": environment(),
    }
    return Setup(models, folder, facts)


def load_evidence(setup: Setup, options: Common) -> Data:
    """The data of an experiment; `setup.facts` is told of them. Raises UserError where they are not the run's any more.

    By default what the run was trained with, read and split as there, so that its held-out part was never trained on.
    """
    folder = Path(options.run or "")
    config = read_json(folder / "config.json") if options.run else {}
    trained_on = read_json(folder / "adapter" / PROVENANCE).get("data", {}) if config else {}
    if options.data is None and config:
        columns = {key: config[key] for key in ("image_column", "caption_column")}
        data = load_data(config["data"], **columns, limit=config["limit"], seed=config["seed"])
        fingerprint = data_fingerprint(data)
        if trained_on.get("fingerprint", fingerprint) != fingerprint:
            raise UserError(
                f"{data.source} holds other rows than when {options.run} was trained on it, so that what is held out "
                "now may have been trained on: bring the old rows back, or name data that it never saw with --data."
            )
    elif options.data is None and options.run:
        raise UserError(f"{options.run} does not say what it was trained on: name held-out pictures with --data.")
    else:
        data = load_data(options.data or "phantoms", seed=options.seed)
        fingerprint = data_fingerprint(data)
    if options.limit is not None and options.limit < len(data.validation):
        rows = _drawn(len(data.validation), options.limit, options.seed)
        data = Data(data.train, data.validation.select(rows), data.source, data.split_rule)
    setup.facts["data"] = {
        "source": data.source,
        "split": data.split_rule,
        "held-out pairs": len(data.validation),
        "fingerprint": fingerprint,
    }
    return data


def _drawn(count: int, limit: int, seed: int) -> list[int]:
    import numpy as np

    return sorted(np.random.default_rng(seed).permutation(count)[:limit].tolist())


def line(name: str, rows: dict[str, dict[str, Any]], key: str = "value", n: int | str = "") -> list[str]:
    """A row of a table: the result of each model with its interval, the chance level where there is one, n."""
    chance = [row["chance"] for row in rows.values() if "chance" in row]
    shown = f"{100 * chance[0]:.2g} %" if chance and chance[0] < 0.01 else f"{100 * chance[0]:.1f} %" if chance else ""
    return [name, *(percent(row, key) for row in rows.values()), shown, f"{n:,}" if isinstance(n, int) else n]


def save(setup: Setup, name: str, results: dict[str, Any]) -> None:
    """NAME.json, whole or not at all: the facts, then the results."""
    write_text(setup.folder / f"{name}.json", json.dumps(setup.facts | {"results": results}, indent=2) + "\n")


def said(setup: Setup, *files: str) -> None:
    """Tell what was written."""
    print(f"\nSaved    {setup.folder}: {', '.join(files)}")


def main(name: str, kind: type[Options], run: Callable[[Options], int]) -> int:
    """Command line of an experiment: flags from the dataclass `kind`; returns the exit code."""
    command = f"python -m experiments.{name}"
    return command_line.exit_code(name, lambda: run(command_line.parse(kind, sys.argv[1:], command)))
