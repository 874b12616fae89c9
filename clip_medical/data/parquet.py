"""Parquet shards, in a folder or on the Hub -> columns: words at once, images a row group at a time.

Parquet keeps each column of each row group in one piece. So captions can be read without the images beside them, on the
Hub too, where a few megabytes do instead of 18.6 GB; and the images follow a row group (about 100 rows) at a time.
"""

import os
import random
from bisect import bisect_right
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import accumulate
from threading import Lock
from typing import Any, NamedTuple, TypeVar, overload

from clip_medical.errors import UserError

T = TypeVar("T")
HUB = "hf://"
CONNECTIONS = 8  # shards or row groups fetched from the Hub at a time


class Shard(NamedTuple):
    """One Parquet file, on disk or on the Hub."""

    path: str  # of a file, or hf://datasets/owner/name@commit/path
    version: str  # names the shard and its version, wherever it lies


class Group(NamedTuple):
    """One row group of a shard."""

    shard: Shard
    number: int
    rows: int
    metadata: Any  # the shard's footer


def local_shard(path: str) -> Shard:
    """A file on disk; its version is where it lies, its size and when it was last changed."""
    status = os.stat(path)
    return Shard(path, f"{os.path.abspath(path)} {status.st_size} {status.st_mtime_ns}")


def read_shards(
    shards: Sequence[Shard], limit: int | None, seed: int
) -> tuple[dict[str, Sequence[Any]], list[str], list[str]]:
    """The rows of some shards, in order -> columns by name, which of them hold images, and the origin of each row.

    limit  whole row groups, drawn by seed from all shards, until there are so many rows: few rows cost few bytes
    Raises UserError if a shard cannot be reached, is no Parquet or has other columns than the first.
    """
    import datasets  # slow to import, and so is pyarrow: only those who read Parquet wait for them

    with ThreadPoolExecutor(CONNECTIONS) as pool:
        footers = list(pool.map(_footer, shards))
        for shard, footer in zip(shards, footers, strict=True):
            if footer.schema.names != footers[0].schema.names:
                raise UserError(f"{shard.path} has other columns than {shards[0].path}: all shards need the same ones.")
        groups = [
            Group(shard, number, footer.row_group(number).num_rows, footer)
            for shard, footer in zip(shards, footers, strict=True)
            for number in range(footer.num_row_groups)
        ]
        groups = _sample(groups, limit, seed)
        features = datasets.Features.from_arrow_schema(footers[0].schema.to_arrow_schema())
        pixels = [name for name, feature in features.items() if holds_images(feature)]
        words = [name for name in features if name not in pixels]
        read = list(pool.map(lambda group: read_group(group, words).to_pydict(), groups)) if words else []
    columns: dict[str, Sequence[Any]] = {name: ImageColumn(groups, name) for name in pixels}
    for name in words:
        values = [value for part in read for value in part[name]]
        columns[name] = class_names(features[name], values)
    origins = [f"{group.shard.version} {group.number:06} {row:06}" for group in groups for row in range(group.rows)]
    return columns, pixels, origins


def holds_images(feature: Any) -> bool:
    """Whether a column of this type (of `datasets`) can be the images themselves."""
    import datasets

    return isinstance(feature, datasets.Image | dict) or "binary" in getattr(feature, "dtype", "")


def class_names(feature: Any, values: Sequence[Any]) -> Sequence[Any]:
    """Numbers of classes -> their names, which stand beside the data; -1 is "unknown". Other values stay."""
    import datasets

    if not isinstance(feature, datasets.ClassLabel):
        return values
    return ["" if value is None or value < 0 else feature.int2str(value) for value in values[:]]


def _sample(groups: list[Group], limit: int | None, seed: int) -> list[Group]:
    order = list(range(len(groups)))
    random.Random(seed).shuffle(order)
    before = accumulate((groups[i].rows for i in order), initial=0)  # rows of the groups drawn before this one
    return [groups[i] for i in sorted(i for i, rows in zip(order, before, strict=False) if rows < (limit or 2**62))]


class ImageColumn(Sequence[Any]):
    """The cells of an image column, read a row group at a time; read in order, the next groups are on their way.

    Memory holds at most HELD row groups. Threads may read at once.
    """

    HELD, AHEAD = 5, 2

    def __init__(self, groups: list[Group], column: str) -> None:
        self.groups, self.column = groups, column
        self.ends = list(accumulate(group.rows for group in groups))
        self._begin()

    def _begin(self) -> None:
        self._held: dict[int, Future[Any]] = {}
        self._lock = Lock()
        self._pool = ThreadPoolExecutor(self.AHEAD + 1)

    def __getstate__(self) -> tuple[list[Group], str, list[int]]:  # for worker processes
        return self.groups, self.column, self.ends

    def __setstate__(self, state: tuple[list[Group], str, list[int]]) -> None:
        self.groups, self.column, self.ends = state
        self._begin()

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    @overload
    def __getitem__(self, row: int) -> Any: ...
    @overload
    def __getitem__(self, row: slice) -> list[Any]: ...
    def __getitem__(self, row: int | slice) -> Any:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        if not 0 <= row < len(self):
            raise IndexError(row)
        group = bisect_right(self.ends, row)
        return self._cells(group)[row - self.ends[group] + self.groups[group].rows].as_py()

    def _cells(self, group: int) -> Any:
        with self._lock:
            ahead = self.AHEAD if group - 1 in self._held else 0  # someone who reads in order
            for number in range(group, min(group + ahead, len(self.groups) - 1) + 1):
                if number not in self._held:
                    self._held[number] = self._pool.submit(self._read, number)
            future = self._held[group]
            while len(self._held) > self.HELD:
                del self._held[min(self._held) if group > min(self._held) else max(self._held)]
        return future.result()

    def _read(self, group: int) -> Any:
        return read_group(self.groups[group], [self.column]).column(0)


# ---- shards


def read_group(group: Group, columns: list[str]) -> Any:
    """Some columns of a row group as a pyarrow Table."""
    import pyarrow.parquet as pq

    def read() -> Any:
        with _open(group.shard.path) as file:
            return pq.ParquetFile(file, metadata=group.metadata, pre_buffer=True).read_row_group(group.number, columns)

    return _explained(group.shard.path, read)


def _footer(shard: Shard) -> Any:
    import pyarrow.parquet as pq

    def read() -> Any:
        with _open(shard.path) as file:
            return pq.read_metadata(file)

    return _explained(shard.path, read)


def _open(path: str) -> Any:
    if not path.startswith(HUB):
        return open(path, "rb")
    from huggingface_hub import HfFileSystem

    return HfFileSystem().open(path, "rb", cache_type="none")  # pyarrow asks for whole pieces: nothing to read ahead


def _explained(path: str, read: Callable[[], T]) -> T:
    """What `read` returns, or one sentence. A broken connection is none yet: huggingface_hub tries again, 5 times."""
    try:
        return read()
    except Exception as error:  # of the network and its libraries, of pyarrow, of the file system
        reason = (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        if path.startswith(HUB):
            raise UserError(
                f"{path} did not come from the Hub ({reason}): check the network and give the same command again, "
                "which goes on where it stopped, or download the data and give --data the folder."
            ) from error
        raise UserError(f"{path}: Parquet cannot be read: {reason}.") from error
