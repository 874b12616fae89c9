"""Zero-shot classification before and after adaptation: `python -m experiments.zero_shot --run runs/x`.

On labelled data: accuracy, balanced accuracy, AUROC, calibration and a confusion matrix for each facet (modality,
anatomy, finding, view). --facet and --classes restrict this to one task, such as pneumonia against normal, on the
images with one of these labels.

On one image with labels of your own: `--image my.png --labels "X-ray of the chest" "CT of the head"`.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from clip_medical.data.batches import Pairs
from clip_medical.data.dataset import FACETS
from clip_medical.data.images import decode
from clip_medical.errors import UserError
from clip_medical.evaluation import plots
from clip_medical.evaluation.classification import classification_report
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.table import Row, as_text
from clip_medical.evaluation.zero_shot import class_scores, label_sets, multilabel
from clip_medical.model import Clip
from experiments.common import Experiment, Reports, main

Labels = dict[str, list[str]]  # facet -> the label of each row, "" where unknown; or facet -> its classes


def facet_reports(clip: Clip, images: Tensor, labels: Labels, classes: Labels) -> Reports:
    """Classify images (N, D) by each facet, over the rows whose label is one of its classes.

    Returns facet -> `classification_report`, without facets that have no such row. A facet of which an image can have
    several labels has a `multilabel_report`, and another entry for each label.
    """
    reports = {}
    for facet, names in classes.items():
        chosen = [label if label in names else "" for label in labels.get(facet, [])]
        if label_sets(chosen):  # an image can have several
            if not (report := multilabel(clip, facet, chosen, images))["classes"]:
                continue  # all images have the same labels
            reports[facet] = report
            for name, label in reports[facet].pop("labels").items():
                reports[f"{facet} {name}"] = label | {"n": f"{label['positives']} of {reports[facet]['n']}"}
            continue
        rows = [row for row, label in enumerate(labels.get(facet, [])) if label in names]
        if rows:
            truth = torch.tensor([names.index(labels[facet][row]) for row in rows])
            probabilities = class_scores(clip, facet, names, images[rows]).softmax(dim=1)
            reports[facet] = classification_report(probabilities, truth, names)
    return reports


@dataclass(frozen=True)
class ZeroShot(Experiment):
    """Zero-shot classification of the validation images, or of one image of yours, before and after adaptation."""

    # Facet to classify. Default: every facet that has labels.
    facet: Literal["modality", "anatomy", "finding", "view"] | None = None
    # Classes of --facet to choose from. Only images with one of these labels count. Default: all classes.
    classes: tuple[str, ...] = ()
    # Image file to classify, instead of labelled data.
    image: str | None = None
    # Candidate labels for --image. Phrases such as "X-ray of the chest" work better than single words.
    labels: tuple[str, ...] = ()

    name = "zero_shot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes and (self.facet is None or len(set(self.classes)) < max(2, len(self.classes))):
            raise UserError("--classes needs a --facet and at least two different classes of it.")
        if (self.image is None) != (not self.labels):
            raise UserError("--image and --labels belong together. Give one image file and its candidate labels.")

    def measure(self, clip: Clip, pairs: Pairs) -> Reports:
        """Return facet -> `classification_report`. Raises UserError if a class is absent, or no facet has two."""
        labels, facets = pairs.split.labels, [self.facet] if self.facet else FACETS
        present = {facet: sorted(set(labels.get(facet, [])) - {""}) for facet in facets}
        absent = [name for name in self.classes if name not in present[self.facet or ""]]
        if absent:
            raise UserError(f"No image is labelled {absent[0]!r}. Give some of {', '.join(*present.values())}.")
        classes = {facet: list(self.classes) or names for facet, names in present.items() if len(names) > 1}
        if not classes:
            raise UserError("The validation images have fewer than two classes. Name a labelled data set with --data.")
        return facet_reports(clip, encode(clip, pairs)[0], labels, classes)

    def perform(self) -> int:
        """Classify the validation images or, with --image, one image with the labels given on the command line."""
        if self.image is None:
            return super().perform()
        image = decode(Path(self.image), self.image)
        setup = self.load_models()
        results = {model: clip.classify(image, self.labels) for model, clip in setup.models.items()}
        adapted = list(results.values())[-1]
        labels = sorted(self.labels, key=lambda label: -adapted[label])
        print(as_text([["", *results], *([x, *(f"{100 * p[x]:.1f} %" for p in results.values())] for x in labels)]))
        bars = {x: {m: dict.fromkeys(("value", "low", "high"), p[x]) for m, p in results.items()} for x in labels}
        rows = [Row(label, probabilities, "") for label, probabilities in bars.items()]
        plots.share_bars(rows, "probability among these labels (%)", setup.folder / "zero_shot_image.png")
        self.save(setup, "zero_shot_image", {"image": self.image, "probabilities": results}, "zero_shot_image.png")
        return 0


if __name__ == "__main__":
    sys.exit(main(ZeroShot))
