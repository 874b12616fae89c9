"""A folder, a file, Parquet shards or the Hub -> one table of columns a split. No image is opened here."""

import csv
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from io import StringIO
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, TypeVar

from clip_medical.data.hub import hub_shards
from clip_medical.data.parquet import Shard, class_names, holds_images, local_shard, read_shards
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
    origins: Sequence[str] = ()  # of each row of those columns: where it is from, in which version


class Wish(NamedTuple):
    """What a user asks of a source beside its name."""

    revision: str | None = None  # of the Hub: commit, tag or branch; default: the newest
    streaming: bool = True  # read the Hub's shards where they lie, instead of downloading them first
    limit: int | None = None  # of Parquet: no more row groups than are needed for so many rows of each split ...
    seed: int = 0  # ... drawn by this seed


def read_tables(source: str, wish: Wish) -> tuple[str, dict[str, Table]]:
    """The kind of a source in words, and its tables: "train" with "validation" or "test", or one named "" if unsplit.

    source is what `load_data` takes, but not "phantoms". Raises UserError for whatever is wrong with it.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return "folder", _folder(path, wish)
        if path.is_file():
            return "file", {"": _file(path, wish)}
    except OSError as error:
        raise UserError(f"{error.filename or path} cannot be read: {error.strerror}.") from error
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise UserError(f"--data {source}: there is no such file or folder, and a Hub id has the form owner/name.")
    commit, shards = hub_shards(source, wish.revision, wish.streaming)
    if not shards:  # images beside a table, tar files, ...: datasets knows how to download and read them
        return f"Hub commit {commit[:8]} of", _datasets(source, commit)
    return f"Hub commit {commit[:8]} of", _parquet(source, path, shards, wish)


def _folder(folder: Path, wish: Wish) -> dict[str, Table]:
    for name in ("metadata.csv", "metadata.jsonl"):
        if (folder / name).is_file():
            return {"": _file(folder / name, wish)}
        found = {p.parent.name: p for p in sorted(folder.glob(f"*/{name}")) if p.parent.name.lower() in SPLITS}
        if found:
            return {split: _file(path, wish) for split, path in by_split(found, str(folder)).items()}
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _saved(folder)
    shards = [local_shard(str(path)) for path in sorted(folder.rglob("*.parquet"))]
    if shards:
        return _parquet(str(folder), folder, shards, wish)
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


def _file(path: Path, wish: Wish) -> Table:
    suffix = path.suffix.lower()
    if suffix == ".parquet":
        return Table(str(path), path.parent, *read_shards([local_shard(str(path))], wish.limit, wish.seed))
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


def _parquet(where: str, root: Path, shards: list[Shard], wish: Wish) -> dict[str, Table]:
    """Shards go by the split in their own name or their folder's: train-00000-of-00027.parquet, train/0000.parquet."""
    found: dict[str, list[Shard]] = {}
    for shard in shards:
        path = PurePosixPath(shard.path.replace("\\", "/"))
        words = re.split(r"[-_.]", path.name)[0], path.parent.name
        found.setdefault(next((word for word in words if word.lower() in SPLITS), ""), []).append(shard)
    if len(found) > 1 and "" in found:
        raise UserError(f"{found[''][0].path} has no split in its name, as other Parquet files of {where} have.")
    splits = by_split(found, where)
    return {split: Table(where, root, *read_shards(some, wish.limit, wish.seed)) for split, some in splits.items()}


def _datasets(name: str, commit: str) -> dict[str, Table]:
    """A data set of the Hub that is not in Parquet: downloaded by `datasets` into the Hugging Face cache."""
    import datasets  # slow to import: only those who need it wait for it

    try:
        loaded = datasets.load_dataset(name, revision=commit)
    except Exception as error:  # no builder for its files, a file that is damaged, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"--data {name}: `datasets` cannot read what the Hub has there: {reason}") from error
    return {split: _from_dataset(name, Path(name), rows) for split, rows in by_split(loaded, name).items()}


def _saved(folder: Path) -> dict[str, Table]:
    """What `save_to_disk` of `datasets` wrote."""
    import datasets

    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # half a folder, a newer format, ...
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{folder}: what save_to_disk wrote there cannot be read: {reason}") from error
    splits = by_split(loaded, str(folder)) if isinstance(loaded, datasets.DatasetDict) else {"": loaded}
    return {split: _from_dataset(str(folder), folder, rows) for split, rows in splits.items()}


def _from_dataset(where: str, root: Path, rows: Any) -> Table:
    import datasets

    columns: dict[str, Sequence[Any]] = {}
    for name, feature in rows.features.items():
        column = rows.select_columns([name])  # else one look at a caption would read the image beside it
        if isinstance(feature, datasets.Image):
            column = column.cast_column(name, datasets.Image(decode=False))
        columns[name] = class_names(feature, column[name])  # lazy: reads what is asked of it
    pixels = [name for name, feature in rows.features.items() if holds_images(feature)]
    files = [local_shard(file["filename"]).version for file in rows.cache_files]
    origins = [f"{rows._fingerprint} {' '.join(files)} {row:09}" for row in range(len(rows))]
    return Table(where, root, columns, pixels, origins)
