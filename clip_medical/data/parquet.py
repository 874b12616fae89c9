"""Read Parquet shards with pyarrow's dataset reader: captions at once, images one row group at a time.

Parquet stores each column of each row group in one piece. Captions can therefore be read without the images beside
them, also from the Hub: those of ROCOv2 are a few megabytes out of 18.6 GB. Images are read when they are opened, one
row group (about 100 rows) at a time.

pyarrow and `datasets` take a second to import, so only the functions that need them import them.
"""

import os
import random
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from itertools import accumulate
from threading import Lock
from typing import Any, NamedTuple

from clip_medical.errors import UserError

HUB = "hf://"
CONNECTIONS = 8  # shards or row groups read at the same time while captions are collected


class Sample(NamedTuple):
    """How many rows of each split are wanted, and the seed that draws them."""

    limit: int | None = None  # None: all rows
    seed: int = 0


def file_version(path: str) -> str:
    """Name a file and its version: the commit is in a path on the Hub; others get size and modification time."""
    if path.startswith(HUB):
        return path
    status = os.stat(path)
    return f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}"


def read_shards(paths: list[str], sample: Sample) -> tuple[dict[str, list[Any]], dict[str, "ImageReader"], list[str]]:
    """Read N rows from shards, in order -> text columns, a reader of each image column, N origins.

    paths  local files, or hf://datasets/owner/name@commit/path

    With `sample.limit`, whole row groups are drawn from all shards until they hold that many rows, so that few rows
    cost few bytes. Raises UserError if a shard cannot be read or has other columns than the first.
    """
    from datasets import Features

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        fragments = list(pool.map(_fragment, paths))
        schema = fragments[0].physical_schema
        for fragment in fragments:
            if fragment.physical_schema.names != schema.names:
                raise UserError(f"{fragment.path} and {fragments[0].path} have different columns. Make them the same.")
        groups = _draw([group for fragment in fragments for group in fragment.split_by_row_group()], sample)
        texts = [field.name for field in schema if not holds_images(field.type)]
        parts = list(pool.map(lambda group: _read(group, texts).to_pydict(), groups))
    features = Features.from_arrow_schema(schema)
    columns = {name: class_names(features[name], [cell for part in parts for cell in part[name]]) for name in texts}
    ends = list(accumulate(map(_rows, groups)))
    images = {name: ImageReader(name, groups, ends) for name in schema.names if name not in texts}
    versions = {path: file_version(path) for path in paths}
    origins = [f"{versions[g.path]} {g.row_groups[0].id:06} {row:06}" for g in groups for row in range(_rows(g))]
    return columns, images, origins


def holds_images(arrow_type: Any) -> bool:
    """Whether a column of this type can hold encoded images: bytes, or structs as `datasets` writes them."""
    return str(arrow_type).startswith(("binary", "large_binary", "struct"))


def class_names(feature: Any, cells: list[Any]) -> list[Any]:
    """Replace class numbers by their names if `feature` is a ClassLabel of `datasets`, or a list of such; -1 and null
    are unknown."""
    if hasattr(inner := getattr(feature, "feature", None), "int2str"):
        return [class_names(inner, cell or []) for cell in cells]
    if not hasattr(feature, "int2str"):
        return cells
    return ["" if cell is None or cell < 0 else feature.int2str(cell) for cell in cells]


class ImageReader:
    """Read cells of an image column: row -> cell. Threads may read at the same time.

    While one row group is decoded, the next one is read: this shortens a first pass over a network by 30 to 50 %.
    Only the last few row groups stay in memory, as many as the threads of a first pass are spread over.
    """

    def __init__(self, column: str, groups: list[Any], ends: list[int]) -> None:
        self.column, self.groups, self.ends = column, groups, ends  # ends: rows up to and with each row group
        self._pool, self._lock = ThreadPoolExecutor(2), Lock()
        self._group = lru_cache(4 + (os.cpu_count() or 1) // 2)(self._submit)

    def __reduce__(self) -> tuple[Any, ...]:  # a pickle holds neither threads nor row groups in memory
        return ImageReader, (self.column, self.groups, self.ends)

    def __call__(self, row: int) -> Any:
        number = bisect_right(self.ends, row)
        with self._lock:  # else several threads that miss the same row group would each read it
            cells = self._group(number)
            if number + 1 < len(self.groups):
                self._group(number + 1)
        return cells.result()[row - self.ends[number]].as_py()  # a negative index: from the end of the row group

    def _submit(self, number: int) -> "Future[Any]":
        return self._pool.submit(lambda: _read(self.groups[number], [self.column]).column(0))


# ---- pyarrow


def _fragment(path: str) -> Any:
    """Return a shard as a pyarrow.dataset.ParquetFileFragment, with its footer read."""
    from pyarrow import dataset, fs

    filesystem: fs.FileSystem = fs.LocalFileSystem()
    if path.startswith(HUB):
        from huggingface_hub import HfFileSystem, constants

        # pyarrow requests the bytes it needs. block_size=1 keeps fsspec from reading 5 MB more after each request.
        files = HfFileSystem(endpoint=constants.ENDPOINT, block_size=1)
        filesystem = fs.PyFileSystem(fs.FSSpecHandler(files))
    fragment = dataset.ParquetFileFormat().make_fragment(path, filesystem)
    _explain_errors(path, fragment.ensure_complete_metadata)
    return fragment


def _rows(group: Any) -> int:
    return int(group.row_groups[0].num_rows)


def _draw(groups: list[Any], sample: Sample) -> list[Any]:
    """Draw row groups until they hold as many rows as are wanted; return them in their order on disk."""
    order = random.Random(sample.seed).sample(range(len(groups)), len(groups))
    ends = list(accumulate(_rows(groups[i]) for i in order))
    return [groups[i] for i in sorted(order[: bisect_left(ends, sample.limit or sys.maxsize) + 1])]


def _read(group: Any, columns: list[str]) -> Any:
    """Read columns of one row group as a pyarrow Table."""
    return _explain_errors(group.path, lambda: group.to_table(columns=columns))


def _explain_errors(path: str, read: Callable[[], Any]) -> Any:
    """Return what `read` returns, or raise UserError. huggingface_hub itself repeats a broken request 5 times."""
    try:
        return read()
    except Exception as error:  # of the network and its libraries, of pyarrow, of the file system
        advice = f"Check the {'network' if path.startswith(HUB) else 'file'}, then run the same command again."
        raise UserError(f"{path} cannot be read: {reason(error)}. {advice}") from error


def reason(error: Exception) -> str:
    """Return the first line of an error message, without its full stop."""
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
