"""Find the tables of a data source: one table of columns for each split. Images are not opened here.

A data source is a reader that returns a Table. To support another file type, write a function (path, sample) -> Table
and enter it in READERS under its suffix. It then reads `--data file.suffix`, and in folders `metadata.suffix` and
tables named after a split, such as `train.suffix`.
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
from clip_medical.data.images import IMAGE_SUFFIXES
from clip_medical.data.parquet import Sample, class_names, file_version, holds_images, read_shards, reason
from clip_medical.data.splits import SPLIT_NAMES
from clip_medical.errors import UserError


class Table(NamedTuple):
    """N rows of a data source, by column."""

    name: str  # in messages
    folder: Path  # to which the paths of images are relative
    columns: Mapping[str, Sequence[Any]]  # N cells each: texts, numbers, paths
    images: Mapping[str, Callable[[int], Any]] = {}  # columns of encoded images: row -> bytes or {"bytes":, "path":}
    origins: Sequence[str] = ()  # N, only where there are columns of images: location and version of the row
    notes: tuple[str, ...] = ()  # what a user should know about how it was read


Readers = dict[str, Callable[[], Table]]  # name of a split in the source, "" without splits -> function that reads it


def find_tables(source: str, revision: str | None, sample: Sample) -> tuple[str, Readers]:
    """Return the kind of a source for messages, and for each of its splits a function that reads the table.

    source    what `load_data` accepts, except "phantoms"
    revision  of a Hub dataset: commit, tag or branch; None: the newest commit

    Raises UserError if the source does not exist or cannot be read.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            return "folder", _folder(path, sample)
        if path.is_file():
            return "file", _file(path, sample)
    except OSError as error:
        raise no_access(source, error) from error
    if not re.fullmatch(r"\w[\w.-]*/[\w.-]+", source):
        raise UserError(f"--data {source}: there is no such file or folder. A Hub dataset has the form owner/name.")
    commit, shards = hub_shards(source, revision)
    # Without Parquet (images beside a table, tar files, ...) `datasets` downloads and reads the repository.
    tables = _parquet(source, path, shards, sample) if shards else _datasets(source, revision=commit)
    return f"Hub commit {commit[:8]} of", tables


def no_access(source: str, error: OSError) -> UserError:
    """The message for a file of `source` that the system does not give out."""
    return UserError(f"{error.filename or source} cannot be read: {error.strerror or error}. Check its permissions.")


def _folder(folder: Path, sample: Sample) -> Readers:
    """Try the layouts of a folder in turn: tables, `datasets`, Parquet and tar shards, images beside texts, classes."""
    for name in (f"{stem}{suffix}" for stem in ("metadata", "captions") for suffix in READERS):
        if (folder / name).is_file():
            return _file(folder / name, sample)
    found = [path for suffix in READERS for path in sorted(folder.glob(f"*/metadata{suffix}"))]
    files = {path.parent.name: path for path in reversed(found) if path.parent.name.lower() in SPLIT_NAMES}
    tables = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in READERS and path.is_file()]
    for path in tables if not files else ():  # train.csv and val.csv, or train_captions.csv and valid_captions.csv
        name = path.stem.removesuffix("_captions")
        if name.lower() in SPLIT_NAMES and path.suffix.lower() not in (".txt", ".parquet"):
            if name in files:
                raise UserError(f"Folder {folder} has {files[name].name} and {path.name}. Name one: --data {path}.")
            files[name] = path
    if files:
        return {split: partial(READERS[path.suffix.lower()], path, sample) for split, path in files.items()}
    if any((folder / name).is_file() for name in ("dataset_dict.json", "state.json")):
        return _datasets(str(folder))
    if shards := [str(path) for path in sorted(folder.rglob("*.parquet"))]:
        return _parquet(str(folder), folder, shards, sample)
    if shards := [str(path) for path in sorted(folder.glob("*.tar"))]:
        return _datasets("webdataset", data_files=_by_name(shards))
    if tables and not all(path.suffix.lower() == ".txt" for path in tables):
        raise UserError(f"Folder {folder} has no metadata.csv. Name a table: --data {tables[0]}.")
    images = [p for p in sorted(folder.rglob("*")) if p.suffix.lower() in IMAGE_SUFFIXES and p.name[0] != "."]
    if any(path.parent != folder or path.with_suffix(".txt").is_file() for path in images):
        return {"": partial(_image_folder, folder, images)}
    raise UserError(
        f"Folder {folder} has no metadata.csv, metadata.jsonl, Parquet files, texts beside images, or images in "
        "folders named after their class. Add a table with the columns file_name and text."
    )


def _file(path: Path, sample: Sample) -> Readers:
    suffix = path.suffix.lower()
    if suffix in (".zip", ".tar"):
        return _datasets("webdataset" if suffix == ".tar" else "imagefolder", data_files=_by_name([str(path)]))
    if suffix not in READERS:
        raise UserError(f"{path}: file type {suffix!r} is not supported. Expected one of {', '.join(READERS)}.")
    return {"": partial(READERS[suffix], path, sample)}


def _image_folder(folder: Path, images: list[Path]) -> Table:
    """Images with a caption each in a text file of the same name, or in folders named after their class."""
    names = [str(path.relative_to(folder)) for path in images]
    columns: dict[str, list[str]] = {"file_name": names}
    texts = [path.with_suffix(".txt") for path in images]
    if any(text.is_file() for text in texts):
        inside = folder.resolve()  # a link to a private text must not become a caption
        readable = [text.is_file() and text.resolve().is_relative_to(inside) for text in texts]
        columns["text"] = [_text(text).strip() if ok else "" for text, ok in zip(texts, readable, strict=True)]
        note = "captions from the text files beside the images"
    else:
        columns["class"] = columns["text"] = [path.parent.name if path.parent != folder else "" for path in images]
        note = "captions are the names of the folders. Word them by --template, such as 'X-ray of the chest, {class}'"
    return Table(str(folder), folder, columns | _split_column(names), notes=(note,))


def _split_column(paths: list[str]) -> dict[str, list[str]]:
    """{"split": N names} of Training/glioma/1.jpg: the first folder on the way that is named as a split; {} without."""
    splits = [next((part for part in Path(p).parts[:-1] if part.lower() in SPLIT_NAMES), "") for p in paths]
    # by_split refuses images beside such folders: they could belong to either
    return {"split": [split or "(images in no split)" for split in splits]} if any(splits) else {}


def first_word(name: str) -> str:
    """Return the first word of a file name: "train" of train_captions.csv and of train-00000-of-00027.parquet."""
    return re.split(r"[-_.]", name)[0]


# ---- readers of a file


def _csv(path: Path, sample: Sample) -> Table:
    # Not pandas: it drops the captions "nan" and "None", fills short rows, and takes the first column for an index if
    # every row has one field too many (a bare comma in the last column), all without a warning.
    text, suffix = _text(path), path.suffix.lower()
    header = text.split("\n", 1)[0]
    # The header decides where it holds only one of them, so that the commas of captions do not count.
    delimiter = max("\t,;|" if suffix != ".csv" else ",;\t|", key=lambda mark: mark in header)
    # captions.txt of ROCO has single double quotes: 5" wide
    quoting: Any = csv.QUOTE_NONE if suffix == ".txt" and delimiter == "\t" else csv.QUOTE_MINIMAL
    reader = csv.reader(StringIO(text, newline=""), delimiter=delimiter, strict=True, quoting=quoting)
    rows: list[list[str]] = []
    try:
        names = [name.strip() for name in next(reader, [])]
        if suffix == ".txt" and len(names) == 2 and not {name.lower() for name in names} & {"caption", "text"}:
            names, rows = ["file_name", "text"], [names]  # ROCO v1: no header
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
        except (ValueError, AttributeError, RecursionError) as error:  # no JSON at all, or no object
            raise UserError(f"{path}, line {number} is not a JSON object. Expected {{...}} in one line.") from error
    names = dict.fromkeys(name for row in rows for name in row)
    return Table(str(path), path.parent, {name: [row.get(name) for row in rows] for name in names})


def _text(path: Path) -> str:
    data = path.read_bytes()
    try:
        if data[:2] in (b"\xff\xfe", b"\xfe\xff"):  # the byte order mark of UTF-16, "Unicode text" of Excel
            return data.decode("utf-16")
        return data.decode("utf-8-sig")  # -sig: Excel begins a UTF-8 file with a byte order mark
    except UnicodeDecodeError as error:
        # In Western languages accented letters stand alone or in pairs; in other encodings, as of Chinese, in runs.
        text = data.decode("cp1252", errors="replace")
        if "\ufffd" not in text and not re.search(r"[^\x00-\x7f]{3}", text):
            return text
        raise UserError(f"{path} is not UTF-8 text: {reason(error)}. Save it as UTF-8.") from error


def _parquet_file(path: Path, sample: Sample) -> Table:
    return Table(str(path), path.parent, *read_shards([str(path)], sample))


# suffix -> reader. A reader may return more rows than the sample wants, never fewer: load_data draws from them.
Reader = Callable[[Path, Sample], Table]
READERS: dict[str, Reader] = {
    ".csv": _csv, ".tsv": _csv, ".txt": _csv, ".jsonl": _json_lines, ".parquet": _parquet_file,
}  # fmt: skip


# ---- sources of several files


def _parquet(source: str, folder: Path, shards: list[str], sample: Sample) -> Readers:
    def read(part: list[str]) -> Table:
        return Table(source, folder, *read_shards(part, sample))

    return {split: partial(read, part) for split, part in _by_name(shards).items()}


def _by_name(shards: list[str]) -> dict[str, list[str]]:
    """Sort shards by the split that their file or folder is named after: train-00000-of-00027, train/0000."""
    parts: dict[str, list[str]] = {}
    for shard in shards:
        path = PurePosixPath(shard.replace("\\", "/"))
        names = first_word(path.name), path.parent.name
        name = next((name for name in names if name.lower() in SPLIT_NAMES), "")
        parts.setdefault(name, []).append(shard)
    return parts


def _datasets(source: str, **options: Any) -> Readers:
    """Read a folder that save_to_disk wrote; or with `options`, for load_dataset, a commit of the Hub, or archives.

    The Hub's files and the contents of archives go into the Hugging Face cache.
    """
    import datasets  # slow

    files = options.get("data_files", {"": [source]})
    source_name = ", ".join(file for part in files.values() for file in part[:3])
    try:
        if "data_files" in options:  # where every split needs a name
            options["data_files"] = {name or "rows": part for name, part in files.items()}
        loaded = datasets.load_dataset(source, **options) if options else datasets.load_from_disk(source)
    except Exception as error:  # no builder for its files, a damaged file, a newer version, ...
        raise UserError(
            f"The library `datasets` cannot read {source_name}: {reason(error)}. Save it as Parquet."
        ) from error
    if not isinstance(loaded, datasets.DatasetDict):
        return {"": partial(_dataset, source_name, loaded)}
    usual = {name: rows for name, rows in loaded.items() if name.lower() in SPLIT_NAMES}
    if not usual and len(loaded) == 1:
        usual = {"": next(iter(loaded.values()))}
    return {split: partial(_dataset, source_name, rows) for split, rows in (usual or loaded).items()}


def _dataset(source: str, rows: Any) -> Table:
    columns: dict[str, Sequence[Any]] = {}
    images: dict[str, Callable[[int], Any]] = {}
    flat = {name: rows.data.column(name) for name in rows.features}  # of pyarrow: `datasets` would decode the images
    for name, column in list(flat.items()):
        if name == "json":  # of webdataset: an object for each sample
            del flat[name]
            names = [field.name for field in column.type]
            flat |= dict(zip(names, column.combine_chunks().flatten(), strict=True))
    for name, column in flat.items():
        feature = rows.features.get(name)
        if holds_images(column.type):
            images[name] = partial(_arrow_cell, column)
        else:
            columns[name] = class_names(feature, column.to_pylist())
    cells = flat[next(iter(images))].to_pylist() if len(images) == 1 and source.endswith(".zip") else []
    if "split" not in columns:  # an archive with the folders Training and Testing: zip://Testing/1.jpg::archive
        columns |= _split_column([cell["path"].removeprefix("zip://").partition("::")[0] for cell in cells])
    # The fingerprint tells splits apart where the library holds them in memory, without files.
    version = " ".join([rows._fingerprint, *(file_version(file["filename"]) for file in rows.cache_files)])
    return Table(source, Path(source), columns, images, [f"{version} {row:09}" for row in range(len(rows))])


def _arrow_cell(column: Any, row: int) -> Any:
    return column[row].as_py()
