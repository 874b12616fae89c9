"""Zero-shot classification, the adapted model beside the unadapted: `python -m experiments.zero_shot --run runs/x`.

Of a labelled set: accuracy, balanced accuracy, AUROC and the confusions of each facet. With --facet and --classes, one
question, such as pneumonia against normal, over the pictures that have one of these labels.

Of one picture, with labels of your own: `--image my.png --labels "X-ray of the chest" "CT of the head"`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from clip_medical.data.batches import prepare
from clip_medical.data.images import decode
from clip_medical.data.sources import FACETS, Split
from clip_medical.errors import UserError
from clip_medical.evaluation.classification import classification_report
from clip_medical.evaluation.report import as_text, encode
from clip_medical.evaluation.zero_shot import class_scores
from experiments import common, figures
from experiments.common import line

MEASURES = {"accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "auroc": "AUROC"}


@dataclass(frozen=True)
class ZeroShot(common.Common):
    """Zero-shot classification of held-out pictures, or of one of your own, before and after adaptation."""

    facet: str | None = None
    """Only this facet: modality, anatomy, finding or view; default: each that has labels."""
    classes: tuple[str, ...] = ()
    """Only these classes of --facet, and only the pictures that have one of them as their label."""
    image: str | None = None
    """Instead of a labelled set: one picture."""
    labels: tuple[str, ...] = ()
    """What the picture of --image might show, in words of your own: sentences do better than single words."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.facet is not None and self.facet not in FACETS:
            raise UserError(f"--facet is {self.facet}: expected one of {', '.join(FACETS)}.")
        if self.classes and (self.facet is None or len(set(self.classes)) < max(2, len(self.classes))):
            raise UserError("--classes needs a --facet and at least two of its classes, each once.")
        if (self.image is None) != (not self.labels) or len(set(self.labels)) < len(self.labels):
            raise UserError("--image and --labels belong together: a picture, and what it might show, each label once.")
        if self.image is not None and (self.facet or self.data):
            raise UserError("--image asks about one picture of yours: leave out --facet and --data.")


def questions(split: Split, options: ZeroShot) -> dict[str, list[str]]:
    """Facet -> the classes to choose from. UserError where that leaves nothing to ask."""
    found = {}
    for facet in [options.facet] if options.facet else FACETS:
        present = sorted(set(split.labels.get(facet, [])) - {""})
        missing = [name for name in options.classes if name not in present]
        if missing:
            raise UserError(f"no held-out picture has the {facet} {missing[0]!r}: it is one of {', '.join(present)}.")
        if len(present) > 1:
            found[facet] = list(options.classes) or present
    if not found:
        raise UserError("the held-out pictures have no two classes to tell apart: name a labelled set with --data.")
    return found


def table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of text, heading first. results: model -> facet -> classification_report."""
    rows = [["", *results, "chance", "n"]]
    for facet, report in list(results.values())[-1].items():
        for key, words in MEASURES.items():
            of_models = {model: facets[facet][key] for model, facets in results.items()}
            rows.append(line(f"{facet}, {len(report['classes'])} classes, {words}", of_models, n=report["n"]))
    return rows


def measure_set(options: ZeroShot) -> int:
    """All facets of a labelled set."""
    setup = common.load_models("zero_shot", options)
    split = common.load_evidence(setup, options).validation
    asked = questions(split, options)
    pairs = prepare(split, setup.best, "held-out")
    results: dict[str, dict[str, Any]] = {}
    for model, clip in setup.models.items():
        images, results[model] = encode(clip, pairs)[0], {}
        for facet, classes in asked.items():
            rows = torch.tensor([row for row, name in enumerate(split.labels[facet]) if name in classes])
            truth = torch.tensor([classes.index(split.labels[facet][row]) for row in rows.tolist()])
            with torch.no_grad():
                probabilities = class_scores(clip, facet, classes, images[rows]).softmax(dim=1)
            results[model][facet] = classification_report(probabilities, truth, classes)
    print(as_text(table(results)))
    common.save(setup, "zero_shot", results)
    files = ["zero_shot.json", "zero_shot.png"]
    names: list[str] = []
    chance: list[float] = []
    shares: figures.Rows = {model: [] for model in results}
    for facet, report in list(results.values())[-1].items():
        for key, words in MEASURES.items():
            names.append(f"{facet}, {words}\n{len(report['classes'])} classes, n = {report['n']:,}")
            chance.append(report[key]["chance"])
            for model, facets in results.items():
                shares[model].append(facets[facet][key])
        files.append(f"zero_shot_confusion_{facet}.png")
        figures.confusion({model: facets[facet] for model, facets in results.items()}, facet, setup.folder / files[-1])
    figures.share_bars(names, shares, "%, with 95 % interval", setup.folder / "zero_shot.png", chance)
    common.said(setup, *files)
    return 0


def ask(options: ZeroShot) -> int:
    """One picture, and the probability of each label that the user typed."""
    file = Path(options.image or "")
    if not file.is_file():
        raise UserError(f"--image {file}: there is no such file.")
    picture = decode(file, str(file))
    setup = common.load_models("zero_shot", options)
    results = {model: clip.classify(picture, options.labels) for model, clip in setup.models.items()}
    order = sorted(options.labels, key=lambda label: -list(results.values())[-1][label])
    rows = [[label, *(f"{100 * found[label]:.1f} %" for found in results.values())] for label in order]
    print(as_text([["", *results], *rows]))
    common.save(setup, "zero_shot_image", {"image": str(file), "probabilities": results})
    figures.answer(picture, order, results, setup.folder / "zero_shot_image.png")
    common.said(setup, "zero_shot_image.json", "zero_shot_image.png")
    return 0


def run(options: ZeroShot) -> int:
    return measure_set(options) if options.image is None else ask(options)


if __name__ == "__main__":
    sys.exit(common.main("zero_shot", ZeroShot, run))
