"""Zero-shot classification: a class is what several sentences say of it (Radford et al. 2021, section 3.1.4).

The facets of a radiology image (modality, anatomy, finding, view) are separate questions. Each has its own sentences
and its own softmax: that an image is an X-ray takes nothing from its being of a knee.

Sentences that mean the same picture form a group, and their features are averaged. But an X-ray and an MRI of the knee
are different pictures, and the mean of the two sentences would describe neither. So an anatomy has groups for each
modality and its usual views, and the probabilities of its groups are added: a knee is what is an X-ray of a knee, or a
lateral one, or a CT, or an MRI, ...
"""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_medical.evaluation.retrieval import bootstrap_interval
from clip_medical.model import Clip

PROMPTS: dict[str, Any] = json.loads(Path(__file__).with_name("prompts.json").read_text(encoding="utf-8"))


def sentences(facet: str, name: str) -> list[list[str]]:
    """What is said of a class: the groups of sentences of its facet, with each of the words for it, from prompts.json.

    A class without words of its own there goes by its name, read as it stands.
    """
    words = PROMPTS["words"].get(name.lower(), [name])
    filled = [[said.format(word) for said in group for word in words] for group in PROMPTS["sentences"][facet]]
    return [[sentence[0].upper() + sentence[1:] for sentence in group] for group in filled]


def class_features(clip: Clip, facet: str, classes: Sequence[str]) -> Tensor:
    """(C, G, D) unit length, one for each group of sentences. Normalise each sentence, average, normalise again: an
    average alone is shorter than 1."""
    groups = [group for name in classes for group in sentences(facet, name)]
    features = clip.encode_texts([sentence for group in groups for sentence in group])
    means = [each.mean(dim=0) for each in features.split([len(group) for group in groups])]
    return F.normalize(torch.stack(means), dim=-1).unflatten(0, (len(classes), -1))


def class_scores(clip: Clip, facet: str, classes: Sequence[str], images: Tensor) -> Tensor:
    """(N, C): logits of images (N, D), unit length, whose softmax is the probabilities of the classes.

    With s the model's own temperature and a cosine to each of the G groups, log(mean over the groups of exp(s cosine)).
    """
    scale = clip.model.logit_scale.detach().float().exp().cpu()
    cosines = torch.einsum("nd,cgd->ncg", images, class_features(clip, facet, classes))
    return (scale * cosines).logsumexp(dim=2) - math.log(cosines.shape[2])


def ranks_in_list(scores: Tensor, column: Tensor) -> Tensor:
    """(N,) how many other labels score as high as the label `column` (N,) of each row or higher; scores (N, L).

    Raises ValueError on NaN, with which no comparison is true, so that every label would come first, and on infinity.
    """
    if not scores.isfinite().all():
        raise ValueError("the scores contain NaN or infinity: an order of them would mean nothing")
    return (scores >= scores.gather(1, column[:, None])).sum(dim=1) - 1


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
        hits = (ranks_in_list(class_scores(clip, facet, classes, images[known]), truth) == 0).double()
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
