"""Classify with dozens of labels of all facets at once: `python -m experiments.stress_test --run runs/x`.

An image has a modality, an anatomy, a finding and a view. In one softmax over all labels these compete: the true
modality takes probability from the true anatomy. Two fair measures avoid this:

    within facets    a softmax for each facet: is the most probable label the true one?
    joint list       all labels in one list, ranked by their probability within the facet: do the top 5 contain the true
                     modality, and the true anatomy?

The labels are all labels of the data, plus distractors (labels that are true of no image) up to 24. Further figures
show the confusions, and calibration: is a confidence of 80 % right 80 times of 100?
"""

import sys
from typing import Any

import torch
from torch import Tensor

from clip_medical.data.batches import Pairs
from clip_medical.data.dataset import FACETS
from clip_medical.data.synthetic.shapes import scene
from clip_medical.errors import UserError
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.retrieval import share
from clip_medical.evaluation.zero_shot import (
    PROMPTS,
    Labels,
    class_cosines,
    class_scores,
    label_sets,
    ranks_in_list,
    refused,
    zero_shot_report,
)
from clip_medical.model import Clip
from experiments.common import Experiment, Reports, main

# A labelled image has another label of the same facet, so none of these can be true of it.
DISTRACTORS: list[tuple[str, str]] = [(facet, name) for facet, name in PROMPTS["distractors"]]
TOP = 5
UNRELATED = 200  # images of coloured shapes, which should be answered by "none of these"
LABELS = 24  # as many as make it a stress test
JOINT = ("modality", "anatomy")


def candidates(labels: Labels) -> Labels:
    """Return facet -> the labels of the data, then distractors until there are 24 labels."""
    exclusive = [facet for facet in FACETS if not label_sets(labels.get(facet, []))]
    names = {facet: sorted(set(labels.get(facet, [])) - {""}) for facet in exclusive}
    lower_case = {name.lower() for of_facet in names.values() for name in of_facet}
    distractors = [(facet, name) for facet, name in DISTRACTORS if facet in names and name.lower() not in lower_case]
    for facet, name in distractors[: max(0, LABELS - sum(map(len, names.values())))]:
        names[facet].append(name)
    return {facet: of_facet for facet, of_facet in names.items() if len(of_facet) > 1}


def joint_report(scores: Tensor, columns: dict[str, Tensor]) -> dict[str, Any]:
    """Measure how often the true labels are in the top 5 of the joint list.

    scores (N, L); columns: "modality" and "anatomy" -> (N,) column of the true label in `scores`.
    Returns {"modality", "anatomy", "modality and anatomy": {"value", "low", "high", "chance"}, "n"}.
    """
    n, count = scores.shape
    hits = {facet: ranks_in_list(scores, column) < TOP for facet, column in columns.items()}
    report: dict[str, Any] = {facet: share(hit) | {"chance": TOP / count} for facet, hit in hits.items()}
    chance = TOP / count * (TOP - 1) / (count - 1)  # the other label takes one of the places
    return report | {" and ".join(JOINT): share(hits["modality"] & hits["anatomy"]) | {"chance": chance}, "n": n}


class StressTest(Experiment):
    """Dozens of labels of all facets at once: top 1, top 5, calibration and confusions, before and after adaptation."""

    name = "stress_test"

    def measure(self, clip: Clip, pairs: Pairs) -> Reports:
        """Return facet -> `classification_report`, and the `joint_report`."""
        images, labels = encode(clip, pairs)[0], pairs.split.labels
        classes = candidates(labels)
        known = [row for row in range(len(pairs)) if all(facet in labels and labels[facet][row] for facet in JOINT)]
        if not known or any(facet not in classes for facet in JOINT):
            raise UserError(f"This test needs labels of {' and '.join(JOINT)}. Name data that have them with --data.")
        reports = zero_shot_report(clip, images, labels, classes)
        scenes = clip.encode_images([scene(0, "unrelated", i).image for i in range(UNRELATED)])
        for facet, report in reports.items():
            if "floor" in clip.calibration.get(facet, {}):
                unrelated = refused(clip, facet, class_cosines(clip, facet, classes[facet], scenes))
                report["none_of_these,_unrelated_images"] = share(unrelated)
        column = {place: i for i, place in enumerate((facet, name) for facet in classes for name in classes[facet])}
        columns = {facet: torch.tensor([column[facet, labels[facet][row]] for row in known]) for facet in JOINT}
        parts = [class_scores(clip, f, names, images[known]).softmax(dim=1) for f, names in classes.items()]
        reports[f"top {TOP} of {len(column)}"] = joint_report(torch.cat(parts, dim=1), columns)
        return reports


if __name__ == "__main__":
    sys.exit(main(StressTest))
