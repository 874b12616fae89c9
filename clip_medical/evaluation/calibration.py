"""Probabilities that can be believed: a temperature for each facet, thresholds, and the answer "none of these".

CLIP's own temperature is trained to tell the captions of a batch apart, not the classes of a facet, so that a softmax
over classes is too sure or too unsure. Temperature scaling (Guo et al. 2017, section 4.2) fits one number for each
facet. All numbers here are chosen on training pairs that were kept back: neither trained nor reported on.

A softmax has to choose one of its labels, even for an image of something else. So each facet has a floor, the cosine
similarity with their best class that 95 % of the kept-back images exceed. Below it the answer is "none of these".
"""

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
SCALES = torch.logspace(0, 2.5, 101).tolist()  # of the cosines in the softmax, 1 / temperature: 1 to 316


@torch.no_grad()
def calibrate(clip: Clip, pairs: Pairs) -> dict[str, dict[str, Any]]:
    """Choose the calibration of a model on kept-back `pairs`, set it as clip.calibration and return it.

    Returns facet -> {"scale", "floor"}; where images have several labels, facet -> {"thresholds": label -> lowest score
    that counts as present, for labels of which both values occur}. The facet CAPTIONS is for labels in the user's own
    words: its temperature is that of a choice among all captions of the pairs. Facets with fewer than two classes are
    left out.
    """
    images, texts = encode(clip, pairs)
    clip.calibration = {}
    for facet, names in pairs.split.labels.items():
        known = torch.tensor([name != "" for name in names], dtype=torch.bool)
        named = [name for name in names if name]
        if facet not in PROMPTS["templates"] or len(set(named)) < 2:
            continue
        if sets := label_sets(named):
            labels, truth = sets
            each = zip(labels, multilabel_scores(clip, facet, labels, images[known]).T, truth.T, strict=True)
            thresholds = {
                label: best_threshold(scores, true)
                for label, scores, true in each
                if (true == 1).any() and (true == 0).any()
            }
            clip.calibration[facet] = {"thresholds": thresholds}
        else:
            classes = sorted(set(named))
            truth = torch.tensor([classes.index(name) for name in named])
            clip.calibration[facet] = _fit(class_cosines(clip, facet, classes, images[known]), truth)
    captions, rows = pairs.caption_ids.unique(return_inverse=True)
    if len(captions) > 1:
        first = torch.stack([(rows == caption).nonzero()[0, 0] for caption in range(len(captions))])
        fitted = _fit((images @ texts[first].T)[..., None], rows)
        # A user's labels are short, and short texts are less similar to their images than captions: hence fragments.
        short = zip(*(x.split(256) for x in fragments(pairs.tokens, pairs.lengths, pairs.kinds, 0, 0)), strict=True)
        own = (images * torch.cat([clip.text_features(*part).cpu() for part in short])).sum(dim=1).double()
        clip.calibration[CAPTIONS] = fitted | {"floor": own.quantile(FALSE_ALARMS).item()}
    return clip.calibration


def _fit(cosines: Tensor, truth: Tensor) -> dict[str, float]:
    """cosines (N, C, G), see class_cosines; truth (N,): the scale of least cross-entropy, and the floor."""
    losses = [F.cross_entropy(scores_at(scale, cosines), truth).item() for scale in SCALES]
    best = cosines.amax(dim=(1, 2)).double()
    return {"scale": SCALES[losses.index(min(losses))], "floor": best.quantile(FALSE_ALARMS).item()}
