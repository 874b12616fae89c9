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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_medical.evaluation.classification import multilabel_report
from clip_medical.evaluation.retrieval import bootstrap_interval
from clip_medical.model import Clip

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


def class_scores(clip: Clip, facet: str, classes: Sequence[str], images: Tensor) -> Tensor:
    """Compute logits (N, C) of images (N, D), unit length; their softmax gives the probabilities of the classes."""
    return scores_at(clip.scale(facet), class_cosines(clip, facet, classes, images))


def refused(clip: Clip, facet: str, cosines: Tensor) -> Tensor:
    """Whether the answer is "none of these": cosines (N, C, G) -> (N,) 1 or 0; the facet must be calibrated."""
    floor: float = clip.calibration[facet]["floor"]
    return (cosines.amax(dim=(1, 2)) < floor).double()


def class_cosines(clip: Clip, facet: str, classes: Sequence[str], images: Tensor) -> Tensor:
    """Compute the cosine similarity of images (N, D) with each group of prompts of each class -> (N, C, G)."""
    return torch.einsum("nd,cgd->ncg", images, class_features(clip, facet, classes))


def scores_at(scale: float, cosines: Tensor) -> Tensor:
    """Combine the groups: cosines (N, C, G) -> logits (N, C), log(mean over groups of exp(scale * cosine))."""
    return torch.logsumexp(scale * cosines, dim=2) - math.log(cosines.shape[2])


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


def zero_shot_report(clip: Clip, images: Tensor, labels: dict[str, list[str]]) -> dict[str, Any]:
    """Compute the accuracy of each facet over the rows that have a label of it.

    images (N, D) unit length; labels: facet -> N class names, "" where unknown. The classes are those that occur.
    Returns facet -> {"accuracy", "low", "high" (95 %, bootstrap), "chance" (1 / number of classes),
    "balanced_accuracy" (mean over classes), "n", "classes"}, without facets of fewer than two classes. A class that
    ties with the true one counts as predicted instead of it. A facet in which images have several labels has a
    `multilabel_report` instead. Raises ValueError on features that are not finite.
    """
    report: dict[str, Any] = {}
    for facet, names in labels.items():
        if facet in PROMPTS["templates"] and label_sets(names):
            report |= {facet: result} if (result := multilabel(clip, facet, names, images))["classes"] else {}
            continue
        classes = sorted(set(names) - {""})
        if facet not in PROMPTS["templates"] or len(classes) < 2:
            continue
        known = torch.tensor([name != "" for name in names])
        truth = torch.tensor([classes.index(name) for name in names if name])
        hits = (ranks_in_list(class_scores(clip, facet, classes, images[known]), truth) == 0).double()
        low, high = bootstrap_interval(hits)
        per_class = [hits[truth == c].mean().item() for c in range(len(classes))]
        report[facet] = {"accuracy": hits.mean().item(), "low": low, "high": high, "chance": 1 / len(classes)}
        report[facet] |= {"balanced_accuracy": sum(per_class) / len(classes), "n": len(truth), "classes": classes}
    return report
