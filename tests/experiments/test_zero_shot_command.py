"""The zero-shot experiment: one image with labels of the user, and one task on a data set."""

from pathlib import Path

import pytest

from clip_medical import load_run
from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.model import NONE
from experiments.zero_shot import comparable
from tests.experiments.tools import Command, results


def test_one_image_with_labels_of_the_user(
    finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches probabilities of the base reported as those of the adapted model, and a table that is not sorted."""
    image, labels = tmp_path / "image.png", ["X-ray of the chest", "CT of the head", "nothing at all"]
    phantom(0, "test", 0).image.save(image)
    assert command("zero_shot", "--run", finished, "--output", tmp_path, "--image", image, "--labels", *labels) == 0
    probabilities = results(tmp_path, "zero_shot_image")["results"]["probabilities"]
    assert probabilities["adapted"] == pytest.approx(
        load_run(finished).classify(phantom(0, "test", 0).image, labels, or_none=True)
    )
    assert probabilities["adapted"] != probabilities["unadapted"]
    assert sum(probabilities["unadapted"].values()) == pytest.approx(1)
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:6]]
    assert rows == sorted([*labels, NONE], key=lambda label: -probabilities["adapted"][label])
    assert (tmp_path / "zero_shot_image.png").stat().st_size > 5000


def test_one_task_on_the_images_of_its_classes(finished: Path, tmp_path: Path, command: Command) -> None:
    """Catches images of other classes counted as wrong: an X-ray has no place in CT against MRI."""
    flags = ("--facet", "modality", "--classes", "MRI", "CT")
    assert command("zero_shot", "--run", finished, "--output", tmp_path, *flags) == 0
    content = results(tmp_path, "zero_shot")
    report = content["results"]["adapted"]
    assert list(report) == ["modality"] and report["modality"]["classes"] == ["MRI", "CT"]
    assert report["modality"]["n"] < content["data"]["validation pairs"]
    assert report["modality"]["auroc"]["chance"] == 0.5
    assert report["modality"]["n"] == sum(map(sum, report["modality"]["confusion"]))


def test_classes_are_compared_within_examinations() -> None:
    """Catches normal ultrasound images among those that are to show no pneumonia: telling ultrasound from X-ray, which
    says nothing about the lungs, would look like a diagnosis."""
    labels = {
        "modality": ["X-ray", "X-ray", "ultrasound", "CT", "CT", "X-ray"],
        "anatomy": ["chest", "chest", "chest", "chest", "chest", "knee"],
        "finding": ["consolidation", "normal", "normal", "normal", "consolidation", "normal"],
    }
    kept = comparable(labels, "finding", ["consolidation", "normal"])
    assert kept["finding"] == ["consolidation", "normal", "", "normal", "consolidation", ""]
    assert comparable({"finding": ["a", "b"]}, "finding", ["a", "b"]) == {"finding": ["a", "b"]}


def test_a_prepared_question(finished: Path, tmp_path: Path, command: Command) -> None:
    """Catches a question that measures other images than those of its classes, or overwrites another's results."""
    flags = ("--run", finished, "--output", tmp_path, "--split", "test", "--limit", "500")
    assert command("zero_shot", *flags, "--question", "head-or-spine") == 0
    report = results(tmp_path, "head-or-spine")["results"]["adapted"]["anatomy"]
    assert report["classes"] == ["head", "lumbar spine"] and 40 < report["n"] < 140
    assert {"sensitivity", "specificity", "threshold chosen on"} <= report.keys()
    assert (tmp_path / "head-or-spine_two_classes.png").stat().st_size > 5000
    assert command("zero_shot", *flags, "--question", "head-or-spine", "--facet", "anatomy") == 2


def test_the_evidence_is_drawn(finished: Path, tmp_path: Path, command: Command) -> None:
    """Catches --evidence without a figure."""
    phantom(0, "test", 0).image.save(tmp_path / "image.png")
    flags = ("--run", finished, "--output", tmp_path, "--image", tmp_path / "image.png", "--evidence")
    assert command("zero_shot", *flags, "--labels", "mass", "cyst") == 0
    assert (tmp_path / "zero_shot_evidence.png").stat().st_size > 5000
    assert command("zero_shot", *flags, "--labels", "mass") == 2
