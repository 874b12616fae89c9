"""The image cache: correct pixels in each row, after kills, full disks, damaged files and concurrent runs.

The environment variable KILLS=20 raises the number of kills from 5 to 20.
"""

import io
import json
import os
import pickle
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from clip_medical.data import cache
from clip_medical.data.cache import Cache, cache_key, open_cache
from clip_medical.data.dataset import load_data
from clip_medical.data.images import UnreadableImage, decode, resize_and_crop
from clip_medical.data.splits import Split
from clip_medical.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16
KILLS = int(os.environ.get("KILLS", "5"))


def make_image(row: int, colour: bool = False) -> Image.Image:
    rng = np.random.default_rng(row)
    shape = (20 + row % 5, 24, 3) if colour else (20, 24 + row % 5)
    return Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8))


def open_row(unreadable: frozenset[int], row: int) -> Image.Image:
    if row in unreadable:
        raise UnreadableImage(f"Image {row} cannot be read: on purpose.")
    return make_image(row, colour=row % 7 == 3)


def make_split(count: int, unreadable: tuple[int, ...] = (), backwards: bool = False) -> Split:
    """Return `count` rows, every seventh in colour; backwards: they lie on disk in the opposite order."""
    origins = [f"{count - row if backwards else row:06}" for row in range(count)]
    names = [f"row {row}" for row in range(count)]
    return Split(names, names, {}, partial(open_row, frozenset(unreadable)), origins)


def squares(image: Image.Image) -> np.ndarray:
    """Return the pixels that the cache must hold for an image, (1, S, S) or (3, S, S)."""
    square = resize_and_crop(image, SIZE)
    return square[None] if square.ndim == 2 else square.transpose(2, 0, 1)


def check(cached: Cache, rows: list[int]) -> None:
    """Check that the cache holds exactly the images of these rows, in this order."""
    assert cached.rows.tolist() == rows
    for position, row in enumerate(rows):
        expected = squares(make_image(row, colour=row % 7 == 3))
        np.testing.assert_array_equal(cached.read(np.array([position]))[0], expected)


@pytest.fixture(autouse=True)
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ROOT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PART", 8)
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("backwards", [False, True])
def test_each_row_has_its_own_pixels(backwards: bool) -> None:
    """Catches rows that are exchanged if the images lie in another order on disk or if one of them is missing."""
    unreadable = (4, 90)
    cached = open_cache(make_split(150, unreadable, backwards), SIZE, "test")
    check(cached, [row for row in range(150) if row not in unreadable])


def test_grey_and_coloured_images_in_one_batch() -> None:
    """Catches a grey image whose other channels are uninitialized memory."""
    cached = open_cache(make_split(10), SIZE, "test")
    mixed = cached.read(np.array([3, 0, 2]))
    assert mixed.shape == (3, 3, SIZE, SIZE) and (mixed[1] == mixed[1, :1]).all() and (mixed[0] != mixed[0, :1]).any()
    assert cached.read(np.array([0, 2])).shape == (2, 1, SIZE, SIZE)
    assert cached.read(np.array([], np.int64)).shape == (0, 1, SIZE, SIZE)


def test_threads_and_other_processes_can_read() -> None:
    """Catches a file position shared between threads, and an open file that cannot be sent to another process."""
    cached = open_cache(make_split(40), SIZE, "test")
    expected = [cached.read(np.array([row])) for row in range(40)]
    orders = [np.random.default_rng(seed).permutation(40) for seed in range(200)]
    with ThreadPoolExecutor(8) as pool:
        for rows, images in zip(orders, pool.map(pickle.loads(pickle.dumps(cached)).read, orders), strict=True):
            for row, image in zip(rows, images, strict=True):
                assert (image == expected[row][0]).all()


def test_a_second_start_opens_no_image() -> None:
    """Catches images decoded again although the cache is complete."""
    split = make_split(20)
    open_cache(split, SIZE, "test")

    def fail(row: int) -> Image.Image:
        raise AssertionError(f"row {row} was opened")

    check(open_cache(replace(split, open_image=fail), SIZE, "test"), list(range(20)))


def test_equal_images_share_an_id() -> None:
    """Catches equal pixels that would count as negatives of each other."""
    numbers = [5, 3, 5, 0, 3, 1]
    images = [make_image(number, colour=number == 3) for number in numbers]
    split = Split(list("abcdef"), list("abcdef"), {}, images.__getitem__, list("fedcba"))
    ids = open_cache(split, SIZE, "test").image_ids
    assert (ids[:, None] == ids).tolist() == [[a == b for b in numbers] for a in numbers]


def test_the_key_changes_with_the_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stale cache after an image is overwritten, or for another size, selection or FORMAT."""
    for row in range(4):
        make_image(row).save(tmp_path / f"{row}.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,caption {i}\n" for i in range(4)))
    train = load_data(str(tmp_path)).train
    keys = [cache_key(train, SIZE), cache_key(train, SIZE + 1), cache_key(train.select([1, 0]), SIZE)]
    assert cache_key(load_data(str(tmp_path)).train, SIZE) == keys[0]
    make_image(9).save(tmp_path / train.ids[0])
    os.utime(tmp_path / train.ids[0], ns=(1, 1))
    keys.append(cache_key(load_data(str(tmp_path)).train, SIZE))
    monkeypatch.setattr(cache, "FORMAT", cache.FORMAT + 1)
    keys.append(cache_key(train, SIZE))
    assert len(set(keys)) == len(keys)


def test_the_key_depends_on_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a cache that is lost with an edited comment or a new version of a library, by a recorded key."""
    monkeypatch.setattr(cache, "FORMAT", 0)
    assert cache_key(make_split(3), SIZE) == "909d46c4e9a778a7"


def test_a_few_unreadable_images_are_listed_and_many_stop_the_run() -> None:
    """Catches rows dropped silently, a run on a fraction of its data, and repaired images that stay unreadable."""
    cached = open_cache(make_split(100, unreadable=(7, 12)), SIZE, "test")
    assert len(cached) == 98
    listing = (cached.folder / "unreadable.tsv").read_text()
    assert listing == "".join(f"row {row}\tImage {row} cannot be read: on purpose.\n" for row in (7, 12))
    message = r"^3 of the first 88 images .* 2 % of all 100\. Image 12 .*\. Image 13 .*\. Image 99 .*\. Repair"
    with pytest.raises(UserError, match=message) as caught:
        open_cache(make_split(100, unreadable=(7, 12, 13, 99), backwards=True), SIZE, "test")
    path = Path(str(caught.value).split("listed in ")[1].rstrip("."))
    assert [line.split("\t")[0] for line in path.read_text().splitlines()] == ["row 12", "row 13", "row 99"]
    check(open_cache(make_split(100, backwards=True), SIZE, "test"), list(range(100)))


def test_other_errors_of_the_source_are_not_unreadable_images(own_root: Path) -> None:
    """Catches rows left out because the network failed, and a restart that decodes again what was stored before."""
    split = make_split(40)

    def lose_network(row: int) -> Image.Image:
        if row == 30:
            raise UserError("no network")
        return split.open_image(row)

    with pytest.raises(UserError, match="no network"):
        open_cache(replace(split, open_image=lose_network), SIZE, "test")
    opened = []

    def record(row: int) -> Image.Image:
        opened.append(row)
        return split.open_image(row)

    check(open_cache(replace(split, open_image=record), SIZE, "test"), list(range(40)))
    assert min(opened) == 24


def test_no_more_is_decoded_than_will_soon_be_written() -> None:
    """Catches all images of a split decoded into memory while the first of them is still missing."""
    split, opened = make_split(100), []

    def stall(row: int) -> Image.Image:
        opened.append(row)
        if row == 0:  # until no further image is opened
            count = 0
            while count < len(opened):
                count = len(opened)
                time.sleep(0.2)
            assert max(opened) < 2 * cache.PART
        return split.open_image(row)

    check(open_cache(replace(split, open_image=stall), SIZE, "test"), list(range(100)))


def test_an_error_stops_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Ctrl-C or a network failure that takes effect only after hundreds of further images."""
    monkeypatch.setattr(cache, "PART", 100)
    split, opened = make_split(1000), []

    def fail(row: int) -> Image.Image:
        opened.append(row)
        time.sleep(0.01)
        if row == 0:
            raise UserError("no network")
        return split.open_image(row)

    with pytest.raises(UserError):
        open_cache(replace(split, open_image=fail), SIZE, "test")
    assert len(opened) < 100


def test_a_small_disk_is_reported_before_any_image_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a disk that is full after an hour, and an estimate without the share of coloured images."""
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=60 * SIZE * SIZE))
    opened: list[int] = []
    with pytest.raises(UserError, match=f"^The remaining images need about .* GB are free.*{cache.ROOT_VARIABLE}"):
        open_cache(replace(make_split(61), open_image=opened.append), SIZE, "test")  # type: ignore[arg-type]
    assert not opened
    coloured = replace(make_split(60), open_image=partial(make_image, colour=True))
    with pytest.raises(UserError, match="^The remaining images need about"):
        open_cache(coloured, SIZE, "test")


def test_a_folder_that_is_not_writable_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback if the cache directory is a file or if the disk fills up during the first pass."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.ROOT_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=f"Not a directory.*{cache.ROOT_VARIABLE}"):
        open_cache(make_split(4), SIZE, "test")
    monkeypatch.setenv(cache.ROOT_VARIABLE, str(tmp_path / "cache"))

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="No space left on device"):
            open_cache(make_split(4), SIZE, "test")
    check(open_cache(make_split(4), SIZE, "test"), [0, 1, 2, 3])


# ---- kills and concurrent processes

LOAD = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from clip_medical.data import cache
from clip_medical.data.dataset import load_data

cache.PART = 8
data = load_data(sys.argv[1]).train
"""
ONE_PASS = LOAD + "cache.open_cache(data, 16, 'test')"
MANY_KILLS = (
    LOAD
    + """
def start(root):  # no other thread is running here, so a fork is safe
    if not (pid := os.fork()):
        os.environ[cache.ROOT_VARIABLE] = root
        cache.open_cache(data, 112, "test")  # parts larger than the buffer of a file, so that kills leave torn ones
        os._exit(0)
    return pid

began = time.monotonic()
assert os.waitpid(start("complete"), 0)[1] == 0
duration, rng, kills = time.monotonic() - began, random.Random(0), 0
while kills < int(sys.argv[2]):
    pid = start("killed")
    time.sleep(rng.uniform(0, duration / 3))
    os.kill(pid, signal.SIGKILL)
    kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
    if any(path.is_dir() and not path.suffix for path in Path("killed").glob("*")):
        shutil.rmtree("killed")  # complete: start again
assert os.waitpid(start("killed"), 0)[1] == 0
"""
)


def save_images(folder: Path, count: int) -> Path:
    folder.mkdir()
    for row in range(count):
        make_image(row, colour=row % 7 == 3).resize((90, 80)).save(folder / f"{row}.png")
    rows = "".join(f"{row}.png,caption {row}\n" for row in range(count))
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    return folder


def script(code: str, data: Path, folder: Path) -> "subprocess.Popen[str]":
    variables = {"PYTHONPATH": str(ROOT), "TQDM_DISABLE": "1", cache.ROOT_VARIABLE: str(folder / "cache")}
    command = [sys.executable, "-c", code, str(data), str(KILLS)]
    return subprocess.Popen(command, cwd=folder, env=os.environ | variables, text=True)


@pytest.mark.slow
def test_a_killed_pass_gives_the_same_cache(tmp_path: Path) -> None:
    """Catches a torn part that counts as complete, and pixels stored twice, after SIGKILL at random moments."""
    assert script(MANY_KILLS, save_images(tmp_path / "data", 300), tmp_path).wait() == 0
    (complete,) = (path for path in (tmp_path / "complete").iterdir() if path.is_dir())
    assert contents(complete) == contents(tmp_path / "killed" / complete.name)
    assert len(np.unique(Cache(complete, SIZE).image_ids)) == 270


def test_every_state_that_a_kill_can_leave(own_root: Path) -> None:
    """Catches a torn line, pixels beyond the index, and a complete folder without its final name."""
    split = make_split(40, unreadable=())
    complete = contents(open_cache(split, SIZE, "test").folder)
    folder = own_root / cache_key(split, SIZE)
    lines = complete["index.jsonl"].splitlines(keepends=True)
    for index in (b"", b"".join(lines[:2]), b"".join(lines[:2]) + lines[2][:-9], complete["index.jsonl"]):
        shutil.rmtree(folder)
        part = folder.with_suffix(".part")
        part.mkdir()
        (part / "index.jsonl").write_bytes(index)
        (part / "pixels.bin").write_bytes(complete["pixels.bin"] + b"more" * 100)
        open_cache(split, SIZE, "test")
        assert contents(folder) == complete


@pytest.mark.slow
def test_two_processes_create_one_cache(tmp_path: Path) -> None:
    """Catches two runs that start together and write into the same file."""
    data = save_images(tmp_path / "data", 100)
    processes = [script(ONE_PASS, data, tmp_path) for _ in range(2)]
    assert [process.wait() for process in processes] == [0, 0]
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert len(np.unique(Cache(folder, SIZE).image_ids)) == 90


def test_waiting_for_another_process_is_reported(monkeypatch: pytest.MonkeyPatch, own_root: Path) -> None:
    """Catches a silent wait of minutes, and one that does not end when the other process is done."""
    split, output, deadline = make_split(4), io.StringIO(), time.monotonic() + 20
    monkeypatch.setattr(sys, "stderr", output)  # capsys may lose what another thread prints while it is read
    own_root.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(own_root / f"{cache_key(split, SIZE)}.lock"):
            waiting = pool.submit(open_cache, split, SIZE, "training")
            while not output.getvalue() and not waiting.done() and time.monotonic() < deadline:
                time.sleep(0.01)
        check(waiting.result(), [0, 1, 2, 3])
    assert "training images are being read by another process" in output.getvalue()


def test_about_describes_the_cache() -> None:
    """Catches a folder that does not show which dataset it was made from."""
    cached = open_cache(make_split(10), SIZE, "test")
    about = json.loads((cached.folder / "about.json").read_text())
    assert about == {"images": 10, "size": SIZE, "first": "000000", "last": "000009"}


# ---- hostile images


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def hostile(number: int) -> tuple[str, bytes]:
    """Return kind and bytes of an unusual or damaged file: one of 20 kinds, with the number as seed."""
    rng = np.random.default_rng(number)
    grey = Image.fromarray(rng.integers(0, 256, rng.integers(1, 60, 2), dtype=np.uint8))
    colour = Image.fromarray(rng.integers(0, 256, (*rng.integers(1, 60, 2), 3), dtype=np.uint8))
    wide = rng.integers(0, 65536, (30, 20), dtype=np.uint16)
    floats = rng.normal(0, 1e3, (20, 30)).astype(np.float32)
    floats[rng.random(floats.shape) < 0.3] = rng.choice([np.nan, np.inf, -np.inf])
    png = encoded(grey, "PNG")
    bomb = png[:16] + (60_000).to_bytes(4, "big") * 2 + png[24:]
    kinds: list[tuple[str, Callable[[], bytes]]] = [
        ("truncated PNG", lambda: encoded(colour, "PNG")[: int(rng.integers(1, 60))]),
        ("truncated JPEG", lambda: encoded(colour, "JPEG")[: int(rng.integers(1, 400))]),
        ("empty", lambda: b""),
        ("zero bytes", lambda: bytes(int(rng.integers(1, 5000)))),
        ("noise", lambda: rng.bytes(int(rng.integers(1, 5000)))),
        ("1 x 1", lambda: encoded(grey.resize((1, 1)), "PNG")),
        ("20,000 x 1", lambda: encoded(grey.resize((20_000, 1)), "PNG")),
        ("1 x 20,000", lambda: encoded(colour.resize((1, 20_000)), "PNG")),
        ("bomb", lambda: bomb),
        ("JPEG named .png", lambda: encoded(colour, "JPEG")),  # as all of these files are
        ("16 bits", lambda: encoded(Image.fromarray(wide), "PNG")),
        ("16-bit TIFF", lambda: encoded(Image.fromarray(wide), "TIFF")),
        ("CMYK", lambda: encoded(colour.convert("CMYK"), "JPEG")),
        ("animated", lambda: encoded(grey, "GIF", save_all=True, append_images=[grey.rotate(90)])),
        ("alpha", lambda: encoded(colour.convert("RGBA"), "PNG")),
        ("NaN", lambda: encoded(Image.fromarray(floats), "TIFF")),
        ("palette", lambda: encoded(colour.convert("P"), "PNG", transparency=0)),
        ("text", lambda: b"<html>404 not found</html>"),
        ("1 bit", lambda: encoded(grey.convert("1"), "TIFF")),
        ("flipped bytes", lambda: bytes(b ^ (rng.random() < 0.02) * 255 for b in encoded(colour, "PNG"))),
    ]
    name, make = kinds[number % len(kinds)]
    return name, make()


def test_300_hostile_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a crash, an image neither cached nor listed, pixels of another image, and a format derived from the file
    name, which is .png for all."""
    monkeypatch.setattr(cache, "UNREADABLE_LIMIT", 1.0)
    files = [hostile(number) for number in range(300)]
    ids = [f"{number} {kind}" for number, (kind, _) in enumerate(files)]
    paths = [tmp_path / f"{number:03}.png" for number in range(300)]
    for path, (_, data) in zip(paths, files, strict=True):
        path.write_bytes(data)
    split = Split(ids, ids, {}, lambda row: decode(paths[row], ids[row]), [path.name for path in paths])
    cached = open_cache(split, SIZE, "test")
    listed = [line.split("\t") for line in (cached.folder / "unreadable.tsv").read_text().splitlines()]
    assert sorted([ids[row] for row in cached.rows] + [name for name, _ in listed]) == sorted(ids)
    assert all(reason.startswith(f"Image {name} cannot be read: ") for name, reason in listed)
    for position, row in enumerate(cached.rows.tolist()):
        expected = squares(decode(files[row][1], ""))
        np.testing.assert_array_equal(cached.read(np.array([position]))[0], expected)
    kinds = {kind for kind, _ in files[:20]}
    unreadable = {"truncated PNG", "truncated JPEG", "empty", "zero bytes", "noise", "bomb", "text"}
    readable = kinds - unreadable - {"flipped bytes"}  # of those, some are
    listed_kinds = {name.split(" ", 1)[1] for name, _ in listed}
    assert listed_kinds >= unreadable and not listed_kinds & readable
