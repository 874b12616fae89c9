"""The search experiment: index, add, query."""

import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from clip_medical.data.synthetic.phantoms import phantom
from tests.experiments.tools import Command, results


def test_index_add_and_query(
    finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an image that is not its own nearest neighbour, and sources that overwrite each other in the index."""
    images = tmp_path / "images" / "deep"
    images.mkdir(parents=True)
    for row in range(3):
        phantom(5, "other", row).image.save(images / f"{row}.png")
    (images / "notes.txt").write_text("not an image")
    (images / "broken.jpg").write_bytes(b"")
    flags = ("--run", finished, "--output", tmp_path / "out")
    assert command("search", *flags, "--add", "validation", tmp_path / "images") == 0
    printed = capsys.readouterr().out
    assert f"validation, {tmp_path / 'images'}: 43 images added, 0 already indexed, 0 duplicates" in printed
    assert "1 unreadable" in printed and "holds 43 images" in printed

    assert command("search", *flags, "--add", tmp_path / "images", "--image", images / "1.png", "--k", 2) == 0
    printed = capsys.readouterr().out
    assert "0 images added, 3 already indexed" in printed and "deep/1.png" in printed
    hits = results(tmp_path / "out", "search")["results"]["hits"]
    for model in ("unadapted", "adapted"):
        assert hits[model][0]["name"] == "deep/1.png" and hits[model][0]["score"] == pytest.approx(1, abs=1e-5)
        assert len(hits[model]) == 2

    assert command("search", *flags, "--text", "MRI of the knee") == 0
    content = results(tmp_path / "out", "search")["results"]
    assert content["query"] == "MRI of the knee" and content["images in the index"] == 43
    assert len(content["hits"]["adapted"]) == 5 and content["hits"]["adapted"] != content["hits"]["unadapted"]
    with Image.open(tmp_path / "out" / "search.png") as figure:
        assert figure.width > 500


@pytest.mark.slow
def test_processes_share_the_images(finished: Path, tmp_path: Path) -> None:
    """Catches images that no process of torchrun encodes, or two; images found twice; and lines printed by each."""
    images = tmp_path / "images"
    images.mkdir()
    for row in range(6):
        phantom(5, "other", row).image.save(images / f"{row}.png")
    phantom(5, "other", 0).image.save(images / "9.png")  # the same image, in the share of the other process
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "--"]
    flags = ["experiments.search", "--run", str(finished), "--output", str(tmp_path), "--add", str(images)]
    query = ["--image", str(images / "4.png"), "--k", "9"]
    for added, known in ((6, 0), (0, 6)):
        run = subprocess.run([*torchrun, *flags, *query], capture_output=True, text=True, check=True)
        assert f"{added} images added, {known} already indexed, 1 duplicates, 0 unreadable" in run.stdout
        assert run.stdout.count("holds 6 images") == 1
        hits = results(tmp_path, "search")["results"]["hits"]["adapted"]
        assert hits[0]["name"] == "4.png" and {hit["name"] for hit in hits} <= {f"{row}.png" for row in range(10)}
        assert len(hits) == 6
    assert {file.stem[-2:] for file in (tmp_path / "index").glob("part-*.parquet")} == {"-0", "-1"}
