"""Load a dataset of images and captions: phantoms, a folder, a table, Parquet shards, or a dataset on the Hub.

tables.py finds one table for each split, and is where a new kind of file is added. This module checks the rows of each
table (a caption in every row, a file behind every path) and returns the training and the validation split.
"""

import hashlib
import json
import os
import random
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from string import Formatter
from typing import Any, NamedTuple
from zipfile import BadZipFile, ZipFile
from zlib import error as ZlibError

from huggingface_hub.constants import HF_HOME, HF_HUB_CACHE
from PIL import Image

from clip_medical.data.images import UnreadableImage, decode
from clip_medical.data.parquet import Sample, file_version
from clip_medical.data.roco import labels_from_cui
from clip_medical.data.splits import SPLIT_NAMES, Split, by_split, hold_out
from clip_medical.data.synthetic import phantoms
from clip_medical.data.tables import Table, find_tables, first_word, no_access
from clip_medical.errors import UserError

# Column names in real files, the preferred ones first, patients before studies. Only letters and digits count: "Patient
# ID" is "patientid". One-hot: findings with a column each, 1, 0 or -1 (uncertain), as in CheXpert, MIMIC-CXR and NIH.
COLUMNS: dict[str, Any] = json.loads(Path(__file__).with_name("columns.json").read_text(encoding="utf-8"))
IMAGE, CAPTION, GROUP, ONE_HOT = (COLUMNS[name] for name in ("image", "caption", "group", "one_hot"))
FACETS: dict[str, list[str]] = COLUMNS["facets"]
PATIENT_FOLDER = re.compile(r"(?:^|[/\\])(p(?:atient)?[-_]?\d{3,})[/\\]", re.IGNORECASE)  # CheXpert, MIMIC-CXR
MODALITIES = {"ct", "mr", "mri", "xray", "us", "ultrasound", "pet", "mammography"}
CACHES = [HF_HUB_CACHE, os.environ.get("HF_DATASETS_CACHE", f"{HF_HOME}/datasets")]  # where `datasets` unpacks archives
MORE_PHANTOMS = {"test": 4096, "calibration": 1024}  # rows, beside those of training and validation
CALIBRATION_SHARE, CALIBRATION_ROWS = 10, (30, 256)  # a tenth of the training rows is kept back, if that is so many
MISSING_LIMIT = 0.02  # fraction of the rows without a caption or a file that are left out; more are refused
EXTENSIONS = ("", ".jpg", ".png", ".jpeg", ".dcm", ".tif")  # tried on names without one, as ROCOv2 has them


@dataclass(frozen=True)
class Data:
    """A dataset: its splits, and for reports its origin and how it was split."""

    train: Split
    validation: Split
    calibration: Split  # training rows that are kept back, see evaluation/calibration.py; empty if there are few
    source: str  # "folder ../radiology (train, validation)" or "phantoms, seed 0"
    split_rule: str  # "splits of the source" or "10 % of the rows held out by seed 0, ..."
    notes: tuple[str, ...] = ()  # what a user should know: patients in both splits, rows left out


@dataclass(frozen=True)
class Columns:
    """How to read the rows of a table where the usual names do not tell. See `load_data`."""

    image: str | None = None
    caption: str | None = None
    group: str | None = None
    template: str | None = None
    image_root: str | None = None


def data_fingerprint(data: Data) -> str:
    """Return SHA-256 over id and caption of every training and validation row, in order. Pixels are not included."""
    rows = [[split.ids, split.captions] for split in (data.train, data.validation)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def load_data(
    source: str,
    *,
    split: str | None = None,
    image_column: str | None = None,
    caption_column: str | None = None,
    group_column: str | None = None,
    template: str | None = None,
    image_root: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    phantom_counts: tuple[int, int] = (6912, 512),
) -> Data:
    """Read captions, labels and the locations of images. Images are read later, by `Split.open_image`.

    source          "phantoms"; a folder with metadata.csv or .jsonl, in itself or in train/, validation/ and test/, or
                    with train.csv, val.csv, ...; a .csv, .tsv, .txt, .jsonl or .parquet file; a folder or file of
                    Parquet shards, tar shards (webdataset) or a zip; a folder that save_to_disk of `datasets` wrote;
                    images beside texts, or in folders by class; or a Hub id "owner/name", whose Parquet shards are
                    read from the Hub
    split           None: a training and a validation split. Otherwise rows to evaluate on, all of them, as the
                    validation split of a Data without training rows: "" the validation split of the source, else its
                    test split, else the whole source; or the name of a split
    image_column, caption_column   names of the columns; None: the first of IMAGE and CAPTION above
    group_column    rows with equal cells here, of a patient, are held out together; None: the first of GROUP
    template        writes the captions from other columns: "{modality} of the {anatomy}"
    image_root      folder to which image paths are relative, and in which absolute ones may lie; None: that of the
                    table, the only one from which files are read
    limit           draw at most this many training rows and this many validation rows, by `seed`. Parquet rows are
                    drawn from as few row groups as hold them, so that few rows cost few bytes
    revision        commit, tag or branch of a Hub id; None: its newest commit
    phantom_counts  training and validation rows of "phantoms"

    Without `split`, test rows are used only if there is no validation split. If there is neither, 10 % of the rows are
    held out. A tenth of the training rows, at most 256, is kept back for calibration. Raises UserError for any fault of
    the source.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no rows. Give at least 1.")
    notes: tuple[str, ...] = ()
    calibration = Split([], [], {}, list[Image.Image]().__getitem__, [])
    if source == "phantoms":
        counts = {"train": phantom_counts[0], "validation": phantom_counts[1], **MORE_PHANTOMS}
        if split and split not in ("train", "validation", "test"):
            raise UserError(f"The phantoms have the splits train, validation and test, not {split!r}. Correct --split.")
        names = ("train", split or "validation", "calibration")  # the last one has no results to report
        train, validation, calibration = (_phantoms(seed, name, counts[name]) for name in names)
        if split is not None:
            train = train.select([])
        description, rule = f"phantoms, seed {seed}", f"split {split}" if split else "splits of the source"
    else:
        kind, readers = find_tables(source, revision, Sample(limit, seed))
        chosen = by_split(readers, source, split) if readers.keys() != {""} else readers
        try:
            tables = {name: read() for name, read in chosen.items()}
        except OSError as error:
            raise no_access(source, error) from error
        columns = Columns(image_column, caption_column, group_column, template, image_root)
        rows = {name: part for table in tables.items() for name, part in _by_split_column(*table, columns).items()}
        rows = by_split(rows, source, split) if len(tables) == 1 else rows
        notes = tuple(dict.fromkeys(note for part in rows.values() for note in part.notes))
        if split is None:
            train, validation, rule, grouping = _train_and_validation(rows, source, seed)
            notes = (*notes, *grouping)
        else:
            ((name, part),) = rows.items()
            train, validation, rule = part.split.select([]), part.split, f"split {name}" if name else "all of its rows"
        description = f"{kind} {source}" + ("" if "" in tables else f" ({', '.join(tables)})")
    if limit is not None:
        rng = random.Random(seed)
        parts = (s.select(rng.sample(range(len(s)), min(limit, len(s)))) for s in (train, validation, calibration))
        train, validation, calibration = parts
    if source != "phantoms":
        train, calibration = _keep_back(train, source, seed)
    return Data(train, validation, calibration, description, rule, notes)


def _keep_back(train: Split, source: str, seed: int) -> tuple[Split, Split]:
    """Split off a tenth of the training rows, in whole groups; nothing where that would be few, or far more."""
    fewest, most = CALIBRATION_ROWS
    count = min(len(train) // CALIBRATION_SHARE, most)
    if count >= fewest and len(set(train.groups)) > 1:
        rows, kept_back = hold_out(train.groups, seed, source, count)
        if len(kept_back) <= count:
            return train.select(rows), train.select(kept_back)
    return train, train.select([])


def _phantoms(seed: int, split: str, count: int) -> Split:
    captions, labels = zip(*(phantoms.describe(seed, split, i) for i in range(count)), strict=True)
    by_facet = {facet: [label[facet] for label in labels] for facet in FACETS}
    ids = [f"{split} {i}" for i in range(count)]
    origins = [f"phantoms {phantoms.VERSION} {seed} {split} {i:09}" for i in range(count)]
    return Split(list(captions), ids, by_facet, partial(_open_phantom, seed, split), origins)


# ---- table -> checked rows


class _Rows(NamedTuple):
    """N checked rows of one split."""

    split: Split
    grouped_by: str  # column of the groups, "" if there is none
    notes: tuple[str, ...]


def _by_split_column(name: str, table: Table, columns: Columns) -> dict[str, _Rows]:
    """Check a table; if it has a column "split", return its rows by that, under the names that stand there."""
    rows, split_names = _check(table, columns)
    if name or not split_names:
        return {name: rows}
    parts: dict[str, list[int]] = {}
    for row, split in enumerate(split_names):
        parts.setdefault(SPLIT_NAMES.get(split.lower(), split), []).append(row)
    return {part: rows._replace(split=rows.split.select(numbers)) for part, numbers in parts.items()}


def _check(table: Table, given: Columns) -> tuple[_Rows, list[str]]:
    """Check the rows of a table -> those with an image and a caption, and the cells of their column "split" if any."""
    if not (table.origins or any(map(len, table.columns.values()))):
        raise UserError(f"{table.name} has no rows. Expected a row for each image and caption.")
    image = given.image
    if image is None and len(table.images) == 1:  # recognised by its type, whatever its name
        (image,) = table.images
    image = _choose_column(table, image, IMAGE, "image")
    if image not in table.images:
        table = _one_image_a_row(table, image)
    others = [name for name in table.columns if name != image]

    def texts(usual: Sequence[str]) -> list[str]:
        column = _find(others, usual)
        return _texts(table.columns[column]) if column else []

    count = len(table.origins) or len(table.columns[image])
    if image in table.images:
        names = texts(["image_id", "id"]) or [f"row {row}" for row in range(1, count + 1)]
        read_cell, origins = table.images[image], [f"{origin} {image}" for origin in table.origins]
        without = {"image file": list[int]()}
    else:
        names = _texts(table.columns[image])
        paths = _locate(table, names, given.image_root)
        without = {f"image file in {given.image_root or table.folder}": [row for row in range(count) if not paths[row]]}
        read_cell, origins = paths.__getitem__, [file_version(path) if path else "" for path in paths]
    labels = _labels(table, [name for name in others if name != given.caption])
    captions, source = _captions(table, given, labels, image)
    without[f"text in {source}"] = [row for row in range(count) if not captions[row]]
    missing = {row for rows in without.values() for row in rows}
    notes = table.notes
    for what, rows in without.items():
        if rows:
            listed = ", ".join(f"{row + 1} ({names[row][:80] or 'no path'})" for row in rows[:5])
            message = f"{len(rows)} of {count} rows have no {what}: row {listed}"
            if len(missing) > MISSING_LIMIT * count:
                raise UserError(f"{table.name}: {message}. Correct or delete these rows.")
            notes = (*notes, f"left out: {message}")

    groups, grouped_by = _groups(table, names, given.group or _find(others, GROUP))
    repeated = {name for name, times in Counter(names).items() if times > 1}
    ids = [f"{name} (row {row})" if name in repeated else name for row, name in enumerate(names, start=1)]
    split = Split(captions, ids, labels, partial(_open_cell, read_cell, table.folder, ids), origins, groups)
    kept = [row for row in range(count) if row not in missing]
    parts = texts(["split"])
    checked = _Rows(split.select(kept), grouped_by, notes)
    return checked, [parts[row] for row in kept] if parts else []


def _labels(table: Table, names: list[str]) -> dict[str, list[str]]:
    """Return facet -> N classes, from ROCOv2's codes and from the columns among `names` called like a facet."""
    labels = labels_from_cui(table.columns.get("cui", ()))
    columns = {facet: _find(names, usual) for facet, usual in FACETS.items()}
    labels |= {facet: _classes(table.columns[column]) for facet, column in columns.items() if column}
    labels |= _one_hot(table) if "finding" not in labels else {}
    findings = {re.sub(r"\W", "", name.lower()) for name in labels.get("finding", [])} - {""}
    if findings and findings <= MODALITIES and "modality" not in labels:  # folders named CT, MRI, ...
        labels["modality"] = labels.pop("finding")
    return labels


def _groups(table: Table, names: list[str], column: str | None) -> tuple[list[str], str]:
    """Return the group of each of N rows, its patient or else its image; and where patients stand, "" if nowhere.

    names: the image of each row. All rows of an image are in the group of its first row.
    """
    if column and column not in table.columns:
        raise UserError(f"{table.name} has no column {column!r}. Choose one with --group-column.")
    patients = _texts(table.columns[column]) if column else []
    if not any(patients):
        found = [PATIENT_FOLDER.search(name) for name in names]
        patients, column = [match[1] if match else "" for match in found], "the patient's folder in the path"
    images = table.columns.get(FIRST_IMAGE, names)
    owners: dict[str, str] = {}
    groups = [owners.setdefault(n, p or image) for n, p, image in zip(names, patients, images, strict=True)]
    return groups, str(column) if any(patients) else ""


FIRST_IMAGE = "the first image of the row"  # a column that `_one_image_a_row` adds


def _one_image_a_row(table: Table, image: str) -> Table:
    """Give each image its own row where a row names several: a list, or "a.png;b.png"."""

    def images(cell: Any) -> list[Any]:
        if isinstance(cell, str):
            names = [name for name in re.split(r"\s*[;|]\s*", cell) if name]
            return names if names and all(os.path.splitext(name)[1] for name in names) else [cell]  # "a;b.png" is one
        return ([name for name in cell if name] or [""]) if isinstance(cell, list) else [cell]

    cells = [images(cell) for cell in table.columns[image]]
    if all(len(cell) == 1 for cell in cells):
        return table
    rows = [row for row, cell in enumerate(cells) for _ in cell]
    columns = {name: [column[row] for row in rows] for name, column in table.columns.items()}
    columns |= {image: [name for cell in cells for name in cell], FIRST_IMAGE: [cells[row][0] for row in rows]}
    return table._replace(columns=columns, origins=())


def _captions(table: Table, given: Columns, labels: dict[str, list[str]], image: str) -> tuple[list[str], str]:
    """Return the captions of N rows, "" where there is none, and where they come from."""
    if given.template is None:
        others = [name for name in table.columns if name != image]
        if given.caption is None and not _find(others, CAPTION) and labels:
            raise UserError(
                f"{table.name} has no caption column with a usual name. Choose one of {', '.join(others)} with "
                f"--caption-column, or write captions from the labels: --template 'X-ray, {{{next(iter(labels))}}}'."
            )
        column = _choose_column(table._replace(images={}), given.caption, CAPTION, "caption")
        captions = _texts(table.columns[column])
        # Reports without an impression have findings, and the reverse (IU X-ray).
        sections = [section for name in ("impression", "findings") if (section := _find(others, [name]))]
        if given.caption is None and column in sections:
            rest = [_texts(table.columns[name]) for name in sections]
            captions = [caption or next(filter(None, row), "") for caption, *row in zip(captions, *rest, strict=True)]
        return captions, f"column {column!r}"
    fields = {_plain(name): _texts(column) for name, column in table.columns.items()}
    fields |= {facet: [cell.replace("|", ", ") for cell in cells] for facet, cells in labels.items()}
    try:
        parts = list(Formatter().parse(given.template))
    except ValueError as error:
        raise UserError(f"--template {given.template!r}: {error}. Expected text and names in braces.") from error
    named = {field + (f":{form}" if form else "") + (f"!{conversion}" if conversion else "")
             for _, field, form, conversion in parts if field is not None}  # fmt: skip
    if unknown := named - fields.keys():
        raise UserError(f"--template names {', '.join(sorted(unknown))}. Expected some of {', '.join(fields)}.")
    rows = [{field: fields[field][row] for field in named} for row in range(len(next(iter(fields.values()))))]
    return [given.template.format(**row) if all(row.values()) else "" for row in rows], "the columns of --template"


def _classes(cells: Sequence[Any]) -> list[str]:
    """Label cells in one spelling: "" unknown; several labels of an image ("B|A", "A; B", a list) as "A|B"."""
    sets: list[list[str]] = []
    for cell, text in zip(cells, _texts(cells), strict=True):
        if isinstance(cell, list):
            names = [str(x) for x in cell]
        elif text.startswith("["):  # PadChest: a list of Python as text
            names = [name for _, name in re.findall(r"""(['"])(.*?)\1(?=\s*[,\]])""", text)]
        else:
            names = re.split("[|;]", text)
        sets.append([name for x in names if (name := x.strip()) and name.lower() != "nan"])
    spellings = Counter(name for names in sets for name in names)
    usual: dict[str, str] = {}  # CT and ct are one class, in its most frequent spelling
    for name, _ in spellings.most_common():
        usual.setdefault(name.lower(), name)
    return ["|".join(sorted({usual[name.lower()] for name in names})) for names in sets]


def _one_hot(table: Table) -> dict[str, list[str]]:
    """Findings with a column each, as {"finding": N cells "A|B"}; "A?" is uncertain. {} without two such columns."""
    values = {"1": "{}", "1.0": "{}", "-1": "{}?", "-1.0": "{}?", "0": "", "0.0": "", "": ""}
    columns = {
        name: cells for name, column in table.columns.items()
        if _plain(name).replace("_", "") in ONE_HOT and set(cells := _texts(column)) <= values.keys()
    }  # fmt: skip
    if len(columns) < 2:
        return {}
    found = []
    for row in zip(*columns.values(), strict=True):
        names = [values[cell].format(name) for name, cell in zip(columns, row, strict=True) if values[cell]]
        found.append("|".join(sorted(names)) or ("No Finding" if any(row) else ""))
    return {"finding": found}


def _plain(name: str) -> str:
    return re.sub(r"\W+", "_", name.strip().lower()).strip("_")


def _find(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """Return the column under the first of the usual names that occurs, or None."""
    columns = {_plain(name).replace("_", ""): name for name in names}
    return next((columns[name] for entry in usual if (name := entry.replace("_", "")) in columns), None)


def _choose_column(table: Table, wanted: str | None, usual: Sequence[str], kind: str) -> str:
    names = [*table.columns, *(table.images if kind == "image" else ())]
    first = ["ID", "id", "Id"] if kind == "image" and wanted is None else []  # the last resort: ROCOv2's ID,Caption
    column = wanted or _find(names, usual) or next((name for name in first if name in names), "")
    if column not in names:
        missing = f"no column {wanted!r}" if wanted else f"no {kind} column with a usual name"
        raise UserError(f"{table.name} has {missing}. Choose one of {', '.join(names)} with --{kind}-column.")
    return column


def _texts(cells: Sequence[Any]) -> list[str]:
    """The cells as stripped text; "" for null, NaN (which differs from itself) and whatever is not a single value."""
    return ["" if x is None or x != x or isinstance(x, list | dict) else str(x).strip() for x in cells]


def _locate(table: Table, names: list[str], image_root: str | None) -> list[str]:
    """Return the paths of the files that N cells name, "" where there is none.

    Names are relative to the table's folder, or to one in it named after the split or "images"; a usual extension may
    be missing. Raises UserError if a name leads out of that folder, and out of `image_root` if that is given.
    """
    roots = [os.path.abspath(os.path.expanduser(image_root))] if image_root else []
    roots.append(os.path.abspath(table.folder))
    part = first_word(Path(table.name).name)
    folders = [""] if image_root else ["", part, "images", os.path.join(part, "images"), "files"]
    places = [(os.path.join(roots[0], folder), extension) for folder in folders for extension in EXTENSIONS]
    paths, below = [], dict[str, str]()
    for row, name in enumerate(names):
        path = ""
        for spelling in {name: None, name.replace("\\", "/"): None} if name else ():  # \\: from Windows
            for place in places if not path else ():
                candidate = os.path.normpath(os.path.join(place[0], spelling) + place[1])
                if not any(Path(candidate).is_relative_to(root) for root in roots):
                    raise UserError(
                        f"{table.name}, row {row + 1}: {name!r} lies outside of {roots[-1]}. If you trust this table, "
                        "give the folder of the images by --image-root."
                    )
                if os.path.isfile(candidate):
                    path = candidate
                    places.remove(place)  # try first what was right before
                    places.insert(0, place)
                    break
        if name and not path and os.path.basename(name) == name:  # in some folder below, as in NIH's images_001/images
            below = below or _files_below(roots[0])
            path = below.get(name, "")
        paths.append(path)
    return paths


def _files_below(root: str) -> dict[str, str]:
    """File name, with and without extension -> path, of all files below a folder; "" where a name occurs twice."""
    found: dict[str, str] = {}
    for folder, _, files in os.walk(root):
        for file in files:
            for name in {file, os.path.splitext(file)[0]}:
                found[name] = "" if name in found else os.path.join(folder, file)
    return found


# Images are opened by functions with bound arguments, because closures could not be pickled for worker processes.


def _open_cell(read_cell: Callable[[int], Any], folder: Path, ids: list[str], row: int) -> Image.Image:
    cell = read_cell(row)
    if isinstance(cell, dict) and cell.get("path") and not cell.get("bytes"):
        member, _, archive = str(cell["path"]).partition("::")  # of `datasets`: zip://x.png::archive
        path = os.path.abspath(archive or folder / member)
        if not any(Path(path).is_relative_to(root) for root in (os.path.abspath(folder), *CACHES)):
            raise UnreadableImage(f"Image {ids[row]} cannot be read: {path} lies outside of {folder}.")
        try:
            cell = _zip(path).read(member.removeprefix("zip://").lstrip("/")) if archive else {"path": path}
        except (BadZipFile, KeyError, OSError, RuntimeError, ZlibError) as error:  # damaged, or encrypted
            raise UnreadableImage(f"Image {ids[row]} cannot be read from {path}: {error}.") from error
    return decode(Path(cell) if isinstance(cell, str) else cell or b"", ids[row])


@lru_cache(2)
def _zip(file: str) -> ZipFile:
    return ZipFile(file)


def _open_phantom(seed: int, split: str, row: int) -> Image.Image:
    return phantoms.phantom(seed, split, row).image


# ---- rows -> training and validation split


def _train_and_validation(rows: dict[str, _Rows], source: str, seed: int) -> tuple[Split, Split, str, list[str]]:
    """Return the two splits, how they were made, and what is known of patients in both."""
    column = next(iter(rows.values())).grouped_by
    if len(rows) == 2:
        train, (name, validation) = rows["train"], [*rows.items()][1]
        both = set(train.split.groups) & set(validation.split.groups) if column else set()
        notes = [f"{len(both):,} groups by {column} are in both splits of the source"] if both else []
        rule = "splits of the source" + (", test used for validation" if name == "test" else "")
        return train.split, validation.split, rule, notes
    (part,) = rows.values()
    training_rows, validation_rows = hold_out(part.split.groups, seed, source, round(len(part.split) / 10))
    share = 100 * len(validation_rows) / len(part.split)
    rule = f"{share:.0f} % of the rows held out by seed {seed}, "
    if column:
        rule += f"grouped by {column} ({len(set(part.split.groups)):,} groups)"
        notes = []
    else:
        rule += "rows of one image kept together"
        notes = ["no patient column found: images of one patient can be in both splits. Name it by --group-column"]
    return part.split.select(training_rows), part.split.select(validation_rows), rule, notes
