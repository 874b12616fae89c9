"""Accuracy, AUROC and calibration: by hand, against scikit-learn and scipy, and against the ways to flatter."""

import pytest
import torch
from torch import Tensor

from clip_medical.evaluation.classification import (
    auroc,
    calibration,
    classification_report,
    hardest_confusions,
    wilson,
)

CLASSES = ["CT", "MRI", "X-ray"]


def drawn(seed: int = 0, n: int = 150) -> tuple[Tensor, Tensor]:
    """Probabilities (n, 3) that know something, and the truth."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 3, (n,), generator=generator)
    logits = torch.randn(n, 3, generator=generator) + torch.eye(3)[truth]
    return logits.softmax(dim=1), truth


def test_auroc_is_that_of_scikit_learn() -> None:
    """Catches ties counted for the model (here a third of all scores), and positives and negatives swapped."""
    metrics = pytest.importorskip("sklearn.metrics")
    generator = torch.Generator().manual_seed(0)
    for levels in (3, 20, 10_000):
        scores = (torch.rand(80, generator=generator) * levels).floor() / levels
        positive = torch.rand(80, generator=generator) < 0.3 + 0.4 * scores
        assert auroc(scores, positive) == pytest.approx(metrics.roc_auc_score(positive, scores), abs=1e-12)
    assert auroc(torch.zeros(10), torch.arange(10) < 4) == 0.5  # features that say nothing


def test_the_report_is_that_of_scikit_learn() -> None:
    """Catches a confusion matrix with rows and columns swapped, and means weighted by the size of the classes."""
    metrics = pytest.importorskip("sklearn.metrics")
    probabilities, truth = drawn()
    report, named = classification_report(probabilities, truth, CLASSES), probabilities.argmax(dim=1)
    assert report["confusion"] == metrics.confusion_matrix(truth, named).tolist()
    assert report["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(truth, named))
    assert report["balanced_accuracy"]["value"] == pytest.approx(metrics.balanced_accuracy_score(truth, named))
    theirs = metrics.roc_auc_score(truth, probabilities.double().numpy(), multi_class="ovr")
    assert report["auroc"]["value"] == pytest.approx(theirs, abs=1e-5)  # they want rows that sum to 1 more exactly
    assert report["n"] == 150 and report["accuracy"]["chance"] == pytest.approx(1 / 3)


def test_intervals_are_those_of_scipy() -> None:
    """Catches scores and labels resampled apart from each other, and weights applied before the sorting."""
    stats, metrics = pytest.importorskip("scipy.stats"), pytest.importorskip("sklearn.metrics")
    probabilities, truth = drawn(n=100)
    probabilities, truth = probabilities[:, :2] / probabilities[:, :2].sum(dim=1, keepdim=True), truth.clamp(max=1)
    report = classification_report(probabilities, truth, CLASSES[:2])
    for key, statistic in (
        ("auroc", lambda s, t: metrics.roc_auc_score(t, s)),
        ("balanced_accuracy", lambda s, t: metrics.balanced_accuracy_score(t, s > 0.5)),
    ):
        sample = (probabilities[:, 1].numpy(), truth.numpy())
        found = stats.bootstrap(sample, statistic, paired=True, vectorized=False, method="percentile",
                                n_resamples=600, rng=0).confidence_interval  # fmt: skip
        assert (report[key]["low"], report[key]["high"]) == pytest.approx((found.low, found.high), abs=0.025)


def test_wilson_is_that_of_scipy() -> None:
    """Catches the plain normal interval, which is [0, 0] for no hit at all."""
    binomtest = pytest.importorskip("scipy.stats").binomtest
    for hits, n in ((0, 7), (3, 7), (7, 7), (40, 200)):
        theirs = binomtest(hits, n).proportion_ci(method="wilson")
        assert wilson(hits, n) == pytest.approx((theirs.low, theirs.high), abs=1e-6)


def test_features_that_say_nothing_score_nothing() -> None:
    """Catches argmax on ties, which names the first class and is right wherever that is the true one."""
    report = classification_report(torch.full((30, 3), 1 / 3), torch.zeros(30, dtype=torch.long), CLASSES)
    assert report["accuracy"]["value"] == 0 and report["balanced_accuracy"]["value"] == 0
    assert "auroc" not in report  # of one class there is none
    with pytest.raises(ValueError, match="NaN"):
        classification_report(torch.full((3, 3), torch.nan), torch.zeros(3, dtype=torch.long), CLASSES)


def test_the_order_of_the_rows_changes_nothing() -> None:
    """Catches truth and probabilities that come apart."""
    probabilities, truth = drawn()
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    one, other = (classification_report(probabilities[o], truth[o], CLASSES) for o in (torch.arange(150), order))
    assert one["confusion"] == other["confusion"] and one["calibration"]["ece"] == pytest.approx(
        other["calibration"]["ece"]
    )
    assert all(one[k]["value"] == pytest.approx(other[k]["value"]) for k in ("accuracy", "balanced_accuracy", "auroc"))


def test_a_class_without_pictures_is_a_distractor() -> None:
    """Catches a mean over classes that counts a class nobody asked about as one with no hit."""
    probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    report = classification_report(probabilities, torch.tensor([0, 1, 0]), CLASSES)
    assert report["balanced_accuracy"]["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert report["confusion"] == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_calibration_by_hand() -> None:
    """Catches an error that is not weighted by the bins, and over- and underconfidence that cancel out."""
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.58, 0.58])
    hits = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    found = calibration(confidence, hits)
    assert found["ece"] == pytest.approx(4 / 6 * 0.45 + 2 / 6 * 0.42)
    assert [b["n"] for b in found["bins"]] == [2, 4]
    assert calibration(torch.ones(5), torch.ones(5))["ece"] == 0  # confidence 1 has a bin


def test_hardest_confusions_by_hand() -> None:
    """Catches right answers listed as confusions, and the direction of a confusion turned round."""
    report = {"classes": CLASSES, "confusion": [[5, 3, 0], [1, 9, 0], [0, 0, 0]]}
    first, second = hardest_confusions(report)
    assert (first["truth"], first["named"], first["times"], first["n"]) == ("CT", "MRI", 3, 8)
    assert first["value"] == pytest.approx(3 / 8) and (second["truth"], second["named"]) == ("MRI", "CT")
