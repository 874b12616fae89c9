"""The zero-shot experiment: one image with labels of the user, and one task on a data set."""

from pathlib import Path

import pytest

from clip_medical import load_run
from clip_medical.data.synthetic.phantoms import phantom
from tests.experiments.tools import Command, results


def test_one_image_with_labels_of_the_user(
    finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches probabilities of the base reported as those of the adapted model, and a table that is not sorted."""
    image, labels = tmp_path / "image.png", ["X-ray of the chest", "CT of the head", "nothing at all"]
    phantom(0, "test", 0).image.save(image)
    assert command("zero_shot", "--run", finished, "--output", tmp_path, "--image", image, "--labels", *labels) == 0
    probabilities = results(tmp_path, "zero_shot_image")["results"]["probabilities"]
    assert probabilities["adapted"] == pytest.approx(load_run(finished).classify(phantom(0, "test", 0).image, labels))
    assert probabilities["adapted"] != probabilities["unadapted"]
    assert sum(probabilities["unadapted"].values()) == pytest.approx(1)
    rows = [line.split("  ")[0] for line in capsys.readouterr().out.splitlines()[2:5]]
    assert rows == sorted(labels, key=lambda label: -probabilities["adapted"][label])
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
