"""What `load_data` finds in each kind of source, what it holds out, and the sentences in which it refuses."""

import io
import json
import pickle
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from clip_medical.data.sources import Data, Split, load_data
from clip_medical.errors import UserError

REAL = Path(__file__).resolve().parents[3] / "shared/radiology-real"


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def write(folder: Path, name: str, text: str | bytes, images: int = 0) -> Path:
    """A table in `folder`, with images 0.png, 1.png, ... beside it; image i has the grey level i."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(images):
        (folder / f"{i}.png").write_bytes(png(i))
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    return folder / name


def table(rows: int, header: str = "file_name,text", row: str = "{i}.png,caption {i}") -> str:
    return "\n".join([header] + [row.format(i=i) for i in range(rows)]) + "\n"


def levels(split: Split) -> list[int]:
    return [np.asarray(split.open_image(i))[0, 0].item() for i in range(len(split))]


def numbers(split: Split) -> list[int]:
    return [int(caption.split()[-1]) for caption in split.captions]


def both(data: Data) -> list[str]:
    return data.train.captions + data.validation.captions


@pytest.fixture
def parquet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes a Parquet file through datasets, whose cache stays in the test's own folder."""
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")

    def save(name: str, columns: dict[str, list[Any]], **features: Any) -> Path:
        path = tmp_path / "shards" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = datasets.Dataset.from_dict(columns)
        for column, feature in features.items():
            rows = rows.cast_column(column, feature)
        rows.to_parquet(path)
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
def test_image_and_caption_stay_together(tmp_path: Path, name: str, text: str | bytes) -> None:
    """Catches captions and images that come apart on the way: by the hold-out, by `select`, by `limit`, by a BOM."""
    data = load_data(str(write(tmp_path, name, text, images=20)))
    assert sorted(numbers(data.train) + numbers(data.validation)) == list(range(20))
    assert len(data.validation) == 2
    for split in (data.train, data.validation, data.train.select([3, 1]), load_data(data.source[5:], limit=2).train):
        assert levels(split) == numbers(split)
        assert split.ids == [f"{i}.png" for i in numbers(split)]
        assert levels(pickle.loads(pickle.dumps(split))) == numbers(split)  # worker processes are sent a split so
    assert data.train.select([3, 1]).captions == [data.train.captions[3], data.train.captions[1]]


@pytest.mark.parametrize("name", ["metadata.csv", "metadata.jsonl"])
def test_folder_with_metadata_in_itself(tmp_path: Path, name: str) -> None:
    """Catches a layout of `imagefolder` that is not seen, or paths not taken from the folder of the metadata."""
    rows = [{"file_name": f"{i}.png", "text": f"caption {i}"} for i in range(5)]
    write(tmp_path, name, "\n".join(map(json.dumps, rows)) if name.endswith("jsonl") else table(5), images=5)
    data = load_data(str(tmp_path))
    assert levels(data.train) == numbers(data.train) and len(data.train) == 4
    assert data.source == f"folder {tmp_path}"
    assert data.split_rule.startswith("20 % held out by seed 0")


@pytest.mark.parametrize(
    ("folders", "rule"),
    [
        (["train", "validation"], "splits of the source"),
        (["Train", "val", "test"], "splits of the source"),
        (["train", "test"], "splits of the source, test for validation"),
    ],
)
def test_split_folders(tmp_path: Path, folders: list[str], rule: str) -> None:
    """Catches test rows that get into training or selection although there is a validation split."""
    for size, folder in zip((5, 3, 2), folders, strict=False):
        write(tmp_path / folder, "metadata.csv", table(size), images=size)
    data = load_data(str(tmp_path))
    assert (len(data.train), len(data.validation), data.split_rule) == (5, 3, rule)


def test_a_test_folder_may_be_unreadable_where_it_is_not_needed(tmp_path: Path) -> None:
    """Catches work (and failure) spent on a test split that nobody reads."""
    for folder in ("train", "validation"):
        write(tmp_path / folder, "metadata.csv", table(2), images=2)
    write(tmp_path / "test", "metadata.csv", b"\xff")
    assert len(load_data(str(tmp_path)).validation) == 2


def test_words_that_pandas_would_eat(tmp_path: Path) -> None:
    """Catches the captions "nan", "None" and "NA" read as missing, and numbers rewritten: 007 as 7, 1.50 as 1.5."""
    words = ["nan", "None", "NA", "null", "007", "1.50", "a, b", 'says "x"', "two\nlines"]
    quoted = [word.replace('"', '""') for word in words]
    text = "file_name,text\n" + "".join(f'{i}.png,"{word}"\n' for i, word in enumerate(quoted))
    assert set(both(load_data(str(write(tmp_path, "t.csv", text, images=len(words)))))) == set(words)


def test_unusual_columns_can_be_named(tmp_path: Path) -> None:
    """Catches a flag that is ignored where a usual name is there as well."""
    path = write(tmp_path, "t.csv", table(4, "scan,note,caption", "{i}.png,note {i},caption {i}"), images=4)
    data = load_data(str(path), image_column="scan", caption_column="note")
    assert set(both(data)) == {f"note {i}" for i in range(4)}
    assert levels(data.train) == numbers(data.train)


@pytest.mark.parametrize(
    ("header", "given", "flag"),
    [("scan,text", {}, "--image-column"), ("image,note", {}, "--caption-column"),
     ("image,text", {"caption_column": "nope"}, "--caption-column")],
)  # fmt: skip
def test_a_missing_column_lists_those_there_are(tmp_path: Path, header: str, given: dict[str, str], flag: str) -> None:
    """Catches a KeyError, or a sentence that leaves the user to guess the flag."""
    path = write(tmp_path, "t.csv", table(3, header), images=3)
    with pytest.raises(UserError, match=f"{header.replace(',', ', ')}.*{flag}"):
        load_data(str(path), **given)  # type: ignore[arg-type]


def test_labels_are_found_by_column_name(tmp_path: Path) -> None:
    """Catches "finding" (a label) confused with "findings" (a report), and a caption column used as a label too."""
    text = table(9, "image,findings,Finding,Body Part,modality,projection", "{i}.png,caption {i},cyst {i},knee,,AP")
    path = str(write(tmp_path, "t.csv", text, images=9))
    data = load_data(path)
    assert data.train.labels["finding"] == [f"cyst {i}" for i in numbers(data.train)]
    cysts = [f"cyst {i}" for i in numbers(data.validation)]
    assert data.validation.labels == {"finding": cysts, "anatomy": ["knee"], "modality": [""], "view": ["AP"]}
    assert "finding" not in load_data(path, caption_column="Finding").train.labels


def test_paths_from_windows(tmp_path: Path) -> None:
    """Catches a table written on Windows refused elsewhere."""
    write(tmp_path / "images", "unused.txt", "", images=3)
    data = load_data(str(write(tmp_path, "t.csv", table(3, row="images\\{i}.png,caption {i}"))))
    assert levels(data.train) == numbers(data.train)


def test_ids_are_unique(tmp_path: Path) -> None:
    """Catches two rows of one image that no message can tell apart."""
    text = table(4) + table(4, row="{i}.png,again {i}").split("\n", 1)[1] + "9.png,caption 9\n"
    write(tmp_path, "t.csv", text, images=10)
    data = load_data(str(tmp_path / "t.csv"))
    assert len(set(data.train.ids + data.validation.ids)) == 9
    assert {"2.png (row 3)", "2.png (row 7)", "9.png"} <= set(data.train.ids + data.validation.ids)


def test_the_folder_stays_as_it_was(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    """Catches a cache or an index written beside the user's data."""
    path = parquet("a.parquet", {"image": [png(0), png(1)], "text": ["caption 0", "caption 1"]})
    write(path.parent, "metadata.csv", table(3), images=3)
    before = sorted(path.parent.rglob("*"))
    load_data(str(path)).train.open_image(0)
    load_data(str(path.parent)).train.open_image(0)
    assert sorted(path.parent.rglob("*")) == before


# ---- what is held out


def test_a_split_column_is_honoured(tmp_path: Path) -> None:
    """Catches a random hold-out that mixes the author's own splits."""
    rows = ["train", "valid", "test", "train", "Train"]
    text = "image,text,split\n" + "".join(f"{i}.png,caption {i},{part}\n" for i, part in enumerate(rows))
    data = load_data(str(write(tmp_path, "t.csv", text, images=5)))
    assert (numbers(data.train), numbers(data.validation), data.split_rule) == ([0, 3, 4], [1], "splits of the source")
    assert levels(data.train) == [0, 3, 4]
    with pytest.raises(UserError, match="fold7"):
        load_data(str(write(tmp_path, "t.csv", text.replace("valid", "fold7"))))
    only_train = text.replace("valid", "train").replace("test", "train")
    assert len(load_data(str(write(tmp_path, "t.csv", only_train))).validation) == 1


def test_hold_out_is_seeded(tmp_path: Path) -> None:
    """Catches a hold-out that changes between two runs of one seed, or is the same for all seeds, or the last rows."""
    path = str(write(tmp_path, "t.csv", table(50), images=50))
    held = [numbers(load_data(path, seed=seed).validation) for seed in (0, 0, 1)]
    assert held[0] == held[1] != held[2] and len(held[0]) == 5
    assert all(h not in (list(range(5)), list(range(45, 50))) for h in held)


@pytest.mark.parametrize("seed", range(5))
def test_patients_are_not_parted(tmp_path: Path, seed: int) -> None:
    """Catches a patient in training and in validation, and one huge group that swallows the training split."""
    patients = [0] * 60 + [1 + i // 4 for i in range(40)]
    text = "image,text,Patient ID\n" + "".join(f"{i}.png,caption {i},{p}\n" for i, p in enumerate(patients))
    data = load_data(str(write(tmp_path, "t.csv", text, images=100)), seed=seed)
    train, held = ({patients[i] for i in numbers(split)} for split in (data.train, data.validation))
    assert not train & held
    assert 5 <= len(data.validation) <= 10


@pytest.mark.parametrize("seed", range(5))
def test_rows_of_one_image_are_not_parted(tmp_path: Path, seed: int) -> None:
    """Catches an image in training whose second caption is in validation, with a group column and without."""
    for header, row in (("image,text", "{j}.png,caption {i}"), ("image,text,group", "{j}.png,caption {i},{g}")):
        lines = [row.format(i=i, j=i // 3, g=f"g{i}" if i % 2 else "") for i in range(60)]
        path = write(tmp_path, "t.csv", "\n".join([header, *lines]), images=20)
        data = load_data(str(path), seed=seed)
        assert not set(levels(data.train)) & set(levels(data.validation))
        assert len(data.validation) == 6


def test_rows_without_a_patient_are_not_one_patient(tmp_path: Path) -> None:
    """Catches empty group cells taken for one group, so that nothing can be held out."""
    path = write(tmp_path, "t.csv", table(30, "image,text,group", "{i}.png,caption {i},"), images=30)
    assert len(load_data(str(path)).validation) == 3


def test_two_rows_are_enough_and_one_is_not(tmp_path: Path) -> None:
    """Catches an empty validation split, or an empty training split."""
    data = load_data(str(write(tmp_path, "t.csv", table(2), images=2)))
    assert (len(data.train), len(data.validation)) == (1, 1)
    with pytest.raises(UserError, match="hold out"):
        load_data(str(write(tmp_path, "t.csv", table(1))))


def test_limit_is_a_random_sample(tmp_path: Path) -> None:
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
    ("name", "text", "sentence"),
    [
        ("t.csv", "", "has no rows"),
        ("t.csv", "file_name,text\n", "has no rows"),
        ("t.jsonl", "\n", "has no rows"),
        ("t.csv", "file_name;text\n0.png;a, b\n", "has ';' between its columns"),
        ("t.csv", "file_name\ttext\n0.png\ta\n", r"has '\\t' between its columns"),
        ("t.tsv", "file_name,text\n0.png,a\n", "has ',' between its columns"),
        ("t.csv", "file_name,text\n0.png,a\n1.png,a, b\n", "line 3: 3 fields, the header has 2"),
        ("t.csv", "file_name,text\n0.png,a, b\n1.png,a, b\n", "line 2: 3 fields, the header has 2"),
        ("t.csv", "file_name,text\n0.png,a\n1.png\n", "line 3: 1 fields, the header has 2"),
        ("t.csv", 'file_name,text\n0.png,"a\n1.png,b\n', "line 3: .*double quote"),
        ("t.csv", "file_name,text,text\n0.png,a,b\n", "two columns are called 'text'"),
        ("t.csv", "file_name,text\n0.png,Röntgen\n".encode("latin-1"), "not UTF-8"),
        ("t.csv", "file_name,text\n0.png,a\n".encode("utf-16"), "not UTF-8"),
        ("t.csv", b"PK\x03\x04\0\0\0\0", "zero bytes"),
        ("t.csv", "file_name,text\n0.png,a\n1.png,  \n", r"1 empty captions of 2, in row 2 \(1.png\)"),
        ("t.csv", "file_name,text\n0.png,a\n7.png,b\n8.png,c\n", r"2 images of 3 .*row 2 \(7.png\)"),
        ("t.csv", "file_name,text\n0.png,a\n,b\n", r"1 images of 2 .*row 2 \(no path\)"),
        ("t.jsonl", '{"image": "0.png", "text": "a"}\n{"image": \n', "line 2: expected one JSON object"),
        ("t.jsonl", '[["image", "text"]]\n', "line 1: expected one JSON object"),
        ("t.jsonl", '{"image": "0.png", "text": ["a", "b"]}\n', "0.png has a list of captions; write one"),
        ("t.jsonl", '{"image": "0.png", "text": null}\n', r"empty captions of 1, in row 1 \(0.png\)"),
        ("t.jsonl", '{"image": "0.png", "text": "a"}\n{"image": "0.png"}\n', "empty captions of 2, in row 2"),
        ("t.xlsx", b"PK", "'.xlsx' are not read"),
        ("t.parquet", b"PAR0" * 30, "Parquet cannot be read"),
    ],
)
def test_bad_tables_get_one_sentence(
    parquet: Callable[..., Path], tmp_path: Path, name: str, text: str | bytes, sentence: str
) -> None:
    """Catches a traceback, a silently skipped row, and a message that does not say which file and row."""
    with pytest.raises(UserError, match=sentence) as caught:
        load_data(str(write(tmp_path, name, text, images=2)))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_bad_folders_get_one_sentence(tmp_path: Path) -> None:
    """Catches a folder without captions read as an empty data set, and a missing path taken for a Hub id."""
    write(tmp_path / "bare", "0.png", png(0))
    write(tmp_path / "named", "captions.csv", table(2), images=2)
    write(tmp_path / "held" / "test", "metadata.csv", table(2), images=2)
    write(tmp_path / "twice" / "train", "metadata.csv", table(2), images=2)
    for folder in ("val", "dev"):
        write(tmp_path / "twice" / folder, "metadata.csv", table(2), images=2)
    sentences = {
        "bare": "no metadata.csv.*file_name and text", "named": "--data .*captions.csv", "held": "expected one train",
        "twice": "dev, train, val; expected one train and one validation", "gone": "no such file or folder",
    }  # fmt: skip
    for name, sentence in sentences.items():
        with pytest.raises(UserError, match=sentence):
            load_data(str(tmp_path / name))


def test_an_unreadable_image_is_named_when_opened(tmp_path: Path) -> None:
    """Catches an error about a row that does not say which."""
    path = write(tmp_path, "t.csv", table(2), images=2)
    (tmp_path / "0.png").write_bytes(b"junk")
    (tmp_path / "1.png").write_bytes(b"junk")
    data = load_data(str(path))
    with pytest.raises(UserError, match=data.train.ids[0]):
        data.train.open_image(0)


# ---- Parquet, the Hub, phantoms


@pytest.mark.parametrize("kind", ["image", "struct", "bytes", "path", "struct path"])
def test_parquet_images_of_every_kind(parquet: Callable[..., Path], kind: str) -> None:
    """Catches one of the ways in which a Parquet file holds an image, and a decoy column of paths taken instead."""
    import datasets

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
    features = {"image": datasets.Image()} if kind == "image" else {}
    path = parquet("a.parquet", columns, modality=datasets.ClassLabel(names=["CT", "MRI"]),
                   **({"scan": datasets.Image()} if features else {}))  # fmt: skip
    write(path.parent, "unused.txt", "", images=10)
    data = load_data(str(path))
    assert levels(data.train) == numbers(data.train) and len(data.train) == 9
    assert data.train.labels["modality"] == [["CT", "MRI"][i % 2] for i in numbers(data.train)]
    assert levels(pickle.loads(pickle.dumps(data.train.select([2])))) == numbers(data.train)[2:3]


def test_parquet_shards_are_split_by_name(parquet: Callable[..., Path]) -> None:
    """Catches shards of one split lost or out of order, and a test shard read beside a validation shard."""
    names = ["train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001", "test-00000-of-00001"]
    for start, name in enumerate(names):
        rows = range(start * 3, start * 3 + 3)
        cells = {
            "image": list(map(png, rows)),
            "caption": [f"c {i}" for i in rows],
            "image_id": [f"x{i}" for i in rows],
        }
        folder = parquet(f"data/{name}.parquet", cells).parents[1]
    data = load_data(str(folder))
    assert numbers(data.train) == levels(data.train) == [0, 1, 2, 3, 4, 5]
    assert numbers(data.validation) == levels(data.validation) == [6, 7, 8]
    assert data.train.ids == [f"x{i}" for i in range(6)]
    assert data.source == f"folder {folder} (train, validation)"


def test_parquet_rows_without_image_or_caption(parquet: Callable[..., Path]) -> None:
    """Catches a null image that ends in an AttributeError, and a null caption read as the word None."""
    columns: dict[str, list[Any]] = {"image": [png(0), None, None], "caption": ["a", "b", "c"]}
    data = load_data(str(parquet("a.parquet", columns)))
    for split in (data.train, data.validation):
        for i, name in enumerate(split.ids):
            if name != "row 1":
                with pytest.raises(UserError, match=f"{name} .*empty"):
                    split.open_image(i)
    with pytest.raises(UserError, match=r"1 empty captions of 3, in row 2 \(row 2\)"):
        load_data(str(parquet("b.parquet", columns | {"caption": ["a", None, "c"]})))


def test_what_save_to_disk_wrote(tmp_path: Path) -> None:
    """Catches an Image column that decodes every picture as soon as captions are read, and a folder not recognised."""
    datasets = pytest.importorskip("datasets")
    rows = {"image": [{"bytes": png(i), "path": None} for i in range(6)], "caption": [f"c {i}" for i in range(6)]}
    rows["image"][0]["bytes"] = b"broken"
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    whole = datasets.Dataset.from_dict(rows, features)
    whole.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict(train=whole, validation=whole).save_to_disk(str(tmp_path / "two"))
    data = load_data(str(tmp_path / "two"))
    assert (len(data.train), len(data.validation), data.source) == (6, 6, f"folder {tmp_path}/two (train, validation)")
    assert levels(data.train.select(range(1, 6))) == [1, 2, 3, 4, 5]
    with pytest.raises(UserError, match="row 1 "):
        data.train.open_image(0)
    one = load_data(str(tmp_path / "one"))
    assert sorted(numbers(one.train) + numbers(one.validation)) == list(range(6))
    assert len({*one.train.origins, *one.validation.origins, *data.train.origins, *data.validation.origins}) == 18
    (tmp_path / "two" / "train" / "state.json").write_text("{")
    with pytest.raises(UserError, match="save_to_disk wrote there cannot be read"):
        load_data(str(tmp_path / "two"))


def test_parquet_is_read_a_row_group_at_a_time(tmp_path: Path, parquet: Callable[..., Path]) -> None:
    """Catches row groups mixed up or kept for ever, a limit that opens them all, and threads that see others' rows."""
    from concurrent.futures import ThreadPoolExecutor

    from clip_medical.data import parquet as reader

    cells = {"image": [png(i) for i in range(200)], "caption": [f"c {i}" for i in range(200)]}
    datasets = pytest.importorskip("datasets")
    path = tmp_path / "train.parquet"
    datasets.Dataset.from_dict(cells).to_parquet(path, batch_size=10)
    columns, pixels, origins = reader.read_shards([reader.local_shard(str(path))], None, 0)
    column = columns["image"]
    assert isinstance(column, reader.ImageColumn) and pixels == ["image"] and len(column.groups) == 20
    order = [*range(200), *np.random.default_rng(0).permutation(200).tolist()]
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(column.__getitem__, order)) == [cells["image"][row] for row in order]
    assert len(column._held) <= reader.ImageColumn.HELD
    assert origins == sorted(origins) and len(set(origins)) == 200
    few, _, _ = reader.read_shards([reader.local_shard(str(path))], 15, 0)
    other, _, _ = reader.read_shards([reader.local_shard(str(path))], 15, 1)
    assert len(few["caption"]) == 20 and few["caption"] != other["caption"]
    assert [int(caption[2:]) for caption in few["caption"]] == [Image.open(io.BytesIO(cell)).getpixel((0, 0))
                                                               for cell in few["image"]]  # fmt: skip
    with pytest.raises(IndexError):
        column[200]


def test_shards_that_disagree_are_named(parquet: Callable[..., Path]) -> None:
    """Catches rows of one shard read with the columns of another."""
    parquet("train-0.parquet", {"image": [png(0)] * 3, "caption": ["a", "b", "c"]})
    path = parquet("train-1.parquet", {"image": [png(0)] * 3, "text": ["a", "b", "c"]})
    with pytest.raises(UserError, match="train-1.parquet has other columns than .*train-0.parquet"):
        load_data(str(path.parent))


def test_phantoms_are_drawn_when_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pictures rendered to learn their captions, a seed or split not passed on, and rows that come apart."""
    drawn = []

    def describe(seed: int, split: str, index: int) -> tuple[str, dict[str, str]]:
        return f"{seed} {split} {index}", {"modality": "CT", "anatomy": "chest", "finding": "cyst", "view": f"v{index}"}

    def phantom(seed: int, split: str, index: int) -> Any:
        drawn.append((seed, split, index))
        return types.SimpleNamespace(image=Image.new("L", (4, 4), index))

    stub = types.ModuleType("clip_medical.data.phantoms")
    stub.__dict__.update(describe=describe, phantom=phantom)
    monkeypatch.setitem(sys.modules, "clip_medical.data.phantoms", stub)
    data = load_data("phantoms", seed=3, phantom_counts=(9, 5), limit=4)
    assert (len(data.train), len(data.validation), data.source) == (4, 4, "phantoms, seed 3")
    assert not drawn
    assert levels(data.validation) == numbers(data.validation)
    assert drawn == [(3, "validation", i) for i in numbers(data.validation)]
    assert data.train.labels["view"] == [f"v{i}" for i in numbers(data.train)]


def test_start_up_does_not_wait_for_datasets() -> None:
    """Catches an import at the top of the file that costs every user of phantoms a second."""
    code = "import sys, clip_medical.data.sources; print({'datasets', 'pandas', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


@pytest.mark.skipif(not REAL.is_dir(), reason="the folder of real images is not here")
def test_a_real_folder() -> None:
    """Catches what invented data does not hold: long captions with commas and quotes, groups, JPEGs, RGB among grey."""
    data = load_data(str(REAL))
    assert (len(data.train), len(data.validation)) == (1868, 280)
    assert set(data.train.labels) == {"modality", "anatomy", "finding"}
    assert {data.train.open_image(i).mode for i in range(0, 1868, 50)} <= {"L", "RGB"}
