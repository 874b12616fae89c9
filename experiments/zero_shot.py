"""Zero-shot classification before and after adaptation: `python -m experiments.zero_shot --run runs/x`.

On labelled data: accuracy, balanced accuracy, AUROC, calibration and a confusion matrix for each facet (modality,
anatomy, finding, view). `--question pneumonia` and `--question head-or-spine` are prepared questions of two classes;
--facet and --classes ask others: `--facet finding --classes fracture "no abnormality"`. With two classes there are
sensitivity and specificity too, of the class that is named first.

On one image with labels of your own: `--image my.png --labels "X-ray of the chest" "CT of the head"`.
"""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from clip_medical.data.batches import Pairs, prepare
from clip_medical.data.dataset import FACETS, Data
from clip_medical.data.images import decode
from clip_medical.errors import UserError
from clip_medical.evaluation import plots
from clip_medical.evaluation.classification import best_threshold, two_class_report
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.evidence import occlusion
from clip_medical.evaluation.table import Row, as_text
from clip_medical.evaluation.zero_shot import PROMPTS, Labels, class_scores, zero_shot_report
from clip_medical.model import CAPTIONS, Clip
from experiments import figures
from experiments.common import Experiment, Reports, Results, Setup, main, pick

FEWEST = 10  # kept-back images of each class that a threshold is chosen on
# question -> facet, and the names of its two classes in data sets; the first is the one that is looked for
QUESTIONS: dict[str, tuple[str, list[str], list[str]]] = PROMPTS["questions"]


def probabilities(clip: Clip, facet: str, names: list[str], images: Tensor, labels: Labels) -> tuple[Tensor, Tensor]:
    """Classify the images (N, D) whose label is one of C names -> probabilities (n, C), index of the true one (n,)."""
    rows = [row for row, label in enumerate(labels.get(facet, [])) if label in names]
    truth = torch.tensor([names.index(labels[facet][row]) for row in rows], dtype=torch.long)
    return class_scores(clip, facet, names, images[rows]).softmax(dim=1), truth


def comparable(labels: Labels, facet: str, names: list[str]) -> Labels:
    """Keep the labels of the examinations (modality and anatomy) in which all the classes `names` occur.

    Otherwise a model would look good that only tells the examinations apart: normal ultrasound images, say, from
    pneumonia, which is looked for on X-rays.
    """
    kinds = [labels[f] for f in ("modality", "anatomy") if f != facet and f in labels]
    examination = list(zip(*kinds, strict=True)) or [()] * len(labels[facet])
    classes: dict[tuple[str, ...], set[str]] = {}
    for kind, name in zip(examination, labels[facet], strict=True):
        classes.setdefault(kind, set()).add(name)
    usable = [classes[kind] >= set(names) for kind in examination]
    return {f: [x if keep else "" for x, keep in zip(column, usable, strict=True)] for f, column in labels.items()}


@dataclass(frozen=True)
class ZeroShot(Experiment):
    """Zero-shot classification of the validation images, or of one image of yours, before and after adaptation."""

    # Facet to classify. Default: every facet that has labels.
    facet: Literal["modality", "anatomy", "finding", "view"] | None = None
    # Classes of --facet to choose from. Only images with one of these labels count. Default: all classes.
    classes: tuple[str, ...] = ()
    # A prepared question of two classes: consolidation or pneumonia against normal in the chest; head against spine.
    question: Literal["pneumonia", "head-or-spine"] | None = None
    # Image file to classify, instead of labelled data.
    image: str | None = None
    # Candidate labels for --image. Phrases such as "X-ray of the chest" work better than single words.
    labels: tuple[str, ...] = ()
    # With --image: draw where the evidence for the most probable label is, by hiding one part after another.
    evidence: bool = False

    name = "zero_shot"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.classes and (self.facet is None or len(set(self.classes)) < max(2, len(self.classes))):
            raise UserError("--classes needs a --facet and at least two different classes of it.")
        if (self.image is None) != (not self.labels):
            raise UserError("--image and --labels belong together. Give one image file and its candidate labels.")
        if self.evidence and len(self.labels) < 2:
            raise UserError("--evidence needs --image and at least two --labels: it is for one label over the others.")
        if self.question and (self.facet or self.classes):
            raise UserError("--question already names a facet and its classes. Leave out --facet and --classes.")

    def prepare(self, data: Data, setup: Setup) -> Pairs:
        """Add the kept-back training pairs of the same data, on which thresholds are chosen."""
        pairs, processor = super().prepare(data, setup), setup.models["unadapted"].processor
        kept_back = prepare(data.calibration, processor, "calibration") if len(data.calibration) else None
        return replace(pairs, kept_back=kept_back)

    def title(self) -> str:
        """Name of the results: that of the question, so that one does not overwrite the other."""
        return self.question or self.name

    def measure(self, clip: Clip, pairs: Pairs) -> Reports:
        """Return facet -> `classification_report`, with two classes a `two_class_report` too.

        Raises UserError if a class is absent, or no facet has two.
        """
        present = {facet: sorted(set(pairs.split.labels.get(facet, [])) - {""}) for facet in FACETS}
        facet: str | None = self.facet
        chosen, labels = list(self.classes), pairs.split.labels
        if self.question:
            facet, *sides = QUESTIONS[self.question]
            spelling = {name.lower(): name for name in present[facet]}
            chosen = [next((spelling[name] for name in side if name in spelling), side[0]) for side in sides]
        absent = [name for name in chosen if name not in present[facet or ""]]
        if absent:
            every = ", ".join(name for names in present.values() for name in names)
            raise UserError(f"No image is labelled {absent[0]!r}. Give some of {every}.")
        classes = {f: chosen or names for f, names in present.items() if facet in (None, f) and len(names) > 1}
        if not classes:
            raise UserError("The validation images have fewer than two classes. Name a labelled data set with --data.")
        if self.question:
            labels = comparable(labels, str(facet), chosen)
        images = encode(clip, pairs)[0]
        reports = zero_shot_report(clip, images, labels, classes)
        if not reports:
            raise UserError(f"No image has one of the labels {classes}. Ask for others.")
        for task, names in classes.items():
            for name, label in reports.get(task, {}).pop("labels", {}).items():  # of which an image can have several
                reports[f"{task} {name}"] = label | {"n": f"{label['positives']} of {reports[task]['n']}"}
            if len(names) == 2 and "auroc" in reports.get(task, {}) and "confusion" in reports[task]:
                p, truth = probabilities(clip, task, names, images, labels)
                threshold, chosen_on = self._threshold(clip, pairs.kept_back, task, names)
                reports[task] |= two_class_report(p[:, 0], truth == 0, threshold) | {"threshold chosen on": chosen_on}
        return reports

    def _threshold(self, clip: Clip, kept_back: Pairs | None, facet: str, names: list[str]) -> tuple[float, str]:
        """Choose the probability from which the first class counts as present, and say on what it was chosen."""
        if kept_back:
            labels = kept_back.split.labels
            labels = comparable(labels, facet, names) if self.question and labels[facet] else labels
            q, true = probabilities(clip, facet, names, encode(clip, kept_back)[0], labels)
            if min((true == 0).sum(), (true == 1).sum()) >= FEWEST:
                return best_threshold(q[:, 0], (true == 0).float()), f"{len(true)} kept-back training pairs"
        return 0.5, f"nothing: 50 %, as fewer than {FEWEST} kept-back training pairs show each class"

    def remarks(self, results: Results) -> list[str]:
        """Say on what the thresholds were chosen."""
        last = list(results.values())[-1]
        return [f"{task}: threshold chosen on {r['threshold chosen on']}" for task, r in last.items() if "roc" in r]

    def draw(self, results: Results, folder: Path) -> list[str]:
        """Draw what every experiment draws, and a figure of each task with two classes."""
        files = super().draw(results, folder)
        for task, report in results["unadapted"].items():
            if "roc" in report:
                files.append(f"{self.title()}_two_classes.png")
                figures.two_classes(pick(results, task), folder / files[-1])
        return files

    def perform(self) -> int:
        """Classify the validation images or, with --image, one image with the labels given on the command line."""
        if self.image is None:
            return super().perform()
        image = decode(Path(self.image), self.image)
        setup = self.load_models()
        or_none = all(CAPTIONS in clip.calibration for clip in setup.models.values())
        results = {model: clip.classify(image, self.labels, or_none) for model, clip in setup.models.items()}
        adapted = list(results.values())[-1]
        labels = sorted(adapted, key=lambda label: -adapted[label])
        print(as_text([["", *results], *([x, *(f"{100 * p[x]:.1f} %" for p in results.values())] for x in labels)]))
        bars = {x: {m: dict.fromkeys(("value", "low", "high"), p[x]) for m, p in results.items()} for x in labels}
        rows, files = [Row(label, each, "") for label, each in bars.items()], ["zero_shot_image.png"]
        plots.share_bars(rows, "probability among these labels (%)", setup.folder / files[0])
        if self.evidence:
            first = [label for label in labels if label in self.labels]
            maps = {model: occlusion(clip, image, clip.encode_texts(first)) for model, clip in setup.models.items()}
            files.append("zero_shot_evidence.png")
            figures.evidence(image, first[0], maps, setup.folder / files[-1])
        self.save(setup, "zero_shot_image", {"image": self.image, "probabilities": results}, *files)
        return 0


if __name__ == "__main__":
    sys.exit(main(ZeroShot))
