"""Metrics of classification: accuracy, balanced accuracy, AUROC, average precision, confusions, calibration.

Accuracy alone flatters a model that predicts the most frequent class. Balanced accuracy and AUROC do not, and AUROC
needs no threshold either. Calibration compares confidence with accuracy: of the predictions made with 80 % confidence,
80 % should be correct.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_medical.evaluation.retrieval import binomial_interval, bootstrap, share

Metric = Callable[[np.ndarray, np.ndarray], float]  # levels of the scores (N,), positive (N,) -> value
Statistic = Callable[[np.ndarray], float]  # numbers of the drawn rows -> value, NaN where they do not define it


def classification_report(probabilities: Tensor, truth: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Compute all metrics of N rows of one facet.

    probabilities (N, C), rows sum to 1; truth (N,) index of the true class; classes: C names. A class without rows can
    still be predicted; it is left out of means over classes. A class that ties with the true one counts as predicted
    instead of it, so that constant features score 0.

    Returns {"n", "classes", "accuracy", "balanced_accuracy", "auroc" (one against the rest, mean over classes), each
    {"value", "low", "high" (95 %, bootstrap over rows), "chance"}, "confusion" (C x C counts, a row per true class),
    "calibration" as `calibration` returns it}. Raises ValueError on probabilities that are not finite.
    """
    if not probabilities.isfinite().all():
        raise ValueError("The probabilities contain NaN or infinity, so no metric can be computed from them.")
    p, true, rows = probabilities.double().numpy(), truth.numpy(), np.arange(len(truth))
    rivals = p.copy()
    rivals[rows, true] = -1
    predicted = np.where(p[rows, true] > rivals.max(axis=1), true, rivals.argmax(axis=1))
    hits = predicted == true
    present = np.unique(true)
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (true, predicted), 1)
    # for each class the levels of its scores, for `auroc`, and which rows are of it
    each = [(np.unique(p[:, c], return_inverse=True)[1], true == c) for c in present]
    areas: list[Statistic] = [lambda rows, s=s, t=t: auroc(s[rows], t[rows]) for s, t in each]  # type: ignore[misc]
    recalls: list[Statistic] = [lambda rows, t=t: (hits & t)[rows].sum() / t[rows].sum() for _, t in each]  # type: ignore[misc]

    report: dict[str, Any] = {"n": len(rows), "classes": list(classes)}
    report["accuracy"] = share(torch.from_numpy(hits)) | {"chance": 1 / len(classes)}
    report["balanced_accuracy"] = bootstrap(partial(_mean_of, recalls), len(rows)) | {"chance": 1 / len(classes)}
    if len(present) > 1:
        report["auroc"] = bootstrap(partial(_mean_of, areas), len(rows)) | {"chance": 0.5}
    report["confusion"] = confusion.tolist()
    report["calibration"] = calibration(torch.from_numpy(p.max(axis=1)), torch.from_numpy(hits))
    return report


def two_class_report(probability: Tensor, positive: Tensor, threshold: float) -> dict[str, Any]:
    """Compute sensitivity and specificity at a threshold that was chosen on other images, and what a ROC curve shows.

    probability (N,) of the positive class; positive (N,) bool, both values occur. Returns {"sensitivity",
    "specificity": {"value", "low", "high" (95 %, Wilson)}, "threshold", "roc": [[1 - specificity, sensitivity], ...],
    "probabilities": {"positive", "negative": each sorted}}.
    """
    called = probability >= threshold
    report: dict[str, Any] = {}
    for name, correct in (("sensitivity", called[positive]), ("specificity", ~called[~positive])):
        report[name] = _proportion(correct.numpy())
    levels = probability.unique().flip(0)
    share = [[(probability[rows] >= s).double().mean().item() for rows in (~positive, positive)] for s in levels]
    each = {
        name: probability[rows].sort().values.tolist()
        for name, rows in (("positive", positive), ("negative", ~positive))
    }
    return report | {"threshold": threshold, "roc": [[0.0, 0.0], *share], "probabilities": each}


def multilabel_report(
    scores: Tensor, truth: Tensor, classes: Sequence[str], thresholds: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """Compute AUROC and average precision of each of L labels, of which an image can have several.

    scores (N, L), the higher the more likely; truth (N, L): 1 present, 0 absent, NaN unknown (left out for
    this label); thresholds: label -> lowest score that counts as present, chosen on other images.

    Returns {"n", "classes", "auroc", "average_precision" (means over labels): {"value", "low", "high" (95 %, bootstrap
    over rows), "chance"}, "labels": label -> {"positives", "auroc", "average_precision", and with a threshold
    "sensitivity", "specificity"}}, without labels that no row has or that all rows have. Raises ValueError on scores
    that are not finite.
    """
    if not scores.isfinite().all():
        raise ValueError("The scores contain NaN or infinity, so no metric can be computed from them.")
    s, t = scores.numpy(), truth.numpy()

    def statistic(metric: Metric, column: int) -> Statistic:
        known, levels = ~np.isnan(t[:, column]), np.unique(s[:, column], return_inverse=True)[1]
        return lambda rows: metric(levels[rows[known[rows]]], t[rows[known[rows]], column] == 1)

    positives, negatives = ((t == value).sum(axis=0) for value in (1, 0))
    usable = [column for column in range(len(classes)) if positives[column] and negatives[column]]
    prevalence = positives / (positives + negatives).clip(1)
    report: dict[str, Any] = {"n": len(s), "classes": [classes[column] for column in usable], "labels": {}}
    for column in usable:
        report["labels"][classes[column]] = {
            "positives": int(positives[column]),
            "auroc": bootstrap(statistic(auroc, column), len(s)) | {"chance": 0.5},
            "average_precision": bootstrap(statistic(average_precision, column), len(s))
            | {"chance": float(prevalence[column])},
        }
        if thresholds and classes[column] in thresholds:
            correct = (s[:, column] >= thresholds[classes[column]]) == (t[:, column] == 1)
            for name, rows in (("sensitivity", t[:, column] == 1), ("specificity", t[:, column] == 0)):
                report["labels"][classes[column]][name] = _proportion(correct[rows])
    chances = {"auroc": 0.5, "average_precision": float(prevalence[usable].mean())} if usable else {}
    for name, chance in chances.items():
        metric = auroc if name == "auroc" else average_precision
        each = [statistic(metric, column) for column in usable]
        report[name] = bootstrap(partial(_mean_of, each), len(s)) | {"chance": chance}
    return report


def _mean_of(statistics: Sequence[Statistic], rows: np.ndarray) -> float:
    """The mean of the statistics that the drawn rows define, NaN if they define none."""
    with np.errstate(invalid="ignore"):  # 0 of 0 rows
        values = np.array([statistic(rows) for statistic in statistics])
    return float(np.nanmean(values)) if np.isfinite(values).any() else float("nan")


def best_threshold(scores: Tensor, truth: Tensor) -> float:
    """The score (N,) with the highest sensitivity + specificity (Youden's J), if rows from it on count as present.

    truth (N,): 1 present, 0 absent, NaN unknown; both have to occur.
    """
    levels = scores[~truth.isnan()].unique()
    present, absent = scores[truth == 1], scores[truth == 0]
    gain = [((present >= s).double().mean() - (absent >= s).double().mean()).item() for s in levels]
    return float(levels[int(np.argmax(gain))])


def _proportion(hits: np.ndarray) -> dict[str, float]:
    low, high = binomial_interval(int(hits.sum()), len(hits), "wilson")
    return {"value": float(hits.mean()), "low": low, "high": high}


def average_precision(levels: np.ndarray, positive: np.ndarray) -> float:
    """Compute the sum over score levels, from the top, of the gain in recall times the precision there.

    levels (N,) as for `auroc`, positive (N,) bool. Equal scores are one level, so their order does not matter. NaN
    without positive rows.
    """
    positives = np.bincount(levels[positive], minlength=levels.max(initial=0) + 1)[::-1]
    counts = np.bincount(levels, minlength=levels.max(initial=0) + 1)[::-1]
    precision = positives.cumsum() / counts.cumsum().clip(1)
    return float(positives @ precision / positives.sum()) if positives.any() else float("nan")


def auroc(levels: np.ndarray, positive: np.ndarray) -> float:
    """Compute the area under the ROC curve: how often a positive row outscores a negative one, a tie counting half.

    levels (N,): the position of each score among the distinct scores, `np.unique(scores, return_inverse=True)[1]`, so
    that a bootstrap sorts the scores only once; positive (N,) bool. NaN if there are no positive or no negative rows.
    Mann and Whitney 1947; Hanley and McNeil 1982.
    """
    positives = np.bincount(levels[positive], minlength=levels.max(initial=0) + 1)
    negatives = np.bincount(levels[~positive], minlength=levels.max(initial=0) + 1)
    below = negatives.cumsum() - negatives / 2  # negatives of a lower score, and half of those of the same score
    pairs = positives.sum() * negatives.sum()
    return float(positives @ below / pairs) if pairs else float("nan")


def calibration(confidence: Tensor, hits: Tensor, bins: int = 10) -> dict[str, Any]:
    """Compute the expected calibration error over bins of equal width (Guo et al. 2017, section 2).

    confidence (N,) probability of the predicted class; hits (N,) 1 where it is correct. Returns {"ece", "bins": [{"n",
    "confidence", "accuracy", "low", "high" (95 %, Wilson)}, ...]}, without empty bins.
    """
    which = (confidence * bins).ceil().long().clamp(1, bins)  # (0, 0.1] is bin 1
    filled = []
    for number in which.unique():
        inside = which == number
        n, correct = int(inside.sum()), int(hits[inside].sum())
        low, high = binomial_interval(correct, n, "wilson")
        mean = confidence[inside].mean().item()
        filled.append({"n": n, "confidence": mean, "accuracy": correct / n, "low": low, "high": high})
    error = sum(b["n"] * abs(b["confidence"] - b["accuracy"]) for b in filled) / len(hits)
    return {"ece": error, "bins": filled}
