"""Accuracy, AUROC and calibration: worked by hand, against scikit-learn and scipy, and on uninformative scores."""

import numpy as np
import pytest
import torch
from torch import Tensor

from clip_medical.evaluation.classification import (
    Metric,
    auroc,
    average_precision,
    best_threshold,
    calibration,
    classification_report,
    multilabel_report,
    two_class_report,
)

CLASSES = ["CT", "MRI", "X-ray"]


def sample(seed: int = 0, n: int = 150) -> tuple[Tensor, Tensor]:
    """Probabilities (n, 3) that are better than chance, and the true classes (n,)."""
    generator = torch.Generator().manual_seed(seed)
    truth = torch.randint(0, 3, (n,), generator=generator)
    logits = torch.randn(n, 3, generator=generator) + torch.eye(3)[truth]
    return logits.softmax(dim=1), truth


@pytest.mark.parametrize(
    ("ours", "name", "constant"), [(auroc, "roc_auc_score", 0.5), (average_precision, "average_precision_score", 0.4)]
)
def test_areas_equal_those_of_scikit_learn(ours: Metric, name: str, constant: float) -> None:
    """Catches ties counted for the model or in the order of the rows (here up to a third of all scores), positives and
    negatives swapped, and the trapezoidal area under the precision, which is too high."""
    theirs = getattr(pytest.importorskip("sklearn.metrics"), name)
    rng = np.random.default_rng(0)
    for distinct in (3, 20, 10_000):
        scores = np.floor(rng.random(80) * distinct) / distinct
        positive = rng.random(80) < 0.3 + 0.4 * scores
        levels = np.unique(scores, return_inverse=True)[1]
        assert ours(levels, positive) == pytest.approx(theirs(positive, scores), abs=1e-12)
    assert ours(np.zeros(10, int), np.arange(10) < 4) == constant  # for constant scores


def test_several_labels_of_an_image_are_scored_one_by_one() -> None:
    """Catches uncertain rows counted as negative, labels without negatives in the mean, and a wrong chance level."""
    nan = float("nan")
    truth = torch.tensor([[1.0, 0, 1], [0, 1, 1], [1, nan, 1], [0, 0, 1]])
    scores = torch.tensor([[0.9, 0.1, 0], [0.2, 0.3, 0], [0.8, 0.9, 0], [0.3, 0.2, 0]])
    report = multilabel_report(scores, truth, ["A", "B", "C"])
    assert report["classes"] == ["A", "B"] and report["n"] == 4
    assert report["labels"]["A"]["auroc"]["value"] == report["labels"]["B"]["auroc"]["value"] == 1
    assert report["labels"]["B"]["average_precision"]["chance"] == pytest.approx(1 / 3)
    assert report["average_precision"]["chance"] == pytest.approx((1 / 2 + 1 / 3) / 2)
    reversed_scores = multilabel_report(-scores, truth, ["A", "B", "C"])
    assert reversed_scores["auroc"]["value"] == 0 and reversed_scores["labels"]["A"]["positives"] == 2
    with_threshold = multilabel_report(scores, truth, ["A", "B", "C"], {"A": 0.25})["labels"]
    assert with_threshold["A"]["sensitivity"]["value"] == 1 and with_threshold["A"]["specificity"]["value"] == 0.5
    assert "sensitivity" not in with_threshold["B"]
    with pytest.raises(ValueError, match="NaN"):
        multilabel_report(scores * nan, truth, ["A", "B", "C"])


def test_the_best_threshold_by_hand() -> None:
    """Catches a threshold that an unknown row decides, and one above the score that should count as present."""
    truth = torch.tensor([0, 0, 1, 1, float("nan"), 0])
    scores = torch.tensor([0.1, 0.2, 0.4, 0.6, 0.3, 0.5])
    assert best_threshold(scores, truth) == pytest.approx(0.4)  # sensitivity 1, specificity 2/3; at 0.6 1/2 and 1


def test_report_equals_scikit_learn() -> None:
    """Catches a confusion matrix with rows and columns swapped, and class means weighted by class size."""
    metrics = pytest.importorskip("sklearn.metrics")
    probabilities, truth = sample()
    report, predicted = classification_report(probabilities, truth, CLASSES), probabilities.argmax(dim=1)
    assert report["confusion"] == metrics.confusion_matrix(truth, predicted).tolist()
    assert report["accuracy"]["value"] == pytest.approx(metrics.accuracy_score(truth, predicted))
    assert report["balanced_accuracy"]["value"] == pytest.approx(metrics.balanced_accuracy_score(truth, predicted))
    expected = metrics.roc_auc_score(truth, probabilities.double().numpy(), multi_class="ovr")
    assert report["auroc"]["value"] == pytest.approx(expected, abs=1e-5)  # scikit-learn renormalises the rows
    assert report["n"] == 150 and report["accuracy"]["chance"] == pytest.approx(1 / 3)


def test_intervals_agree_with_scipy() -> None:
    """Catches a bootstrap that resamples scores and labels independently of each other."""
    stats = pytest.importorskip("scipy.stats")
    probabilities, truth = sample(n=100)
    probabilities, truth = probabilities[:, :2] / probabilities[:, :2].sum(dim=1, keepdim=True), truth.clamp(max=1)
    report = classification_report(probabilities, truth, CLASSES[:2])

    def auroc_of(scores: np.ndarray, truth: np.ndarray) -> float:
        return float((scores[truth == 1][:, None] > scores[truth == 0]).mean())  # no ties

    def balanced_accuracy(scores: np.ndarray, truth: np.ndarray) -> float:
        return float((scores[truth == 1] > 0.5).mean() + (scores[truth == 0] < 0.5).mean()) / 2

    for key, statistic in (("auroc", auroc_of), ("balanced_accuracy", balanced_accuracy)):
        rows = (probabilities[:, 1].numpy(), truth.numpy())
        options = dict(paired=True, vectorized=False, method="percentile", n_resamples=600, rng=0)
        expected = stats.bootstrap(rows, statistic, **options).confidence_interval
        assert (report[key]["low"], report[key]["high"]) == pytest.approx((expected.low, expected.high), abs=0.025)


def test_uninformative_scores_have_no_accuracy() -> None:
    """Catches argmax on ties, which predicts the first class and is right wherever that is the true one."""
    report = classification_report(torch.full((30, 3), 1 / 3), torch.zeros(30, dtype=torch.long), CLASSES)
    assert report["accuracy"]["value"] == 0 and report["balanced_accuracy"]["value"] == 0
    assert "auroc" not in report  # undefined with one class
    with pytest.raises(ValueError, match="NaN"):
        classification_report(torch.full((3, 3), torch.nan), torch.zeros(3, dtype=torch.long), CLASSES)


def test_row_order_does_not_matter() -> None:
    """Catches rows of `truth` and `probabilities` that get out of step."""
    probabilities, truth = sample()
    order = torch.randperm(150, generator=torch.Generator().manual_seed(1))
    one, other = (classification_report(probabilities[o], truth[o], CLASSES) for o in (torch.arange(150), order))
    assert one["confusion"] == other["confusion"]
    assert one["calibration"]["ece"] == pytest.approx(other["calibration"]["ece"])
    assert all(one[k]["value"] == pytest.approx(other[k]["value"]) for k in ("accuracy", "balanced_accuracy", "auroc"))


def test_class_without_rows_is_a_distractor() -> None:
    """Catches a mean over classes that counts a class without rows as one with no hits."""
    probabilities = torch.tensor([[0.8, 0.1, 0.1], [0.1, 0.8, 0.1], [0.1, 0.1, 0.8]])
    report = classification_report(probabilities, torch.tensor([0, 1, 0]), CLASSES)
    assert report["balanced_accuracy"]["value"] == pytest.approx((1 / 2 + 1) / 2)
    assert report["confusion"] == [[1, 0, 1], [0, 1, 0], [0, 0, 0]]


def test_calibration_by_hand() -> None:
    """Catches an error that is not weighted by bin size, and over- and underconfidence that cancel out."""
    confidence = torch.tensor([0.95, 0.95, 0.95, 0.95, 0.58, 0.58])
    hits = torch.tensor([1.0, 1.0, 0.0, 0.0, 1.0, 1.0])
    result = calibration(confidence, hits)
    assert result["ece"] == pytest.approx(4 / 6 * 0.45 + 2 / 6 * 0.42)
    assert [b["n"] for b in result["bins"]] == [2, 4]
    assert (result["bins"][1]["low"], result["bins"][1]["high"]) == pytest.approx((0.1500, 0.8500), abs=1e-4)  # Wilson
    assert calibration(torch.ones(5), torch.ones(5))["ece"] == 0  # confidence 1 belongs to a bin


def test_two_classes_by_hand() -> None:
    """Catches exchanged sensitivity and specificity, a threshold that excludes itself, and a ROC curve upside down."""
    probability = torch.tensor([0.9, 0.6, 0.5, 0.2, 0.1])
    report = two_class_report(probability, torch.tensor([True, True, False, True, False]), 0.5)
    assert report["sensitivity"]["value"] == pytest.approx(2 / 3) and report["specificity"]["value"] == 0.5
    expected = np.array([[0, 0], [0, 1 / 3], [0, 2 / 3], [0.5, 2 / 3], [0.5, 1], [1, 1]])
    np.testing.assert_allclose(report["roc"], expected)
    assert report["probabilities"]["negative"] == pytest.approx([0.1, 0.5])
