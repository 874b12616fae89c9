"""A folder, a file, Parquet shards or the Hub -> one table of columns a split. No image is opened here."""

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from clip_medical.errors import UserError

SPLITS = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLITS |= dict.fromkeys(["validation", "valid", "val", "dev"], "validation")
T = TypeVar("T")


class Table(NamedTuple):
    """Columns by name, all of one length."""

    where: str  # its name in messages
    root: Path  # its paths are relative to this folder
    columns: Mapping[str, Sequence[Any]]
    pixels: Sequence[str] = ()  # the columns that hold images themselves and not paths; read row by row


def read_tables(source: str) -> tuple[str, dict[str, Table]]:
    """The kind of a source in words, and its tables: "train" with "validation" or "test", or one named "" if unsplit.

    source is what `load_data` takes, but not "phantoms". Raises UserError for whatever is wrong with it.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return "folder", _folder(path)
        if path.is_file():
            return "file", {"": _file(path)}
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}.") from error
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise UserError(f"--data {source}: there is no such file or folder, and a Hub id has the form owner/name.")
    return "Hub", _datasets(source, path, f"--data {source} is no file or folder here, and the Hub did not give it")


def _folder(folder: Path) -> dict[str, Table]:
    for name in ("metadata.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            return {"": _file(folder / name)}
        found = {p.parent.name: p for p in sorted(folder.glob(f"*/{name}")) if p.parent.name.lower() in SPLITS}
        if found:
            return {split: _file(path) for split, path in by_split(found, str(folder)).items()}
    shards: dict[str, list[str]] = {}
    for shard in sorted(folder.rglob("*.parquet")):
        words = re.split(r"[-_.]", shard.name)[0], shard.parent.name  # train-00000-of-00027.parquet, train/0000.parquet
        shards.setdefault(next((w for w in words if w.lower() in SPLITS), ""), []).append(str(shard))
    if len(shards) > 1 and "" in shards:
        raise UserError(f"{shards[''][0]} has no split in its name, as other Parquet files of the folder have.")
    if shards:
        return _parquet(folder, by_split(shards, str(folder)))
    tables = [str(p) for p in sorted(folder.iterdir()) if p.suffix.lower() in (".csv", ".tsv", ".jsonl")]
    hint = f"name the table itself: --data {tables[0]}" if tables else "write one with the columns file_name and text"
    raise UserError(f"folder {folder} has no metadata.csv, metadata.jsonl or Parquet files in it; {hint}.")


def by_split(found: Mapping[str, T], where: str) -> dict[str, T]:
    """What goes by a split's usual name, without a test beside a validation; {"": it} for one unnamed thing."""
    if len(found) == 1 and next(iter(found)).lower() not in SPLITS:
        return {"": next(iter(found.values()))}
    named = [(SPLITS[name.lower()], thing) for name, thing in found.items() if name.lower() in SPLITS]
    splits = dict(named)
    if "train" not in splits or len(splits) < len(named):
        raise UserError(f"{where} has the splits {', '.join(found)}; expected one train and one validation (or test).")
    wanted = ("train", "validation" if "validation" in splits else "test")
    return {name: splits[name] for name in wanted if name in splits}


def _file(path: Path) -> Table:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return _parquet(path.parent, {"": [str(path)]})[""]
    if suffix not in (".csv", ".tsv", ".jsonl"):
        raise UserError(f"{path}: files of type '{suffix}' are not read; expected .csv, .tsv, .jsonl or .parquet.")
    try:
        text = path.read_text(encoding="utf-8-sig")  # -sig: Excel begins a UTF-8 file with a byte order mark
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text (see byte {error.start}); save it as UTF-8.") from error
    if "\0" in text:
        raise UserError(f"{path} is no text file: there are zero bytes in it.")
    columns = _json_lines(text, path) if suffix == ".jsonl" else _csv(text, path, "\t" if suffix == ".tsv" else ",")
    return Table(str(path), path.parent, columns)


def _csv(text: str, path: Path, delimiter: str) -> dict[str, list[Any]]:
    # Not pandas: it drops the captions "nan" and "None", fills short rows up, and where every row is one field too long
    # (a bare comma in the last column) it takes the first column for an index, without a word.
    reader, rows = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True), []
    try:
        names = [name.strip() for name in next(reader, [])]
        other = next((d for d in ",;\t|" if len(names) == 1 and d in names[0]), None)
        if other:
            raise UserError(f"{path} has {other!r} between its columns; save it with {delimiter!r}.")
        for row in filter(None, reader):
            if len(row) != len(names):
                what = f"{len(row)} fields, the header has {len(names)}"
                raise UserError(f"{path}, line {reader.line_num}: {what}; text with {delimiter!r} in it needs quotes.")
            rows.append(row)
    except csv.Error as error:
        raise UserError(f"{path}, line {reader.line_num}: {error}; is a double quote missing?") from error
    if len(set(names)) < len(names):
        raise UserError(f"{path}: two columns are called {Counter(names).most_common(1)[0][0]!r}.")
    return {name: [row[i] for row in rows] for i, name in enumerate(names)}


def _json_lines(text: str, path: Path) -> dict[str, list[Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.split("\n"), start=1):
        try:
            rows += [dict(json.loads(line).items())] if line.strip() else []
        except (ValueError, AttributeError) as error:
            raise UserError(f"{path}, line {number}: expected one JSON object, {{...}}, a line.") from error
    names = dict.fromkeys(name for row in rows for name in row)
    return {name: [row.get(name) for row in rows] for name in names}


def _parquet(root: Path, files: dict[str, list[str]]) -> dict[str, Table]:
    tables = _datasets("parquet", root, f"{root}: Parquet cannot be read", {k or "train": v for k, v in files.items()})
    return {"": tables["train"]} if "" in files else tables


def _datasets(name: str, root: Path, trouble: str, files: dict[str, list[str]] | None = None) -> dict[str, Table]:
    """Goes through the Hugging Face cache, from which any single row can be read; the user's folder stays untouched."""
    import datasets  # slow to import: only those who need it wait for it

    try:
        loaded = datasets.load_dataset(name, data_files=files)
    except Exception as error:  # no network, no such data set, a gated one, a damaged file, shards that disagree, ...
        raise UserError(f"{trouble}: {(str(error) or type(error).__name__).splitlines()[0]}") from error
    splits = by_split(loaded, name)
    return {split: _from_dataset(str(root if files else name), root, rows) for split, rows in splits.items()}


def _from_dataset(where: str, root: Path, rows: Any) -> Table:
    import datasets

    columns: dict[str, Sequence[Any]] = {}
    pixels = []
    for name, feature in rows.features.items():
        column = rows.select_columns([name])  # else one look at a caption would read the image beside it
        if isinstance(feature, datasets.Image):
            column = column.cast_column(name, datasets.Image(decode=False))
        columns[name] = column[name]  # lazy: reads what is asked of it
        if isinstance(feature, datasets.Image | dict) or "binary" in getattr(feature, "dtype", ""):
            pixels.append(name)
        elif isinstance(feature, datasets.ClassLabel):  # numbers, with their names beside the data; -1 is "unknown"
            columns[name] = ["" if v is None or v < 0 else feature.int2str(v) for v in column[name][:]]
    return Table(where, root, columns, pixels)
