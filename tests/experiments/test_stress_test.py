"""The stress test: labels and distractors, and the joint list computed by hand."""

import pytest
import torch

from clip_medical.errors import UserError
from experiments.stress_test import candidates, joint_accuracy


def test_top_5_by_hand() -> None:
    """Catches a hit in one facet counted for both, and rows without a label counted as misses."""
    # Row 0: the modality in column 1 is first, the anatomy in column 9 is sixth. Row 1: the anatomy is unknown.
    scores = torch.tensor([[0.0, 1, 0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.2, 0.5], [0.9, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
    columns = {"modality": torch.tensor([1, 0]), "anatomy": torch.tensor([9, -1])}
    report = joint_accuracy(scores, columns)
    assert report["modality"]["value"] == 1 and report["modality"]["n"] == 2
    assert report["anatomy"]["value"] == 0 and report["anatomy"]["n"] == 1
    assert report["both"]["value"] == 0 and report["both"]["n"] == 1
    assert report["modality"]["chance"] == 0.5 and report["both"]["chance"] == pytest.approx(0.5 * 4 / 9)
    columns["anatomy"][0] = 5  # the fifth
    assert joint_accuracy(scores, columns)["both"]["value"] == 1


def test_chance_level_is_the_accuracy_of_random_scores() -> None:
    """Catches the chance level of one label given for both, beside which the unadapted model would look good."""
    scores = torch.rand(20_000, 26, generator=torch.Generator().manual_seed(0))
    columns = {"modality": torch.zeros(20_000, dtype=torch.long), "anatomy": torch.full((20_000,), 5)}
    for row in joint_accuracy(scores, columns).values():
        assert row["value"] == pytest.approx(row["chance"], abs=0.01)


def test_distractors_are_no_labels_of_the_data() -> None:
    """Catches a distractor that is true of some images, and distractors added to data with enough labels."""
    labels = {
        "modality": ["CT", "pet"] * 8,
        "anatomy": ["foot", "head"] * 7 + ["", "knee"],
        "finding": [f"f{i}" for i in range(16)],
    }
    classes = candidates(labels)  # 2 + 3 + 16 of the data, and distractors up to 24
    assert {facet: len(names) for facet, names in classes.items()} == {"modality": 2, "anatomy": 4, "finding": 18}
    classes = candidates(labels, all_distractors=True)
    assert [name for name in classes["modality"] if name.lower() == "pet"] == ["pet"]
    assert classes["anatomy"].count("foot") == 1 and "" not in classes["anatomy"]
    enough = labels | {"finding": [f"f{i % 5}" for i in range(16)], "view": [f"v{i}" for i in range(16)]}
    assert sum(map(len, candidates(enough).values())) == 26


def test_too_few_labels_are_refused() -> None:
    """Catches a stress test of five labels."""
    with pytest.raises(UserError, match="too few"):
        candidates({"modality": ["CT", "MRI"], "anatomy": ["head", "knee"], "finding": ["", ""]})
    with pytest.raises(UserError, match="anatomy"):
        candidates({"modality": ["CT", "MRI"]})
