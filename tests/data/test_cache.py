"""The image cache: the right pixels for the right row, whatever happens on the way. KILLS=20 for more kills."""

import io
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from clip_medical.data import cache
from clip_medical.data.cache import Cache, cache_key, open_cache
from clip_medical.data.images import UnreadableImage, decode, resize_and_crop
from clip_medical.data.sources import Split
from clip_medical.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
SIZE = 16
KILLS = int(os.environ.get("KILLS", "5"))


def picture(row: int, colour: bool = False) -> Image.Image:
    rng = np.random.default_rng(row)
    return Image.fromarray(
        rng.integers(0, 256, (20 + row % 5, 24, 3) if colour else (20, 24 + row % 5), dtype=np.uint8)
    )


def open_row(bad: frozenset[int], row: int) -> Image.Image:
    if row in bad:
        raise UnreadableImage(f"image {row} cannot be read: on purpose.")
    return picture(row, colour=row % 7 == 3)


def made_split(count: int, bad: tuple[int, ...] = (), backwards: bool = False) -> Split:
    """`count` rows, each seventh coloured; backwards: they lie on disk in the opposite order."""
    origins = [f"{count - row if backwards else row:06}" for row in range(count)]
    names = [f"row {row}" for row in range(count)]
    return Split(names, names, {}, partial(open_row, frozenset(bad)), origins)


def check(found: Cache, rows: list[int]) -> None:
    """That the cache holds exactly the squares of these rows, in this order."""
    assert found.rows.tolist() == rows
    for place, row in enumerate(rows):
        square = resize_and_crop(picture(row, colour=row % 7 == 3), SIZE)
        channels = square[None] if square.ndim == 2 else square.transpose(2, 0, 1)
        np.testing.assert_array_equal(found.read(np.array([place]))[0], channels)


@pytest.fixture(autouse=True)
def own_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(cache.ROOT_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(cache, "PART", 8)
    monkeypatch.setattr(cache, "RUN", 2)
    return tmp_path / "cache"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


@pytest.mark.parametrize("backwards", [False, True])
def test_each_row_has_its_own_pixels(backwards: bool) -> None:
    """Catches rows mixed up where the order of reading is not that of the split, or where one of them is missing."""
    bad = (4, 90)
    found = open_cache(made_split(150, bad, backwards), SIZE, "test")
    check(found, [row for row in range(150) if row not in bad])


def test_grey_and_coloured_in_one_batch() -> None:
    """Catches a grey picture whose other channels are left as the memory held them."""
    found = open_cache(made_split(10), SIZE, "test")
    both = found.read(np.array([3, 0, 2]))
    assert both.shape == (3, 3, SIZE, SIZE) and (both[1] == both[1, :1]).all() and (both[0] != both[0, :1]).any()
    assert found.read(np.array([0, 2])).shape == (2, 1, SIZE, SIZE)
    assert found.read(np.array([], np.int64)).shape == (0, 1, SIZE, SIZE)


def test_a_second_start_opens_no_image(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches images decoded again although the cache is complete."""
    split = made_split(20)
    open_cache(split, SIZE, "test")

    def never(row: int) -> Image.Image:
        raise AssertionError(f"row {row} was opened")

    check(open_cache(Split(split.captions, split.ids, {}, never, split.origins), SIZE, "test"), list(range(20)))


def test_equal_pictures_share_an_id() -> None:
    """Catches equal pixels that count as negatives of each other, and a grey one equal to a coloured one."""
    numbers = [5, 3, 5, 0, 3, 1]
    pictures = [picture(n, colour=n == 3) for n in numbers]
    split = Split(list("abcdef"), list("abcdef"), {}, pictures.__getitem__, list("fedcba"))
    ids = open_cache(split, SIZE, "test").image_ids
    assert (ids[:, None] == ids).tolist() == [[a == b for b in numbers] for a in numbers]


def test_whatever_changes_the_pixels_changes_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a stale cache: an image written over, another size, other rows, other code, another Pillow."""
    from clip_medical.data.sources import load_data

    for i in range(4):
        picture(i).save(tmp_path / f"{i}.png")
    (tmp_path / "metadata.csv").write_text("file_name,text\n" + "".join(f"{i}.png,caption {i}\n" for i in range(4)))
    train = load_data(str(tmp_path)).train
    keys = [cache_key(train, SIZE), cache_key(train, SIZE + 1), cache_key(train.select([1, 0]), SIZE)]
    assert cache_key(load_data(str(tmp_path)).train, SIZE) == keys[0]
    picture(9).save(tmp_path / train.ids[0])
    os.utime(tmp_path / train.ids[0], ns=(1, 1))
    keys.append(cache_key(load_data(str(tmp_path)).train, SIZE))
    monkeypatch.setattr(cache, "version", lambda name: "0")
    keys.append(cache_key(train, SIZE))
    monkeypatch.setattr(Path, "read_text", lambda path: "other code")
    keys.append(cache_key(train, SIZE))
    assert len(set(keys)) == len(keys)


def test_a_few_unreadable_images_are_listed_and_many_stop_the_run(own_root: Path) -> None:
    """Catches rows dropped without a word, and a run that goes on with a tenth of its data."""
    found = open_cache(made_split(100, bad=(7, 12)), SIZE, "test")
    assert len(found) == 98
    listed = (found.folder / "unreadable.tsv").read_text()
    assert listed == "".join(f"row {i}\timage {i} cannot be read: on purpose.\n" for i in (7, 12))
    with pytest.raises(UserError, match=r"^3 images .* 2% of all 100: image 12 .*; image 13 .*; image 99 ") as caught:
        open_cache(made_split(100, bad=(7, 12, 13, 99), backwards=True), SIZE, "test")
    listed = str(caught.value).split("see ")[1].split(",")[0]
    assert len(Path(listed).read_text().splitlines()) == 3
    assert not list(own_root.glob("*.part"))  # catches a mended archive refused for what the journal says


def test_a_trouble_of_the_source_is_not_an_unreadable_image(own_root: Path) -> None:
    """Catches rows given up because the network failed; what was read before must be kept."""
    split = made_split(40)

    def failing(row: int) -> Image.Image:
        if row == 30:
            raise UserError("no network")
        return split.open_image(row)

    with pytest.raises(UserError, match="no network"):
        open_cache(Split(split.captions, split.ids, {}, failing, split.origins), SIZE, "test")
    (journal,) = own_root.glob("*.part/journal.jsonl")
    assert len(journal.read_text().splitlines()) == 3
    opened = []

    def counting(row: int) -> Image.Image:
        opened.append(row)
        return split.open_image(row)

    check(open_cache(Split(split.captions, split.ids, {}, counting, split.origins), SIZE, "test"), list(range(40)))
    assert min(opened) == 24


def test_no_more_is_begun_than_will_soon_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches all pictures of a split decoded into memory while the writer still writes the first; and more threads
    than there are runs of rows to give them."""
    monkeypatch.setattr(cache, "_cores", lambda: 16)
    begun: list[int] = []

    def work(row: int) -> int:
        begun.append(row)
        return row

    with ThreadPoolExecutor(16) as pool:
        results = cache._in_order(pool, work, list(range(1000)))
        assert next(results) == 0
        ahead = 2 * 16 * cache.RUN
        deadline = time.monotonic() + 10
        while len(begun) < ahead and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.05)
        assert sorted(begun) == list(range(ahead))
        assert list(results) == list(range(1, 1000))


def test_an_error_waits_for_no_row_that_nobody_wants(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches Ctrl-C, or the network's end, that is answered after whole runs of slow pictures."""
    monkeypatch.setattr(cache, "RUN", 100)
    begun: list[int] = []

    def work(row: int) -> int:
        begun.append(row)
        time.sleep(0.01)
        if row == 0:
            raise UserError("no network")
        return row

    with ThreadPoolExecutor(2) as pool, pytest.raises(UserError):
        next(cache._in_order(pool, work, list(range(1000))))
    assert 0 in begun and len(begun) < 20


def test_too_little_space_is_said_before_anything_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a disk that is full after an hour; and the share of coloured pictures left out of the estimate."""
    free = 60 * SIZE * SIZE
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
    opened = []
    split = made_split(61)
    with pytest.raises(UserError, match=f"61 images need about .* GB are free.*{cache.ROOT_VARIABLE}"):
        open_cache(Split(split.captions, split.ids, {}, opened.append, split.origins), SIZE, "test")
    assert not opened
    coloured = Split(
        list("abc") * 20, list("abc") * 20, {}, lambda row: picture(row, True), [f"{i:02}" for i in range(60)]
    )
    with pytest.raises(UserError, match="52 images need about"):
        open_cache(coloured, SIZE, "test")


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback where the cache directory is a file, or a disk that fills up on the way."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache.ROOT_VARIABLE, str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match=f"Not a directory.*{cache.ROOT_VARIABLE}"):
        open_cache(made_split(4), SIZE, "test")
    monkeypatch.setenv(cache.ROOT_VARIABLE, str(tmp_path / "cache"))

    def full(file: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(cache, "_to_disk", full)
        with pytest.raises(UserError, match="No space left on device"):
            open_cache(made_split(4), SIZE, "test")
    check(open_cache(made_split(4), SIZE, "test"), [0, 1, 2, 3])


# ---- kills

PICTURES = """
import os, random, shutil, signal, sys, time
from pathlib import Path
from clip_medical.data import cache
from clip_medical.data.sources import load_data

cache.PART, cache.RUN = 8, 2
data = load_data(sys.argv[1]).train
"""
ONE_PASS = PICTURES + "cache.open_cache(data, 16, 'test')"
MANY_KILLS = (
    PICTURES
    + """
def start(root):  # no other thread runs here: a fork is a whole process
    if not (pid := os.fork()):
        os.environ[cache.ROOT_VARIABLE] = root
        cache.open_cache(data, 112, "test")  # pixels beyond what a file buffers: any kill leaves some half-written
        os._exit(0)
    return pid

began = time.monotonic()
assert os.waitpid(start("whole"), 0)[1] == 0
whole, rng, killed, ended = time.monotonic() - began, random.Random(0), 0, 0
while killed < int(sys.argv[2]):
    pid = start("parts")
    time.sleep(rng.uniform(0, whole / 3))
    os.kill(pid, signal.SIGKILL)
    if os.waitpid(pid, 0)[1] == signal.SIGKILL:
        killed += 1
    if any(path.is_dir() and not path.suffix for path in Path("parts").glob("*")):
        shutil.rmtree("parts")  # it had come to its end: once more from the beginning
        ended += 1
assert os.waitpid(start("parts"), 0)[1] == 0
print(ended)
"""
)


def pictures(folder: Path, count: int) -> Path:
    folder.mkdir()
    for i in range(count):
        picture(i, colour=i % 7 == 3).resize((90, 80)).save(folder / f"{i}.png")
    rows = "".join(f"{i}.png,caption {i}\n" for i in range(count))
    (folder / "metadata.csv").write_text("file_name,text\n" + rows)
    return folder


def script(code: str, data: Path, folder: Path) -> "subprocess.Popen[str]":
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "TQDM_DISABLE": "1",
        cache.ROOT_VARIABLE: str(folder / "cache"),
    }
    return subprocess.Popen([sys.executable, "-c", code, str(data), str(KILLS)], cwd=folder, env=environment)


def test_a_kill_at_any_moment_costs_nothing(tmp_path: Path) -> None:
    """Catches a torn part taken for a whole one, and pixels that stand twice, after SIGKILL at random moments."""
    assert script(MANY_KILLS, pictures(tmp_path / "data", 300), tmp_path).wait() == 0
    (whole,) = (path for path in (tmp_path / "whole").iterdir() if path.is_dir())
    assert contents(whole) == contents(tmp_path / "parts" / whole.name)
    assert len(np.unique(Cache(whole, SIZE).image_ids)) == 270


def test_what_a_kill_leaves_behind(own_root: Path) -> None:
    """Catches each state that a kill can leave, one by one: a torn line, pixels beyond the journal, no publication."""
    split = made_split(40)
    whole = contents(open_cache(split, SIZE, "test").folder)
    folder = own_root / cache_key(split, SIZE)
    lines = whole["journal.jsonl"].splitlines(keepends=True)
    for journal in (b"", b"".join(lines[:2]), b"".join(lines[:2]) + lines[2][:-9], whole["journal.jsonl"]):
        shutil.rmtree(folder)
        part = folder.with_suffix(".part")
        part.mkdir()
        (part / "journal.jsonl").write_bytes(journal)
        (part / "pixels.bin").write_bytes(whole["pixels.bin"] + b"more" * 100)
        open_cache(split, SIZE, "test")
        assert contents(folder) == whole


def test_two_processes_make_one_cache(tmp_path: Path) -> None:
    """Catches two runs that start together and write into each other's pixels."""
    data = pictures(tmp_path / "data", 100)
    both = [script(ONE_PASS, data, tmp_path) for _ in range(2)]
    assert [process.wait() for process in both] == [0, 0]
    (folder,) = (path for path in (tmp_path / "cache").iterdir() if path.is_dir())
    assert len(np.unique(Cache(folder, SIZE).image_ids)) == 90


# ---- hostile images


def encoded(image: Image.Image, format: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def hostile(number: int) -> tuple[str, bytes]:
    """One of 20 kinds, with the number as seed -> (what it is, its bytes)."""
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
        ("JPEG called PNG", lambda: encoded(colour, "JPEG")),  # as all of them are
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
    """Catches a crash, an image neither cached nor listed, a square that is not the one of its image, and a file judged
    by its name: all of them are called .png."""
    monkeypatch.setattr(cache, "TOLERATED", 1.0)
    files = [hostile(number) for number in range(300)]
    ids = [f"{number} {kind}" for number, (kind, _) in enumerate(files)]
    paths = [tmp_path / f"{number:03}.png" for number in range(300)]
    for path, (_, data) in zip(paths, files, strict=True):
        path.write_bytes(data)
    split = Split(ids, ids, {}, lambda row: decode(paths[row], ids[row]), [path.name for path in paths])
    found = open_cache(split, SIZE, "test")
    listed = [line.split("\t") for line in (found.folder / "unreadable.tsv").read_text().splitlines()]
    assert sorted([ids[row] for row in found.rows] + [name for name, _ in listed]) == sorted(ids)
    assert all(reason.startswith(f"image {name} cannot be read: ") for name, reason in listed)
    for place, row in enumerate(found.rows.tolist()):
        square = resize_and_crop(decode(files[row][1], ""), SIZE)
        channels = square[None] if square.ndim == 2 else square.transpose(2, 0, 1)
        np.testing.assert_array_equal(found.read(np.array([place]))[0], channels)
    kinds = {kind for kind, _ in files[:20]}
    lost = {"truncated PNG", "truncated JPEG", "empty", "zero bytes", "noise", "bomb", "text"}
    never_lost = kinds - lost - {"flipped bytes"}
    assert not [name for name, _ in listed if name.split(" ", 1)[1] in never_lost]
    assert {name.split(" ", 1)[1] for name, _ in listed} >= lost


def test_about_says_what_the_cache_is_of() -> None:
    """Catches a folder of numbers that nobody can tell what it was made from."""
    found = open_cache(made_split(10), SIZE, "test")
    about = json.loads((found.folder / "about.json").read_text())
    assert about == {"images": 10, "unreadable": 0, "size": SIZE, "first": "000000", "last": "000009"}


def test_who_waits_for_another_process_is_told(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], own_root: Path
) -> None:
    """Catches a wait of minutes without a word, and one that does not end with the other process's work."""
    monkeypatch.setattr(cache, "PATIENCE", 0.05)
    split, said, deadline = made_split(4), "", time.monotonic() + 20
    own_root.mkdir()
    with ThreadPoolExecutor(1) as pool:
        with FileLock(own_root / f"{cache_key(split, SIZE)}.lock"):
            waiting = pool.submit(open_cache, split, SIZE, "training")
            while not said and not waiting.done() and time.monotonic() < deadline:
                said = capsys.readouterr().err
        check(waiting.result(), [0, 1, 2, 3])
    assert "training images are just being read by another process" in said
