"""Zero-shot classification before and after adaptation: `python -m experiments.zero_shot --run runs/x`.

On labelled data: accuracy, balanced accuracy, AUROC and a confusion matrix for each facet (modality, anatomy, finding,
view). --facet and --classes restrict this to one task, such as pneumonia against normal, on the images with one of
these labels.

On one image with labels of your own: `--image my.png --labels "X-ray of the chest" "CT of the head"`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from clip_medical.data.batches import Pairs
from clip_medical.data.dataset import FACETS
from clip_medical.data.images import decode
from clip_medical.errors import UserError
from clip_medical.evaluation import plots
from clip_medical.evaluation.classification import classification_report
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.table import Row, as_text, metric_rows
from clip_medical.evaluation.zero_shot import class_scores
from clip_medical.model import Clip
from experiments import figures
from experiments.common import Experiment, Results, main, pick

Labels = dict[str, list[str]]  # facet -> the label of each row, "" where unknown; or facet -> its classes


@torch.no_grad()
def facet_reports(clip: Clip, images: Tensor, labels: Labels, classes: Labels) -> dict[str, Any]:
    """Classify images (N, D) by each facet, over the rows whose label is one of its classes.

    Returns facet -> `classification_report`, without facets that have no such row or fewer than two classes.
    """
    reports = {}
    for facet, names in classes.items():
        rows = [row for row, label in enumerate(labels.get(facet, [])) if label in names]
        if rows and len(names) > 1:
            truth = torch.tensor([names.index(labels[facet][row]) for row in rows])
            probabilities = class_scores(clip, facet, names, images[rows]).softmax(dim=1)
            reports[facet] = classification_report(probabilities, truth, names)
    return reports


@dataclass(frozen=True)
class ZeroShot(Experiment):
    """Zero-shot classification of the validation images, or of one image of yours, before and after adaptation."""

    facet: Literal["modality", "anatomy", "finding", "view"] | None = None
    """Facet to classify. Default: every facet that has labels."""
    classes: tuple[str, ...] = ()
    """Classes of --facet to choose from. Only images with one of these labels count. Default: all classes."""
    image: str | None = None
    """Image file to classify, instead of labelled data."""
    labels: tuple[str, ...] = ()
    """Candidate labels for --image. Phrases such as "X-ray of the chest" work better than single words."""

    name = "zero_shot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes and (self.facet is None or len(set(self.classes)) < max(2, len(self.classes))):
            raise UserError("--classes needs a --facet and at least two different classes of it.")
        if (self.image is None) != (not self.labels):
            raise UserError("--image and --labels belong together. Give one image file and its candidate labels.")
        if self.image is not None and (self.facet or self.data):
            raise UserError("--image classifies one image. Leave out --facet and --data.")

    def classes_in(self, labels: Labels) -> Labels:
        """Return facet -> candidate classes. Raises UserError if one of --classes is absent, or no facet has two."""
        classes = {}
        for facet in [self.facet] if self.facet else FACETS:
            present = sorted(set(labels.get(facet, [])) - {""})
            absent = [name for name in self.classes if name not in present]
            if absent:
                raise UserError(f"No validation image is labelled {absent[0]!r}. Give some of {', '.join(present)}.")
            if len(present) > 1:
                classes[facet] = list(self.classes) or present
        if not classes:
            raise UserError("The validation images have fewer than two classes. Name a labelled data set with --data.")
        return classes

    def measure(self, clip: Clip, pairs: Pairs) -> dict[str, Any]:
        """Return facet -> `classification_report`."""
        labels = pairs.split.labels
        return facet_reports(clip, encode(clip, pairs)[0], labels, self.classes_in(labels))

    def rows(self, results: Results) -> list[Row]:
        rows = []
        for facet, report in results["unadapted"].items():
            name = f"{facet}, {len(report['classes'])} classes"
            rows += metric_rows(name, pick(results, facet), report["n"])
        return rows

    def draw(self, results: Results, folder: Path) -> list[str]:
        files = super().draw(results, folder)
        for facet in results["unadapted"]:
            files.append(f"zero_shot_confusion_{facet}.png")
            figures.confusion(pick(results, facet), facet, folder / files[-1])
        return files

    def perform(self) -> int:
        return super().perform() if self.image is None else self.classify_image(self.image)

    def classify_image(self, file: str) -> int:
        """Classify one image with the labels given on the command line."""
        image = decode(Path(file), file)
        setup = self.load_models()
        results = {model: clip.classify(image, self.labels) for model, clip in setup.models.items()}
        best = list(results.values())[-1]
        rows = []
        for label in sorted(self.labels, key=lambda label: -best[label]):
            probability = {model: dict.fromkeys(("value", "low", "high"), p[label]) for model, p in results.items()}
            rows.append(Row(label, probability, 1))
        cells = [[label, *(f"{100 * p[label]:.1f} %" for p in results.values())] for label, _, _ in rows]
        print(as_text([["", *results], *cells]))
        plots.share_bars(rows, "probability among these labels (%)", setup.folder / "zero_shot_image.png")
        self.save(setup, "zero_shot_image", {"image": file, "probabilities": results}, "zero_shot_image.png")
        return 0


if __name__ == "__main__":
    sys.exit(main(ZeroShot))
