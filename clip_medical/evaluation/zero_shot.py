"""Zero-shot classification with prompt ensembles (Radford et al. 2021, section 3.1.4).

The facets of a radiology image (modality, anatomy, finding, view) are separate classification tasks. Each has its own
prompts and its own softmax, so that the modality and the anatomy of an image do not compete.

Prompts that describe the same kind of image form a group, whose features are averaged. An X-ray and an MRI of the knee
look different, and the mean of their prompts would describe neither. So an anatomy has a group for each modality and
its usual views, and the probabilities of its groups are added: "knee" is an X-ray of the knee, or a lateral one, or a
CT, or an MRI, ...
"""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_medical.evaluation.classification import calibration, classification_report, multilabel_report
from clip_medical.evaluation.retrieval import share
from clip_medical.model import Clip

Labels = dict[str, list[str]]  # facet -> the label of each row, "" where unknown; or facet -> its classes
PROMPTS: dict[str, Any] = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


def prompts(facet: str, name: str) -> list[list[str]]:
    """Return the groups of prompts of a class: the templates of its facet, filled with each of its synonyms.

    Templates and synonyms are in prompts.json. A class without synonyms there is filled in by its name.
    """
    synonyms = PROMPTS["synonyms"].get(name.lower(), [name])
    groups = [[t.format(synonym) for t in group for synonym in synonyms] for group in PROMPTS["templates"][facet]]
    return [[prompt[0].upper() + prompt[1:] for prompt in group] for group in groups]


def class_features(clip: Clip, facet: str, classes: Sequence[str]) -> Tensor:
    """Encode C classes: (C, G, D) unit length, one feature for each group of prompts.

    Prompt features are normalised, averaged and normalised again: the mean of unit vectors is shorter than 1.
    """
    groups = [group for name in classes for group in prompts(facet, name)]
    features = clip.encode_texts([prompt for group in groups for prompt in group])
    means = [part.mean(dim=0) for part in features.split([len(group) for group in groups])]
    return F.normalize(torch.stack(means), dim=-1).view(len(classes), -1, features.shape[1])


def refused(clip: Clip, facet: str, cosines: Tensor) -> Tensor:
    """Whether the answer is "none of these": cosines (N, C, G) -> (N,) 1 or 0; the facet must be calibrated."""
    floor: float = clip.calibration[facet]["floor"]
    return (cosines.amax(dim=(1, 2)) < floor).double()


def class_cosines(clip: Clip, facet: str, classes: Sequence[str], images: Tensor) -> Tensor:
    """Compute the cosine similarity of images (N, D) with each group of prompts of each class -> (N, C, G)."""
    return torch.einsum("nd,cgd->ncg", images, class_features(clip, facet, classes))


def scores_at(scale: float | Tensor, cosines: Tensor) -> Tensor:
    """Combine the groups: cosines (N, C, G) -> logits (N, C), log(mean over groups of exp(scale * cosine))."""
    return torch.logsumexp(scale * cosines, dim=2) - math.log(cosines.shape[2])


def class_scores(clip: Clip, facet: str, classes: Sequence[str], images: Tensor) -> Tensor:
    """Compute logits (N, C) of images (N, D), unit length; their softmax gives the probabilities of the classes.

    A calibrated model adds the offset of each class, 0 for a class without one: see calibration.py.
    """
    offsets = clip.calibration.get(facet, {}).get("offsets", {})
    cosines = class_cosines(clip, facet, classes, images)
    return scores_at(clip.scale(facet), cosines) + torch.tensor([offsets.get(name, 0.0) for name in classes])


def label_sets(names: Sequence[str]) -> tuple[list[str], Tensor] | None:
    """Read N cells "A|B" ("A?": A is uncertain) -> L labels and truth (N, L): 1, 0 or NaN for uncertain.

    Returns None if no image has several labels: then they are classes that exclude each other.
    """
    sets = [name.split("|") if name else [] for name in names]
    if all(len(labels) < 2 for labels in sets) and not any(name.endswith("?") for name in names):
        return None
    classes = sorted({label.removesuffix("?") for labels in sets for label in labels})
    truth = [[float("nan") if f"{c}?" in labels else float(c in labels) for c in classes] for labels in sets]
    return classes, torch.tensor(truth)


def multilabel_scores(clip: Clip, facet: str, classes: Sequence[str], images: Tensor) -> Tensor:
    """Score each label by itself, without a softmax: images (N, D) -> (N, L), the mean cosine with its prompts."""
    return class_cosines(clip, facet, classes, images).mean(dim=2)


def ranks_in_list(scores: Tensor, column: Tensor) -> Tensor:
    """Count the other labels that score at least as high as the label `column` (N,) of each row; scores (N, L) -> (N,).

    Raises ValueError on NaN, with which every comparison is false, so that every label would rank first, and on
    infinity.
    """
    if not scores.isfinite().all():
        raise ValueError("The scores contain NaN or infinity, so they cannot be ranked.")
    return (scores >= scores.gather(1, column[:, None])).sum(dim=1) - 1


def multilabel(clip: Clip, facet: str, names: Sequence[str], images: Tensor) -> dict[str, Any]:
    """The `multilabel_report` of images (N, D) over the rows with a label; names: N cells "A|B" of `label_sets`."""
    rows = [row for row, name in enumerate(names) if name]
    classes, truth = label_sets([names[row] for row in rows]) or ([], torch.empty(0, 0))
    scores = multilabel_scores(clip, facet, classes, images[rows])
    return multilabel_report(scores, truth, classes, clip.calibration.get(facet, {}).get("thresholds"))


def zero_shot_report(
    clip: Clip, images: Tensor, labels: Labels, classes: Mapping[str, Sequence[str]] | None = None
) -> dict[str, Any]:
    """Classify images (N, D), unit length, by each facet, over the rows whose label is one of its classes.

    labels: facet -> N class names, "" where unknown; classes: facet -> C of them. Default: all that occur, where there
    are two or more. Returns facet -> `classification_report`, without facets that have no such row; "uncalibrated" is
    its calibration at CLIP's own temperature, without offsets. A facet of which an image can have several labels has a
    `multilabel_report`. Raises ValueError on features that are not finite.
    """
    if classes is None:
        present = {f: sorted(set(names) - {""}) for f, names in labels.items() if f in PROMPTS["templates"]}
        classes = {facet: names for facet, names in present.items() if len(names) > 1}
    reports: dict[str, Any] = {}
    for facet, names in classes.items():
        chosen = [label if label in names else "" for label in labels.get(facet, [])]
        if label_sets(chosen):  # an image can have several
            if (report := multilabel(clip, facet, chosen, images))["classes"]:  # else all images have the same labels
                reports[facet] = report
            continue
        known = torch.tensor([label != "" for label in chosen], dtype=torch.bool)
        if not known.any():
            continue
        truth = torch.tensor([names.index(label) for label in chosen if label])
        cosines = class_cosines(clip, facet, names, images[known])
        own = scores_at(clip.model.logit_scale.detach().exp().item(), cosines).softmax(dim=1)
        p = class_scores(clip, facet, names, images[known]).softmax(dim=1)
        report = reports[facet] = classification_report(p, truth, names)
        hits = own.argmax(dim=1) == truth
        report["uncalibrated"] = calibration(own.amax(dim=1), hits)
        report["accuracy,_uncalibrated"] = share(hits) | {"chance": 1 / len(names)}
        for key, name in (("calibration", "calibration_error"), ("uncalibrated", "calibration_error,_uncalibrated")):
            report[f"{name}_(points)"] = {"value": round(100 * report[key]["ece"], 1)}
        if "floor" in clip.calibration.get(facet, {}):
            report["none_of_these,_own_images"] = share(refused(clip, facet, cosines))
    return reports
