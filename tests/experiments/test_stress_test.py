"""The joint list, worked by hand."""

import pytest
import torch

from clip_medical.data.sources import Split
from clip_medical.errors import UserError
from experiments.stress_test import joint, labels_of, truths


def split(**labels: list[str]) -> Split:
    rows = len(next(iter(labels.values())))
    names = [str(r) for r in range(rows)]
    return Split(["x"] * rows, names, labels, lambda row: None, names)  # type: ignore[arg-type, return-value]


def test_top_5_by_hand() -> None:
    """Catches the number of a class within its facet used as its place in the list, and the two facets in one hit."""
    # 2 modalities, 8 anatomies; row 0: modality 1 leads, anatomy 7 is sixth; row 1: anatomy not known
    scores = torch.tensor([[0.0, 1, 0.9, 0.8, 0.7, 0.6, 0.1, 0.1, 0.2, 0.5], [0.9, 1, 0, 0, 0, 0, 0, 0, 0, 0]])
    truth = {"modality": torch.tensor([1, 0]), "anatomy": torch.tensor([7, -1])}
    found = joint(scores, truth, {"modality": 0, "anatomy": 2})
    assert found["modality"]["value"] == 1 and found["modality"]["n"] == 2
    assert found["anatomy"]["value"] == 0 and found["anatomy"]["n"] == 1
    assert found["both"]["value"] == 0 and found["both"]["n"] == 1
    assert found["modality"]["chance"] == 0.5 and found["both"]["chance"] == pytest.approx(0.5 * 4 / 9)
    truth["anatomy"][0] = 3  # fifth
    assert joint(scores, truth, {"modality": 0, "anatomy": 2})["both"]["value"] == 1


def test_chance_is_what_random_scores_reach() -> None:
    """Catches the chance of one label given for both, as the unadapted model would look good beside it."""
    scores = torch.rand(20_000, 26, generator=torch.Generator().manual_seed(0))
    truth = {"modality": torch.zeros(20_000, dtype=torch.long), "anatomy": torch.ones(20_000, dtype=torch.long)}
    found = joint(scores, truth, {"modality": 0, "anatomy": 4})
    for row in found.values():
        assert row["value"] == pytest.approx(row["chance"], abs=0.01)


def test_distractors_are_labels_that_no_picture_has() -> None:
    """Catches a distractor that is true of some pictures, and distractors where the data have labels enough."""
    data = split(
        modality=["CT", "pet"] * 8, anatomy=["foot", "head"] * 7 + ["", "knee"], finding=[f"f{i}" for i in range(16)]
    )
    found = labels_of(data)  # 2 + 3 + 16 of the data, then as many as make 24
    assert {facet: len(names) for facet, names in found.items()} == {"modality": 2, "anatomy": 4, "finding": 18}
    found = labels_of(data, every_distractor=True)
    assert [name for name in found["modality"] if name.lower() == "pet"] == ["pet"]
    assert found["anatomy"].count("foot") == 1 and "" not in found["anatomy"]
    right = truths(data, found)
    assert right["anatomy"][14] == -1
    assert all(found[facet][right[facet][0]] == data.labels[facet][0] for facet in right)
    data.labels["finding"] = [f"f{i % 5}" for i in range(16)]
    assert sum(map(len, labels_of(split(**data.labels, view=[f"v{i}" for i in range(16)])).values())) == 26


def test_too_few_labels_are_refused() -> None:
    """Catches a stress test with five labels in it."""
    with pytest.raises(UserError, match="too few"):
        labels_of(split(modality=["CT", "MRI"], anatomy=["head", "knee"], finding=["", ""]))
    with pytest.raises(UserError, match="anatomy"):
        labels_of(split(modality=["CT", "MRI"]))
