"""Temperatures, floors and thresholds, chosen on kept-back pairs."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from clip_medical.data.batches import Pairs
from clip_medical.data.dataset import load_data
from clip_medical.data.fragments import fragments
from clip_medical.data.splits import Split
from clip_medical.errors import UserError
from clip_medical.evaluation.calibration import calibrate
from clip_medical.evaluation.classification import best_threshold
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.zero_shot import class_cosines, class_scores, multilabel_scores, refused, scores_at
from clip_medical.model import CAPTIONS, NONE, Clip, load_clip


def kept_back(clip: Clip, labels: dict[str, list[str]], count: int) -> Pairs:
    """Noise images with captions of their own and the given labels."""
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (count, 3, 112, 112), dtype=torch.uint8, generator=generator)
    captions = [f"image {row}" for row in range(count)]
    ids, lengths = clip.processor.tokens(captions)
    rows = torch.arange(count)
    return Pairs(
        pixels, ids, lengths, rows, rows, Split(captions, captions, labels, list[Image.Image]().__getitem__, captions)
    )


def test_scale_and_offsets_are_those_of_least_cross_entropy() -> None:
    """Catches a temperature where its inverse is meant, a fit that stops early, and numbers that are fitted but not
    used; a frequent class that stays too improbable."""
    clip, classes = load_clip(), ["CT", "MRI", "X-ray"]
    names = ["CT", "MRI", "X-ray", "", "CT", "CT"] * 6
    pairs = kept_back(clip, {"modality": names}, 36)
    chosen = calibrate(clip, pairs)["modality"]
    known = torch.tensor([name != "" for name in names])
    images, truth = encode(clip, pairs)[0][known], torch.tensor([classes.index(name) for name in names if name])
    cosines, offsets = class_cosines(clip, "modality", classes, images), torch.tensor(list(chosen["offsets"].values()))

    def loss(factor: float, shift: list[float]) -> float:
        moved = offsets + torch.tensor(shift)
        logits = scores_at(chosen["scale"] * factor, cosines) + moved
        return (F.cross_entropy(logits, truth) + moved.square().sum() / (2 * len(truth))).item()

    others = [loss(factor, [0, 0, 0]) for factor in (0.9, 1.1)] if chosen["scale"] > 1 else []
    others += [loss(1, [s * (i == c) for i in range(3)]) for s in (-0.1, 0.1) for c in range(3)]
    assert loss(1, [0, 0, 0]) < min(others)
    assert list(chosen["offsets"]) == classes
    shares = (scores_at(chosen["scale"], cosines) + offsets).softmax(dim=1).mean(dim=0)
    torch.testing.assert_close(shares, torch.tensor([0.6, 0.2, 0.2]), atol=0.02, rtol=0)  # CT is three fifths
    expected = scores_at(chosen["scale"], cosines)[:, [0, 2]] + offsets[[0, 2]]
    torch.testing.assert_close(class_scores(clip, "modality", ["CT", "X-ray"], images), expected)
    unknown = class_scores(clip, "modality", ["CT", "PET"], images)[:, 1]  # no offset was fitted
    torch.testing.assert_close(
        unknown, scores_at(chosen["scale"], class_cosines(clip, "modality", ["PET"], images))[:, 0]
    )


def test_thresholds_are_chosen_on_rows_with_a_label() -> None:
    """Catches an unlabelled row counted as without findings, and thresholds of exclusive classes."""
    clip = load_clip()
    labels = {"finding": ["cyst|mass", "cyst", "mass", "", "fracture"], "modality": ["CT", "MRI", "CT", "CT", "MRI"]}
    pairs = kept_back(clip, labels, 5)
    chosen = calibrate(clip, pairs)
    assert chosen == clip.calibration and set(chosen["modality"]) == {"scale", "floor", "offsets"}
    images = encode(clip, pairs)[0]
    scores = multilabel_scores(clip, "finding", ["cyst", "fracture", "mass"], images)
    known = torch.tensor([0, 1, 2, 4])
    truth = {"cyst": [1, 1, 0, 0], "fracture": [0, 0, 0, 1], "mass": [1, 0, 1, 0]}
    for column, (label, present) in enumerate(truth.items()):
        expected = best_threshold(scores[known, column], torch.tensor(present).float())
        assert chosen["finding"]["thresholds"][label] == pytest.approx(expected, abs=1e-5)


def test_the_floor_of_own_labels_is_that_of_short_texts() -> None:
    """Catches a floor chosen on whole captions, which refuses most images of the data where labels are short."""
    clip = load_clip()
    pairs = kept_back(clip, {}, 40)
    floor = calibrate(clip, pairs)[CAPTIONS]["floor"]
    images, captions = encode(clip, pairs)
    tokens, lengths = fragments(pairs.tokens, pairs.lengths, pairs.kinds, 0, 0)
    short = (images * encode(clip, replace(pairs, tokens=tokens, lengths=lengths))[1]).sum(dim=1)
    assert (short < floor).float().mean() == pytest.approx(0.05) and not torch.equal(tokens, pairs.tokens)


def test_an_image_below_the_floor_is_none_of_these() -> None:
    """Catches a photograph of something else that is diagnosed with confidence, and a floor that refuses everything."""
    clip = load_clip()
    labels = ["CT of the head", "X-ray of the chest"]
    image = Image.new("L", (112, 112), 90)
    with pytest.raises(UserError, match="not calibrated"):
        clip.classify(image, labels, or_none=True)
    cosines = (clip.encode_images(image) @ clip.encode_texts(labels).T)[0]
    for floor, is_none in ((cosines.max().item() + 0.01, True), (cosines.max().item() - 0.01, False)):
        clip.calibration = {CAPTIONS: {"scale": 20.0, "floor": floor}, "modality": {"scale": 20.0, "floor": floor}}
        answer = clip.classify(image, labels, or_none=True)
        assert sum(answer.values()) == pytest.approx(1)
        assert (max(answer, key=lambda label: answer[label]) == NONE) == is_none
    clip.calibration["modality"]["floor"] = 1.0
    assert refused(clip, "modality", torch.tensor([[[0.9, 0.2]], [[0.2, 1.1]]])).tolist() == [1, 0]


def test_a_tenth_of_the_training_rows_is_kept_back_by_patient(tmp_path: Path) -> None:
    """Catches a patient on both sides of the calibration, kept-back rows that are trained on, and few rows split."""
    for row in range(600):
        Image.new("L", (2, 2), row % 256).save(tmp_path / f"{row}.png")
    lines = [f"{row}.png,caption {row},patient {row // 3}" for row in range(600)]
    (tmp_path / "t.csv").write_text("\n".join(["image,caption,patient", *lines]))
    data = load_data(str(tmp_path / "t.csv"))
    parts = [set(split.captions) for split in (data.train, data.validation, data.calibration)]
    assert sum(map(len, parts)) == len(set.union(*parts)) == 600 and 50 <= len(parts[2]) <= 54
    patients = [set(split.groups) for split in (data.train, data.validation, data.calibration)]
    assert sum(map(len, patients)) == len(set.union(*patients))
    (tmp_path / "t.csv").write_text("\n".join(["image,caption,patient", *lines[:200]]))
    assert len(load_data(str(tmp_path / "t.csv")).calibration) == 0
