"""`load_data` on every kind of source: which rows it returns, how it splits them, and its error messages."""

import csv
import io
import json
import pickle
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_medical.data.dataset import Data, data_fingerprint, load_data
from clip_medical.data.parquet import Sample
from clip_medical.data.splits import Split
from clip_medical.data.synthetic import phantoms
from clip_medical.data.tables import READERS, Table
from clip_medical.errors import UserError

SaveParquet = Callable[..., Path]


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, name: str, text: str | bytes, images: int = 0) -> Path:
    """Write a table into `folder`, and beside it images 0.png, 1.png, ...; image i has the grey level i."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def table(rows: int, header: str = "file_name,text", row: str = "{i}.png,caption {i}") -> str:
    return "\n".join([header] + [row.format(i=i) for i in range(rows)]) + "\n"


def levels(split: Split) -> list[int]:
    """The grey level of each image, which is its number."""
    return [np.asarray(split.open_image(i))[0, 0].item() for i in range(len(split))]


def numbers(split: Split) -> list[int]:
    """The number at the end of each caption."""
    return [int(caption.split()[-1]) for caption in split.captions]


def all_captions(data: Data) -> list[str]:
    return data.train.captions + data.validation.captions


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SaveParquet:
    """A function that writes a Parquet file with `datasets`."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(name: str, columns: dict[str, list[Any]], rows_per_group: int = 1000, **features: Any) -> Path:
        path = tmp_path / "shards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_dict(columns)
        for column, feature in features.items():
            rows = rows.cast_column(column, feature)
        rows.to_parquet(path, batch_size=rows_per_group)
        return path

    return save


# ---- tables and folders


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("t.csv", table(20)),
        ("t.CSV", b"\xef\xbb\xbf" + table(20).replace("\n", "\r\n").encode()),
        ("t.tsv", table(20, "Image Path\tReport", "{i}.png\tcaption {i}")),
        ("t.jsonl", "\n\n".join(json.dumps({"image": f"{i}.png", "caption": f" caption {i} "}) for i in range(20))),
    ],
)
def test_images_and_captions_stay_paired(tmp_path: Path, name: str, text: str | bytes) -> None:
    """Catches pairs mixed up by the hold-out, by `select`, by `limit`, by pickling, or by a byte order mark."""
    path = str(write(tmp_path, name, text, images=20))
    data = load_data(path)
    assert sorted(numbers(data.train) + numbers(data.validation)) == list(range(20))
    assert len(data.validation) == 2 and data.source == f"file {path}"
    for split in (data.train, data.validation, data.train.select([3, 1]), load_data(path, limit=2).train):
        assert levels(split) == numbers(split)
        assert split.ids == [f"{i}.png" for i in numbers(split)]
        assert levels(pickle.loads(pickle.dumps(split))) == numbers(split)
    assert data.train.select([3, 1]).captions == [data.train.captions[3], data.train.captions[1]]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_folder_with_metadata(tmp_path: Path, name: str) -> None:
    """Catches an `imagefolder` layout that is not recognised, or paths not relative to the folder of the metadata."""
    rows = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(5)]
    write(tmp_path, name, "\n".join(map(json.dumps, rows)) if name.endswith("jsonl") else table(5), images=5)
    data = load_data(str(tmp_path))
    assert levels(data.train) == numbers(data.train) and len(data.train) == 4
    assert data.source == f"folder {tmp_path}"
    assert data.split_rule.startswith("20 % of the rows held out by seed 0")


@pytest.mark.parametrize(
    ("folders", "rule"),
    [
        (["train", "validation"], "splits of the source"),
        (["Train", "val", "test"], "splits of the source"),
        (["train", "test"], "splits of the source, test used for validation"),
    ],
)
def test_split_folders(tmp_path: Path, folders: list[str], rule: str) -> None:
    """Catches test rows used for training or validation although there is a validation split, or a test table read."""
    for size, folder in zip((5, 3, 2), folders, strict=False):
        write(tmp_path / folder, "metadata.csv", table(size) if size > 2 else b"\xff not UTF-8", images=size)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.validation), data.split_rule) == (5, 3, rule)


def test_cells_are_read_as_text(tmp_path: Path) -> None:
    """Catches the captions "nan", "None" and "NA" read as missing, and numbers rewritten: 007 as 7, 1.50 as 1.5."""
    captions = ["nan", "None", "NA", "null", "007", "1.50", "a, b", 'a "quoted" word', "two\nlines"]
    with open(write(tmp_path, "t.csv", "", images=len(captions)), "w", newline="") as file:
        csv.writer(file).writerows([("file_name", "text"), *((f"{i}.png", c) for i, c in enumerate(captions))])
    assert set(all_captions(load_data(str(tmp_path / "t.csv")))) == set(captions)


def test_columns_can_be_named(tmp_path: Path) -> None:
    """Catches a column flag that is ignored if there is also a column with a usual name."""
    path = write(tmp_path, "t.csv", table(4, "scan,note,caption", "{i}.png,note {i},caption {i}"), images=4)
    data = load_data(str(path), image_column="scan", caption_column="note")
    assert set(all_captions(data)) == {f"note {i}" for i in range(4)}
    assert levels(data.train) == numbers(data.train)


@pytest.mark.parametrize(
    ("header", "column", "flag"),
    [("scan,text", None, "--image-column"), ("image,note", None, "--caption-column"),
     ("image,text", "nope", "--caption-column")],
)  # fmt: skip
def test_missing_columns(tmp_path: Path, header: str, column: str | None, flag: str) -> None:
    """Catches a KeyError, or a message without the existing columns and the flag that chooses one."""
    path = write(tmp_path, "t.csv", table(3, header), images=3)
    with pytest.raises(UserError, match=f"{column or ''}.*{header.replace(',', ', ')}.*{flag}"):
        load_data(str(path), caption_column=column)


def test_label_columns(tmp_path: Path) -> None:
    """Catches "finding" (a label) confused with "findings" (a report), and a caption column also used as a label."""
    text = table(9, "image,findings,Finding,Body Part,modality,projection", "{i}.png,caption {i},cyst {i},knee,,AP")
    path = str(write(tmp_path, "t.csv", text, images=9))
    data = load_data(path)
    assert data.train.labels["finding"] == [f"cyst {i}" for i in numbers(data.train)]
    cysts = [f"cyst {i}" for i in numbers(data.validation)]
    assert data.validation.labels == {"finding": cysts, "anatomy": ["knee"], "modality": [""], "view": ["AP"]}
    assert "finding" not in load_data(path, caption_column="Finding").train.labels


def test_windows_paths(tmp_path: Path) -> None:
    """Catches a table written on Windows that is refused on other systems."""
    write(tmp_path / "images", "unused.txt", "", images=3)
    data = load_data(str(write(tmp_path, "t.csv", table(3, row="images\\{i}.png,caption {i}"))))
    assert levels(data.train) == numbers(data.train)


def test_ids_are_unique(tmp_path: Path) -> None:
    """Catches two captions of one image under the same id."""
    text = table(4) + table(4, row="{i}.png,again {i}").split("\n", 1)[1] + "9.png,caption 9\n"
    data = load_data(str(write(tmp_path, "t.csv", text, images=10)))
    ids = set(data.train.ids + data.validation.ids)
    assert len(ids) == 9 and {"2.png (row 3)", "2.png (row 7)", "9.png"} <= ids


def test_the_source_is_not_modified(tmp_path: Path, parquet: SaveParquet) -> None:
    """Catches a cache or an index written into the user's folder."""
    path = parquet("a.parquet", {"image": [png(0), png(1)], "text": ["caption 0", "caption 1"]})
    write(path.parent, "metadata.csv", table(3), images=3)
    before = sorted(path.parent.rglob("*"))
    load_data(str(path)).train.open_image(0)
    load_data(str(path.parent)).train.open_image(0)
    assert sorted(path.parent.rglob("*")) == before


def test_a_reader_is_one_entry_in_a_mapping(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a new file type that needs changes outside READERS, or works as a file but not as a folder's metadata."""

    def read_json(path: Path, sample: Sample) -> Table:
        return Table(str(path), path.parent, json.loads(path.read_text()))

    monkeypatch.setitem(READERS, ".json", read_json)
    columns = {"image": [f"{i}.png" for i in range(5)], "text": [f"caption {i}" for i in range(5)]}
    path = write(tmp_path, "metadata.json", json.dumps(columns), images=5)
    for source in (path, path.parent):
        data = load_data(str(source))
        assert levels(data.train) == numbers(data.train) and len(data.train) == 4


def test_fingerprint(tmp_path: Path) -> None:
    """Catches a fingerprint that ignores a caption, an id or the split, or that depends on where the data lie."""
    write(tmp_path / "a", "t.csv", table(20), images=20)
    data = load_data(str(tmp_path / "a" / "t.csv"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert data_fingerprint(load_data(str(tmp_path / "b" / "t.csv"))) == data_fingerprint(data)
    write(tmp_path / "b", "t.csv", table(20).replace("caption 7", "caption 77"))
    changed = [load_data(str(tmp_path / "b" / "t.csv")), Data(data.validation, data.train, data.calibration, "", "")]
    assert len({data_fingerprint(other) for other in (data, *changed)}) == 3


# ---- splits


def test_split_column(tmp_path: Path) -> None:
    """Catches a random hold-out that mixes the splits of the source, and rows of an unknown split dropped silently."""
    names = ["train", "valid", "test", "train", "Train"]
    text = "image,text,split\n" + "".join(f"{i}.png,caption {i},{name}\n" for i, name in enumerate(names))
    data = load_data(str(write(tmp_path, "t.csv", text, images=5)))
    assert (numbers(data.train), numbers(data.validation), data.split_rule) == ([0, 3, 4], [1], "splits of the source")
    assert levels(data.train) == [0, 3, 4]
    with pytest.raises(UserError, match="t.csv has the splits train, fold7, test. Expected one train"):
        load_data(str(write(tmp_path, "t.csv", text.replace("valid", "fold7"))))
    only_train = text.replace("valid", "train").replace("test", "train")
    assert len(load_data(str(write(tmp_path, "t.csv", only_train))).validation) == 1


def test_hold_out_is_seeded(tmp_path: Path) -> None:
    """Catches a hold-out that is not reproducible, ignores the seed, or takes the first or the last rows."""
    path = str(write(tmp_path, "t.csv", table(50), images=50))
    validation = [numbers(load_data(path, seed=seed).validation) for seed in (0, 0, 1)]
    assert validation[0] == validation[1] != validation[2] and len(validation[0]) == 5
    assert all(rows not in (list(range(5)), list(range(45, 50))) for rows in validation)


@pytest.mark.parametrize("seed", range(5))
def test_patients_stay_in_one_split(tmp_path: Path, seed: int) -> None:
    """Catches a patient in training and validation, and one large patient who leaves too few training rows."""
    patients = [0] * 60 + [1 + i // 4 for i in range(40)]
    text = "image,text,Patient ID\n" + "".join(f"{i}.png,caption {i},{p}\n" for i, p in enumerate(patients))
    data = load_data(str(write(tmp_path, "t.csv", text, images=100)), seed=seed)
    train, validation = ({patients[i] for i in numbers(split)} for split in (data.train, data.validation))
    assert not train & validation
    assert 5 <= len(data.validation) <= 10


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_one_image_stay_in_one_split(tmp_path: Path, seed: int) -> None:
    """Catches an image in training whose second caption is in validation, with a group column or without."""
    for header, row in (("image,text", "{j}.png,caption {i}"), ("image,text,group", "{j}.png,caption {i},{g}")):
        lines = [row.format(i=i, j=i // 3, g=f"g{i}" if i % 2 else "") for i in range(60)]
        data = load_data(str(write(tmp_path, "t.csv", "\n".join([header, *lines]), images=20)), seed=seed)
        assert not set(levels(data.train)) & set(levels(data.validation))
        assert len(data.validation) == 6


def test_rows_without_a_patient_are_separate(tmp_path: Path) -> None:
    """Catches empty patient cells treated as one patient, so that nothing can be held out."""
    path = write(tmp_path, "t.csv", table(30, "image,text,group", "{i}.png,caption {i},"), images=30)
    assert len(load_data(str(path)).validation) == 3


def test_two_rows_are_enough_and_one_is_not(tmp_path: Path) -> None:
    """Catches an empty validation split or an empty training split."""
    data = load_data(str(write(tmp_path, "t.csv", table(2), images=2)))
    assert (len(data.train), len(data.validation)) == (1, 1)
    with pytest.raises(UserError, match="only one image or group.*validation split"):
        load_data(str(write(tmp_path, "t.csv", table(1))))


def test_limit_draws_a_random_sample(tmp_path: Path) -> None:
    """Catches `limit` taking the first rows, which in a sorted table are all of one kind."""
    for folder, size in (("train", 60), ("validation", 40)):
        write(tmp_path / folder, "metadata.csv", table(size), images=size)
    data, same, other = (load_data(str(tmp_path), limit=30, seed=seed) for seed in (0, 0, 1))
    assert len(data.train) == len(data.validation) == 30
    assert numbers(data.train) == numbers(same.train) != numbers(other.train)
    assert set(numbers(data.train)) != set(range(30)) and len(set(numbers(data.train))) == 30
    assert levels(data.train) == numbers(data.train)
    assert len(load_data(str(tmp_path), limit=10**6).train) == 60
    with pytest.raises(UserError, match="--limit 0"):
        load_data(str(tmp_path), limit=0)


# ---- refusals


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("t.csv", "", "has no rows"),
        ("t.csv", "file_name,text\n", "has no rows"),
        ("t.jsonl", "\n", "has no rows"),
        ("t.csv", "file_name,text\n0.png,a\n1.png,a, b\n", "line 3 has 3 fields, but the header has 2"),
        ("t.csv", "file_name,text\n0.png,a, b\n1.png,a, b\n", "line 2 has 3 fields, but the header has 2"),
        ("t.csv", "file_name,text\n0.png,a\n1.png\n", "line 3 has 1 fields, but the header has 2"),
        ("t.csv", 'file_name,text\n0.png,"a\n1.png,b\n', "line 3: .*double quote"),
        ("t.csv", "file_name,text,text\n0.png,a,b\n", "two columns named 'text'"),
        ("t.csv", "file_name,text\n0.png,肺部正常\n".encode("gb18030"), "not UTF-8"),
        ("t.csv", "file_name,text\n0.png,a\n1.png,  \n", r"1 of 2 rows have no text in column 'text': row 2 \(1.png\)"),
        ("t.csv", "file_name,text\n0.png,a\n7.png,b\n8.png,c\n", r"2 of 3 rows have no image.*row 2 \(7.png\), 3 \(8"),
        ("t.csv", "file_name,text\n0.png,a\n,b\n", r"1 of 2 rows have no image file.*row 2 \(no path\)"),
        ("t.jsonl", '{"image": "0.png", "text": "a"}\n{"image": \n', "line 2 is not a JSON object"),
        ("t.jsonl", '[["image", "text"]]\n', "line 1 is not a JSON object"),
        ("t.jsonl", '{"image": "0.png", "text": ["a", "b"]}\n', r"no text in column 'text': row 1 \(0.png\)"),
        ("t.jsonl", '{"image": "0.png", "text": null}\n', r"no text in column 'text': row 1 \(0.png\)"),
        ("t.jsonl", '{"image": "0.png", "text": "a"}\n{"image": "0.png"}\n', "1 of 2 rows have no text.*row 2"),
        ("t.xlsx", b"PK", "file type '.xlsx' is not supported. Expected one of .csv, .tsv, .txt, .jsonl, .parquet"),
        ("t.parquet", b"PAR0" * 30, "t.parquet cannot be read.*Check the file"),
    ],
)
def test_faulty_files(tmp_path: Path, name: str, text: str | bytes, message: str) -> None:
    """Catches a traceback, a row that is skipped silently, and a message without the file and the row."""
    with pytest.raises(UserError, match=message) as caught:
        load_data(str(write(tmp_path, name, text, images=2)))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("folder", "files", "message"),
    [
        ("bare", ["0.png"], "no metadata.csv.*file_name and text"),
        ("named", ["pairs.csv"], "--data .*pairs.csv"),
        ("untrained", ["test/metadata.csv"], "has the splits test. Expected one train"),
        (
            "twice",
            ["train/metadata.csv", "val/metadata.csv", "dev/metadata.csv"],
            "val, train, dev. Expected one train",
        ),
        ("gone", [], "no such file or folder"),
    ],
)
def test_faulty_folders(tmp_path: Path, folder: str, files: list[str], message: str) -> None:
    """Catches a folder without captions read as an empty dataset, and a missing path taken for a Hub id."""
    for file in files:
        write((tmp_path / folder / file).parent, Path(file).name, table(2), images=2)
    with pytest.raises(UserError, match=message):
        load_data(str(tmp_path / folder))


def test_an_unreadable_image_is_named(tmp_path: Path) -> None:
    """Catches an error about an image that does not name it."""
    path = write(tmp_path, "t.csv", table(2), images=2)
    for i in range(2):
        (tmp_path / f"{i}.png").write_bytes(b"junk")
    data = load_data(str(path))
    with pytest.raises(UserError, match=data.train.ids[0]):
        data.train.open_image(0)


# ---- Parquet and save_to_disk


@pytest.mark.parametrize("kind", ["image", "struct", "bytes", "path", "struct path"])
def test_parquet_image_columns(parquet: SaveParquet, kind: str) -> None:
    """Catches a way to store images that is not read, class numbers without names, and a path column used instead."""
    datasets = pytest.importorskip("datasets")
    cells: dict[str, list[Any]] = {
        "image": [{"bytes": png(i), "path": None} for i in range(10)],
        "struct": [{"bytes": png(i), "path": "gone.png"} for i in range(10)],
        "bytes": [png(i) for i in range(10)],
        "path": [f"{i}.png" for i in range(10)],
        "struct path": [{"bytes": None, "path": f"{i}.png"} for i in range(10)],
    }
    column = "image" if kind == "path" else "scan"
    columns = {column: cells[kind], "caption": [f"caption {i}" for i in range(10)], "modality": [0, 1] * 5}
    if kind != "path":
        columns["path"] = ["decoy.png"] * 10
    features = {"modality": datasets.ClassLabel(names=["CT", "MRI"])}
    path = parquet("a.parquet", columns, **features, **({"scan": datasets.Image()} if kind == "image" else {}))
    write(path.parent, "unused.txt", "", images=10)
    data = load_data(str(path))
    assert levels(data.train) == numbers(data.train) and len(data.train) == 9
    assert data.train.labels["modality"] == [["CT", "MRI"][i % 2] for i in numbers(data.train)]
    assert levels(pickle.loads(pickle.dumps(data.train.select([2])))) == numbers(data.train)[2:3]


def test_parquet_shards_are_split_by_name(parquet: SaveParquet) -> None:
    """Catches shards lost or out of order, a test shard read for validation, and a shard of no split ignored."""

    def save(name: str, rows: range) -> Path:
        captions, ids = [f"c {i}" for i in rows], [f"x{i}" for i in rows]
        return parquet(f"data/{name}.parquet", {"image": list(map(png, rows)), "caption": captions, "image_id": ids})

    names = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"]
    for start, name in enumerate(names):
        folder = save(name, range(start * 3, start * 3 + 3)).parents[1]
    data = load_data(str(folder))
    assert numbers(data.train) == levels(data.train) == [0, 1, 2, 3, 4, 5]
    assert numbers(data.validation) == levels(data.validation) == [6, 7, 8]
    assert data.train.ids == [f"x{i}" for i in range(6)]
    assert data.source == f"folder {folder} (train, validation)"
    save("more", range(3))
    with pytest.raises(UserError, match=r"rows without a split.*Expected one train"):
        load_data(str(folder))


def test_parquet_without_image_or_caption(parquet: SaveParquet) -> None:
    """Catches a null image that ends in an AttributeError, and a null caption read as the text "None"."""
    columns: dict[str, list[Any]] = {"image": [png(0), None, None], "caption": ["a", "b", "c"]}
    data = load_data(str(parquet("a.parquet", columns)))
    for split in (data.train, data.validation):
        for i, name in enumerate(split.ids):
            if name != "row 1":
                with pytest.raises(UserError, match=f"{name} .*empty"):
                    split.open_image(i)
    with pytest.raises(UserError, match=r"1 of 3 rows have no text in column 'caption': row 2 \(row 2\)"):
        load_data(str(parquet("b.parquet", columns | {"caption": ["a", None, "c"]})))


def test_row_groups_are_read_by_several_threads(parquet: SaveParquet) -> None:
    """Catches cells of one row group returned for another, in order, at random, or when threads read at once."""
    cells = {"image": [png(i) for i in range(200)], "caption": [f"c {i}" for i in range(200)]}
    train = load_data(str(parquet("train.parquet", cells, rows_per_group=10))).train
    order = [*range(len(train)), *np.random.default_rng(0).permutation(len(train)).tolist()]
    with ThreadPoolExecutor(4) as pool:
        images = list(pool.map(train.open_image, order))
    assert [image.getpixel((0, 0)) for image in images] == [numbers(train)[row] for row in order]
    assert train.origins == sorted(set(train.origins))


def test_limit_draws_row_groups(parquet: SaveParquet) -> None:
    """Catches a limit that reads all row groups, ignores the seed, or separates images from captions."""
    cells = {"image": [png(i) for i in range(200)], "caption": [f"c {i}" for i in range(200)]}
    path = str(parquet("train.parquet", cells, rows_per_group=10))
    few, other = (load_data(path, limit=12, seed=seed).train for seed in (0, 1))
    assert len(few) == 12 and numbers(few) == levels(few) != numbers(other)
    assert len({number // 10 for number in numbers(few)}) == 2


def test_shards_with_different_columns(parquet: SaveParquet) -> None:
    """Catches rows of one shard read with the columns of another."""
    parquet("train-0.parquet", {"image": [png(0)] * 3, "caption": ["a", "b", "c"]})
    path = parquet("train-1.parquet", {"image": [png(0)] * 3, "text": ["a", "b", "c"]})
    with pytest.raises(UserError, match="train-1.parquet and .*train-0.parquet have different columns"):
        load_data(str(path.parent))


def test_save_to_disk_folders(tmp_path: Path) -> None:
    """Catches a folder of save_to_disk that is not recognised, and images decoded while captions are read."""
    datasets = pytest.importorskip("datasets")
    rows: dict[str, list[Any]] = {"caption": [f"c {i}" for i in range(6)], "modality": [0, 1] * 3}
    rows["image"] = [{"bytes": png(i) if i else b"broken", "path": None} for i in range(6)]
    kinds = datasets.ClassLabel(names=["CT", "MRI"])
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string"), "modality": kinds})
    whole = datasets.Dataset.from_dict(rows, features)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=whole, validation=whole, extra=whole).save_to_disk(str(tmp_path / "two"))
    data = load_data(str(tmp_path / "two"))
    assert (len(data.train), len(data.validation), data.source) == (6, 6, f"folder {tmp_path}/two (train, validation)")
    assert levels(data.train.select(range(1, 6))) == [1, 2, 3, 4, 5]
    assert data.train.labels["modality"] == ["CT", "MRI"] * 3
    with pytest.raises(UserError, match="row 1 "):
        data.train.open_image(0)
    one = load_data(str(tmp_path / "one"))
    assert sorted(numbers(one.train) + numbers(one.validation)) == list(range(6))
    assert len({*one.train.origins, *one.validation.origins, *data.train.origins, *data.validation.origins}) == 18
    (tmp_path / "two" / "train" / "state.json").write_text("{")
    with pytest.raises(UserError, match="`datasets` cannot read .*two"):
        load_data(str(tmp_path / "two"))


# ---- phantoms


def test_phantoms_are_rendered_when_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches images rendered to read their captions, a seed or split not passed on, and pairs mixed up."""
    rendered = []

    def describe(seed: int, split: str, index: int) -> tuple[str, dict[str, str]]:
        return f"{seed} {split} {index}", {"modality": "CT", "anatomy": "chest", "finding": "cyst", "view": f"v{index}"}

    def phantom(seed: int, split: str, index: int) -> SimpleNamespace:
        rendered.append((seed, split, index))
        return SimpleNamespace(image=Image.new("L", (4, 4), index))

    monkeypatch.setattr(phantoms, "describe", describe)
    monkeypatch.setattr(phantoms, "phantom", phantom)
    data = load_data("phantoms", seed=3, phantom_counts=(9, 5), limit=4)
    assert (len(data.train), len(data.validation), data.source) == (4, 4, "phantoms, seed 3")
    assert not rendered
    assert levels(data.validation) == numbers(data.validation)
    assert rendered == [(3, "validation", i) for i in numbers(data.validation)]
    assert data.train.labels["view"] == [f"v{i}" for i in numbers(data.train)]


def test_origins_of_phantoms_change_with_their_version(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches cached pixels of an earlier version of the phantoms used for the current one."""
    before = load_data("phantoms", phantom_counts=(3, 2)).train.origins
    monkeypatch.setattr(phantoms, "VERSION", phantoms.VERSION + 1)
    after = load_data("phantoms", phantom_counts=(3, 2)).train.origins
    assert len({*before, *after}) == 6


@pytest.mark.slow
def test_slow_libraries_are_not_imported_at_startup() -> None:
    """Catches an import that costs every start a second, although only Parquet and the Hub need it."""
    code = "import sys, clip_medical.data.dataset; print({'datasets', 'pandas', 'pyarrow'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr
