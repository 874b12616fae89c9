"""How well probabilities name classes: accuracy, balanced accuracy, AUROC, confusions, calibration, each with its n.

Accuracy alone flatters whoever names the commonest class; balanced accuracy and AUROC do not, and AUROC needs no
threshold either. Calibration asks whether what is said with 80 % confidence is right 80 times of 100.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

Weights = np.ndarray  # (N,) how often each row was drawn in a bootstrap sample; all 1 for the sample itself


def classification_report(probabilities: Tensor, truth: Tensor, classes: Sequence[str]) -> dict[str, Any]:
    """Everything about N rows of one facet.

    probabilities (N, C), rows that sum to 1; truth (N,) number of the right class; classes: C names. A class may have
    no row of its own: it can be taken for others, and is left out of the means over classes.

    Returns {"n", "classes", "accuracy", "balanced_accuracy", "auroc" (one against the rest, mean over classes), each
    {"value", "low", "high" (95 %, bootstrap over rows), "chance"}, "confusion" (C rows of C counts, the right class
    first), "calibration" as `calibration` gives it}. Raises ValueError on probabilities that are not finite.
    """
    if not probabilities.isfinite().all():
        raise ValueError("the probabilities contain NaN or infinity: a report on them would mean nothing")
    chances, right = probabilities.double().numpy(), truth.numpy()
    # a class that ties with the right one was named instead of it: features that say nothing name nothing rightly
    rivals = chances.copy()
    rivals[np.arange(len(right)), right] = -1
    of_truth, best_rival = chances[np.arange(len(right)), right], rivals.max(axis=1)
    predicted = np.where(of_truth > best_rival, right, rivals.argmax(axis=1))
    hits = (predicted == right).astype(float)
    present = np.unique(right)
    confusion = np.zeros((len(classes), len(classes)), int)
    np.add.at(confusion, (right, predicted), 1)

    def balanced(weights: Weights) -> float:
        rows = np.bincount(right, weights, len(classes))[present]
        found = np.bincount(right, weights * hits, len(classes))[present]
        return float(np.mean(found[rows > 0] / rows[rows > 0]))

    areas = [_area(chances[:, c], right == c) for c in present] if len(present) > 1 else []

    def mean_area(weights: Weights) -> float:  # of the classes that were drawn
        found = [value for area in areas if (value := area(weights)) == value]
        return sum(found) / len(found) if found else float("nan")

    report: dict[str, Any] = {"n": len(right), "classes": list(classes)}
    report["accuracy"] = _with_interval(lambda w: float(np.average(hits, weights=w)), len(hits), 1 / len(classes))
    report["balanced_accuracy"] = _with_interval(balanced, len(hits), 1 / len(classes))
    if areas:
        report["auroc"] = _with_interval(mean_area, len(hits), 0.5)
    confidence = torch.from_numpy(chances.max(axis=1))
    calibrated = calibration(confidence, torch.from_numpy(hits))
    return report | {"confusion": confusion.tolist(), "calibration": calibrated}


def auroc(scores: Tensor, positive: Tensor) -> float:
    """Area under the ROC curve: how often a positive row outscores a negative one, a tie counting half.

    scores (N,), positive (N,) bool, with at least one row of each kind. Mann and Whitney 1947; Hanley and McNeil 1982.
    """
    return _area(scores.double().numpy(), positive.numpy())(np.ones(len(scores)))


def _area(scores: np.ndarray, positive: np.ndarray) -> Callable[[Weights], float]:
    """The AUROC as a function of how often each row was drawn; the sorting is done once. NaN if one kind is missing."""
    order = np.argsort(scores)
    starts = np.flatnonzero(np.diff(scores[order], prepend=-np.inf))  # where a new score begins
    is_positive = positive[order]

    def area(weights: Weights) -> float:
        drawn = weights[order]
        above = np.add.reduceat(drawn * is_positive, starts)  # positives of each score
        below = np.add.reduceat(drawn * ~is_positive, starts)
        pairs = above.sum() * below.sum()
        return float((above * (below.cumsum() - below / 2)).sum() / pairs) if pairs else float("nan")

    return area


def _with_interval(
    statistic: Callable[[Weights], float], rows: int, chance: float, draws: int = 1000
) -> dict[str, float]:
    """The statistic of the sample, and its 95 % percentile interval by resampling rows."""
    rng = np.random.default_rng(0)
    drawn = [statistic(np.bincount(rng.integers(rows, size=rows), minlength=rows)) for _ in range(draws)]
    low, high = np.nanpercentile(drawn, (2.5, 97.5))
    return {"value": statistic(np.ones(rows)), "low": float(low), "high": float(high), "chance": chance}


def calibration(confidence: Tensor, hits: Tensor, bins: int = 10) -> dict[str, Any]:
    """Expected calibration error over bins of equal width (Guo et al. 2017, section 2), and the bins.

    confidence (N,) probability of what was named, 0 to 1; hits (N,) 1 where that was right. Returns {"ece", "bins":
    [{"n", "confidence", "accuracy", "low", "high" (95 %)}, ...]}; bins that hold nothing are left out.
    """
    which = (confidence * bins).ceil().long().clamp(1, bins)  # (0, 0.1] is bin 1
    found, error = [], 0.0
    for number in which.unique().tolist():
        inside = which == number
        n, mean, accuracy = int(inside.sum()), confidence[inside].mean().item(), hits[inside].double().mean().item()
        low, high = wilson(accuracy * n, n)
        found.append({"n": n, "confidence": mean, "accuracy": accuracy, "low": low, "high": high})
        error += n / len(hits) * abs(mean - accuracy)
    return {"ece": error, "bins": found}


def wilson(hits: float, n: int) -> tuple[float, float]:
    """95 % interval of a share, `hits` of n, by Wilson's formula (1927): it holds for small n too."""
    z = 1.959964
    share = hits / n
    middle, reach = share + z * z / (2 * n), z * (share * (1 - share) / n + z * z / (4 * n * n)) ** 0.5
    return max(0.0, (middle - reach) / (1 + z * z / n)), min(1.0, (middle + reach) / (1 + z * z / n))


def hardest_confusions(report: dict[str, Any], count: int = 5) -> list[dict[str, Any]]:
    """The commonest mistakes of a `classification_report`: {"truth", "named", "value" (share of the rows of that class,
    with "low" and "high"), "times", "n"}, those that happened most often first."""
    classes, confusion = report["classes"], np.array(report["confusion"])
    wrong = confusion * (1 - np.eye(len(classes), dtype=int))
    mistakes = []
    for place in np.argsort(-wrong, axis=None, kind="stable")[:count].tolist():
        truth, named = divmod(place, len(classes))
        if times := int(wrong[truth, named]):
            mistakes.append(confusion_of(report, truth, named) | {"times": times})
    return mistakes


def confusion_of(report: dict[str, Any], truth: int, named: int) -> dict[str, Any]:
    """How often class number `truth` was taken for number `named`, as a share of its rows."""
    row = report["confusion"][truth]
    low, high = wilson(row[named], sum(row))
    names = {"truth": report["classes"][truth], "named": report["classes"][named]}
    return names | {"value": row[named] / sum(row), "low": low, "high": high, "n": sum(row)}
