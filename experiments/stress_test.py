"""Classify with dozens of labels of all facets at once: `python -m experiments.stress_test --run runs/x`.

An image has a modality, an anatomy, a finding and a view. In one softmax over all labels these compete: the true
modality takes probability from the true anatomy. Two fair measures avoid this:

    within facets    a softmax for each facet: is the most probable label the true one?
    joint list       all labels in one list, ranked by their score before the softmax, or by their probability within
                     the facet: do the top 5 contain the true modality, and the true anatomy?

The labels are all labels of the data, plus distractors (labels that are true of no image) up to 24. The figures also
show calibration (is a confidence of 80 % right 80 times of 100?) and the most frequent confusions.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_medical.data.batches import Pairs
from clip_medical.data.dataset import FACETS
from clip_medical.errors import UserError
from clip_medical.evaluation import plots
from clip_medical.evaluation.classification import confusion_of, hardest_confusions
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.table import Row
from clip_medical.evaluation.zero_shot import class_scores, ranks_in_list
from clip_medical.model import Clip
from experiments import figures
from experiments.common import Experiment, Results, main, pick, share
from experiments.zero_shot import Labels, facet_reports

# A labelled image has another label of the same facet, so none of these can be true of it.
DISTRACTORS = (
    ("finding", "fracture"), ("anatomy", "foot"), ("modality", "PET"),
    ("finding", "aneurysm"), ("anatomy", "shoulder"), ("modality", "scintigraphy"),
    ("finding", "foreign body"), ("anatomy", "elbow"), ("modality", "endoscopy"),
    ("finding", "pneumothorax"), ("anatomy", "eye"),
)  # fmt: skip
TOP = 5
MIN_LABELS = 24  # fewer labels are no stress test
JOINT = ("modality", "anatomy")
RANKINGS = {"score": "by score", "facet": "by probability"}  # of the joint list


def candidates(labels: Labels, all_distractors: bool = False) -> Labels:
    """Return facet -> the labels of the data, then distractors. Raises UserError if they are too few."""
    names = {facet: sorted(set(labels.get(facet, [])) - {""}) for facet in FACETS}
    missing = [facet for facet in JOINT if len(names[facet]) < 2]
    if missing:
        raise UserError(f"The validation images have no labels of {' and '.join(missing)}. Name others with --data.")
    lower_case = {name.lower() for of_facet in names.values() for name in of_facet}
    for facet, name in DISTRACTORS:
        if name.lower() not in lower_case and (all_distractors or sum(map(len, names.values())) < MIN_LABELS):
            names[facet].append(name)
    count = sum(map(len, names.values()))
    if count < MIN_LABELS:
        raise UserError(f"Data and distractors have {count} labels, too few for this test. It needs {MIN_LABELS}.")
    return {facet: of_facet for facet, of_facet in names.items() if of_facet}


def joint_accuracy(scores: Tensor, columns: dict[str, Tensor]) -> dict[str, Any]:
    """Measure how often the true labels are in the top 5 of the joint list.

    scores (N, L); columns: "modality" and "anatomy" -> (N,) column of the true label in `scores`, -1 where unknown.
    Returns {"modality", "anatomy", "both": {"value", "low", "high", "chance", "n", "labels" (L)}}, each over the rows
    whose labels are known.
    """
    known = {facet: column >= 0 for facet, column in columns.items()}
    hits = {facet: ranks_in_list(scores, column.clamp(min=0)) < TOP for facet, column in columns.items()}
    for rows in (known, hits):
        rows["both"] = rows["modality"] & rows["anatomy"]
    count = scores.shape[1]
    chance = dict.fromkeys(columns, TOP / count)
    chance["both"] = TOP / count * (TOP - 1) / (count - 1)  # the other label takes one of the places
    return {
        name: share(hits[name][rows]) | {"chance": chance[name], "n": int(rows.sum()), "labels": count}
        for name, rows in known.items()
    }


def confusions(results: Results, count: int = 4) -> list[Row]:
    """Return the most frequent confusions of the last model in each facet, as a share of the images with that label."""
    rows = []
    for facet, report in list(results.values())[-1]["facets"].items():
        for worst in hardest_confusions(report, count):
            true, predicted = (report["classes"].index(worst[key]) for key in ("true", "predicted"))
            of_models = {m: confusion_of(r, true, predicted) for m, r in pick(results, "facets", facet).items()}
            rows.append(Row(f"true {worst['true']} -> {worst['predicted']}", of_models, worst["n"]))
    return rows


@dataclass(frozen=True)
class StressTest(Experiment):
    """Dozens of labels of all facets at once: top-1, top-5, calibration and confusions, before and after adaptation."""

    distractors: bool = False
    """Add all distractors (labels that are true of no image), not only as many as make 24 labels."""

    name = "stress_test"

    @torch.no_grad()
    def measure(self, clip: Clip, pairs: Pairs) -> dict[str, Any]:
        """Return {"labels", "facets": facet -> classification_report, "joint": ranking -> joint_accuracy}."""
        images, labels = encode(clip, pairs)[0], pairs.split.labels
        classes = candidates(labels, self.distractors)
        column = {place: i for i, place in enumerate((facet, name) for facet in classes for name in classes[facet])}
        columns = {facet: torch.tensor([column.get((facet, name), -1) for name in labels[facet]]) for facet in JOINT}
        scores = [class_scores(clip, facet, names, images) for facet, names in classes.items()]
        rankings = {"score": scores, "facet": [each.softmax(dim=1) for each in scores]}
        return {
            "labels": classes,
            "facets": facet_reports(clip, images, labels, classes),
            "joint": {key: joint_accuracy(torch.cat(parts, dim=1), columns) for key, parts in rankings.items()},
        }

    def figure_rows(self, results: Results) -> list[Row]:
        first, rows = results["unadapted"], []
        for facet, report in first["facets"].items():
            name = f"{facet}, top 1 of {len(report['classes'])}"
            rows.append(Row(name, pick(results, "facets", facet, "accuracy"), report["n"]))
        for key, ranking in RANKINGS.items():
            for facet, report in first["joint"][key].items():
                name = f"{facet} in top {TOP} of {report['labels']}, {ranking}"
                rows.append(Row(name, pick(results, "joint", key, facet), report["n"]))
        return rows

    def rows(self, results: Results) -> list[Row]:
        errors = []
        for facet, report in results["unadapted"]["facets"].items():
            reports = pick(results, "facets", facet, "calibration")
            points = {model: {"value": round(100 * report["ece"], 1)} for model, report in reports.items()}
            errors.append(Row(f"{facet}, calibration error (points)", points, report["n"]))
        return [*self.figure_rows(results), *errors, *confusions(results)]

    def draw(self, results: Results, folder: Path) -> list[str]:
        files = [*super().draw(results, folder), "stress_test_reliability.png"]
        figures.reliability(pick(results, "facets"), folder / files[-1])
        if worst := confusions(results):
            files.append("stress_test_confusions.png")
            plots.share_bars(worst, "% of the images with the true label, 95 % interval", folder / files[-1])
        return files


if __name__ == "__main__":
    sys.exit(main(StressTest))
