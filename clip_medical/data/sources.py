"""Images and captions from wherever they lie: phantoms, an image folder, a table, Parquet shards, the Hub.

tables.py finds one table a split; here each table becomes rows that were checked (a caption in every row, a file behind
every path), and the rows become the two splits that training reads.
"""

import hashlib
import os
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from clip_medical.data.images import decode
from clip_medical.data.roco import labels_from_cui
from clip_medical.data.splits import Split, hold_out
from clip_medical.data.tables import SPLITS, Table, Wish, by_split, read_tables
from clip_medical.errors import UserError

# Column names that real files use, best first; compared in lower case, with "_" for blanks and hyphens.
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
    """What `load_data` found, and the words in which a report says so."""

    train: Split
    validation: Split
    source: str  # "folder ../radiology (train, validation)" or "phantoms, seed 0"
    split_rule: str  # "splits of the source" or "10 % held out by seed 0, ..."


class _Rows(NamedTuple):
    split: Split
    parts: list[str]  # the split that each row names for itself, or []
    ties: list[str]  # the patient of each row, or its image: rows with the same one must not be parted


def load_data(
    source: str,
    *,
    image_column: str | None = None,
    caption_column: str | None = None,
    limit: int | None = None,
    seed: int = 0,
    revision: str | None = None,
    streaming: bool = True,
    phantom_counts: tuple[int, int] = (2304, 512),
) -> Data:
    """Read captions, labels and the whereabouts of images; pixels are read by `open_image` alone.

    source          "phantoms"; a folder with metadata.csv or .jsonl, in itself or in train/, validation/ and test/;
                    a .csv, .tsv, .jsonl or .parquet file; a folder of Parquet shards; one that save_to_disk of
                    `datasets` wrote; or a Hub id "owner/name"
    image_column, caption_column   the columns' names, where the usual ones (IMAGE, CAPTION above) do not find them
    limit           a random sample, drawn by `seed`, of so many training rows, and of so many validation rows; of
                    Parquet shards within as few row groups as hold so many, so that few rows are few megabytes
    revision        commit, tag or branch of a Hub id; default: its newest commit
    streaming       read the Hub's Parquet shards where they lie; else download them all first
    phantom_counts  training and validation rows of "phantoms"

    Test rows are used only where there is no validation split; where there is neither, 10 % of the rows are held out.
    Raises UserError, one sentence, for whatever is wrong with the source.
    """
    if limit is not None and limit < 1:
        raise UserError(f"--limit {limit} leaves no rows; give at least 1.")
    if source == "phantoms":
        train, validation = map(partial(_phantoms, seed), ("train", "validation"), phantom_counts)
        said, rule = f"phantoms, seed {seed}", "splits of the source"
    else:
        kind, tables = read_tables(source, Wish(revision, streaming, limit, seed))
        rows = {name: _read(table, image_column, caption_column) for name, table in tables.items()}
        train, validation, rule = _train_and_validation(rows, source, seed)
        said = f"{kind} {source}" + ("" if "" in tables else f" ({', '.join(tables)})")
    if limit is not None:
        rng = random.Random(seed)
        train, validation = (s.select(rng.sample(range(len(s)), min(limit, len(s)))) for s in (train, validation))
    return Data(train, validation, said, rule)


# ---- table -> checked rows


def _read(table: Table, image_column: str | None, caption_column: str | None) -> _Rows:
    if not any(map(len, table.columns.values())):
        raise UserError(f"{table.where} has no rows.")
    # Parquet says by its types which columns hold images; a lone one needs no usual name
    image = table.pixels[0] if len(table.pixels) == 1 else None
    image = _pick(table, image_column or image, IMAGE, "image")
    caption = _pick(table, caption_column, CAPTION, "caption")
    ids = _ids(table, image)
    if image in table.pixels:
        cells: Sequence[Any] = table.columns[image]
        origins = [f"{origin} {image}" for origin in table.origins]
    else:
        cells, origins = _existing(table, ids)
    others = [name for name in table.columns if name not in (image, caption)]
    found = {facet: _find(others, usual) for facet, usual in FACETS.items()}
    labels = labels_from_cui(table.columns["cui"]) if _lists(table.columns.get("cui")) else {}
    labels |= {facet: _texts(table.columns[name]) for facet, name in found.items() if name}
    part, group = _find(others, ["split"]), _find(others, GROUP)
    owner: dict[str, str] = {}  # image -> its patient: two rows of one image have one tie, whatever their groups say
    patients = _texts(table.columns[group]) if group else [""] * len(ids)
    ties = [owner.setdefault(name, patient or name) for name, patient in zip(ids, patients, strict=True)]
    captions = _captions(table.columns[caption], ids, f"{table.where}, column {caption!r}")
    repeated = {name for name, count in Counter(ids).items() if count > 1}
    unique = [f"{name} (row {i})" if name in repeated else name for i, name in enumerate(ids, start=1)]
    split = Split(captions, unique, labels, partial(_open_cell, cells, table.root, unique), origins)
    return _Rows(split, _texts(table.columns[part]) if part else [], ties)


def _ids(table: Table, image: str) -> list[str]:
    """What rows are called: rows of one image share it."""
    name = _find(list(table.columns), ["image_id", "id"]) if image in table.pixels else image
    return _texts(table.columns[name]) if name else [f"row {i + 1}" for i in range(len(table.columns[image]))]


def _find(names: Sequence[str], usual: Sequence[str]) -> str | None:
    keys = {re.sub(r"[ -]", "_", name.strip().lower()): name for name in names}
    return next((keys[name] for name in usual if name in keys), None)


def _pick(table: Table, wanted: str | None, usual: Sequence[str], kind: str) -> str:
    names = list(table.columns)
    found = wanted if wanted in names else _find(names, usual) if wanted is None else None
    if found is None:
        what = f"no column {wanted!r}" if wanted else f"no column with a usual name for the {kind}"
        raise UserError(f"{table.where} has {what}, only {', '.join(names)}; choose one with --{kind}-column.")
    return found


def _lists(values: Sequence[Any] | None) -> bool:
    return values is not None and any(isinstance(value, list) for value in values[:])


def _texts(values: Sequence[Any]) -> list[str]:
    return ["" if v is None or v != v else str(v).strip() for v in values[:]]  # v != v: NaN, a missing number


def _captions(values: Sequence[Any], ids: list[str], where: str) -> list[str]:
    nested = [ids[i] for i, value in enumerate(values[:]) if isinstance(value, list | dict)]
    if nested:
        raise UserError(f"{where}: {nested[0]} has a list of captions; write one caption a row.")
    captions = _texts(values)
    empty = [f"{i} ({ids[i - 1]})" for i, caption in enumerate(captions, start=1) if not caption]
    if empty:
        raise UserError(f"{where}: {len(empty)} empty captions of {len(ids)}, in row {', '.join(empty[:5])}.")
    return captions


def _existing(table: Table, names: list[str]) -> tuple[list[str], list[str]]:
    """The images' paths, and with size and time of change the origins of their pixels."""
    paths, origins, missing = [], [], []
    for row, name in enumerate(names, start=1):
        path = os.path.join(table.root, name)
        if not os.path.isfile(path) and "\\" in name:  # a table written on Windows
            path = os.path.join(table.root, name.replace("\\", "/"))
        if os.path.isfile(path):
            status = os.stat(path)
            origins.append(f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}")
        else:
            missing.append(f"{row} ({name or 'no path'})")
        paths.append(path)
    if missing:
        some = f"{len(missing)} images of {len(names)} are not in {table.root}"
        raise UserError(f"{table.where}: {some}, the first of them in row {', '.join(missing[:3])}.")
    return paths, origins


# Opening a row is a function with bound arguments and not a closure, so that it can be sent to worker processes.


def _open_cell(cells: Sequence[Any], root: Path, ids: list[str], row: int) -> Image.Image:
    cell = cells[row]
    if isinstance(cell, dict) and cell.get("path"):
        cell = {**cell, "path": root / cell["path"]}
    return decode(Path(cell) if isinstance(cell, str) else cell or b"", ids[row])


def _open_phantom(seed: int, split: str, row: int) -> Image.Image:
    from clip_medical.data.phantoms import phantom

    return phantom(seed, split, row).image


def _phantoms(seed: int, split: str, count: int) -> Split:
    from clip_medical.data.phantoms import describe

    captions, labels = zip(*(describe(seed, split, i) for i in range(count)), strict=True)
    by_facet = {facet: [label[facet] for label in labels] for facet in FACETS}
    drawn_by = hashlib.sha256()
    for name in ("phantoms.py", "scanners.py"):
        drawn_by.update(Path(__file__).with_name(name).read_bytes())
    origins = [f"phantoms {drawn_by.hexdigest()[:16]} {seed} {split} {i:09}" for i in range(count)]
    ids = [f"{split} {i}" for i in range(count)]
    return Split(list(captions), ids, by_facet, partial(_open_phantom, seed, split), origins)


# ---- rows -> training and validation


def _train_and_validation(read: dict[str, _Rows], source: str, seed: int) -> tuple[Split, Split, str]:
    split, parts, ties = next(iter(read.values()))
    splits = {name: rows.split for name, rows in read.items()}
    rows = list(range(len(split)))
    if len(read) == 1 and parts:
        by_part: dict[str, list[int]] = {}
        for row, part in enumerate(parts):
            by_part.setdefault(SPLITS.get(part.lower(), part), []).append(row)
        if not SPLITS.keys() >= by_part.keys():
            raise UserError(f"{source}: its split column says {', '.join(by_part)}; expected train and validation.")
        chosen = by_split(by_part, source)
        splits = {name: split.select(indices) for name, indices in chosen.items()}
        rows = chosen["train"]
    if len(splits) == 2:
        (_, train), (name, validation) = splits.items()
        return train, validation, "splits of the source" + ", test for validation" * (name == "test")
    kept, held = hold_out(rows, ties, seed, source)
    rule = f"{100 * len(held) / len(rows):.0f} % held out by seed {seed}, rows of one image or group kept together"
    return split.select(kept), split.select(held), rule
