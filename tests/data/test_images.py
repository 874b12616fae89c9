"""What `decode` makes of the files that radiology comes in, and whether `resize_and_crop` gives CLIP's own pixels."""

import importlib
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from transformers import CLIPImageProcessor
from transformers.models.clip import CLIPImageProcessorPil

from clip_medical.data import images
from clip_medical.data.images import decode, resize_and_crop
from clip_medical.errors import UserError

GREY = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
COLOUR = np.random.default_rng(1).integers(0, 256, (20, 30, 3), dtype=np.uint8)


def encoded(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def pixels(source: Any) -> np.ndarray:
    image = decode(source, "x.png")
    assert image.mode in ("L", "RGB")
    return np.asarray(image)


# ---- decode: right pixels


def test_path_bytes_dictionary_and_image_are_the_same(tmp_path: Path) -> None:
    """Catches a kind of source that is read differently, or a {"bytes": None} whose path is not followed."""
    data, path = encoded(Image.fromarray(GREY)), tmp_path / "x.png"
    path.write_bytes(data)
    sources = [data, path, Image.open(path), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    for source in sources:
        np.testing.assert_array_equal(pixels(source), GREY)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int) -> None:
    """Catches an image left lying on its side, or one turned twice because it kept its orientation tag."""
    turned = {1: GREY, 2: GREY[:, ::-1], 3: GREY[::-1, ::-1], 4: GREY[::-1], 5: GREY.T, 6: np.rot90(GREY, -1),
              7: GREY[::-1, ::-1].T, 8: np.rot90(GREY)}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "TIFF"):
        image = decode(encoded(Image.fromarray(GREY), format, exif=exif), "x")
        np.testing.assert_array_equal(np.asarray(image), turned[orientation])
        np.testing.assert_array_equal(pixels(image), turned[orientation])


def test_damaged_exif_does_not_cost_the_image() -> None:
    """Catches a sound image refused because Pillow raises on the EXIF block beside it."""
    data = encoded(Image.fromarray(GREY), exif=b"Exif\0\0not a tiff header")
    np.testing.assert_array_equal(pixels(data), GREY)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_wide_pixels_are_scaled_and_not_clipped(dtype: str) -> None:
    """Catches Pillow's own convert("L"), which makes everything above 255 white."""
    wide = (np.linspace(1000, 41000, 600).reshape(20, 30)).astype(dtype)
    expected = np.rint((wide.astype(float) - wide.min()) / (int(wide.max()) - int(wide.min())) * 255)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(wide), "TIFF")), expected)
    if dtype == "uint16":
        np.testing.assert_array_equal(pixels(encoded(Image.fromarray(wide), "PNG")), expected)
        big = Image.frombytes("I;16B", (30, 20), wide.astype(">u2").tobytes())
        np.testing.assert_array_equal(pixels(big), expected)  # catches bytes read in the wrong order


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_eight_bit_values_in_a_wide_file_stay(dtype: str) -> None:
    """Catches a dark 8-bit scan stretched to full contrast only because its file has wide pixels."""
    np.testing.assert_array_equal(pixels(Image.fromarray((GREY // 3).astype(dtype))), GREY // 3)


def test_fractions_are_stretched() -> None:
    """Catches a float image from 0 to 1, or a mask of 0 and 1, taken for 8-bit data and read as black."""
    assert pixels(Image.fromarray(np.eye(2, dtype=np.float32))).tolist() == [[255, 0], [0, 255]]
    image = pixels(Image.fromarray(GREY.astype(np.float32) / 255))
    np.testing.assert_array_equal(image, np.rint((GREY - GREY.min()) / np.ptp(GREY).astype(float) * 255))


def test_nan_and_infinity_are_the_darkest() -> None:
    """Catches NaN spreading over the whole image through min() and max(), or infinity flattening it to black."""
    wide = np.array([[np.nan, np.inf, -np.inf], [-100, 0, 100]], np.float32)
    np.testing.assert_array_equal(pixels(Image.fromarray(wide)), [[0, 0, 0], [0, 128, 255]])
    assert pixels(Image.fromarray(np.full((2, 2), np.nan, np.float32))).max() == 0


@pytest.mark.filterwarnings("error")
def test_constant_wide_image_is_black() -> None:
    """Catches a division by zero where all pixels are the same."""
    assert pixels(Image.fromarray(np.full((4, 4), 5000, np.uint16))).max() == 0


@pytest.mark.parametrize("hidden", [255, 77])
def test_transparent_is_black(hidden: int) -> None:
    """Catches convert("RGB"), which drops alpha and shows the colour that hides under transparent pixels."""
    alpha = np.zeros((20, 30), np.uint8)
    alpha[5:15] = 255
    colour = np.where(alpha[..., None] > 0, COLOUR, hidden).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    np.testing.assert_array_equal(pixels(encoded(rgba)), np.where(alpha[..., None] > 0, COLOUR, 0))
    grey = np.where(alpha > 0, GREY, hidden).astype(np.uint8)
    both = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    np.testing.assert_array_equal(pixels(encoded(both)), np.where(alpha > 0, GREY, 0))


def test_half_transparent_is_half_as_bright() -> None:
    """Catches alpha used as a yes or no."""
    rgba = Image.new("RGBA", (4, 4), (200, 100, 50, 128))
    np.testing.assert_allclose(pixels(rgba)[0, 0], [100, 50, 25], atol=1)


def test_palettes_are_looked_up() -> None:
    """Catches palette numbers taken for brightness, and the transparent entry of a palette or a grey PNG shown."""
    grey = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2))
    image = Image.new("P", (2, 2))
    image.putdata(list(range(4)))
    image.putpalette([9, 9, 9, 200, 200, 200, 50, 50, 50, 255, 255, 255])
    assert pixels(encoded(image)).tolist() == [[9, 200], [50, 255]]  # all grey: mode "L"
    assert pixels(encoded(image, transparency=3)).tolist() == [[9, 200], [50, 0]]
    assert pixels(encoded(grey, transparency=3)).tolist() == [[0, 1], [2, 0]]
    image.putpalette([255, 0, 0, 200, 200, 200, 50, 50, 50, 255, 255, 255])
    assert pixels(encoded(image))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_every_mode_comes_out_right(mode: str) -> None:
    """Catches a mode that raises or comes out with inverted or shifted colours."""
    original = Image.new("RGB", (8, 8), (200, 120, 40))
    if mode == "LAB":
        srgb, lab = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
        image = ImageCms.profileToProfile(original, srgb, lab, outputMode="LAB")
        assert image is not None
    else:
        image = original.convert(mode)
    expected = np.asarray(original if mode not in ("1", "L") else image.convert("L"))
    np.testing.assert_allclose(pixels(image).astype(int), expected.astype(int), atol=3)


def test_cmyk_jpeg_is_not_inverted() -> None:
    """Catches the negative that a CMYK JPEG turns into when Adobe's inversion is undone twice or not at all."""
    image = Image.new("RGB", (16, 16), (200, 120, 40)).convert("CMYK")
    np.testing.assert_allclose(pixels(encoded(image, "JPEG", quality=100))[8, 8], [200, 120, 40], atol=4)


def test_grey_in_three_channels_is_one_channel() -> None:
    """Catches three times the work for a grey image, and a coloured one that loses its colours."""
    assert decode(encoded(Image.fromarray(GREY).convert("RGB")), "x").mode == "L"
    nearly = np.repeat(GREY[..., None], 3, axis=2)
    nearly[-1, -1, 2] ^= 1
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(nearly))), nearly)


def test_first_frame_of_several() -> None:
    """Catches a cine loop read at its last frame."""
    frames = [Image.new("L", (8, 8), level) for level in (10, 90, 170)]
    for format in ("GIF", "TIFF", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert pixels(data)[0, 0] == 10


# ---- decode: refusals


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "no image format"),
        (encoded(Image.fromarray(COLOUR), "PNG")[:-900], "truncated"),
        (encoded(Image.fromarray(COLOUR), "JPEG")[:-300], "truncated"),
        (encoded(Image.fromarray(COLOUR), "PNG")[:60] + b"\xff" * 600, "."),
        (bytes(128) + b"DICM" + bytes(100), "Transfer Syntax"),
        ({"bytes": None, "path": None}, "empty"),
        (Image.new("L", (0, 5)), "0 x 5"),
    ],
)
def test_unreadable_images_are_named(data: Any, reason: str) -> None:
    """Catches a traceback out of Pillow, or half an image taken for a whole one."""
    with pytest.raises(UserError, match=f"(?s)^image scan 17.*{reason}"):
        decode(data, "scan 17")


def test_a_file_that_is_gone_is_named(tmp_path: Path) -> None:
    """Catches a FileNotFoundError that says neither row nor reason in words."""
    with pytest.raises(UserError, match="scan 17 cannot be read: No such file"):
        decode(tmp_path / "gone.png", "scan 17")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_is_a_user_error() -> None:
    """Catches exceptions of Pillow's readers that are no OSError (struct.error, SyntaxError, ValueError, ...)."""
    rng = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "TIFF", "GIF", "BMP"):
        data = np.frombuffer(encoded(Image.fromarray(COLOUR), format), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[rng.integers(0, min(200, len(data)), 4)] = rng.integers(0, 256, 4)
            try:
                assert decode(damaged.tobytes(), "x").mode in ("L", "RGB")
            except UserError:
                pass


@pytest.mark.filterwarnings("error")
def test_large_radiographs_pass_and_bombs_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mammogram stopped by Pillow's warning, and the limit against decompression bombs switched off."""
    importlib.reload(images)  # its own filter once more, above the one that makes warnings errors here
    assert Image.MAX_IMAGE_PIXELS is not None
    data = encoded(Image.fromarray(GREY))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size - 1)
    np.testing.assert_array_equal(pixels(data), GREY)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size // 2 - 1)
    with pytest.raises(UserError, match="(?i)decompression bomb"):
        decode(data, "x")


# ---- resize_and_crop


def radiograph(width: int, height: int, colour: bool) -> Image.Image:
    """Smooth tissue, hard edges, a grid of fine lines and noise: what shows a filter at the wrong place."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[:height, :width]
    tissue, edges, noise = np.sin(x / 17) * np.cos(y / 11), (x // 9 + y // 7) % 2, rng.normal(0, 12, (height, width))
    image = 120 + 60 * tissue + 60 * edges + noise
    channels = np.stack([image, np.roll(image, 5, 1), 255 - image], axis=-1) if colour else image
    return Image.fromarray(np.clip(channels, 0, 255).astype(np.uint8))


SIZES = [(224, 224), (300, 200), (200, 301), (113, 112), (97, 89), (31, 57), (1, 1), (3, 400), (400, 3), (111, 333),
         (641, 479), (479, 641), (1000, 90)]  # fmt: skip


@pytest.mark.parametrize("size", [112, 45])
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("processor", [CLIPImageProcessor, CLIPImageProcessorPil])
def test_pixels_are_those_of_clip(size: int, colour: bool, processor: Any) -> None:
    """Catches a crop off by a pixel, another filter, no antialiasing, a filter cut off at the edge of the crop."""
    square = {"height": size, "width": size}
    reference = processor(size={"shortest_edge": size}, crop_size=square, do_rescale=False, do_normalize=False)
    for width, height in SIZES:
        image = radiograph(width, height, colour)
        ours = resize_and_crop(image, size)
        assert ours.dtype == np.uint8 and ours.shape == ((size, size, 3) if colour else (size, size))
        theirs = np.asarray(reference(image, return_tensors="np")["pixel_values"][0], float).transpose(1, 2, 0)
        off = np.abs(theirs - (ours if colour else ours[..., None]))
        assert off.mean() <= 1 and np.quantile(off, 0.999) <= 3, (width, height, off.mean(), off.max())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_pixels_of_every_mode_are_those_of_clip(mode: str) -> None:
    """Catches a mode that is read with other colours than CLIP reads it with. All are opaque and of 8-bit values: what
    is transparent or wider differs on purpose, as CLIPImageProcessor shows hidden colours and clips at 255."""
    reference = CLIPImageProcessor(do_rescale=False, do_normalize=False)
    for width, height in [(301, 223), (97, 640), (31, 57)]:
        image = radiograph(width, height, colour=True)
        image = (image.convert("L").convert("I") if mode in ("F", "I;16") else image).convert(mode)
        ours = resize_and_crop(decode(image, mode), 224)
        theirs = np.asarray(reference(image, return_tensors="np")["pixel_values"][0], float).transpose(1, 2, 0)
        off = np.abs(theirs - (ours if ours.ndim == 3 else ours[..., None]))
        assert off.mean() <= 1 and np.quantile(off, 0.999) <= 3, (width, height, off.mean(), off.max())


@pytest.mark.parametrize("size", [112, 32])
def test_pixels_of_pure_noise(size: int) -> None:
    """Catches height resized before width, as Pillow 13 does for some boxes: overshoot is then clipped elsewhere."""
    square = {"height": size, "width": size}
    reference = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, do_rescale=False, do_normalize=False)
    for width, height in SIZES:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))
        theirs = np.asarray(reference(noise, return_tensors="np")["pixel_values"][0, 0], float)
        off = np.abs(theirs - resize_and_crop(noise, size))
        assert off.mean() <= 0.2 and off.max() <= 3, (width, height, off.mean(), off.max())


@pytest.mark.parametrize(("width", "height"), [(200_000, 1), (1, 200_000), (30_000, 40), (40, 30_000)])
def test_long_strips_cost_no_memory(width: int, height: int) -> None:
    """Catches resizing before cropping: 200,000 x 1 at 224 pixels would be 200,000 * 224 * 224 = 10 GB."""
    resource = pytest.importorskip("resource")  # not on Windows
    image = Image.new("L", (width, height), 90)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    square = resize_and_crop(image, 224)
    assert (square == 90).all()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 100_000  # kB


def test_the_middle_of_a_strip_survives() -> None:
    """Catches a crop from the left or the top of an image that is not square."""
    strip = np.zeros((40, 30_000), np.uint8)
    strip[:, 14_980:15_020] = 255
    assert resize_and_crop(Image.fromarray(strip), 20).mean() > 250
    assert resize_and_crop(Image.fromarray(strip.T), 20).mean() > 250
