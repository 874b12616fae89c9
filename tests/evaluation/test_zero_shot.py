"""Zero-shot classification: prompts to features to scores, by hand, and on uninformative features."""

import pytest
import torch
import torch.nn.functional as F

from clip_medical import load_clip
from clip_medical.evaluation.zero_shot import (
    PROMPTS,
    class_features,
    class_scores,
    label_sets,
    prompts,
    ranks_in_list,
    zero_shot_report,
)
from clip_medical.model import Clip


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip()


def test_class_features_are_normalised_averaged_and_normalised(clip: Clip) -> None:
    """Catches the mean of unit vectors used as it is: features of classes with diverse prompts would be shorter."""
    for facet, names in {"anatomy": ["knee", "hand"], "finding": ["cyst", "pneumonia"]}.items():
        features = class_features(clip, facet, names)
        for row, name in zip(features, names, strict=True):
            for feature, group in zip(row, prompts(facet, name), strict=True):
                expected = clip.encode_texts(group).mean(dim=0)
                torch.testing.assert_close(feature, F.normalize(expected, dim=0), atol=1e-5, rtol=0)
        torch.testing.assert_close(features.norm(dim=2), torch.ones(features.shape[:2]))


def test_probabilities_of_groups_are_added(clip: Clip) -> None:
    """Catches an anatomy that is the mean of its X-ray, CT, MRI and ultrasound, and so describes no image."""
    names = ["knee", "hand", "chest"]
    groups = class_features(clip, "anatomy", names)
    images = F.normalize(groups[:, 3] + 0.3 * groups[:, 6], dim=1)
    of_groups = (clip.model.logit_scale.exp() * images @ groups.flatten(0, 1).T).softmax(dim=1)
    expected = of_groups.unflatten(1, groups.shape[:2]).sum(dim=2)
    torch.testing.assert_close(class_scores(clip, "anatomy", names, images).softmax(dim=1), expected)


def test_prompts_of_a_class() -> None:
    """Catches synonyms that are used for one spelling of the class only, and templates without a placeholder."""
    assert prompts("view", "frontal")[0][:2] == ["Frontal view.", "Frontal image."]
    assert ["Frontal knee X-ray.", "Frontal radiograph of the knee."] in prompts("anatomy", "knee")
    assert prompts("finding", "PNEUMONIA") == prompts("finding", "pneumonia")
    assert {"Pneumonia.", "Pulmonary infiltrate."} < set(prompts("finding", "Pneumonia")[0])
    for facet, groups in PROMPTS["templates"].items():
        assert all(template.count("{}") == 1 for group in groups for template in group), facet
    assert all(name == name.lower() for name in PROMPTS["synonyms"]), "classes are looked up in lower case"


def test_report_leaves_unknown_labels_out(clip: Clip) -> None:
    """Catches rows without a label counted as wrong, and an accuracy over all rows where that of classes is meant."""
    images = class_features(clip, "modality", ["CT", "MRI"])[[0, 0, 0, 1, 1], 0]
    labels = {"modality": ["CT", "CT", "MRI", "CT", ""], "unknown facet": ["a", "b", "a", "b", "a"]}
    report = zero_shot_report(clip, images, labels)
    assert list(report) == ["modality"] and report["modality"]["n"] == 4
    assert report["modality"]["accuracy"]["value"] == 0.5  # two of three CT are right, the one MRI is not
    assert report["modality"]["balanced_accuracy"]["value"] == pytest.approx((2 / 3 + 0) / 2)


def test_label_sets() -> None:
    """Catches uncertain labels as absent, and exclusive classes taken for label sets."""
    assert label_sets(["CT", "MRI", ""]) is None
    classes, truth = label_sets(["B|A", "A?", "", "B"]) or ([], torch.empty(0))
    assert classes == ["A", "B"]
    expected = torch.tensor([[1, 1], [float("nan"), 0], [0, 0], [0, 1]])
    torch.testing.assert_close(truth, expected, equal_nan=True)


def test_uninformative_features_have_no_accuracy(clip: Clip) -> None:
    """Catches argmax on ties and on NaN, which predicts the first class: right wherever that is the most frequent."""
    labels = {"modality": ["CT"] * 8 + ["MRI"] * 2}
    assert zero_shot_report(clip, torch.zeros(10, 128), labels)["modality"]["accuracy"]["value"] == 0
    with pytest.raises(ValueError, match="NaN"):
        zero_shot_report(clip, torch.full((10, 128), torch.nan), labels)


def test_probabilities_use_the_logit_scale_of_the_model(clip: Clip) -> None:
    """Catches a softmax over bare cosines, which is nearly uniform for every model."""
    classes = ["CT", "MRI", "X-ray"]
    features = class_features(clip, "modality", classes)[:, 0]
    cosines = features[:2] @ features.T
    expected = (clip.model.logit_scale.exp() * (cosines - 1)).exp()
    scores = class_scores(clip, "modality", classes, features[:2])
    torch.testing.assert_close(scores.softmax(dim=1), expected / expected.sum(dim=1, keepdim=True), rtol=1e-3, atol=0)


def test_constant_scores_never_rank_first() -> None:
    """Catches topk on ties, which returns the labels at the front of the list, and NaN, which would rank first."""
    assert ranks_in_list(torch.zeros(3, 30), torch.tensor([0, 4, 29])).tolist() == [29, 29, 29]
    with pytest.raises(ValueError, match="NaN"):
        ranks_in_list(torch.full((3, 30), torch.nan), torch.tensor([0, 4, 29]))
