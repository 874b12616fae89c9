"""Probabilities that can be believed: scale and offsets for each facet, thresholds, and the answer "none of these".

CLIP's own temperature is trained to tell the captions of a batch apart, not the classes of a facet, so that a softmax
over classes is too sure or too unsure. And the score that InfoNCE learns is how much more frequent a text is with this
image than with others (van den Oord et al. 2018, section 2.3): the frequency of its class is divided out, which makes
frequent classes such as "no abnormality" too improbable. So each facet has a scale and each of its classes an offset
(temperature and vector scaling, Guo et al. 2017, section 4.2). All numbers here are chosen on training pairs that were
kept back: neither trained nor reported on.

A softmax has to choose one of its labels, even for an image of something else. So each facet has a floor, the cosine
similarity with their best class that 95 % of the kept-back images exceed. Below it the answer is "none of these".
"""

from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from clip_medical.data.batches import Pairs
from clip_medical.data.fragments import fragments
from clip_medical.evaluation.classification import best_threshold
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.zero_shot import PROMPTS, class_cosines, label_sets, multilabel_scores, scores_at
from clip_medical.model import CAPTIONS, Clip

FALSE_ALARMS = 0.05  # share of the kept-back images below the floor
STEPS = 300  # of Adam, until the fit no longer moves


def calibrate(clip: Clip, pairs: Pairs) -> dict[str, dict[str, Any]]:
    """Choose the calibration of a model on kept-back `pairs`, set it as clip.calibration and return it.

    Returns facet -> {"scale", "floor", "offsets": class -> offset}; where images have several labels, facet ->
    {"thresholds": label -> lowest score that counts as present, for labels of which both values occur}. The facet
    CAPTIONS is for labels in the user's own words: it has no offsets, and its scale is that of a choice among all
    captions of the pairs. Facets with fewer than two classes are left out.
    """
    images, texts = encode(clip, pairs)
    choices: dict[str, tuple[list[str], Tensor, Tensor]] = {}  # facet -> C names, cosines (N, C, G), true one (N,)
    clip.calibration = {}
    for facet, names in pairs.split.labels.items():
        known = torch.tensor([name != "" for name in names], dtype=torch.bool)
        named = [name for name in names if name]
        if facet not in PROMPTS["templates"] or len(set(named)) < 2:
            continue
        if sets := label_sets(named):
            labels, truth = sets
            each = zip(labels, multilabel_scores(clip, facet, labels, images[known]).T, truth.T, strict=True)
            both = [(label, x, true) for label, x, true in each if (true == 1).any() and (true == 0).any()]
            clip.calibration[facet] = {"thresholds": {label: best_threshold(x, true) for label, x, true in both}}
        else:
            classes = sorted(set(named))
            truth = torch.tensor([classes.index(name) for name in named])
            choices[facet] = (classes, class_cosines(clip, facet, classes, images[known]), truth)
    captions, rows = pairs.caption_ids.unique(return_inverse=True)
    if len(captions) > 1:
        first = torch.stack([(rows == caption).nonzero()[0, 0] for caption in range(len(captions))])
        choices[CAPTIONS] = ([], (images @ texts[first].T)[..., None], rows)
    for facet, (classes, cosines, truth) in choices.items():
        floor = cosines.amax(dim=(1, 2)).double().quantile(FALSE_ALARMS).item()
        log_scale, offsets = torch.tensor(clip.scale(facet)).log(), torch.zeros(cosines.shape[1])
        fitted = [log_scale, offsets] if classes else [log_scale]  # a caption has hardly more than one row
        optimizer = torch.optim.Adam([each.requires_grad_() for each in fitted], lr=0.03)
        for _ in range(STEPS):
            logits = scores_at(log_scale.exp().clamp(1, 300), cosines) + offsets
            loss = F.cross_entropy(logits, truth) + offsets.square().sum() / (2 * len(truth))  # prior of width 1
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        by_class = dict(zip(classes, offsets.tolist(), strict=False))
        clip.calibration[facet] = {"scale": log_scale.exp().clamp(1, 300).item(), "floor": floor, "offsets": by_class}
    if CAPTIONS in choices:
        # A user's labels are short, and short texts are less similar to their images than captions: hence fragments.
        tokens, lengths = fragments(pairs.tokens, pairs.lengths, pairs.kinds, 0, 0)
        short = encode(clip, replace(pairs, tokens=tokens, lengths=lengths))[1]
        floor = (images * short).sum(dim=1).double().quantile(FALSE_ALARMS).item()
        clip.calibration[CAPTIONS]["floor"] = floor
    return clip.calibration
