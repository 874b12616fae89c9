"""Find the tables of a data source: one table of columns for each split. Images are not opened here.

A data source is a reader that returns a Table. To support another file type, write a function (path, sample) -> Table
and enter it in READERS under its suffix. It then reads `--data file.suffix` and `metadata.suffix` in folders.
"""

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

from clip_medical.data.hub import hub_shards
from clip_medical.data.parquet import Sample, class_names, file_version, holds_images, read_shards, reason
from clip_medical.data.splits import SPLIT_NAMES, by_split
from clip_medical.errors import UserError


class Table(NamedTuple):
    """N rows of a data source, by column."""

    name: str  # in messages
    folder: Path  # to which the paths of images are relative
    columns: Mapping[str, Sequence[Any]]  # N cells each: texts, numbers, paths
    images: Mapping[str, Callable[[int], Any]] = {}  # columns of encoded images: row -> bytes or {"bytes":, "path":}
    origins: Sequence[str] = ()  # N, only where there are columns of images: location and version of the row


def read_tables(source: str, revision: str | None, sample: Sample) -> tuple[str, dict[str, Table]]:
    """Return the kind of a source for messages, and its tables by split ("train" and "validation" or "test", or "").

    source    what `load_data` accepts, except "phantoms"
    revision  of a Hub dataset: commit, tag or branch; None: the newest commit

    Raises UserError if the source does not exist or cannot be read.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return "folder", _folder(path, sample)
        if path.is_file():
            return "file", {"": _file(path, sample)}
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}. Check its permissions.") from error
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise UserError(f"--data {source}: there is no such file or folder. A Hub dataset has the form owner/name.")
    commit, shards = hub_shards(source, revision)
    # Without Parquet (images beside a table, tar files, ...) `datasets` downloads and reads the repository.
    tables = _parquet(source, path, shards, sample) if shards else _datasets(source, commit)
    return f"Hub commit {commit[:8]} of", tables


def _folder(folder: Path, sample: Sample) -> dict[str, Table]:
    for name in (f"metadata{suffix}" for suffix in READERS):
        if (folder / name).is_file():
            return {"": _file(folder / name, sample)}
    found = [path for suffix in READERS for path in sorted(folder.glob(f"*/metadata{suffix}"))]
    if files := {path.parent.name: path for path in reversed(found) if path.parent.name.lower() in SPLIT_NAMES}:
        return {split: _file(path, sample) for split, path in by_split(files, str(folder)).items()}
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _datasets(str(folder))
    if shards := [str(path) for path in sorted(folder.rglob("*.parquet"))]:
        return _parquet(str(folder), folder, shards, sample)
    others = [str(path) for path in sorted(folder.iterdir()) if path.suffix.lower() in READERS]
    hint = f"Name a table: --data {others[0]}." if others else "Add a table with the columns file_name and text."
    raise UserError(f"Folder {folder} has no metadata.csv, metadata.jsonl or Parquet files. {hint}")


def _file(path: Path, sample: Sample) -> Table:
    suffix = path.suffix.lower()
    if suffix not in READERS:
        raise UserError(f"{path}: file type {suffix!r} is not supported. Expected one of {', '.join(READERS)}.")
    return READERS[suffix](path, sample)


# ---- readers of a file


def _csv(path: Path, sample: Sample) -> Table:
    # Not pandas: it drops the captions "nan" and "None", fills short rows, and takes the first column for an index if
    # every row has one field too many (a bare comma in the last column), all without a warning.
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    reader, rows = csv.reader(StringIO(_text(path), newline=""), delimiter=delimiter, strict=True), []
    try:
        names = [name.strip() for name in next(reader, [])]
        if len(names) == 1 and (other := re.search("[,;\t|]", names[0])):
            raise UserError(f"{path} separates its columns by {other[0]!r}. Expected {delimiter!r}.")
        for row in filter(None, reader):
            if len(row) != len(names):
                fields = f"{len(row)} fields, but the header has {len(names)}"
                raise UserError(f"{path}, line {reader.line_num} has {fields}. Put text with {delimiter!r} in quotes.")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}. Check for a missing double quote.") from error
    if len(set(names)) < len(names):
        raise UserError(f"{path} has two columns named {Counter(names).most_common(1)[0][0]!r}. Rename one of them.")
    return Table(str(path), path.parent, {name: [row[i] for row in rows] for i, name in enumerate(names)})


def _json_lines(path: Path, sample: Sample) -> Table:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(_text(path).split("\n"), start=1):
        try:
            rows += [dict(json.loads(line).items())] if line.strip() else []
        except (ValueError, AttributeError) as error:  # no JSON at all, or no object
            raise UserError(f"{path}, line {number} is not a JSON object. Expected {{...}} in one line.") from error
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), path.parent, {name: [row.get(name) for row in rows] for name in names})


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")  # -sig: Excel begins a UTF-8 file with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {reason(error)}. Save it as UTF-8.") from error


def _parquet_file(path: Path, sample: Sample) -> Table:
    return Table(str(path), path.parent, *read_shards([str(path)], sample))


# suffix -> reader. A reader may return more rows than the sample wants, never fewer: load_data draws from them.
Reader = Callable[[Path, Sample], Table]
READERS: dict[str, Reader] = {".csv": _csv, ".tsv": _csv, ".jsonl": _json_lines, ".parquet": _parquet_file}


# ---- sources of several files


def _parquet(source: str, folder: Path, shards: list[str], sample: Sample) -> dict[str, Table]:
    """Read shards by the split that their file or folder is named after: train-00000-of-00027, train/0000."""
    parts: dict[str, list[str]] = {}
    for shard in shards:
        path = PurePosixPath(shard.replace("\\", "/"))
        names = re.split(r"[-_.]", path.name)[0], path.parent.name
        name = next((name for name in names if name.lower() in SPLIT_NAMES), "no split in the file name")
        parts.setdefault(name, []).append(shard)
    return {split: Table(source, folder, *read_shards(part, sample)) for split, part in by_split(parts, source).items()}


def _datasets(source: str, commit: str | None = None) -> dict[str, Table]:
    """Read a folder that save_to_disk wrote, or a commit of the Hub, downloaded into the Hugging Face cache."""
    import datasets  # slow

    try:
        loaded = datasets.load_dataset(source, revision=commit) if commit else datasets.load_from_disk(source)
    except Exception as error:  # no builder for its files, a damaged file, a newer version, ...
        raise UserError(f"The library `datasets` cannot read {source}: {reason(error)}. Save it as Parquet.") from error
    if not isinstance(loaded, datasets.DatasetDict):
        return {"": _dataset(source, loaded)}
    usual = {name: rows for name, rows in loaded.items() if name.lower() in SPLIT_NAMES}
    return {split: _dataset(source, rows) for split, rows in by_split(usual or loaded, source).items()}


def _dataset(source: str, rows: Any) -> Table:
    columns: dict[str, Sequence[Any]] = {}
    images: dict[str, Callable[[int], Any]] = {}
    for name, feature in rows.features.items():
        column = rows.data.column(name)  # of pyarrow: `datasets` would decode the images
        if holds_images(column.type):
            images[name] = partial(_arrow_cell, column)
        else:
            columns[name] = class_names(feature, column.to_pylist())
    # The fingerprint tells splits apart where the library holds them in memory, without files.
    version = " ".join([rows._fingerprint, *(file_version(file["filename"]) for file in rows.cache_files)])
    return Table(source, Path(source), columns, images, [f"{version} {row:09}" for row in range(len(rows))])


def _arrow_cell(column: Any, row: int) -> Any:
    return column[row].as_py()
