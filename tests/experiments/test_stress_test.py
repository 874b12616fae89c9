"""The stress test: labels and distractors, and the joint list computed by hand."""

import pytest
import torch

from experiments.stress_test import candidates, joint_report


def test_top_5_by_hand() -> None:
    """Catches a hit in one facet counted for both."""
    scores = torch.tensor([[0.0, 1, 0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.2, 0.5]])
    # the modality in column 1 is first, the anatomy in column 9 is sixth
    columns = {"modality": torch.tensor([1]), "anatomy": torch.tensor([9])}
    report = joint_report(scores, columns)
    assert report["modality"]["value"] == 1 and report["anatomy"]["value"] == 0 and report["n"] == 1
    both = report["modality and anatomy"]
    assert both["value"] == 0 and both["chance"] == pytest.approx(0.5 * 4 / 9) and report["modality"]["chance"] == 0.5
    columns["anatomy"][0] = 5  # the fifth
    assert joint_report(scores, columns)["modality and anatomy"]["value"] == 1


def test_chance_level_is_the_accuracy_of_random_scores() -> None:
    """Catches the chance level of one label given for both, beside which the unadapted model would look good."""
    scores = torch.rand(20_000, 26, generator=torch.Generator().manual_seed(0))
    columns = {"modality": torch.zeros(20_000, dtype=torch.long), "anatomy": torch.full((20_000,), 5)}
    report = joint_report(scores, columns)
    for name in ("modality", "anatomy", "modality and anatomy"):
        assert report[name]["value"] == pytest.approx(report[name]["chance"], abs=0.01)


def test_distractors_are_no_labels_of_the_data() -> None:
    """Catches a distractor that is true of some images, and distractors added to data with enough labels."""
    labels = {
        "modality": ["CT", "pet"] * 8,
        "anatomy": ["foot", "head"] * 7 + ["", "knee"],
        "finding": [f"f{i}" for i in range(16)],
    }
    classes = candidates(labels)  # 2 + 3 + 16 of the data, and distractors up to 24
    assert {facet: len(names) for facet, names in classes.items()} == {"modality": 2, "anatomy": 4, "finding": 18}
    classes = candidates(labels | {"finding": ["f", ""]})  # all distractors
    assert [name for name in classes["modality"] if name.lower() == "pet"] == ["pet"]
    assert classes["anatomy"].count("foot") == 1 and "" not in classes["anatomy"]
    enough = labels | {"finding": [f"f{i % 5}" for i in range(16)], "view": [f"v{i}" for i in range(16)]}
    assert sum(map(len, candidates(enough).values())) == 26
