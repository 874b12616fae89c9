"""Dozens of labels of every kind at once, on held-out pictures: `python -m experiments.stress_test --run runs/x`.

A picture has a modality, an anatomy, a finding and a view. In one softmax over all labels, a true modality and a true
anatomy take probability from each other, so that neither can be certain. Two ways of asking that are fair:

    within facets    a softmax for each facet, as if each were a question of its own: is its first answer right?
    joint list       all labels in one list, ordered by the score that each has before the softmax, or by the
                     probability after it: do the first five hold the true modality, and the true anatomy?

The labels are all that the data have, view included, and where these are fewer than 24, labels that are true of no
picture here. The figures also show whether confidence can be believed (calibration) and what is taken for what.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from clip_medical.data.batches import prepare
from clip_medical.data.sources import FACETS, Split
from clip_medical.errors import UserError
from clip_medical.evaluation.classification import classification_report, confusion_of, hardest_confusions
from clip_medical.evaluation.report import as_text, encode
from clip_medical.evaluation.retrieval import bootstrap_interval
from clip_medical.evaluation.zero_shot import class_scores, ranks_in_list
from clip_medical.model import Clip
from experiments import common, figures
from experiments.common import line

# none of these can be true of a picture whose labels are known and are others
DISTRACTORS = (
    ("finding", "fracture"), ("anatomy", "foot"), ("modality", "PET"),
    ("finding", "aneurysm"), ("anatomy", "shoulder"), ("modality", "scintigraphy"),
    ("finding", "foreign body"), ("anatomy", "elbow"), ("modality", "endoscopy"),
    ("finding", "pneumothorax"), ("anatomy", "eye"),
)  # fmt: skip
FIRST = 5
FEWEST = 24  # labels that make this a stress test


@dataclass(frozen=True)
class StressTest(common.Common):
    """Dozens of labels of every kind at once: first answers, top-5, calibration and confusions, before and after."""

    distractors: bool = False
    """Put in all labels that are true of no picture here, not only as many as are wanted for 24."""


def labels_of(split: Split, every_distractor: bool = False) -> dict[str, list[str]]:
    """Facet -> its classes, those of the data and then the distractors. UserError if that makes too few."""
    found = {facet: sorted(set(split.labels.get(facet, [])) - {""}) for facet in FACETS}
    missing = [facet for facet in ("modality", "anatomy") if len(found[facet]) < 2]
    if missing:
        raise UserError(
            f"the held-out pictures have no labels of their {' and '.join(missing)}: name others with --data."
        )
    known = [name.lower() for names in found.values() for name in names]
    count = len(known)
    for facet, name in DISTRACTORS:
        if name.lower() not in known and (every_distractor or count < FEWEST):
            found[facet].append(name)
            count += 1
    if count < FEWEST:
        raise UserError(
            f"these pictures and the distractors make {count} labels, too few for this test: {FEWEST} or more."
        )
    return {facet: names for facet, names in found.items() if names}


def truths(split: Split, classes: dict[str, list[str]]) -> dict[str, Tensor]:
    """Facet -> (N,) number of the right class of each row, -1 where it is not known."""
    return {
        facet: torch.tensor([names.index(name) if name else -1 for name in split.labels[facet]])
        for facet, names in classes.items()
        if facet in split.labels
    }


def joint(scores: Tensor, truth: dict[str, Tensor], first: dict[str, int]) -> dict[str, Any]:
    """Share of rows whose true labels are among the FIRST of the joint list (N, L); first: facet -> its first column.

    Returns {"modality", "anatomy", "both": {"value", "low", "high", "n", "chance", "labels" (L)}}, over the rows where
    it is known.
    """
    facets = ("modality", "anatomy")
    known = {facet: truth[facet] >= 0 for facet in facets}
    hits = {f: ranks_in_list(scores, truth[f].clamp(min=0) + first[f]) < FIRST for f in facets}
    known["both"], hits["both"] = (torch.stack([d[f] for f in facets]).all(dim=0) for d in (known, hits))
    report = {}
    for name, found in hits.items():
        values = found[known[name]].double()
        low, high = bootstrap_interval(values)
        report[name] = {"value": values.mean().item(), "low": low, "high": high, "n": len(values)}
        share = FIRST / scores.shape[1]
        other = (FIRST - 1) / (scores.shape[1] - 1)
        report[name] |= {"chance": share * other if name == "both" else share, "labels": scores.shape[1]}
    return report


@torch.no_grad()
def measure(clip: Clip, images: Tensor, classes: dict[str, list[str]], truth: dict[str, Tensor]) -> dict[str, Any]:
    """One model: {"facets": facet -> classification_report, "joint": {"score", "facet": as `joint` gives it}}."""
    scores = {facet: class_scores(clip, facet, names, images) for facet, names in classes.items()}
    probabilities = {facet: each.softmax(dim=1) for facet, each in scores.items()}
    facets = {}
    for facet, right in truth.items():
        known = right >= 0
        if known.any() and len(classes[facet]) > 1:
            facets[facet] = classification_report(probabilities[facet][known], right[known], classes[facet])
    first, column = {}, 0
    for facet, names in classes.items():
        first[facet], column = column, column + len(names)
    lists = {"score": scores, "facet": probabilities}
    joined = {how: joint(torch.cat(list(each.values()), dim=1), truth, first) for how, each in lists.items()}
    return {"facets": facets, "joint": joined}


JOINT = {"score": "by score", "facet": "by probability in facet"}


def rows_of(results: dict[str, dict[str, Any]]) -> list[tuple[str, dict[str, Any], int]]:
    """What table and figure show: name, model -> result, n."""
    last = list(results.values())[-1]
    found = []
    for facet, report in last["facets"].items():
        of_models = {model: result["facets"][facet]["accuracy"] for model, result in results.items()}
        found.append((f"{facet}, first of its {len(report['classes'])}", of_models, report["n"]))
    for how, words in JOINT.items():
        for name, row in last["joint"][how].items():
            of_models = {model: result["joint"][how][name] for model, result in results.items()}
            found.append((f"{name} in first {FIRST} of {row['labels']},\n{words}", of_models, row["n"]))
    return found


def table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    rows = [["", *results, "chance", "n"]] + [
        line(name.replace("\n", " "), of_models, n=n) for name, of_models, n in rows_of(results)
    ]
    for facet, report in list(results.values())[-1]["facets"].items():
        errors = (result["facets"][facet]["calibration"]["ece"] for result in results.values())
        rows.append([f"{facet}, calibration error", *(f"{100 * e:.1f} %" for e in errors), "", f"{report['n']:,}"])
    return rows


def confusions(results: dict[str, dict[str, Any]], count: int = 4) -> list[tuple[str, dict[str, Any]]]:
    """The hardest confusions of the last model, beside how often the other made them: name, model -> share."""
    found = []
    for facet, report in list(results.values())[-1]["facets"].items():
        for mistake in hardest_confusions(report, count):
            truth, named = (report["classes"].index(mistake[key]) for key in ("truth", "named"))
            of_models = {m: confusion_of(result["facets"][facet], truth, named) for m, result in results.items()}
            found.append((f"{mistake['truth']} taken for {mistake['named']}", of_models))
    return found


def draw(setup: common.Setup, results: dict[str, dict[str, Any]]) -> Sequence[str]:
    """The three figures; returns their names."""
    shown = rows_of(results)
    of_models = {model: [found[model] for _, found, _ in shown] for model in results}
    chance = [list(found.values())[-1]["chance"] for _, found, _ in shown]
    names = [f"{name}, n = {n:,}" if "\n" in name else f"{name}\nn = {n:,}" for name, _, n in shown]
    figures.share_bars(
        names, of_models, "% of held-out pictures, 95 % interval", setup.folder / "stress_test.png", chance
    )
    facets = {model: {f: r["calibration"] for f, r in result["facets"].items()} for model, result in results.items()}
    figures.reliability(facets, setup.folder / "stress_test_reliability.png")
    mistakes = confusions(results)
    of_models = {model: [found[model] for _, found in mistakes] for model in results}
    names = [f"{name}\nn = {list(found.values())[-1]['n']:,}" for name, found in mistakes]
    label = "% of the pictures with the first label, 95 % interval"
    figures.share_bars(names, of_models, label, setup.folder / "stress_test_confusions.png")
    return "stress_test.png", "stress_test_reliability.png", "stress_test_confusions.png"


def run(options: StressTest) -> int:
    setup = common.load_models("stress_test", options)
    split = common.load_evidence(setup, options).validation
    classes = labels_of(split, options.distractors)
    pairs = prepare(split, setup.best, "held-out")
    truth = truths(split, classes)
    results = {m: measure(clip, encode(clip, pairs)[0], classes, truth) for m, clip in setup.models.items()}
    print(as_text(table(results)))
    print("\nHardest confusions, most frequent first, as a share of the pictures with the first label")
    hardest = confusions(results)
    shares = [line(name, found, n=list(found.values())[-1]["n"]) for name, found in hardest]
    print(as_text([["", *results, "", "n"], *shares]))
    common.save(setup, "stress_test", {"labels": classes} | results)
    common.said(setup, "stress_test.json", *draw(setup, results))
    return 0


if __name__ == "__main__":
    sys.exit(common.main("stress_test", StressTest, run))
