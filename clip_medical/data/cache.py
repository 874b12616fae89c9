"""Image cache: decode every image once, and store the pixels that CLIP needs in one file per split and image size.

Decoding takes longer than a training step on a GPU, so later epochs and later runs read the decoded pixels.

    <root>/<key>/pixels.bin      one record per image: S * S bytes if it is grey, 3 * S * S bytes if it has colour
                 index.jsonl     the records in the order of pixels.bin, one line for each 256 of them
                 unreadable.tsv  the images that could not be decoded, with the reason
                 about.json      what the cache was made from
    <root>/<key>.part/           the same, while the first pass is running

The key is a hash of FORMAT, the image size and the origin of each image (its path or shard, size and time of change).
After a kill the first pass continues after the last complete line of the index. When all images are decoded, the
folder is renamed to its final name, so an incomplete cache is never read.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from filelock import AcquireReturnProxy, FileLock, Timeout
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from clip_medical.data.images import UnreadableImage, resize_and_crop
from clip_medical.data.splits import Split
from clip_medical.errors import UserError

# Part of the key: raise it with any change to the decoded pixels (images.py, dicom.py) or to the files of the cache.
# tests/data/test_images.py compares the pixels with recorded hashes. Versions of libraries are not part of the key,
# because a routine update of Pillow would then decode every dataset again.
FORMAT = 2
ROOT_VARIABLE = "CLIP_MEDICAL_CACHE"
PART = 256  # images per line of the index, which are the most that a kill can lose
UNREADABLE_LIMIT = 0.02  # fraction of the images; more than that points to a problem of the whole dataset


class Record(NamedTuple):
    """One image in the index."""

    row: int  # of the split
    offset: int  # of the first byte in pixels.bin
    channels: int  # 1 or 3; 0 if the image is unreadable
    digest: str  # hash of the pixels
    error: str  # why the image is unreadable


Decoded = tuple[int, np.ndarray, str]  # row, pixels (channels, S, S), error


class Cache:
    """The N readable images of a split, in its order, as uint8 squares of S x S pixels on disk."""

    def __init__(self, folder: Path, size: int) -> None:
        records = sorted(record for record in _read_index(folder) if record.channels)
        self.folder, self.size = folder, size
        self.rows = np.array([record.row for record in records], np.int64)  # (N,) rows of the split, ascending
        self.offsets = np.array([record.offset for record in records], np.int64)  # (N,) first bytes in pixels.bin
        self.channels = np.array([record.channels for record in records], np.uint8)  # (N,) 1 or 3
        self.digests = [record.digest for record in records]  # N hashes of the pixels
        self.image_ids = np.unique(self.digests, return_inverse=True)[1]  # (N,) int64, equal for identical pixels

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, rows: np.ndarray) -> np.ndarray:
        """Read the images at `rows` (n,) of the cache -> (n, 3, S, S) uint8, or (n, 1, S, S) if all of them are grey.

        Not a memory map, because mapped pages count as memory of this process. Each call opens the file, because
        threads and forked workers must not share a file position.
        """
        channels = int(self.channels[rows].max(initial=1))
        images = np.empty((len(rows), channels, self.size, self.size), np.uint8)
        with open(self.folder / "pixels.bin", "rb", buffering=0) as file:
            for image, row in zip(images, rows, strict=True):
                file.seek(int(self.offsets[row]))
                if file.readinto(image[: self.channels[row]].data) < int(self.channels[row]) * self.size**2:
                    raise UserError(f"{file.name} is shorter than its index. Delete {self.folder} and start again.")
                image[self.channels[row] :] = image[0]  # a grey image among coloured ones
        return images

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """Rows as a tensor: (n,) numbers or a slice -> (n, 3, S, S) uint8; of grey images a view of one channel."""
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice) else rows.numpy()
        return torch.from_numpy(self.read(numbers)).expand(-1, 3, -1, -1)

    def image(self, row: int) -> Image.Image:
        """One image, as CLIP sees it."""
        pixels = self.read(np.array([row]))[0]
        return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


def cache_key(split: Split, size: int) -> str:
    """Return 16 hexadecimal digits that identify the images of a split at this size."""
    return hashlib.sha256(json.dumps([FORMAT, size, split.origins]).encode()).hexdigest()[:16]


def open_cache(split: Split, size: int, name: str) -> Cache:
    """Open the cache of a split's images at `size` x `size` pixels. If there is none, decode them first, on all cores.

    name: of the split, for the progress bar. Raises UserError if more than 2 % of the images cannot be decoded (fewer
    are left out and listed in unreadable.tsv), if the disk is too small or if the folder is not writable.
    """
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    root = Path(os.environ.get(ROOT_VARIABLE) or f"{user_cache}/clip-medical").expanduser()
    folder = root / cache_key(split, size)
    try:
        root.mkdir(parents=True, exist_ok=True)
        if not folder.is_dir():
            with _lock(folder, name):
                if not folder.is_dir():  # otherwise the process that held the lock has created it
                    _first_pass(split, size, name, folder)
        return Cache(folder, size)
    except OSError as error:
        raise UserError(
            f"The image cache {error.filename or folder} cannot be used ({error.strerror or error}). "
            f"Set {ROOT_VARIABLE} to a writable folder on a disk with enough space."
        ) from error


def _lock(folder: Path, name: str) -> "AcquireReturnProxy[Any]":
    """Acquire the lock of a cache. The operating system releases it if this process dies."""
    lock = FileLock(folder.with_suffix(".lock"))
    try:
        return lock.acquire(blocking=False)
    except Timeout:
        print(f"The {name} images are being read by another process. Waiting for it to finish.", file=sys.stderr)
        return lock.acquire()


def _first_pass(split: Split, size: int, name: str, folder: Path) -> None:
    """Decode all images into <folder>.part, continue an earlier pass that was killed, and rename the folder."""

    def decode(row: int) -> Decoded:
        try:
            square = np.atleast_3d(resize_and_crop(split.open_image(row), size))
        except UnreadableImage as error:
            return row, np.empty((0, size, size), np.uint8), str(error)
        return row, np.ascontiguousarray(square.transpose(2, 0, 1)), ""

    part_folder = folder.with_suffix(".part")
    part_folder.mkdir(exist_ok=True)
    # In the order of their origins, consecutive images are close on disk or share a row group of a Parquet shard.
    order = sorted(range(len(split)), key=split.origins.__getitem__)
    # Threads are enough, because Pillow releases the GIL to decode and resize. One per core that this process may use.
    pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count())
    with (
        open(part_folder / "index.jsonl", "ab") as index,
        open(part_folder / "pixels.bin", "ab") as pixels,
        tqdm(total=len(order), desc=f"{name} images", unit="image", leave=False) as bar,
    ):
        index.truncate((part_folder / "index.jsonl").read_bytes().rfind(b"\n") + 1)  # a kill can cut off the last line
        records = _read_index(part_folder)
        pixels.seek(pixels.truncate(size * size * sum(record.channels for record in records)))
        bar.update(len(records))
        _check(split, records, size, part_folder)
        try:
            upcoming = pool.map(decode, order[len(records) : len(records) + PART])
            for start in range(len(records), len(order), PART):
                # Decode the next part while this one is written, but no further ones, which would fill the memory.
                current, upcoming = upcoming, pool.map(decode, order[start + PART : start + 2 * PART])
                records += _write_part(current, pixels, index, bar)
                _check(split, records, size, part_folder)
        finally:
            pool.shutdown(cancel_futures=True)  # after an error or Ctrl-C, do not decode the images in the queue
    about = {"images": len(order), "size": size, "first": split.origins[order[0]], "last": split.origins[order[-1]]}
    (part_folder / "about.json").write_text(json.dumps(about, indent=2) + "\n")
    os.rename(part_folder, folder)


def _write_part(images: Iterator[Decoded], pixels: BinaryIO, index: BinaryIO, bar: "tqdm[None]") -> list[Record]:
    records = []
    for row, image, error in images:
        digest = hashlib.blake2b(image.data, digest_size=16).hexdigest()
        records.append(Record(row, pixels.tell(), len(image), digest, error))
        pixels.write(image.data)
        bar.update()
    # First the pixels, then the index: it must not list pixels that a power failure can lose.
    for file, data in ((pixels, b""), (index, json.dumps(records).encode() + b"\n")):
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return records


def _read_index(folder: Path) -> list[Record]:
    lines = (folder / "index.jsonl").read_bytes().splitlines()
    return [Record(*record) for line in lines for record in json.loads(line)]


def _check(split: Split, records: list[Record], size: int, part_folder: Path) -> None:
    """List the unreadable images, and raise UserError if they are too many or the disk is too small for the others."""
    errors = sorted((record.row, record.error) for record in records if not record.channels)
    listing = part_folder / "unreadable.tsv"
    listing.write_text("".join(f"{split.ids[row]}\t{error}\n" for row, error in errors), encoding="utf-8")
    if len(errors) > UNREADABLE_LIMIT * len(split):
        for name in ("index.jsonl", "pixels.bin"):
            os.truncate(part_folder / name, 0)  # the next start has to decode repaired images again
        raise UserError(
            f"{len(errors)} of the first {len(records):,} images cannot be read, more than "
            f"{100 * UNREADABLE_LIMIT:g} % of all {len(split):,}. {' '.join(error for _, error in errors[:3])} "
            f"Repair or remove the images listed in {listing}."
        )
    # Before the first image is decoded, all are assumed to be grey.
    bytes_per_image = (part_folder / "pixels.bin").stat().st_size / len(records) if records else size * size
    needed, free = (len(split) - len(records)) * bytes_per_image, shutil.disk_usage(part_folder).free
    if needed > free:
        raise UserError(
            f"The remaining images need about {needed / 1e9:.1f} GB in {part_folder.parent}, but only "
            f"{free / 1e9:.1f} GB are free. Free some space there, or set {ROOT_VARIABLE} to a folder on a larger disk."
        )
