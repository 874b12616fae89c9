"""`inflated` may change how fast Pillow reads a PNG, and nothing else: the same image, or the same complaint."""

import io
import re
import struct
import tracemalloc
import zlib
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from clip_medical.data.png import inflated


def png(image: Image.Image, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG", **options)
    return buffer.getvalue()


def noise(mode: str, width: int, height: int) -> Image.Image:
    """Half noise, half flat: all filters, and several chunks where it is large."""
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 4), dtype=np.uint8)
    pixels[:, width // 2 :] = 7
    if mode == "I;16":
        return Image.fromarray(pixels[..., :2].copy().view("<u2")[..., 0])
    return Image.fromarray(pixels).convert(mode)


def chunk(kind: bytes, body: bytes) -> bytes:
    return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))


def by_hand(width: int, height: int, stream: bytes, interlaced: int = 0, depth: int = 8, colour: int = 0) -> bytes:
    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlaced)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def read(data: bytes) -> tuple[Any, ...]:
    """All that Pillow makes of a file: mode, size, pixels, what stands beside them; or its complaint."""
    try:
        image: Any = Image.open(io.BytesIO(data))
        image.load()
        return image.mode, image.size, image.tobytes(), image.getpalette(), image.info, dict(image.getexif())
    except Exception as error:
        return type(error), re.sub("0x[0-9a-f]+", "", str(error))  # the address of the BytesIO


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
@pytest.mark.parametrize("size", [(1, 1), (7, 5), (300, 260), (1, 70_000)])
def test_the_same_image_uncompressed(mode: str, size: tuple[int, int]) -> None:
    """Catches a bit depth or a colour type whose rows are counted wrong, and blocks, chunks or checksums cut wrong."""
    data = png(noise(mode, *size))
    fast = inflated(data)
    assert fast != data
    assert read(fast) == read(data)
    Image.open(io.BytesIO(fast)).verify()  # all checksums of the chunks
    assert fast.count(b"IDAT") == 1
    start = fast.index(b"IDAT") + 4
    stored = fast[start : start + struct.unpack(">I", fast[start - 8 : start - 4])[0]]
    raw = zlib.decompress(stored)  # which also compares the pixels' checksum
    assert len(stored) == 2 + 5 * -(-len(raw) // 65535) + len(raw) + 4  # RFC 1950 and 1951, nothing compressed


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_several_pixels_in_a_byte(bits: int) -> None:
    """Catches a row length that is rounded down where the last byte is not full."""
    data = png(noise("P", 13, 9), bits=bits)
    assert inflated(data) != data
    assert read(inflated(data)) == read(data)


def test_what_stands_beside_the_pixels_stays() -> None:
    """Catches a transparent colour, an orientation or a text lost with the chunks around the pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    before = png(noise("P", 40, 30), transparency=3, exif=exif, dpi=(100, 100))
    after = before[:-12] + chunk(b"tEXt", b"after\0words") + before[-12:]
    assert "after" in read(after)[4] and "dpi" in read(after)[4]
    frames = [noise("RGB", 40, 30), noise("RGB", 40, 30).rotate(90)]
    animated = png(frames[0], save_all=True, append_images=frames[1:])
    for data in (after, animated):
        assert inflated(data) != data
        assert read(inflated(data)) == read(data)
    assert inflated(animated).count(b"fdAT") == animated.count(b"fdAT") == 1


def test_a_huge_image_is_left_to_pillow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches one that would be held three times: as the file, as rows, and as the file with these rows."""
    data = png(noise("L", 60, 50))
    for largest, alike in ((50 * 61, False), (50 * 61 - 1, True)):
        monkeypatch.setattr("clip_medical.data.png.LARGEST", largest)
        assert (inflated(data) == data) == alike


def test_whatever_is_not_an_intact_png_comes_back() -> None:
    """Catches a damaged file that is mended into a wrong image, or that loses Pillow's reason why it cannot be read."""
    rows = b"\x00" + b"\x05" * 8
    stream = zlib.compress(rows * 4)
    interlaced = zlib.compress(b"".join(b"\x00" + b"\x05" * n for n in [1, 1, 2, 2, 2, 4, 4, 4, 4] + [8] * 4))
    damaged = stream[:-1] + bytes([stream[-1] ^ 1])
    files = {
        "jpeg": b"\xff\xd8\xff\xe0 what a PNG is not",
        "empty": b"",
        "checksum": by_hand(8, 4, damaged),
        "checksum missing": by_hand(8, 4, stream[:-4]),
        "rows missing": by_hand(8, 5, stream),
        "rows too many": by_hand(8, 3, stream),
        "bytes after the end": by_hand(8, 4, stream + b"more"),
        "interlaced": by_hand(8, 8, interlaced, interlaced=1),
        "unknown colour": by_hand(8, 4, stream, colour=5),
        "no pixels": by_hand(8, 4, b""),
        "huge": by_hand(2**31 - 1, 2**31 - 1, stream),
    }
    assert inflated(by_hand(8, 4, stream)) != by_hand(8, 4, stream)
    for name, data in files.items():
        assert inflated(data) == data, name


def test_a_bomb_does_not_go_off() -> None:
    """Catches a stream that is inflated to its end, whatever size the header has promised."""
    data = by_hand(8, 4, zlib.compress(bytes(50_000_000)))
    tracemalloc.start()
    assert inflated(data) == data
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_every_header_of_a_zlib_stream() -> None:
    """Catches a window size that isal accepts, Pillow refuses, and a header of our own would hide."""
    stream = zlib.compress((b"\x00" + b"\x05" * 8) * 4)
    for method in range(256):
        for flags in range(256):
            if (256 * method + flags) % 31 == 0:  # the check bits of RFC 1950; isal refuses all others
                data = by_hand(8, 4, bytes([method, flags]) + stream[2:])
                assert read(inflated(data)) == read(data)


DATA = png(noise("L", 60, 50))


@settings(max_examples=300, deadline=None)
@given(st.integers(0, len(DATA) - 1), st.integers(1, 255), st.integers(0, len(DATA)))
def test_damage_anywhere(at: int, flipped: int, cut: int) -> None:
    """Catches any change of one byte, or an end too early, of which Pillow would make something else than before."""
    changed = DATA[:at] + bytes([DATA[at] ^ flipped]) + DATA[at + 1 :]
    for data in (changed, DATA[:cut]):
        assert read(inflated(data)) == read(data)
