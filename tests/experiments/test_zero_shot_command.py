"""One picture with labels that the user types, and one question about a set."""

from pathlib import Path

import pytest

from clip_medical import load_run
from clip_medical.data.phantoms import phantom
from tests.experiments.tools import Command, results


def test_one_picture_with_labels_of_the_user(
    finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches probabilities of the base given for those of the adapter, and a table in another order than the bars."""
    picture, labels = tmp_path / "picture.png", ["X-ray of the chest", "CT of the head", "nothing at all"]
    phantom(0, "test", 0).image.save(picture)
    assert command("zero_shot", "--run", finished, "--output", tmp_path, "--image", picture, "--labels", *labels) == 0
    found = results(tmp_path, "zero_shot_image")["results"]["probabilities"]
    assert found["adapted"] == pytest.approx(load_run(finished).classify(phantom(0, "test", 0).image, labels))
    assert found["adapted"] != found["unadapted"] and sum(found["unadapted"].values()) == pytest.approx(1)
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert rows == sorted(labels, key=lambda label: -found["adapted"][label])
    assert (tmp_path / "zero_shot_image.png").stat().st_size > 5000


def test_one_question_over_the_pictures_that_it_is_about(finished: Path, tmp_path: Path, command: Command) -> None:
    """Catches pictures of other classes counted as wrong: CT against MRI says nothing about an X-ray."""
    flags = ("--facet", "modality", "--classes", "MRI", "CT")
    assert command("zero_shot", "--run", finished, "--output", tmp_path, *flags) == 0
    found = results(tmp_path, "zero_shot")
    report = found["results"]["adapted"]
    assert list(report) == ["modality"] and report["modality"]["classes"] == ["MRI", "CT"]
    assert report["modality"]["n"] < found["data"]["held-out pairs"] and report["modality"]["auroc"]["chance"] == 0.5
    assert report["modality"]["n"] == sum(map(sum, report["modality"]["confusion"]))
