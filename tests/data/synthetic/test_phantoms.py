"""Synthetic images: deterministic, with true captions, and with the signal models that their modalities claim."""

import collections
import hashlib
import itertools

import numpy as np
import pytest
from PIL import ImageFilter

from clip_medical.data.synthetic import Example, phantoms, scanners, shapes
from clip_medical.data.synthetic.phantoms import BODIES, EXAMINATIONS, FINDINGS, describe, phantom
from clip_medical.data.synthetic.scanners import AXIAL, CORONAL, MODALITIES, SAGITTAL, Ellipsoid
from clip_medical.data.synthetic.shapes import scene


def indices(labels: dict[str, str], count: int = 1) -> list[int]:
    """Return the first test phantoms with these labels."""
    matches = (i for i in itertools.count() if labels.items() <= describe(7, "test", i)[1].items())
    return list(itertools.islice(matches, count))


def grey_levels(index: int) -> np.ndarray:
    return np.asarray(phantom(7, "test", index).image, dtype=float)


def caption_hash(examples: list[Example]) -> str:
    return hashlib.sha256("\n".join(example.caption for example in examples).encode()).hexdigest()[:16]


def mean_levels(examples: list[Example]) -> list[float]:
    """Return the mean grey level of each image, with weights that rise from 0 at the top to 2 at the bottom.

    Single pixels can differ between CPUs in the last bit. The weights make the mean depend on displacements too.
    """
    pixels = np.array([np.asarray(example.image.convert("L"), dtype=float) for example in examples])
    weights = np.linspace(0, 2, pixels.shape[1])[:, None]
    levels: list[float] = (pixels * weights).mean(axis=(1, 2)).round(2).tolist()
    return levels


# ---- determinism


def test_equal_arguments_give_equal_phantoms() -> None:
    """Catches hidden global random state, and Python's salted hash() in the seed."""
    first, second = phantom(3, "train", 5), phantom(3, "train", 5)
    assert first.image.tobytes() == second.image.tobytes() and first.caption == second.caption
    assert first.caption == (  # recorded in another process
        "Computed tomography of the chest in axial view, soft-tissue window: pleural effusion on the right side."
    )
    assert phantom(4, "train", 5).image.tobytes() != first.image.tobytes()


def test_splits_share_no_phantom() -> None:
    """Catches a validation split that repeats the training split."""
    train, validation = ({phantom(0, split, i).image.tobytes() for i in range(40)} for split in ("train", "validation"))
    assert len(train) == 40 and not train & validation


def test_a_changed_phantom_needs_a_new_version() -> None:
    """Catches image caches that keep outdated phantoms, because VERSION was not raised."""
    recorded_version, recorded_captions = 2, "d4ba38f74d4dc434"
    recorded_levels = """
        145.31 91.81 44.00 111.54 37.95 111.71 72.41 66.86 68.39 48.08 117.78 70.81 62.75 71.87 77.89 58.52
        49.54 51.39 72.18 42.62 24.85 49.49 93.58 67.19 41.81 74.82 79.12 95.38 37.12 73.26 139.93 145.59
        107.11 108.37 63.19 99.11 51.07 32.59 57.41 62.21 54.89 100.91 80.14 114.46 91.07 50.15 60.20 99.02
        47.59 70.36 51.27 37.54 127.90 103.89 126.21 68.20 96.56 58.39 78.48 40.99 65.73 64.67 110.40 76.02
    """
    examples = [phantom(0, "test", i) for i in range(64)]
    captions, levels = caption_hash(examples), mean_levels(examples)
    message = f"The phantoms have changed. Raise VERSION in phantoms.py and record: {captions} {levels}"
    assert captions == recorded_captions, message
    assert levels == pytest.approx([float(level) for level in recorded_levels.split()], abs=0.05), message
    assert phantoms.VERSION == recorded_version, "VERSION has changed. Record the new number here."


def test_a_changed_scene_needs_a_new_version() -> None:
    """Catches image caches that keep outdated scenes, because VERSION was not raised."""
    recorded_version, recorded_captions = 1, "a90daee015825b16"
    recorded_levels = """
        145.41 69.38 111.57 125.68 68.58 169.11 146.30 62.25 126.67 140.29 82.89 131.55 67.42 162.32 113.91 161.39
        135.96 82.54 70.63 136.07 120.70 75.24 58.44 104.83 132.78 163.63 159.95 70.78 156.90 88.05 86.27 104.13
        67.61 76.96 142.56 122.32 125.63 166.13 169.57 67.62 163.44 137.66 155.02 141.73 133.66 168.17 87.09 64.65
        188.35 130.61 73.10 154.46 23.27 54.21 158.61 158.90 157.57 139.62 82.36 111.39 101.26 161.09 72.30 62.93
    """
    examples = [scene(0, "test", i) for i in range(64)]
    captions, levels = caption_hash(examples), mean_levels(examples)
    message = f"The scenes have changed. Raise VERSION in shapes.py and record: {captions} {levels}"
    assert captions == recorded_captions, message
    assert levels == pytest.approx([float(level) for level in recorded_levels.split()], abs=0.05), message
    assert shapes.VERSION == recorded_version, "VERSION has changed. Record the new number here."


# ---- captions and labels


def test_describe_agrees_with_phantom() -> None:
    """Catches captions drawn from other random numbers than the image."""
    for index in range(5):
        assert describe(0, "train", index) == phantom(0, "train", index)[1:]


def test_every_combination_occurs() -> None:
    """Catches a modality, anatomy or finding that is listed but never drawn."""
    combinations = collections.Counter(
        (labels["modality"], labels["anatomy"], labels["finding"])
        for labels in (describe(0, "train", i)[1] for i in range(4000))
    )
    normal = [(m, a, "no abnormality") for m, anatomies in EXAMINATIONS.items() for a in anatomies]
    assert set(combinations) == {*EXAMINED, *normal} and {f for _, _, f in combinations} == set(FINDINGS)
    assert {m for m, _, _ in combinations} == set(MODALITIES) and {a for _, a, _ in combinations} == set(BODIES)


def test_captions_state_the_labels() -> None:
    """Catches a template that omits a label, and a side stated in a view that cannot show it."""
    for index in range(400):
        caption, labels = describe(0, "train", index)
        text, modality = caption.lower(), MODALITIES[labels["modality"]]
        assert labels["anatomy"] in text and labels["view"] in text and labels["technique"].lower() in text
        assert any(term.lower() in text for term in modality.terms)
        assert labels["finding"] == "no abnormality" or any(phrase in text for phrase in FINDINGS[labels["finding"]])
        assert labels["place"] in text and labels["size"] in text
        assert ("left" in text or "right" in text) == (labels["place"] in ("left", "right"))
        if labels["view"] == list(modality.views)[1]:
            assert labels["place"] in ("upper", "lower", "")
        assert not (labels["finding"] == "cardiomegaly" and labels["place"])


def test_scenes_state_their_labels() -> None:
    """Catches scene captions that contradict the image's labels, and hidden random state in scenes."""
    assert scene(0, "test", 3).image.tobytes() == scene(0, "test", 3).image.tobytes()
    for index in range(50):
        _, caption, labels = scene(0, "test", index)
        assert labels["shape"] in caption and labels["colour"] in caption and labels["texture"] in caption


# ---- what the images show


@pytest.mark.parametrize("modality", list(MODALITIES))
def test_a_lesion_on_the_left_appears_on_the_right_of_the_image(modality: str) -> None:
    """Catches mirrored images, by the difference from the same patient without the finding."""
    labels = {"modality": modality, "view": list(MODALITIES[modality].views)[0]}
    half = scanners.SIZE // 2
    for place in ("left", "right"):
        spread = np.zeros(2)  # of the differences in either half of the image
        for index in indices(labels | {"place": place}, 8):
            healthy = np.asarray(phantom(7, "test", index, healthy=True).image, dtype=float)
            difference = grey_levels(index) - healthy  # everywhere, where the display window has changed
            spread += difference[:, :half].std(), difference[:, half:].std()
        assert (spread[0] < spread[1]) == (place == "left")


EXAMINED = [(m, a, f) for m, of in EXAMINATIONS.items() for a, findings in of.items() for f in findings]


@pytest.mark.parametrize(("modality", "anatomy", "finding"), EXAMINED)
def test_findings_are_visible(modality: str, anatomy: str, finding: str) -> None:
    """Catches a finding outside the slice, the body or the display window: an image is unlike its healthy twin."""
    labels = {"modality": modality, "anatomy": anatomy, "finding": finding}
    seen = []
    for index in indices(labels, 4):
        images = phantom(7, "test", index).image, phantom(7, "test", index, healthy=True).image
        smooth = [np.asarray(image.filter(ImageFilter.BoxBlur(2)), dtype=float) for image in images]
        seen.append((np.abs(smooth[0] - smooth[1]) > 15).sum())
    assert np.median(seen) >= 40  # of 16,384 pixels; noise alone gives none


def test_a_healthy_twin_is_the_same_patient() -> None:
    """Catches a twin in another position, with which the difference of two images would not show the finding."""
    (index,) = indices({"finding": "no abnormality", "modality": "MRI"})
    assert phantom(7, "test", index).image == phantom(7, "test", index, healthy=True).image
    (index,) = indices({"finding": "calcification", "modality": "CT", "size": "small"})
    images = [np.asarray(phantom(7, "test", index, healthy=healthy).image) for healthy in (False, True)]
    assert 0 < (images[0] != images[1]).mean() < 0.05


def test_normal_images_deny_findings() -> None:
    """Catches normal captions that name no finding, so that a model could take any mention for a finding."""
    denied: collections.Counter[str] = collections.Counter()
    for index in range(3000):
        caption, labels = describe(0, "train", index)
        if labels["finding"] == "no abnormality":
            named = [f for f in EXAMINATIONS[labels["modality"]][labels["anatomy"]] if f in caption.lower()]
            denied.update(named)
            assert not named or any(word in caption.lower() for word in ("no ", "without "))
    assert set(denied) == {finding for _, _, finding in EXAMINED}


# ---- acquisition physics


def test_xray_integrates_along_the_ray() -> None:
    """Catches a projection that ignores depth: the film of a sphere follows the length of its chords."""
    sphere = [Ellipsoid("muscle", "air", (0.0, 0.0, 0.0), (0.6, 0.9, 0.6))]
    rngs = [np.random.default_rng(i) for i in range(40)]
    film = np.mean([scanners.xray(sphere, CORONAL, 0, "standard exposure", rng) for rng in rngs], axis=0)
    centre = film[60:68, 60:68].mean()
    off_centre = film[60:68, [64 + 28, 64 - 28]].mean()  # at 0.45 of half the field of view, 0.75 of the radius
    assert off_centre / centre == pytest.approx((1 - 0.75**2) ** 0.5, abs=0.12)


def test_ct_shows_hounsfield_units_in_a_window() -> None:
    """Catches exchanged window level and width: fluid of 5 HU has the grey level (5 - 40) / 400 + 1/2."""
    fluid = [Ellipsoid("fluid", "air", (0.0, 0.0, 0.0), (0.7, 0.7, 0.7))]
    image = scanners.ct(fluid, SAGITTAL, 0, "soft-tissue window", np.random.default_rng(0))
    assert image[54:74, 54:74].mean() == pytest.approx(0.5 + (5 - 40) / 400, abs=0.01)
    assert image[0, 0] == 0  # air


@pytest.mark.parametrize(("weighting", "fluid_is_bright"), [("T1-weighted", False), ("T2-weighted", True)])
def test_fluid_is_dark_on_t1_and_bright_on_t2(weighting: str, fluid_is_bright: bool) -> None:
    """Catches exchanged echo and repetition times."""
    body = [
        Ellipsoid("muscle", "air", (0.0, 0.0, 0.0), (0.8, 0.8, 0.8)),
        Ellipsoid("fluid", "muscle", (0.0, 0.0, 0.0), (0.3, 0.3, 0.3)),
    ]
    image = scanners.mri(body, CORONAL, 0, weighting, np.random.default_rng(1))
    assert (image[58:70, 58:70].mean() > image[58:70, 20:30].mean()) == fluid_is_bright


def test_mri_noise_is_rician() -> None:
    """Catches Gaussian noise: in air the magnitude is Rayleigh distributed, with mean / std = sqrt(pi / (4 - pi))."""
    fat = [Ellipsoid("fat", "air", (0.0, 0.0, 0.0), (0.5, 0.5, 0.5))]
    air = scanners.mri(fat, CORONAL, 0, "T1-weighted", np.random.default_rng(0))[:12]
    assert air.min() >= 0 and air.mean() / air.std() == pytest.approx((np.pi / (4 - np.pi)) ** 0.5, rel=0.05)


def test_ultrasound_has_shadows_and_enhancement() -> None:
    """Catches attenuation that is applied to the absorbing tissue but not to what lies below it."""

    def mean_below(tissue: str) -> float:
        body = [
            Ellipsoid("muscle", "air", (0.0, 0.0, 0.0), (1.5, 0.8, 1.5)),
            Ellipsoid(tissue, "muscle", (0.0, -0.3, 0.0), (0.25, 0.12, 0.25)),
        ]
        image = scanners.ultrasound(body, AXIAL, 0, "linear probe", np.random.default_rng(0))
        return float(image[64:90, 58:70].mean())

    assert mean_below("bone") < 0.75 * mean_below("muscle")
    assert mean_below("muscle") < mean_below("fluid")
