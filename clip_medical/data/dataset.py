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
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from clip_medical.data.images import decode
from clip_medical.data.parquet import Sample, file_version
from clip_medical.data.roco import labels_from_cui
from clip_medical.data.splits import SPLIT_NAMES, Split, by_split, hold_out
from clip_medical.data.synthetic import phantoms
from clip_medical.data.tables import Table, read_tables
from clip_medical.errors import UserError

# Column names in real files, the preferred ones first. Case is ignored, and blanks and hyphens count as "_".
IMAGE = "file_name filename image_path image_file image img_path img filepath file_path path file image_name".split()
CAPTION = "caption captions text report report_text description impression findings image_caption sentence".split()
FACETS = {
    "modality": ["modality", "imaging_modality"],
    "anatomy": ["anatomy", "region", "body_region", "body_part", "bodypart", "organ"],
    "finding": ["finding", "pathology", "diagnosis", "disease"],
    "view": ["view", "view_position", "projection", "plane"],
}
GROUP = "patient patient_id subject subject_id group study_id".split()


@dataclass(frozen=True)
class Data:
    """A dataset: its two splits, and for reports its origin and how it was split."""

    train: Split
    validation: Split
    source: str  # "folder ../radiology (train, validation)" or "phantoms, seed 0"
    split_rule: str  # "splits of the source" or "10 % of the rows held out by seed 0, ..."


def data_fingerprint(data: Data) -> str:
    """Return SHA-256 over id and caption of every training and validation row, in order. Pixels are not included."""
    rows = [[split.ids, split.captions] for split in (data.train, data.validation)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()


def load_data(
    source: str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    phantom_counts: tuple[int, int] = (2304, 512),
) -> Data:
    """Read captions, labels and the locations of images. Images are read later, by `Split.open_image`.

    source          "phantoms"; a folder with metadata.csv or .jsonl, in itself or in train/, validation/ and test/;
                    a .csv, .tsv, .jsonl or .parquet file; a folder of Parquet shards; a folder that save_to_disk of
                    `datasets` wrote; or a Hub id "owner/name", whose Parquet shards are read from the Hub
    image_column, caption_column   names of the columns; None: the first of IMAGE and CAPTION above
    limit           draw at most this many training rows and this many validation rows, by `seed`. Parquet rows are
                    drawn from as few row groups as hold them, so that few rows cost few bytes
    revision        commit, tag or branch of a Hub id; None: its newest commit
    phantom_counts  training and validation rows of "phantoms"

    Test rows are used only if there is no validation split. If there is neither, 10 % of the rows are held out.
    Raises UserError for any fault of the source.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no rows. Give at least 1.")
    if source == "phantoms":
        train, validation = map(partial(_phantoms, seed), ("train", "validation"), phantom_counts)
        description, rule = f"phantoms, seed {seed}", "splits of the source"
    else:
        kind, tables = read_tables(source, revision, Sample(limit, seed))
        rows = {name: _check(table, image_column, caption_column) for name, table in tables.items()}
        train, validation, rule = _train_and_validation(rows, source, seed)
        description = f"{kind} {source}" + ("" if "" in tables else f" ({', '.join(tables)})")
    if limit is not None:
        rng = random.Random(seed)
        train, validation = (s.select(rng.sample(range(len(s)), min(limit, len(s)))) for s in (train, validation))
    return Data(train, validation, description, rule)


def _phantoms(seed: int, split: str, count: int) -> Split:
    captions, labels = zip(*(phantoms.describe(seed, split, i) for i in range(count)), strict=True)
    by_facet = {facet: [label[facet] for label in labels] for facet in FACETS}
    ids = [f"{split} {i}" for i in range(count)]
    origins = [f"phantoms {phantoms.VERSION} {seed} {split} {i:09}" for i in range(count)]
    return Split(list(captions), ids, by_facet, partial(_open_phantom, seed, split), origins)


# ---- table -> checked rows


_Rows = tuple[Split, list[str], list[str]]


def _check(table: Table, image_column: str | None, caption_column: str | None) -> _Rows:
    """Check the N rows of a table -> the rows; N split names, or none; N groups.

    Rows of one group must be in one split: those of a patient, or where no patient is given those of an image.
    """
    if not (table.origins or any(map(len, table.columns.values()))):
        raise UserError(f"{table.name} has no rows. Expected a row for each image and caption.")
    if image_column is None and len(table.images) == 1:  # recognised by its type, whatever its name
        (image_column,) = table.images
    image = _choose_column(table, image_column, IMAGE, "image")
    caption = _choose_column(table, caption_column, CAPTION, "caption")
    others = [name for name in table.columns if name not in (image, caption)]

    def texts(usual: Sequence[str]) -> list[str]:
        column = _find(others, usual)
        return _texts(table.columns[column]) if column else []

    if image in table.images:
        images = texts(["image_id", "id"]) or [f"row {row}" for row in range(1, len(table.origins) + 1)]
        read_cell, origins = table.images[image], [f"{origin} {image}" for origin in table.origins]
    else:
        images = _texts(table.columns[image])
        paths = [_image_path(table.folder, image) for image in images]
        paths = _require(paths, images, table, f"image file in {table.folder}")
        read_cell, origins = paths.__getitem__, [file_version(path) for path in paths]
    labels = labels_from_cui(table.columns.get("cui", ()))
    labels |= {facet: column for facet, usual in FACETS.items() if (column := texts(usual))}
    patients = texts(GROUP) or [""] * len(images)
    owners: dict[str, str] = {}  # image -> patient in its first row, so that all rows of an image are in one group
    groups = [owners.setdefault(name, patient or name) for name, patient in zip(images, patients, strict=True)]
    repeated = {name for name, count in Counter(images).items() if count > 1}
    ids = [f"{name} (row {row})" if name in repeated else name for row, name in enumerate(images, start=1)]
    captions = _require(_texts(table.columns[caption]), images, table, f"text in column {caption!r}")
    split = Split(captions, ids, labels, partial(_open_cell, read_cell, table.folder, ids), origins)
    return split, texts(["split"]), groups


def _find(names: Sequence[str], usual: Sequence[str]) -> str | None:
    """Return the column under the first of the usual names that occurs, or None."""
    columns = {re.sub("[ -]", "_", name.strip().lower()): name for name in names}
    return next((columns[name] for name in usual if name in columns), None)


def _choose_column(table: Table, wanted: str | None, usual: Sequence[str], kind: str) -> str:
    names = [*table.columns, *(table.images if kind == "image" else ())]
    column = wanted or _find(names, usual) or ""
    if column not in names:
        missing = f"no column {wanted!r}" if wanted else f"no {kind} column with a usual name"
        raise UserError(f"{table.name} has {missing}. Choose one of {', '.join(names)} with --{kind}-column.")
    return column


def _texts(cells: Sequence[Any]) -> list[str]:
    """The cells as stripped text; "" for null, NaN (which differs from itself) and whatever is not a single value."""
    return ["" if x is None or x != x or isinstance(x, list | dict) else str(x).strip() for x in cells]


def _require(values: list[str], images: list[str], table: Table, what: str) -> list[str]:
    missing = [f"{row} ({images[row - 1] or 'no path'})" for row, value in enumerate(values, start=1) if not value]
    if missing:
        rows = f"{len(missing)} of {len(values)} rows have no {what}: row {', '.join(missing[:5])}"
        raise UserError(f"{table.name}: {rows}. Correct or delete these rows.")
    return values


def _image_path(folder: Path, name: str) -> str:
    paths = (os.path.join(folder, spelling) for spelling in (name, name.replace("\\", "/")))  # \\: from Windows
    return next(filter(os.path.isfile, paths), "")


# Images are opened by functions with bound arguments, because closures could not be pickled for worker processes.


def _open_cell(read_cell: Callable[[int], Any], folder: Path, ids: list[str], row: int) -> Image.Image:
    cell = read_cell(row)
    if isinstance(cell, dict) and cell.get("path"):
        cell = {**cell, "path": folder / cell["path"]}
    return decode(Path(cell) if isinstance(cell, str) else cell or b"", ids[row])


def _open_phantom(seed: int, split: str, row: int) -> Image.Image:
    return phantoms.phantom(seed, split, row).image


# ---- rows -> training and validation split


def _train_and_validation(tables: dict[str, _Rows], source: str, seed: int) -> tuple[Split, Split, str]:
    splits = {name: split for name, (split, _, _) in tables.items()}
    split, split_names, groups = next(iter(tables.values()))
    if len(tables) == 1 and split_names:
        rows_of: dict[str, list[int]] = {}
        for row, name in enumerate(split_names):
            rows_of.setdefault(SPLIT_NAMES.get(name.lower(), name), []).append(row)
        chosen = by_split(rows_of, f"{source}, column 'split',")
        splits = {name: split.select(rows) for name, rows in chosen.items()}
        groups = [groups[row] for row in next(iter(chosen.values()))]
    if len(splits) == 2:
        (_, train), (name, validation) = splits.items()
        return train, validation, "splits of the source" + (", test used for validation" if name == "test" else "")
    (split,) = splits.values()
    training_rows, validation_rows = hold_out(groups, seed, source)
    share = 100 * len(validation_rows) / len(split)
    rule = f"{share:.0f} % of the rows held out by seed {seed}, rows of one image or group kept together"
    return split.select(training_rows), split.select(validation_rows), rule
