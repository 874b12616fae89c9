"""Build, add, search: as a person does it."""

from pathlib import Path

import pytest
from PIL import Image

from clip_medical.data.phantoms import phantom
from tests.experiments.tools import Command, results


def test_build_add_and_search(
    finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a picture that does not find itself, and sources that overwrite each other."""
    pictures = tmp_path / "pictures" / "deep"
    pictures.mkdir(parents=True)
    for row in range(3):
        phantom(5, "other", row).image.save(pictures / f"{row}.png")
    (pictures / "notes.txt").write_text("not a picture")
    (pictures / "broken.jpg").write_bytes(b"")
    to = ("--run", finished, "--output", tmp_path / "out")
    assert command("search", *to, "--add", "held-out", tmp_path / "pictures") == 0
    printed = capsys.readouterr().out
    assert "held-out: 40 pictures added" in printed and "3 pictures added, 0 were there" in printed
    assert "1 could not be read" in printed and "holds 43 pictures" in printed
    assert command("search", *to, "--add", tmp_path / "pictures", "--image", pictures / "1.png", "--k", 2) == 0
    printed = capsys.readouterr().out
    assert "0 pictures added, 3 were there already" in printed and "deep/1.png" in printed
    found = results(tmp_path / "out", "search")["results"]["hits"]
    for model in ("unadapted", "adapted"):
        assert found[model][0]["name"] == "deep/1.png" and found[model][0]["score"] == pytest.approx(1, abs=1e-5)
        assert len(found[model]) == 2
    assert command("search", *to, "--text", "MRI of the knee") == 0
    found = results(tmp_path / "out", "search")["results"]
    assert found["query"] == "MRI of the knee" and found["pictures in the index"] == 43
    assert len(found["hits"]["adapted"]) == 5 and found["hits"]["adapted"] != found["hits"]["unadapted"]
    with Image.open(tmp_path / "out" / "search.png") as figure:
        assert figure.width > 500
