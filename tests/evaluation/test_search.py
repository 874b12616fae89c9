"""The index: what is found, what is not read twice, what is refused, and what an interruption leaves."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_medical import load_clip
from clip_medical.data.phantoms import phantom
from clip_medical.errors import UserError
from clip_medical.evaluation import search
from clip_medical.evaluation.search import Index, Item
from clip_medical.model import Clip
from lora import adapter_parameters, inject

PICTURES = [phantom(0, "search", row) for row in range(7)]


@pytest.fixture(scope="module")
def models() -> dict[str, Clip]:
    """A base, and an adapter of it that shows."""
    adapted = load_clip()
    inject(adapted.model)
    with torch.no_grad():
        for matrix in adapter_parameters(adapted.model):
            matrix.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return {"unadapted": load_clip(), "adapted": adapted}


def items(rows: range = range(7), source: str = "phantoms") -> list[Item]:
    return [
        Item(f"phantom {r}", source, PICTURES[r].caption, PICTURES[r].labels, lambda r=r: PICTURES[r].image)  # type: ignore[misc]
        for r in rows
    ]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PART", 3)


def test_search_finds_what_a_plain_product_finds(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches rows and features out of step across the parts, and one model's features taken for the other's."""
    assert Index(tmp_path / "index", models).add(items()).new == 7
    index = Index(tmp_path / "index", models)  # read from disk
    assert len(index) == 7 and len(index.parts) == 3
    for model, clip in models.items():
        features = clip.encode_images([p.image for p in PICTURES])
        query = clip.encode_texts(["CT of the head"])[0]
        found = index.search(model, query, k=4)
        scores, rows = (features @ query).topk(4)
        assert [hit.name for hit in found] == [f"phantom {row}" for row in rows.tolist()]
        assert [hit.score for hit in found] == pytest.approx(scores.tolist(), abs=1e-5)
        assert [hit.caption for hit in found] == [PICTURES[row].caption for row in rows.tolist()]
        itself = index.search(model, features[5], k=1)[0]
        assert itself.name == "phantom 5" and itself.score == pytest.approx(1, abs=1e-5)
    small = index.thumbnail(5).convert("L")
    assert small.size == (128, 128)
    difference = torch.tensor(list(small.tobytes())).sub(torch.tensor(list(PICTURES[5].image.tobytes())))
    assert difference.abs().float().mean() < 6  # that picture, as JPEG has it, and not a neighbour


def test_what_is_known_is_not_read_again(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches an index that grows by being built twice, and a second build as slow as the first."""
    Index(tmp_path, models).add(items(range(4)))

    def refuse() -> Image.Image:
        raise AssertionError("this picture was in the index already")

    again = [item._replace(open=refuse) for item in items(range(4))] + items(range(4, 7))
    added = Index(tmp_path, models).add(again)
    assert (added.new, added.known, added.duplicates) == (3, 4, 0)
    added = Index(tmp_path, models).add(items(source="the same under another name"))
    assert (added.new, added.known, added.duplicates) == (0, 0, 7) and len(Index(tmp_path, models)) == 7


def test_an_interrupted_build_goes_on(models: dict[str, Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a part that counts although its features were never written, and one that is begun again from nothing."""
    whole = search.save_file
    written: list[Path] = []

    def stop(features: dict[str, torch.Tensor], file: Path) -> None:
        if len(written) == 1:
            raise KeyboardInterrupt
        written.append(file)
        whole(features, file)

    monkeypatch.setattr(search, "save_file", stop)
    index = Index(tmp_path, models)
    with pytest.raises(KeyboardInterrupt):
        index.add(items())
    assert len(index) == 3 and len(list(tmp_path.glob("part-*.parquet"))) == 2  # the rows of the second were written
    monkeypatch.setattr(search, "save_file", whole)
    added = Index(tmp_path, models).add(items())
    assert (added.new, added.known) == (4, 3)
    assert [row["name"] for row in Index(tmp_path, models).rows] == [f"phantom {r}" for r in range(7)]


def test_one_bad_picture_does_not_end_the_build(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches an archive of 100,000 that stops at its one truncated file."""

    def broken() -> Image.Image:
        raise UserError("image x.png cannot be read: it is empty.")

    added = Index(tmp_path, models).add([*items(range(2)), items()[2]._replace(open=broken), *items(range(3, 5))])
    assert added.new == 4 and added.unreadable == ["image x.png cannot be read: it is empty."]


def test_features_of_other_weights_are_refused(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches queries of one model compared with features of another: plausible numbers, meaningless order."""
    Index(tmp_path, models).add(items(range(2)))
    other = load_clip()
    inject(other.model)  # an adapter that does nothing yet is another adapter
    with pytest.raises(UserError, match="other weights"):
        Index(tmp_path, models | {"adapted": other})
    with pytest.raises(UserError, match="other weights"):
        Index(tmp_path, {"unadapted": models["unadapted"]})
    files = sorted(tmp_path.iterdir())
    assert len(Index(tmp_path, models)) == 2 and sorted(tmp_path.iterdir()) == files


@pytest.fixture
def damaged(models: dict[str, Clip], tmp_path: Path) -> Iterator[Path]:
    Index(tmp_path, models).add(items(range(2)))
    yield tmp_path


@pytest.mark.parametrize("suffix", [".parquet", ".safetensors"])
def test_a_damaged_part_is_named(damaged: Path, models: dict[str, Clip], suffix: str) -> None:
    """Catches a traceback from the depths of Arrow, and a search over what can still be read."""
    file = damaged / f"part-00000{suffix}"
    file.write_bytes(file.read_bytes()[:50])
    with pytest.raises(UserError, match="part-00000.*delete"):
        Index(damaged, models)


def test_a_folder_with_other_files_is_not_made_an_index(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches --index pointed at a folder of pictures, which would be littered with parts."""
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="choose another --index"):
        Index(tmp_path, models)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]
