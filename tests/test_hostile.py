"""Hostile input: 600 damaged or malicious images, adapters and tables. Each ends in one sentence, or is read as it is.

The model stays as it was, no file outside the data folder is read or written, nothing from a file is run, and the
memory does not grow with what a header claims.
"""

import io
import json
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from clip_medical.data.dataset import load_data
from clip_medical.data.images import decode
from clip_medical.errors import UserError
from clip_medical.training.memory import memory_in_use
from lora import LoRAError, inject, load_adapter, save_adapter

STARTS = [
    b"%PDF-1.7", b"PK\x03\x04", b"\x1f\x8b\x08", b"NRRD0004", b"\x93NUMPY", b"<html>", b"<!DOCTYPE html>",
    b"version https://git-lfs.github.com/spec/v1", b"\0\0\0\x18ftypheic", b"\0\0\0\x18ftypmp42", b"GIF89a",
    b"\x89PNG\r\n\x1a\n", b"\xff\xd8\xff\xe0", b"II*\0", b"BM", b"RIFF....WEBP", b"\0" * 128 + b"DICM",
]  # fmt: skip
NAMES = [
    "../secret.png", "../../secret.png", "a/../../secret.png", "/etc/passwd", "..\\secret.png", "./../secret.png",
    "~/secret.png", "file:///etc/passwd", "http://x.y/z.png", "\x00", "a.png\x00", "con", "a" * 5000, "a.png/", "", ".",
    "..", "*", "?.png",
]  # fmt: skip
GOOD = "file_name,text\na.png,one\nb.png,two\n"
CONTENTS: list[str | bytes] = [
    "", "\n", "file_name\n", "file_name,text\n", "text,file_name", GOOD + '"', GOOD + 'a.png,"open\n',
    GOOD.replace(",", "\x00"), GOOD + "a.png\n", GOOD + "a.png,1,2,3\n", "a,a\n1,2\n", "file_name,file_name\na,b\n",
    b"\xff\xfe" + b"x", b"\xff\xfe\x00", b"\x80\x81\x82\x83", b"PK\x03\x04" + b"\0" * 50, "\ufeff", "💥" * 1000,
]  # fmt: skip
CAPTIONS = [
    "=cmd|'/c calc'!A0", "@SUM(1+1)", "\x1b[31mred\x1b[0m", "x" * 10**6, "\u202eevil", "\ud800", "a\u0000b", "\r",
    "{0.__class__}",
]  # fmt: skip
MARK = "/tmp/clip-medical-hostile-file-was-run"


class Bomb:
    """A pickle that writes a file when it is opened."""

    def __reduce__(self) -> tuple[Any, ...]:
        return Path(MARK).write_text, ("run",)


def one_sentence(error: BaseException) -> bool:
    text = str(error)
    return 10 < len(text) < 1500 and "\n" not in text and "Traceback" not in text


# ---- images


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def images() -> Iterator[bytes]:
    """300 files."""
    rng = np.random.default_rng(0)
    noise = Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8))
    whole = [encoded(noise, kind) for kind in ("PNG", "JPEG", "TIFF", "BMP", "WEBP", "GIF", "PPM")]
    for data in whole:  # truncated at every kind of boundary: 140
        for cut in np.linspace(0, len(data) - 1, 20).astype(int):
            yield data[:cut]
    for data in whole:  # bytes overwritten: 105
        for _ in range(15):
            broken = bytearray(data)
            for place in rng.integers(0, min(len(data), 400), 4):
                broken[place] = rng.integers(256)
            yield bytes(broken)
    for start in STARTS:  # 17
        yield start + bytes(rng.integers(0, 256, 500, np.uint8))
    for width, height in ((1, 20_000), (20_000, 1), (60_000, 60_000), (2**31 - 1, 1), (0, 0), (1, 1), (3, 0)):  # 7
        header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
        chunk = b"IHDR" + header
        yield b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))
    for size in ((1, 20_000), (20_000, 1), (1, 1)):  # 3
        yield encoded(Image.new("L", size, 9), "PNG")
    for value in (np.nan, np.inf, -np.inf, 1e38):  # 4
        yield encoded(Image.fromarray(np.full((8, 8), value, np.float32)), "TIFF")
    for exif in (b"Exif\0\0" + b"\xff" * 40, b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0"):  # 3
        yield encoded(noise, "JPEG", exif=exif)
    for profile in (b"", b"\xff" * 200, b"acsp" * 40):  # 3
        yield encoded(noise, "PNG", icc_profile=profile)
    yield pickle.dumps(Bomb())
    for length in (1, 2, 3, 4, 7, 8, 127, 128, 131, 132, 140, 344, 348, 352, 500, 1000, 4000):  # 17
        yield bytes(rng.integers(0, 256, length, np.uint8))


def test_three_hundred_images() -> None:
    """Catches an exception other than UserError, an image that is none, and memory for what a header claims."""
    files = list(images())
    assert len(files) == 300
    before, refused = memory_in_use(torch.device("cpu")), 0
    for number, data in enumerate(files):
        try:
            image = decode(data, f"{number}.png")
        except UserError as error:
            refused += 1
            assert one_sentence(error), (number, str(error))
        else:
            assert image.mode in ("L", "RGB") and image.width * image.height > 0, number
    assert 150 < refused < 290
    assert memory_in_use(torch.device("cpu")) - before < 500 * 2**20 and not Path(MARK).exists()


# ---- adapters


def a_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 4))


def adapters(folder: Path) -> Iterator[Callable[[], object]]:
    """200 functions, each of which damages the adapter in `folder`."""
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    data, config, tensors = weights.read_bytes(), json.loads(settings.read_text()), load_file(weights)
    rng = np.random.default_rng(0)
    for cut in np.linspace(0, len(data) - 1, 60).astype(int):  # 60
        yield partial(weights.write_bytes, data[:cut])
    for size in (0, 1, 2**20, 2**40, 2**63, 2**64 - 1):  # 6: the length of the header
        yield partial(weights.write_bytes, struct.pack("<Q", size) + data[8:])
    header = int(struct.unpack("<Q", data[:8])[0])
    for place in np.linspace(8, 8 + header - 1, 24).astype(int):  # 24: a byte of the header
        yield partial(weights.write_bytes, data[:place] + b"\x07" + data[place + 1 :])
    for key, tensor in tensors.items():  # 4 x 8
        others = {name: value for name, value in tensors.items() if name != key}
        yield partial(save_file, others, weights)
        for change in (
            tensor.T.contiguous(), tensor[:1].contiguous(), tensor.flatten(), tensor.int(), tensor * float("nan"),
            tensor + float("inf"),
        ):  # fmt: skip
            yield partial(save_file, {**others, key: change}, weights)
        yield partial(save_file, {**others, f"../{key}": tensor}, weights)
    yield partial(save_file, {**tensors, "base_model.model.9.lora_A.weight": torch.zeros(2, 2)}, weights)  # 1
    for content in (pickle.dumps(Bomb()), b"PK\x03\x04" + data, b"", b"{}", data + b"more"):  # 5
        yield partial(weights.write_bytes, content)
    wrong: dict[str, list[Any]] = {
        "r": [0, -1, 2.5, "8", None, 10**9, True, []],
        "lora_alpha": ["x", None, float("nan"), float("inf"), [], {}],
        "lora_dropout": [-0.1, 1.0, 2, "x", None, []],
        "use_rslora": ["yes", 1.5, []],
        "target_modules": [[], None, "", ["nothing"], {"0": 1}, 7, ["../0"], "(", ["0", 3]],
        "peft_type": ["LOHA", None, 3, "lora", ["LORA"]],
        "bias": ["all", "lora_only", 1],
        "modules_to_save": [["2"], "2"],
        "layers_to_transform": [[0], 0],
        "rank_pattern": [{"0": 4}],
        "fan_in_fan_out": [True],
        "use_dora": [True, "x"],
        "init_lora_weights": ["pissa", "olora", "loftq"],
        "auto_mapping": [{"base_model_class": "os.system"}],
        "quantisation": ["int8", {"bits": 4}],
        "layer_replication": [[[0, 2]]],
        "megatron_config": [{"a": 1}],
        "trainable_token_indices": [[1]],
        "exclude_modules": ["0"],
        "alpha_pattern": [{"0": 4}],
        "lora_bias": [True],
    }
    for name, values in wrong.items():
        for value in values:
            yield partial(settings.write_text, json.dumps(config | {name: value}))
    for text in ("", "{", "[]", "null", "7", '"LORA"', "\0", "{}", json.dumps(config)[:-9], json.dumps(config) + "}"):
        yield partial(settings.write_text, text)
    while True:  # random bytes over the settings, up to 200
        broken = bytearray(json.dumps(config).encode())
        for place in rng.integers(0, len(broken), 3):
            broken[place] = rng.integers(1, 32)
        yield partial(settings.write_bytes, bytes(broken))


def test_two_hundred_adapters(tmp_path: Path) -> None:
    """Catches a damaged adapter that is loaded in part, a model changed by one that is refused, and a pickle opened."""
    model = a_model()
    inject(model, ("0", "2"), rank=2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_()
    save_adapter(model, tmp_path, base_model="x")
    original = {file: file.read_bytes() for file in tmp_path.iterdir()}
    loaded = 0
    for number, damage in zip(range(200), adapters(tmp_path), strict=False):
        for file, data in original.items():
            file.write_bytes(data)
        damage()
        target = a_model()
        weights = {name: tensor.clone() for name, tensor in target.state_dict().items()}
        try:
            load_adapter(target, tmp_path)
        except LoRAError as error:
            assert one_sentence(error), (number, str(error))
            assert all(type(module) is nn.Linear for module in target), number
            assert weights.keys() == target.state_dict().keys()
            assert all(torch.equal(tensor, weights[name]) for name, tensor in target.state_dict().items()), number
        else:  # harmless: all tensors are there and finite
            loaded += 1
            assert torch.isfinite(target(torch.randn(3, 12))).all(), number
    assert loaded < 20 and not Path(MARK).exists()


# ---- tables and archives


def tables(folder: Path) -> Iterator[Path]:
    """100 sources; the images a.png and b.png lie beside the tables, secret.png outside."""

    def text(content: str | bytes, suffix: str = "csv") -> Path:
        file = folder / f"t.{suffix}"
        file.write_bytes(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))
        return file

    for name in [*NAMES, str(folder.parent / "secret.png")]:  # 20
        yield text(f'file_name,text\n"{name}",one\nb.png,two\n')
        if name.isprintable():  # and as JSON: 18
            rows = [{"file_name": name, "text": "one"}, {"file_name": "b.png", "text": "2"}]
            yield text("\n".join(map(json.dumps, rows)), "jsonl")
    for content in CONTENTS:  # 18
        yield text(content)
    for caption in CAPTIONS:  # 9
        yield text(f'file_name,text\na.png,"{caption}"\nb.png,two\n')
    for content in (
        "{",
        "[]",
        "null",
        '{"file_name": 1}',
        '{"file_name": {"a": 1}, "text": []}',
        "[" * 5000,
        '{"text": NaN}',
        "7",
    ):  # 8
        yield text(content + "\n", "jsonl")
    yield text(GOOD + GOOD.partition("\n")[2])  # the same rows twice: 1
    for content in (b"PAR1", b"PAR1" + b"\0" * 100 + b"PAR1", b"", b"x" * 1000):  # 4
        yield text(content, "parquet")
    for member in ("../../evil.png", "/tmp/evil.png", "a/../../../evil.png", "metadata.csv"):  # 4
        with zipfile.ZipFile(folder / "t.zip", "w") as file:
            file.writestr(member, "file_name,text\n../../secret.png,x\n" if member == "metadata.csv" else b"\x89PNG")
        yield folder / "t.zip"
    for content in (b"", b"PK\x03\x04" + b"\0" * 100, b"PK\x05\x06" + b"\0" * 18):  # 3
        yield text(content, "zip")
    for kind in (tarfile.CHRTYPE, tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):  # 4
        with tarfile.open(folder / "t.tar", "w") as tar:
            entry = tarfile.TarInfo("x.png")
            entry.type, entry.linkname = kind, "/etc/passwd"
            tar.addfile(entry)
            entry = tarfile.TarInfo("../evil.png")
            entry.size = 4
            tar.addfile(entry, io.BytesIO(b"\x89PNG"))
        yield folder / "t.tar"
    for content in (b"", b"\0" * 1024, b"x" * 2000):  # 3
        yield text(content, "tar")
    for pattern in range(100):  # random bytes in a good table, up to 100
        rng, broken = np.random.default_rng(pattern), bytearray(GOOD.encode())
        for place in rng.integers(0, len(broken), 3):
            broken[place] = rng.integers(256)
        yield text(bytes(broken))


def test_a_hundred_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback, a file read or written outside of the data folder, and captions that are run."""
    datasets = pytest.importorskip("datasets")
    for name in ("HF_DATASETS_CACHE", "DOWNLOADED_DATASETS_PATH", "EXTRACTED_DATASETS_PATH"):
        monkeypatch.setattr(datasets.config, name, tmp_path / "hf" / name)
    folder = tmp_path / "data"
    folder.mkdir()
    for name, level in (("data/a.png", 1), ("data/b.png", 2), ("secret.png", 77)):
        Image.new("L", (4, 4), level).save(tmp_path / name)
    count = 0
    for number, source in zip(range(100), tables(folder), strict=False):
        count += 1
        try:
            split = load_data(str(source), split="").validation
            for row in range(len(split)):
                try:
                    assert np.asarray(split.open_image(row)).max() != 77, number
                except UserError as error:
                    assert one_sentence(error), (number, str(error))
        except UserError as error:
            assert one_sentence(error), (number, str(error))
        source.unlink()
    assert count == 100 and not list(tmp_path.rglob("evil*")) and not Path("/tmp/evil.png").exists()
