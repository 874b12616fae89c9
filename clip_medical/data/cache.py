"""Every image is decoded once in its life: the first pass writes what CLIP sees of it, all later epochs read that.

    <root>/<key>/pixels.bin         one record an image: S * S bytes where it is grey, 3 * S * S where it is coloured
                 index.safetensors  which rows of the split these are, where their records lie, which of them are equal
                 unreadable.tsv     the rows that are missing, each with its reason
                 about.json         what the cache was made from
                 journal.jsonl      how far the first pass has come: a line for each 256 images
    <root>/<key>.part/              the same while the first pass is on its way

The key is a hash over all that the pixels depend on: where each image lies and in which version, the size, the code
that decodes and the libraries that it uses. Whatever changes makes another key, so no cache can be out of date.
A pass that was killed goes on after the last line of its journal; when it is complete the folder gets its final name in
one step. Nothing here needs torch.
"""

import hashlib
import importlib.util
import json
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from threading import Event
from typing import Any, NamedTuple, TypeVar

import numpy as np
from filelock import AcquireReturnProxy, FileLock, Timeout
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

from clip_medical.data import dicom, images, png
from clip_medical.data.images import UnreadableImage, resize_and_crop
from clip_medical.data.splits import Split
from clip_medical.errors import UserError

ROOT_VARIABLE = "CLIP_MEDICAL_CACHE"
FORMAT = 1
PART = 256  # images between two lines of the journal: what a kill can cost
RUN = 16  # images that a thread decodes before it wakes the writer, who takes its core and the interpreter's lock
PATIENCE = 3.0  # seconds of waiting for another process before the user is told
TOLERATED = 0.02  # share of unreadable images above which a run stops: that is no accident any more
T = TypeVar("T")


class Cache:
    """The N readable images of a split, in its order, as CLIP's uint8 squares on disk."""

    def __init__(self, folder: Path, size: int) -> None:
        index = load_file(folder / "index.safetensors")
        self.folder, self.size = folder, size
        self.rows: np.ndarray = index["rows"]  # (N,) int64, rising: row of the split
        self.offsets: np.ndarray = index["offsets"]  # (N,) int64: byte of pixels.bin where the record begins
        self.channels: np.ndarray = index["channels"]  # (N,) uint8: 1 or 3
        self.image_ids: np.ndarray = index["image_ids"]  # (N,) int64: the same number where the pixels are the same
        self._file = open(folder / "pixels.bin", "rb", buffering=0)

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """(n,) row numbers -> (n, 3, S, S) uint8, or (n, 1, S, S) where all of them are grey.

        Read and not mapped: the pages of a mapping count as memory of this process, and would grow to the whole file.
        preadv has no file position, so that threads and forked processes may share the open file.
        """
        channels = int(self.channels[rows].max(initial=1))
        out = np.empty((len(rows), channels, self.size, self.size), np.uint8)
        for square, row in zip(out, rows, strict=True):
            os.preadv(self._file.fileno(), [square[: self.channels[row]].data], int(self.offsets[row]))
            square[self.channels[row] :] = square[0]  # a grey picture among coloured ones
        return out


def cache_root() -> Path:
    """The folder of all caches: $CLIP_MEDICAL_CACHE, or clip-medical in the user's cache directory."""
    usual = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "clip-medical"
    return Path(os.environ.get(ROOT_VARIABLE) or usual).expanduser()


def open_cache(split: Split, size: int, name: str) -> Cache:
    """The images of a split as `size` x `size` squares; decoded now, on all cores, if that was never done before.

    name: what the progress bar calls them. Raises UserError if more than 2 % of the images cannot be read (fewer are
    left out and listed in unreadable.tsv), if there is not enough space, or if the folder cannot be written.
    """
    folder = cache_root() / cache_key(split, size)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            with _lock(folder, name):  # of two processes one does the work
                if not folder.is_dir():
                    _first_pass(split, size, name, folder)
        return Cache(folder, size)
    except OSError as error:
        reason = error.strerror or str(error)
        raise UserError(
            f"the image cache {error.filename or folder} cannot be used ({reason}): "
            f"set {ROOT_VARIABLE} to a folder on a disk with space that you may write to."
        ) from error


def cache_key(split: Split, size: int) -> str:
    """16 hexadecimal digits that change with anything that the pixels depend on."""
    has_dicom = importlib.util.find_spec("pydicom") is not None
    facts = {
        "format": FORMAT,
        "size": size,
        "code": [Path(module.__file__ or "").read_text() for module in (images, dicom, png)],
        "libraries": [version("Pillow"), version("isal"), version("pydicom") if has_dicom else None],
        "origins": split.origins,
    }
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


def _lock(folder: Path, name: str) -> AcquireReturnProxy:
    """For one process at a time; the death of that process frees it."""
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        return lock.acquire(timeout=PATIENCE)
    except Timeout:
        print(f"The {name} images are just being read by another process: waiting for it.", file=sys.stderr)
        return lock.acquire()


# ---- the first pass


class Part(NamedTuple):
    """One line of the journal: so many rows more are decoded, and pixels.bin is this long."""

    end: int
    channels: list[int]  # of each row, in reading order; 0: unreadable
    digests: list[str]  # of each row's pixels; "" where unreadable
    unreadable: list[list[Any]]  # row of the split, reason


def _first_pass(split: Split, size: int, name: str, folder: Path) -> None:
    part_folder = folder.with_suffix(".part")
    part_folder.mkdir(exist_ok=True)
    # in the order in which they lie on disk or in their shards, where neighbours cost one access
    order = sorted(range(len(split)), key=split.origins.__getitem__)
    parts = _read_journal(part_folder / "journal.jsonl")
    done = sum(len(part.channels) for part in parts)
    with (
        open(part_folder / "pixels.bin", "ab") as pixels,
        open(part_folder / "journal.jsonl", "a") as journal,
        ThreadPoolExecutor(_cores()) as pool,  # Pillow decodes and resizes without the interpreter's lock
        closing(_in_order(pool, lambda row: _square(split, size, row), order[done:])) as squares,
        tqdm(initial=done, total=len(order), desc=f"{name} images", unit="image", leave=False) as bar,
    ):
        pixels.seek(pixels.truncate(parts[-1].end if parts else 0))
        for start in range(done, len(order), PART):
            _check_space(folder, len(order) - start, size, parts)
            parts.append(_write_part(order[start : start + PART], squares, pixels, journal, bar))
            _check_readable(split, parts, part_folder)
    _publish(split, order, parts, part_folder, folder, size)


def _square(split: Split, size: int, row: int) -> np.ndarray | str:
    """(1, S, S) or (3, S, S) uint8, or the reason why there is none."""
    try:
        image = split.open_image(row)
    except UnreadableImage as error:
        return str(error)
    square = resize_and_crop(image, size)
    return square[None] if square.ndim == 2 else np.ascontiguousarray(square.transpose(2, 0, 1))


def _in_order(pool: ThreadPoolExecutor, work: Callable[[int], T], rows: list[int]) -> Generator[T, None, None]:
    """Results in order, a part of them waiting, or two runs a core: Executor.map would begin, and keep, all it can."""
    waiting: deque[Future[list[T]]] = deque()
    stopped = Event()

    def work_on(run: list[int]) -> list[T]:
        return [work(row) for row in run if not stopped.is_set()]

    try:
        for start in range(0, len(rows), RUN):
            waiting.append(pool.submit(work_on, rows[start : start + RUN]))
            if len(waiting) >= max(PART // RUN, 2 * _cores()):
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    finally:  # after an error or Ctrl-C
        stopped.set()
        for future in waiting:
            future.cancel()


def _write_part(rows: list[int], squares: Iterator[np.ndarray | str], pixels: Any, journal: Any, bar: tqdm) -> Part:
    part = Part(0, [], [], [])
    for row in rows:
        square = next(squares)
        if isinstance(square, str):
            part.unreadable.append([row, square])
        else:
            pixels.write(square)
        part.channels.append(0 if isinstance(square, str) else len(square))
        part.digests.append("" if isinstance(square, str) else hashlib.blake2b(square.data, digest_size=16).hexdigest())
        bar.update()
    _to_disk(pixels)  # before the journal says so
    part = part._replace(end=pixels.tell())
    journal.write(json.dumps(part) + "\n")
    _to_disk(journal)
    return part


def _to_disk(file: Any) -> None:
    file.flush()
    os.fsync(file.fileno())


def _read_journal(path: Path) -> list[Part]:
    """The parts that are complete. What follows the last line break was cut off by a kill, and is removed."""
    if not path.is_file():
        return []
    whole = path.read_text().rpartition("\n")
    os.truncate(path, len((whole[0] + whole[1]).encode()))
    return [Part(*json.loads(line)) for line in whole[0].splitlines()]


def _check_space(folder: Path, left: int, size: int, parts: list[Part]) -> None:
    """Stop while there is still space: before the first image as if all were grey, then by the share that is not."""
    done = sum(len(part.channels) for part in parts)
    need = left * (parts[-1].end / done if parts else size * size)
    free = shutil.disk_usage(folder.parent).free
    if need > free:
        raise UserError(
            f"{left:,} images need about {need / 1e9:.1f} GB in {folder.parent}, where {free / 1e9:.1f} GB are free: "
            f"make space there, or set {ROOT_VARIABLE} to a folder on a larger disk."
        )


def _check_readable(split: Split, parts: list[Part], part_folder: Path) -> None:
    bad = sorted(entry for part in parts for entry in part.unreadable)
    if len(bad) <= TOLERATED * len(split):
        return
    listed = part_folder.with_suffix(".unreadable.tsv")
    _write_unreadable(split, bad, listed)
    shutil.rmtree(part_folder)  # else the next start would believe the journal, whatever was mended
    some = "; ".join(reason.rstrip(".") for _, reason in bad[:3])
    raise UserError(
        f"{len(bad)} images of the first {sum(len(p.channels) for p in parts):,} cannot be read, more than "
        f"{TOLERATED:.0%} of all {len(split):,}: {some}; see {listed}, then mend these images or take out their rows."
    )


def _write_unreadable(split: Split, bad: list[list[Any]], path: Path) -> None:
    path.write_text("".join(f"{split.ids[row]}\t{reason}\n" for row, reason in bad))


def _publish(split: Split, order: list[int], parts: list[Part], part_folder: Path, folder: Path, size: int) -> None:
    in_order = np.argsort(np.array(order, np.int64))  # reading order -> order of the split
    channels = np.array([c for part in parts for c in part.channels], np.uint8)
    offsets = np.cumsum(np.concatenate([[0], channels[:-1].astype(np.int64) * size * size]))
    digests = np.array([d for part in parts for d in part.digests])
    rows = np.flatnonzero(channels[in_order])
    kept = in_order[rows]
    index = {"rows": rows, "offsets": offsets[kept], "channels": channels[kept]}
    index["image_ids"] = np.unique(digests[kept], return_inverse=True)[1]
    bad = sorted(entry for part in parts for entry in part.unreadable)
    about = {"images": len(rows), "unreadable": len(bad), "size": size, "first": split.origins[order[0]],
             "last": split.origins[order[-1]]}  # fmt: skip
    save_file({name: np.ascontiguousarray(values) for name, values in index.items()}, part_folder / "index.safetensors")
    _write_unreadable(split, bad, part_folder / "unreadable.tsv")
    (part_folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    os.rename(part_folder, folder)


def _cores() -> int:
    """Those that this process may use, which can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
