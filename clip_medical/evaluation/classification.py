"""Metrics of classification from probabilities: accuracy, balanced accuracy, AUROC, confusions, calibration.

Accuracy alone flatters a model that predicts the most frequent class. Balanced accuracy and AUROC do not, and AUROC
needs no threshold either. Calibration compares confidence with accuracy: of the predictions made with 80 % confidence,
80 % should be correct.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_medical.evaluation.retrieval import binomial_interval, bootstrap_interval, percentile_interval


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
    score_levels = {c: np.unique(p[:, c], return_inverse=True)[1] for c in present}

    def balanced_accuracy(drawn: np.ndarray) -> float:
        count = np.bincount(true[drawn], minlength=len(classes))
        correct = np.bincount(true[drawn], hits[drawn], len(classes))
        return float(np.mean(correct[count > 0] / count[count > 0]))

    def mean_auroc(drawn: np.ndarray) -> float:  # over the classes for which the drawn rows define it
        areas = np.array([auroc(levels[drawn], true[drawn] == c) for c, levels in score_levels.items()])
        return float(np.nanmean(areas)) if np.isfinite(areas).any() else float("nan")

    def measure(statistic: Callable[[np.ndarray], float], chance: float) -> dict[str, float]:
        low, high = percentile_interval(statistic, len(rows), draws=1000)
        return {"value": statistic(rows), "low": low, "high": high, "chance": chance}

    report: dict[str, Any] = {"n": len(rows), "classes": list(classes)}
    low, high = bootstrap_interval(torch.from_numpy(hits))
    report["accuracy"] = {"value": float(hits.mean()), "low": low, "high": high, "chance": 1 / len(classes)}
    report["balanced_accuracy"] = measure(balanced_accuracy, 1 / len(classes))
    if len(present) > 1:
        report["auroc"] = measure(mean_auroc, 0.5)
    report["confusion"] = confusion.tolist()
    report["calibration"] = calibration(torch.from_numpy(p.max(axis=1)), torch.from_numpy(hits))
    return report


def auroc(levels: np.ndarray, positive: np.ndarray) -> float:
    """Compute the area under the ROC curve: how often a positive row outscores a negative one, a tie counting half.

    levels (N,): the position of each score among the distinct scores, `np.unique(scores, return_inverse=True)[1]`, so
    that a bootstrap sorts the scores only once; positive (N,) bool. NaN if there are no positive or no negative rows.
    Mann and Whitney 1947; Hanley and McNeil 1982.
    """
    positives = np.bincount(levels[positive], minlength=levels.max() + 1)
    negatives = np.bincount(levels[~positive], minlength=levels.max() + 1)
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
