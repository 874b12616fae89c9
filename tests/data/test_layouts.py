"""`load_data` on the layouts that people have: public datasets, folders by class, archives, reports."""

import csv
import io
import json
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from clip_medical.data.dataset import Data, load_data
from clip_medical.data.splits import Split
from clip_medical.errors import UserError

COUNT = 40
Rows = list[list[object]]


def png(level: int) -> bytes:
    buffer = io.BytesIO()
    Image.new("L", (4, 4), level).save(buffer, "PNG")
    return buffer.getvalue()


def image(file: Path, number: int) -> str:
    """Write image `number`, whose grey level is its number."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_bytes(png(number))
    return file.name


def write(file: Path, header: list[str], rows: Rows, delimiter: str = ",", encoding: str = "utf-8") -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    with open(file, "w", newline="", encoding=encoding) as handle:
        csv.writer(handle, delimiter=delimiter).writerows([header, *rows] if header else rows)
    return file


def levels(split: Split) -> list[int]:
    return [np.asarray(split.open_image(i))[0, 0].item() for i in range(len(split))]


def rocov2(root: Path) -> Path:
    """As on Zenodo: train_captions.csv with ID and Caption, images in train/ID.jpg (here PNG)."""
    for split, numbers in (("train", range(30)), ("valid", range(30, 40))):
        rows: Rows = []
        for n in numbers:
            image(root / split / f"ROCOv2_2023_{split}_{n:06d}.png", n)
            rows.append([f"ROCOv2_2023_{split}_{n:06d}", f"caption {n}"])
        write(root / f"{split}_captions.csv", ["ID", "Caption"], rows)
    return root


def roco_v1(root: Path) -> Path:
    """captions.txt without a header, images in images/."""
    lines = []
    for n in range(COUNT):
        image(root / "images" / f"ROCO_{n:05d}.png", n)
        lines.append(f'ROCO_{n:05d}\t A 5" wide caption {n}\n')
    (root / "captions.txt").write_text("".join(lines))
    return root


def beside_texts(root: Path) -> Path:
    for n in range(COUNT):
        image(root / "scans" / f"x{n}.png", n)
        (root / "scans" / f"x{n}.txt").write_text(f"caption {n}\n")
    return root


def tables_side_by_side(root: Path) -> Path:
    for name, numbers in (("train", range(28)), ("val", range(28, 34)), ("test", range(34, 40))):
        rows: Rows = [[image(root / f"{n}.png", n), f"caption {n}"] for n in numbers]
        write(root / f"{name}.csv", ["filepath", "caption"], rows)
    return root


def semicolons(root: Path) -> Path:
    """A table as Excel saves it in Europe."""
    rows: Rows = [[image(root / f"{n}.png", n), f"Lésion à gauche, caption {n}"] for n in range(COUNT)]
    return write(root / "t.csv", ["Image Path", "Report"], rows, ";", "cp1252")


def utf_16(root: Path) -> Path:
    rows: Rows = [[image(root / f"{n}.png", n), f"肺 caption {n}"] for n in range(COUNT)]
    return write(root / "t.csv", ["file_name", "text"], rows, "\t", "utf-16")


def archive(root: Path) -> Path:
    with zipfile.ZipFile(root / "pairs.zip", "w") as file:
        file.writestr("metadata.csv", "file_name,text\n" + "".join(f"{n}.png,caption {n}\n" for n in range(COUNT)))
        for n in range(COUNT):
            file.writestr(f"{n}.png", png(n))
    return root / "pairs.zip"


def webdataset(root: Path) -> Path:
    with tarfile.open(root / "pairs-0000.tar", "w") as file:
        for n in range(COUNT):
            for suffix, data in (("png", png(n)), ("txt", f"caption {n}".encode())):
                entry = tarfile.TarInfo(f"{n:04d}.{suffix}")
                entry.size = len(data)
                file.addfile(entry, io.BytesIO(data))
    return root


def metadata_parquet(root: Path) -> Path:
    datasets = pytest.importorskip("datasets")
    for split, numbers in (("train", range(30)), ("validation", range(30, 40))):
        names = [image(root / split / f"{n}.png", n) for n in numbers]
        rows = datasets.Dataset.from_dict({"file_name": names, "text": [f"caption {n}" for n in numbers]})
        rows.to_parquet(root / split / "metadata.parquet")
    return root


LAYOUTS: dict[str, tuple[Callable[[Path], Path], tuple[int, int]]] = {
    "ROCOv2 from Zenodo": (rocov2, (30, 10)),
    "ROCO v1": (roco_v1, (36, 4)),
    "texts beside images": (beside_texts, (36, 4)),
    "train.csv, val.csv, test.csv": (tables_side_by_side, (28, 6)),
    "semicolons, cp1252": (semicolons, (36, 4)),
    "tabs in a .csv, UTF-16": (utf_16, (36, 4)),
    "zip": (archive, (36, 4)),
    "webdataset": (webdataset, (36, 4)),
    "metadata.parquet": (metadata_parquet, (30, 10)),
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` unpacks archives into its cache."""
    datasets = pytest.importorskip("datasets")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "hf" / name)
    monkeypatch.setattr("clip_medical.data.dataset.CACHES", [str(tmp_path / "hf")])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_captions_of_a_layout_stay_together(layout: str, tmp_path: Path) -> None:
    """Catches a layout that is refused or whose rows are paired wrongly, and test rows in training."""
    make, sizes = LAYOUTS[layout]
    data = load_data(str(make(tmp_path / "data") if layout not in ("zip", "webdataset") else make(tmp_path)))
    assert (len(data.train), len(data.validation)) == sizes
    for split in (data.train, data.validation):
        assert levels(split) == [int(caption.split()[-1]) for caption in split.captions]
    if "cp1252" in layout:
        assert data.train.captions[0].startswith("Lésion à gauche, ")
    if "16" in layout:
        assert data.train.captions[0].startswith("肺")


def by_class(root: Path) -> Path:
    for n in range(COUNT):
        split, name = ("Training", "Testing")[n >= 30], ("glioma", "notumor")[n % 2]
        image(root / split / name / f"{n}.png", n)
    return root


def test_folders_by_class(tmp_path: Path) -> None:
    """Catches test images in training, captions other than the folder's name, and labels that are lost."""
    data = load_data(str(by_class(tmp_path)))
    assert (len(data.train), len(data.validation)) == (30, 10)
    assert data.train.captions == data.train.labels["finding"] and set(data.train.captions) == {"glioma", "notumor"}
    assert any("names of the folders" in note for note in data.notes)
    worded = load_data(str(tmp_path), template="MRI of the head, {class}")
    assert set(worded.train.captions) == {"MRI of the head, glioma", "MRI of the head, notumor"}


def test_folders_named_after_modalities_are_modalities(tmp_path: Path) -> None:
    """Catches CT and MRI measured as findings."""
    for n in range(COUNT):
        image(tmp_path / ("CT", "MRI")[n % 2] / f"{n}.png", n)
    labels = load_data(str(tmp_path)).train.labels
    assert set(labels) == {"modality"} and set(labels["modality"]) == {"CT", "MRI"}


def nih(root: Path, kinds: list[str]) -> Path:
    rows: Rows = [[image(root / f"{n}.png", n), kinds[n % len(kinds)], n // 2] for n in range(COUNT)]
    return write(root / "Data_Entry.csv", ["Image Index", "Finding Labels", "Patient ID"], rows)


def test_the_table_of_nih(tmp_path: Path) -> None:
    """Catches sets of findings in two orders as two classes, a missing caption column that is not explained, and
    patients in both splits."""
    kinds = ["Cardiomegaly|Effusion", "Effusion|Cardiomegaly", "effusion", "No Finding", "Effusion"]
    path = str(nih(tmp_path, kinds))
    with pytest.raises(UserError, match="--template"):
        load_data(path)
    data = load_data(path, template="Chest X-ray. {finding}")
    assert set(data.train.labels["finding"]) == {"Cardiomegaly|Effusion", "Effusion", "No Finding"}
    assert "Chest X-ray. Cardiomegaly, Effusion" in data.train.captions
    assert "grouped by Patient ID (20 groups)" in data.split_rule
    with pytest.raises(UserError, match="--template names colour.*finding"):
        load_data(path, template="{colour}")


def test_the_table_of_chexpert(tmp_path: Path) -> None:
    """Catches one-hot columns that are ignored, -1 (uncertain) as present or absent, and the patient in the path."""
    rows: Rows = []
    for n in range(COUNT):
        path = tmp_path / f"train/patient{n // 4:05d}/study1/view{n}.png"
        image(path, n)
        rows.append([str(path.relative_to(tmp_path)), 60, "1.0" if n % 2 else "", "-1.0" if n % 4 == 1 else "0.0"])
    path = write(tmp_path / "train.csv", ["Path", "Age", "Edema", "Pleural Effusion"], rows)
    data = load_data(str(path), template="{finding}")
    assert set(data.train.labels["finding"]) == {"Edema|Pleural Effusion?", "Edema", "No Finding"}
    patients = [{name.split("/")[1] for name in split.ids} for split in (data.train, data.validation)]
    assert not patients[0] & patients[1] and "patient's folder" in data.split_rule


def test_the_table_of_padchest(tmp_path: Path) -> None:
    """Catches a list written as text taken for one class."""
    rows: Rows = [[image(tmp_path / f"{n}.png", n), "informe", "['nodule', 'normal']"] for n in range(COUNT)]
    path = write(tmp_path / "PADCHEST.csv", ["ImageID", "Report", "Labels"], rows)
    assert set(load_data(str(path)).train.labels["finding"]) == {"nodule|normal"}


def test_reports_without_an_impression_have_their_findings(tmp_path: Path) -> None:
    """Catches IU X-ray refused for blank impressions, and the findings of another row."""
    rows: Rows = [
        [image(tmp_path / f"{n}.png", n), f"findings {n}", "" if n % 4 else f"impression {n}"] for n in range(COUNT)
    ]
    split = load_data(str(write(tmp_path / "t.csv", ["filename", "findings", "impression"], rows))).train
    for level, caption in zip(levels(split), split.captions, strict=True):
        assert caption == (f"findings {level}" if level % 4 else f"impression {level}")


@pytest.mark.parametrize("as_list", [True, False])
def test_several_images_of_a_report(as_list: bool, tmp_path: Path) -> None:
    """Catches a report with two views as one row or none, and its views in both splits."""
    lines = []
    for n in range(0, COUNT, 2):
        names = [image(tmp_path / f"{m}.png", m) for m in (n, n + 1)]
        lines.append(json.dumps({"image_path": names if as_list else "; ".join(names), "report": f"report {n}"}))
    (tmp_path / "annotation.jsonl").write_text("\n".join(lines))
    for seed in range(3):
        data = load_data(str(tmp_path / "annotation.jsonl"), seed=seed)
        assert len(data.train) + len(data.validation) == COUNT
        for split in (data.train, data.validation):
            assert [int(c.split()[1]) for c in split.captions] == [level // 2 * 2 for level in levels(split)]
        assert not set(data.train.captions) & set(data.validation.captions)


def test_a_semicolon_in_a_file_name_is_no_list(tmp_path: Path) -> None:
    """Catches a file name cut in two, and both halves reported as missing."""
    rows: Rows = [[image(tmp_path / f"{n};left.png", n), f"caption {n}"] for n in range(4)]
    data = load_data(str(write(tmp_path / "t.csv", ["file_name", "text"], rows)), split="")
    assert levels(data.validation) == [0, 1, 2, 3]


@pytest.mark.parametrize("column", ["PatientID", "patientId", "patientid", "uid", "StudyInstanceUID", "Who"])
def test_a_column_of_patients_has_many_names(column: str, tmp_path: Path) -> None:
    """Catches images of one patient in both splits, and a run that does not say by what it grouped."""
    rows: Rows = [[image(tmp_path / f"{n}.png", n), f"caption {n}", f"p{n // 2}"] for n in range(COUNT)]
    path = str(write(tmp_path / "t.csv", ["file_name", "text", column], rows))
    for seed in range(3):
        data = load_data(path, seed=seed, group_column="Who" if column == "Who" else None)
        assert not {level // 2 for level in levels(data.train)} & {level // 2 for level in levels(data.validation)}
        assert f"grouped by {column} (20 groups)" in data.split_rule


def test_an_unknown_patient_is_said(tmp_path: Path) -> None:
    """Catches a split by image that a user takes for one by patient; patients in both splits of the source."""
    rows: Rows = [[image(tmp_path / f"{n}.png", n), f"c {n}", "p", ("train", "validate")[n % 2]] for n in range(4)]
    plain = load_data(str(write(tmp_path / "plain.csv", ["file_name", "text"], [row[:2] for row in rows])))
    assert any("no patient column found" in note for note in plain.notes)
    both = load_data(str(write(tmp_path / "t.csv", ["file_name", "text", "patient", "split"], rows)))
    assert (len(both.train), len(both.validation)) == (2, 2)
    assert any("1 groups by patient are in both splits" in note for note in both.notes)


def test_a_few_rows_without_image_or_caption_are_left_out_and_listed(tmp_path: Path) -> None:
    """Catches 160 rows refused for one lost file, and rows dropped without a word."""
    rows: Rows = [[image(tmp_path / f"{n}.png", n), f"caption {n}"] for n in range(160)]
    rows[3][0], rows[7][1] = "gone.png", " "
    data = load_data(str(write(tmp_path / "t.csv", ["file_name", "text"], rows)))
    assert len(data.train) + len(data.validation) == 158
    notes = " ".join(note for note in data.notes if "left out" in note)
    assert "row 4 (gone.png)" in notes and "no text in column 'text': row 8 (7.png)" in notes
    for row in range(20, 26):
        rows[row][1] = ""
    with pytest.raises(UserError, match="1 of 160 rows have no image file in .*: row 4"):
        load_data(str(write(tmp_path / "t.csv", ["file_name", "text"], rows)))


def evaluated(path: Path, split: str = "") -> Data:
    data = load_data(str(path), split=split)
    assert not len(data.train)
    return data


def test_a_source_to_evaluate_on_is_taken_whole(tmp_path: Path) -> None:
    """Catches a tenth of a test table measured in silence, and a folder refused because it holds only test rows."""
    rows: Rows = [[image(tmp_path / f"{n}.png", n), f"caption {n}"] for n in range(COUNT)]
    data = evaluated(write(tmp_path / "t.csv", ["file_name", "text"], rows))
    assert len(data.validation) == COUNT and data.split_rule == "all of its rows"
    sides = tables_side_by_side(tmp_path / "sides")
    assert [len(evaluated(sides, split).validation) for split in ("", "val", "test", "train")] == [6, 6, 6, 28]
    assert evaluated(sides, "test").validation.captions[0] == "caption 34"
    with pytest.raises(UserError, match="splits test, train, val. Choose one of them with --split"):
        evaluated(sides, "extra")
    (sides / "train.csv").unlink()
    (sides / "val.csv").unlink()
    assert evaluated(sides).validation.captions[0] == "caption 34" and evaluated(sides).split_rule == "split test"
    with pytest.raises(UserError, match="Expected one train"):
        load_data(str(sides))


def test_only_files_in_the_folder_of_the_table_are_read(tmp_path: Path) -> None:
    """Catches a table from elsewhere that reads private files of its user."""
    image(tmp_path / "private" / "0.png", 0)
    for name in ("../private/0.png", str(tmp_path / "private" / "0.png"), "..\\private\\0.png"):
        path = write(tmp_path / "data" / "t.csv", ["file_name", "text"], [[name, "a"], [name, "b"]])
        with pytest.raises(UserError, match=r"row 1: .* lies outside .*--image-root"):
            load_data(str(path))
        data = load_data(str(path), split="", image_root=str(tmp_path / "private"))
        assert len(data.validation) == 2 if not name.startswith("..") else True
