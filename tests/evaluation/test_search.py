"""The index: search results, images that are not read again, refusals, and interruptions."""

import os
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from clip_medical import load_clip
from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.errors import UserError
from clip_medical.evaluation import search
from clip_medical.evaluation.search import Index, Item
from clip_medical.model import Clip
from lora import DoRALinear, LoRALinear, adapter_parameters, inject, set_strength
from lora.inject import lora_layers

PHANTOMS = [phantom(0, "search", row) for row in range(7)]


@pytest.fixture(scope="module")
def models() -> dict[str, Clip]:
    """A base model, and the same with a random adapter."""
    adapted = load_clip()
    inject(adapted.model)
    with torch.no_grad():
        for matrix in adapter_parameters(adapted.model):
            matrix.normal_(std=0.05, generator=torch.Generator().manual_seed(0))
    return {"unadapted": load_clip(), "adapted": adapted}


def image(row: int) -> Image.Image:
    return PHANTOMS[row].image


def items(rows: range = range(7), source: str = "phantoms") -> list[Item]:
    return [Item(f"phantom {r}", source, PHANTOMS[r].caption, PHANTOMS[r].labels, partial(image, r)) for r in rows]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search, "PART", 3)


def test_results_are_those_of_a_matmul(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches rows and features out of step across parts, and features of one model taken for the other's."""
    assert Index(tmp_path / "index", models).add(items()).new == 7
    index = Index(tmp_path / "index", models)  # read from disk
    assert len(index) == 7 and len(index.parts) == 3
    for model, clip in models.items():
        features = clip.encode_images([p.image for p in PHANTOMS])
        query = clip.encode_texts(["CT of the head"])[0]
        found = index.search(model, query, k=4)
        scores, rows = (features @ query).topk(4)
        assert [hit.name for hit in found] == [f"phantom {row}" for row in rows.tolist()]
        assert [hit.score for hit in found] == pytest.approx(scores.tolist(), abs=1e-5)
        assert [hit.caption for hit in found] == [PHANTOMS[row].caption for row in rows.tolist()]
        assert found[0].labels == PHANTOMS[found[0].row].labels
        same = index.search(model, features[5], k=1)[0]
        assert same.name == "phantom 5" and same.score == pytest.approx(1, abs=1e-5)
    for row in range(7):  # in parts of 3, 3 and 1
        thumbnail = index.thumbnail(row).convert("L")
        assert thumbnail.size == (128, 128)
        difference = np.asarray(thumbnail, float) - np.asarray(PHANTOMS[row].image, float)
        assert np.abs(difference).mean() < 6  # that image after JPEG compression, not its neighbour


def test_known_images_are_not_read_again(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches an index that grows when it is built twice, and a second build as slow as the first."""
    Index(tmp_path, models).add(items(range(4)))

    def refuse() -> Image.Image:
        raise AssertionError("this image was in the index already")

    processed: list[int] = []
    again = [item._replace(open=refuse) for item in items(range(4))] + items(range(4, 7))
    added = Index(tmp_path, models).add(again, processed.append)
    assert (added.new, added.known, added.duplicates) == (3, 4, 0) and sum(processed) == 7
    added = Index(tmp_path, models).add(items(source="the same images under another name"))
    assert (added.new, added.known, added.duplicates) == (0, 0, 7) and len(Index(tmp_path, models)) == 7


def test_processes_that_add_at_the_same_time(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches parts that overwrite each other, an image that is found twice, and rows out of step without it."""
    indexes = [Index(tmp_path, models), Index(tmp_path, models)]  # opened before the other has stored anything
    first = [item._replace(name=f"a {item.name}") for item in items(range(4))]
    assert indexes[0].add(first, process=0).new == 4 and indexes[1].add(items(), process=1).new == 7
    index = Index(tmp_path, models)
    assert len(index) == 7 and len(index.parts) == 5
    for row, shown in enumerate(PHANTOMS):
        hit = index.search("adapted", models["adapted"].encode_images(shown.image)[0], k=2)[0]
        assert hit.name.endswith(f"phantom {row}") and hit.score == pytest.approx(1, abs=1e-5)
        difference = np.asarray(index.thumbnail(hit.row).convert("L"), float) - np.asarray(shown.image, float)
        assert np.abs(difference).mean() < 6


def test_interrupted_build_continues(models: dict[str, Clip], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a part that counts although it was not written completely, and finished parts built a second time."""
    replace = os.replace
    finished: list[Path] = []

    def stop(source: Path, target: Path) -> None:
        if target.suffix == ".parquet" and finished:
            raise KeyboardInterrupt
        if target.suffix == ".parquet":
            finished.append(target)
        replace(source, target)

    index = Index(tmp_path, models)
    monkeypatch.setattr(os, "replace", stop)
    with pytest.raises(KeyboardInterrupt):
        index.add(items())
    assert len(index) == 3 and len(finished) == 1
    monkeypatch.setattr(os, "replace", replace)
    added = Index(tmp_path, models).add(items())
    assert (added.new, added.known) == (4, 3)
    index = Index(tmp_path, models)
    query = models["unadapted"].encode_texts(["CT of the head"])[0]
    assert {hit.name for hit in index.search("unadapted", query, k=10)} == {f"phantom {r}" for r in range(7)}


def test_unreadable_image_does_not_end_the_build(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches an archive of 100,000 images that stops at its one truncated file."""

    def broken() -> Image.Image:
        raise UserError("Image x.png cannot be read: it is empty.")

    added = Index(tmp_path, models).add([*items(range(2)), items()[2]._replace(open=broken), *items(range(3, 5))])
    assert added.new == 4 and added.unreadable == ["Image x.png cannot be read: it is empty."]


def test_features_of_other_weights_are_refused(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches queries of one model compared with features of another: plausible scores in a meaningless order."""
    Index(tmp_path, models).add(items(range(2)))
    files = sorted(tmp_path.iterdir())
    other = load_clip()
    inject(other.model)  # B is zero, so the features are those of the base, but the adapter is another one
    for refused in (models | {"adapted": other}, {"unadapted": models["unadapted"]}):
        with pytest.raises(UserError, match="other weights"):
            Index(tmp_path, refused)
    set_strength(models["adapted"].model, 0.5)
    with pytest.raises(UserError, match="other weights"):
        Index(tmp_path, models)
    set_strength(models["adapted"].model, 1.0)
    assert len(Index(tmp_path, models)) == 2 and sorted(tmp_path.iterdir()) == files


def test_trained_parameters_beside_a_and_b_count(tmp_path: Path) -> None:
    """Catches an index of DoRA searched with other row lengths, and one of LoRA searched with DoRA."""
    clips = [load_clip() for _ in range(3)]
    for clip, kind in zip(clips, (LoRALinear, DoRALinear, DoRALinear), strict=True):
        torch.manual_seed(0)
        inject(clip.model, layer=kind)
    next(iter(lora_layers(clips[2].model).values())).get_parameter("magnitude").data *= 1.5
    for number, clip in enumerate(clips):
        Index(tmp_path / str(number), {"adapted": clip})
        for other in clips[:number]:
            with pytest.raises(UserError, match="other weights"):
                Index(tmp_path / str(number), {"adapted": other})


@pytest.fixture
def index_folder(models: dict[str, Clip], tmp_path: Path) -> Iterator[Path]:
    Index(tmp_path, models).add(items(range(2)))
    yield tmp_path


@pytest.mark.parametrize("size", [0, 50, 0.5, -10, None])
def test_damaged_part_is_named(index_folder: Path, models: dict[str, Clip], size: float | None) -> None:
    """Catches a traceback from the depths of Arrow, a search over the remaining rows, and one flipped bit (None)."""
    file = index_folder / "part-00000-0.parquet"
    content = bytearray(file.read_bytes())
    content[pq.ParquetFile(file).metadata.row_group(0).column(6).data_page_offset + 999] ^= 1  # in a feature
    file.write_bytes(content[: int(size * len(content)) if isinstance(size, float) else size])
    with pytest.raises(UserError, match="part-00000.* is damaged .*Delete"):
        Index(index_folder, models)


def test_an_index_of_an_earlier_version_is_refused(index_folder: Path, models: dict[str, Clip]) -> None:
    """Catches parts in Arrow's file format passed over in silence: an empty index, or half of one."""
    (index_folder / "part-00001.arrow").write_bytes(b"ARROW1")
    with pytest.raises(UserError, match="An earlier version .*Delete it and add the images again"):
        Index(index_folder, models)


def test_other_programs_read_the_parts(index_folder: Path, models: dict[str, Clip]) -> None:
    """Catches vectors of no fixed length, which vector databases refuse, and thumbnails held in memory by the index."""
    index = Index(index_folder, models)
    table = pq.read_table(index_folder / "part-00000-0.parquet")
    assert table["name"].to_pylist() == ["phantom 0", "phantom 1"]
    for model, features in index.features.items():
        column = table["feature: " + model]
        assert column.type == pa.list_(pa.float32(), features.shape[1])
        assert torch.equal(torch.tensor(np.stack(column.to_pandas())), features)
    assert index.table.schema.names == ["name", "source", "caption", "labels", "hash"]


def test_folder_with_other_files_is_refused(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches --index pointed at a folder of images, which the index would fill with its parts."""
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(UserError, match="Choose another --index"):
        Index(tmp_path, models)
    assert [p.name for p in tmp_path.iterdir()] == ["note.txt"]


def test_search_in_an_empty_index_is_refused(models: dict[str, Clip], tmp_path: Path) -> None:
    """Catches an IndexError where the user has added nothing yet."""
    with pytest.raises(UserError, match="is empty. Add images"):
        Index(tmp_path, models).search("unadapted", torch.ones(128))
