"""What all experiments share: flags, models, data, table, figure and results file.

An experiment measures the adapted model of a run, and beside it the unadapted model, on the same validation pairs. It
prints a table and writes NAME.json (with command, seed, versions and hardware) and NAME.png. To add one, write a
subclass of Experiment in experiments/NAME.py; `python -m experiments.NAME --run runs/x` then works:

    import sys
    from clip_medical.data.batches import Pairs
    from clip_medical.evaluation.encode import encode
    from clip_medical.evaluation.retrieval import share
    from clip_medical.model import Clip
    from experiments.common import Experiment, Reports, main

    class Cosine(Experiment):
        \"""Mean cosine similarity of matching pairs.\"""  # shown by --help

        name = "cosine"

        def measure(self, clip: Clip, pairs: Pairs) -> Reports:
            images, texts = encode(clip, pairs)
            return {"pairs": {"cosine_similarity": share((images * texts).sum(dim=1)), "n": len(pairs)}}

    if __name__ == "__main__":
        sys.exit(main(Cosine))

With @dataclass(frozen=True), fields of the subclass become flags.
"""

import json
import random
import shlex
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

from clip_medical import cli
from clip_medical import run_folder as runs
from clip_medical.config import Config
from clip_medical.data.batches import Pairs, prepare
from clip_medical.data.dataset import Data, data_fingerprint, load_data
from clip_medical.errors import UserError
from clip_medical.evaluation import plots
from clip_medical.evaluation.report import environment
from clip_medical.evaluation.table import Row, as_text, comparison, metric_rows
from clip_medical.model import Clip, load_clip
from clip_medical.training.device import choose_device
from experiments import figures

RESULTS = Path(__file__).parent / "results"
ROOT_OF_PROJECT = RESULTS.parent.parent

Reports = dict[str, dict[str, Any]]  # task -> its "n", its metrics ({"value", ...} as for table.Row), and details
Results = dict[str, Reports]  # model, "unadapted" first -> its reports


class Setup(NamedTuple):
    """Models and places of an experiment."""

    models: dict[str, Clip]  # "unadapted" and, with --run, "adapted", in eval mode
    folder: Path  # for the results
    facts: dict[str, Any]  # command, seed, model, data and environment, saved with the results
    warnings: list[str]  # printed with the results


@dataclass(frozen=True)
class Experiment:
    """The flags of every experiment, and the steps from the models to the results file."""

    # Run folder of train.py, exported adapter or adapter on the Hub; its unadapted base is measured beside it.
    run: str | None = None
    # Base model of the run, where it lies elsewhere now.
    base: str | None = None
    # Instead of --run, an unadapted CLIP alone: tiny-clip, a Hugging Face folder or a name on the Hub.
    model: str | None = None
    # Measure on this data set, named as for train.py: on its validation split, else its test split, else on all of it.
    # Default: the validation split of the run's data, else of the phantoms.
    data: str | None = None
    # Measure on this split of the data instead, such as test.
    split: str | None = None
    # Leave out the images that the run was trained on, recognised by their pixels, instead of a warning.
    leave_out_trained: bool = False
    # Columns and image folder of --data, as for train.py.
    image_column: str | None = None
    caption_column: str | None = None
    template: str | None = None
    image_root: str | None = None
    # Use at most this many validation pairs, sampled by --seed. Default: all.
    limit: int | None = None
    # Folder for the results. Default: the run folder; with --model, experiments/results, or without it this one.
    output: str | None = None
    # Seed of random samples and of the validation split of --data.
    seed: int = 0

    name: ClassVar[str]
    trains: ClassVar[bool] = False  # whether it needs the training split of --data too

    def __post_init__(self) -> None:
        if (self.run is None) == (self.model is None):
            raise UserError("Give either --run with a run of train.py, or --model with an unadapted CLIP.")
        smallest = {"limit": 2, "seed": 0, "k": 1, "steps": 1, "port": 1}  # the last three not everywhere
        for flag, lowest in smallest.items():
            value = getattr(self, flag, None)
            if value is not None and value < lowest:
                raise UserError(f"--{flag} is {value}. Give a whole number of {lowest} or more.")

    def measure(self, clip: Clip, pairs: Pairs) -> Reports:
        """Measure one model on the validation pairs; `pairs.split` holds the labels. The result must fit into JSON."""
        raise NotImplementedError

    def rows(self, results: Results) -> list[Row]:
        """Return the rows of the table, one for each metric of each task."""
        first = results["unadapted"].items()
        return [row for task, report in first for row in metric_rows(task, pick(results, task), report["n"])]

    def title(self) -> str:
        """Return the name of the files."""
        return self.name

    def remarks(self, results: Results) -> list[str]:
        """Return lines to print below the table."""
        return []

    def draw(self, results: Results, folder: Path) -> list[str]:
        """Draw the figures and return their file names.

        One shows all rows that are shares. Tasks with a `classification_report` also have a confusion matrix each, and
        all together a figure of their calibration.
        """
        files = [f"{self.title()}.png"]
        plots.share_bars(self.rows(results), "%, with 95 % interval", folder / files[0])
        tasks = [task for task, report in results["unadapted"].items() if "confusion" in report]
        for task in tasks:
            files.append(f"{self.title()}_confusion_{task}.png")
            figures.confusion(pick(results, task), task, folder / files[-1])
        if tasks:
            files.append(f"{self.title()}_reliability.png")
            figures.reliability({task: pick(results, task) for task in tasks}, folder / files[-1])
        return files

    def perform(self) -> int:
        """Measure every model, print the table, draw the figures, save the results. Returns the exit code."""
        setup = self.load_models()
        pairs = self.prepare(self.load_data(setup), setup)
        results = {model: self.measure(clip, pairs) for model, clip in setup.models.items()}
        print(as_text(comparison(self.rows(results))), *self.remarks(results), *setup.warnings, sep="\n")
        self.save(setup, self.title(), results, *self.draw(results, setup.folder))
        return 0

    def load_models(self) -> Setup:
        """Load the models in fp32, on the GPU where there is one."""
        device, _, _ = choose_device("fp32")
        if self.run is not None:
            adapted = runs.load_run(self.run, device, base=self.base)
            models = {"unadapted": runs.load_base(adapted, self.run), "adapted": adapted}
        else:
            models = {"unadapted": load_clip(self.model or "", device)}
        local_run = self.run if self.run and Path(self.run).is_dir() else None  # else an adapter on the Hub, or --model
        base = models["unadapted"]
        identity = {"base": base.name, "revision": base.revision, "fingerprint": base.fingerprint}
        facts = {
            "command": f"{cli.console or f'python -m experiments.{self.name}'} {shlex.join(sys.argv[1:])}",
            "seed": self.seed,
            "model": {"run": self.run, **identity, "encoder": base.encoder.name},
            "environment": environment(),
        }
        default = RESULTS if RESULTS.is_dir() else "."  # installed without its repository
        return Setup(models, runs.make_folder(Path(self.output or local_run or default)), facts, [])

    def read_config(self) -> Config:
        """Return the configuration of the run; with --model, the defaults of train.py for that model and --data."""
        if self.run is None:
            return Config(model=self.model or "", data=self.data or "phantoms", seed=self.seed)
        stored = runs.read_json(runs.run_root(self.run) / "config.json")
        if not stored:
            raise UserError(f"{self.run} has no config.json. Give a run of train.py, or name the data with --data.")
        known: dict[str, Any] = {key: value for key, value in stored.items() if key in Config.__dataclass_fields__}
        return Config(**known | {"targets": tuple(known["targets"])})

    def load_data(self, setup: Setup) -> Data:
        """Load the data, and record source and fingerprint in `setup.facts`.

        The default is the data of the run, loaded and split as in training, so that no validation pair was trained on.
        The same holds if --data names them at another place. Raises UserError if these data have changed since.
        """
        flags = "image_column", "caption_column", "template", "image_root"
        given = {name: value for name in flags if (value := getattr(self, name)) is not None}
        provenance = runs.run_root(self.run) / "adapter" / runs.PROVENANCE if self.run else Path()
        expected = runs.read_json(provenance).get("data", {}).get("fingerprint")
        data = None
        if self.split is None and (not self.data or expected):
            config = self.read_config()
            try:
                data = load_data(self.data or config.data, **config.reading() | given)
            except UserError:
                if not self.data:
                    raise
            if data and expected not in (None, data_fingerprint(data)):
                if not self.data:
                    raise UserError(
                        f"{config.data} has changed since {self.run} was trained on it, so validation pairs may have "
                        "been trained on. Restore the data, or name data the run has not seen with --data."
                    )
                data = None
        if data is None:  # other data than the run's, or another split of the run's
            config = Config(data=self.data) if self.data else self.read_config()
            reading = config.reading() | given | {"limit": None, "seed": self.seed}
            data = load_data(config.data, split=None if self.trains else self.split or "", **reading)
        fingerprint, total = data_fingerprint(data), len(data.validation)
        if self.limit is not None:
            sample = sorted(random.Random(self.seed).sample(range(total), min(self.limit, total)))
            data = replace(data, validation=data.validation.select(sample))
        count = f"{len(data.validation):,} of {total:,} pairs" if len(data.validation) < total else f"{total:,} pairs"
        print(f"Data     {data.source}: {count} ({data.split_rule})", *data.notes, sep="\n         ")
        counted = {"validation pairs": len(data.validation), "of": total, "fingerprint": fingerprint}
        setup.facts["data"] = {"source": data.source, "split": data.split_rule, **counted}
        return data

    def prepare(self, data: Data, setup: Setup) -> Pairs:
        """Decode and tokenize the validation pairs; say how many of their images the run was trained on."""
        processor = setup.models["unadapted"].processor
        pairs = prepare(data.validation, processor, "validation")
        trained = set(runs.trained_on(self.run))
        if self.run and not trained and not len(data.train):
            print(f"         {self.run} has no {runs.TRAINED}: it is not known whether it was trained on some of these")
        new = [row for row, digest in enumerate(pairs.digests) if digest not in trained]
        if seen := len(pairs) - len(new):
            message = f"{seen:,} of {len(pairs):,} images of {data.source} were trained on by {self.run}"
            if self.leave_out_trained:
                if not new:
                    raise UserError(f"{message}, so none is left to measure on. Name other data.")
                print(f"         {message}, and are left out")
                setup.facts["data"] |= {"validation pairs": len(new), "trained on, left out": seen}
                return prepare(pairs.split.select(new), processor, "validation")
            setup.facts["data"]["trained on"] = seen
            setup.warnings.append(f"{message}: these results are not of held-out data. --leave-out-trained omits them")
            print(f"         {setup.warnings[-1]}")
        return pairs

    def save(self, setup: Setup, name: str, results: dict[str, Any], *files: str) -> None:
        """Write NAME.json atomically: the facts of `setup`, then the results. With names of figures, print them."""
        runs.write_text(setup.folder / f"{name}.json", json.dumps(setup.facts | {"results": results}, indent=2) + "\n")
        if files:
            print(f"\nSaved    {setup.folder}: {', '.join([f'{name}.json', *files])}")


def pick(results: Results, task: str) -> dict[str, dict[str, Any]]:
    """Return model -> its report of one task."""
    return {model: reports[task] for model, reports in results.items()}


def main(experiment: type[Experiment]) -> int:
    """Parse the flags of an experiment, perform it, and return the exit code."""
    command = cli.console or f"python -m experiments.{experiment.name}"
    return cli.exit_code(experiment.name, lambda: cli.parse(experiment, sys.argv[1:], command).perform())
