"""Zero-shot classification: each class is the mean of several sentences about it (Radford et al. 2021, section 3.1.4).

The facets of a radiology image (modality, anatomy, finding, view) are separate questions. Each has its own sentences
and its own softmax: that an image is an X-ray takes nothing from its being of a knee.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_medical.evaluation.retrieval import Keys, bootstrap_interval, ranks
from clip_medical.model import Clip

PROMPTS: dict[str, Any] = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


def sentences(facet: str, name: str) -> list[str]:
    """What is said of a class: each sentence of its facet with each of the words for it, as prompts.json has them.

    A class without words of its own there goes by its name, and one called "a/b" by both a and b.
    """
    words = PROMPTS["words"].get(name.lower(), name.split("/"))
    filled = [sentence.format(word) for sentence in PROMPTS["sentences"][facet] for word in words]
    return [sentence[0].upper() + sentence[1:] for sentence in filled]


def class_features(clip: Clip, facet: str, classes: Sequence[str]) -> Tensor:
    """(C, D) unit length. Normalise each sentence, average, normalise again: an average alone is shorter than 1."""
    said = [sentences(facet, name) for name in classes]
    features = clip.encode_texts([sentence for each in said for sentence in each])
    means = [each.mean(dim=0) for each in features.split([len(each) for each in said])]
    return F.normalize(torch.stack(means), dim=-1)


def zero_shot_report(clip: Clip, images: Tensor, labels: dict[str, list[str]]) -> dict[str, Any]:
    """Accuracy per facet over the rows that have a label of it.

    images (N, D) unit length; labels: facet -> N class names, "" where unknown. The classes are those that occur.
    Returns facet -> {"accuracy", "low", "high" (95 % bootstrap), "balanced_accuracy" (mean over classes), "n",
    "classes", "chance" (1 / number of classes)}; a facet of fewer than two classes is left out. A class that ties with
    the right one was named instead of it. Raises ValueError on features that are not finite.
    """
    report: dict[str, Any] = {}
    for facet, names in labels.items():
        classes = sorted(set(names) - {""})
        if facet not in PROMPTS["sentences"] or len(classes) < 2:
            continue
        known = torch.tensor([name != "" for name in names])
        truth = torch.tensor([classes.index(name) for name in names if name])
        own = (Keys.of(truth), Keys.of(torch.arange(len(classes))))
        hits = (ranks(images[known], class_features(clip, facet, classes), *own).rank == 0).double()
        low, high = bootstrap_interval(hits)
        per_class = [hits[truth == c].mean().item() for c in range(len(classes))]
        report[facet] = {
            "accuracy": hits.mean().item(),
            "low": low,
            "high": high,
            "balanced_accuracy": sum(per_class) / len(classes),
            "n": len(truth),
            "classes": classes,
            "chance": 1 / len(classes),
        }
    return report
