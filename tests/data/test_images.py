"""`decode` on the kinds of files that radiology uses, and `resize_and_crop` against CLIP's own image processors."""

import hashlib
import io
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms
from transformers import CLIPImageProcessor
from transformers.models import clip

from clip_medical.data import images
from clip_medical.data.images import UnreadableImage, decode, resize_and_crop
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


# ---- decode: correct pixels


def test_path_bytes_dictionary_and_image_give_the_same_pixels(tmp_path: Path) -> None:
    """Catches a type of source that is decoded differently, or a {"bytes": None} whose path is ignored."""
    data, path = encoded(Image.fromarray(GREY)), tmp_path / "x.png"
    path.write_bytes(data)
    sources = [data, path, Image.open(path), {"bytes": data, "path": None}, {"bytes": None, "path": str(path)}]
    for source in sources:
        np.testing.assert_array_equal(pixels(source), GREY)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_applied_once(orientation: int) -> None:
    """Catches an image that stays rotated, or one rotated twice because it keeps its orientation tag."""
    upright = {1: GREY, 2: GREY[:, ::-1], 3: GREY[::-1, ::-1], 4: GREY[::-1], 5: GREY.T, 6: np.rot90(GREY, -1),
               7: GREY[::-1, ::-1].T, 8: np.rot90(GREY)}  # fmt: skip
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "TIFF"):
        image = decode(encoded(Image.fromarray(GREY), format, exif=exif), "x")
        np.testing.assert_array_equal(np.asarray(image), upright[orientation])
        np.testing.assert_array_equal(pixels(image), upright[orientation])


def test_an_image_with_damaged_exif_is_decoded() -> None:
    """Catches an intact image that is refused because Pillow raises on its EXIF data."""
    data = encoded(Image.fromarray(GREY), exif=b"Exif\0\0not a tiff header")
    np.testing.assert_array_equal(pixels(data), GREY)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_wide_pixels_are_scaled_and_not_clipped(dtype: str) -> None:
    """Catches Pillow's convert("L"), which turns every value above 255 white."""
    wide = (np.linspace(1000, 41000, 600).reshape(20, 30)).astype(dtype)
    expected = np.rint((wide.astype(float) - wide.min()) / (int(wide.max()) - int(wide.min())) * 255)
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(wide), "TIFF")), expected)
    if dtype == "uint16":
        np.testing.assert_array_equal(pixels(encoded(Image.fromarray(wide), "PNG")), expected)
        big = Image.frombytes("I;16B", (30, 20), wide.astype(">u2").tobytes())
        np.testing.assert_array_equal(pixels(big), expected)  # big-endian


@pytest.mark.parametrize("dtype", ["uint16", "int32", "float32"])
def test_eight_bit_values_in_a_wide_file_are_unchanged(dtype: str) -> None:
    """Catches a dark 8-bit scan stretched to full contrast because its file has wide pixels."""
    np.testing.assert_array_equal(pixels(Image.fromarray((GREY // 3).astype(dtype))), GREY // 3)


def test_fractions_are_stretched() -> None:
    """Catches a float image from 0 to 1, or a mask of 0 and 1, treated as 8-bit data and so almost black."""
    assert pixels(Image.fromarray(np.eye(2, dtype=np.float32))).tolist() == [[255, 0], [0, 255]]
    image = pixels(Image.fromarray(GREY.astype(np.float32) / 255))
    np.testing.assert_array_equal(image, np.rint((GREY - GREY.min()) / np.ptp(GREY).astype(float) * 255))


def test_nan_and_infinity_are_black() -> None:
    """Catches NaN that spreads over the whole image through min() and max(), or infinity that turns it black."""
    wide = np.array([[np.nan, np.inf, -np.inf], [-100, 0, 100]], np.float32)
    np.testing.assert_array_equal(pixels(Image.fromarray(wide)), [[0, 0, 0], [0, 128, 255]])
    assert pixels(Image.fromarray(np.full((2, 2), np.nan, np.float32))).max() == 0


@pytest.mark.filterwarnings("error")
def test_constant_wide_image_is_black() -> None:
    """Catches a division by zero if all pixels are equal."""
    assert pixels(Image.fromarray(np.full((4, 4), 5000, np.uint16))).max() == 0


@pytest.mark.parametrize("hidden", [255, 77])
def test_transparent_pixels_are_black(hidden: int) -> None:
    """Catches convert("RGB"), which drops alpha and shows the colour stored under transparent pixels."""
    alpha = np.zeros((20, 30), np.uint8)
    alpha[5:15] = 255
    colour = np.where(alpha[..., None] > 0, COLOUR, hidden).astype(np.uint8)
    rgba = Image.fromarray(np.dstack([colour, alpha]))
    np.testing.assert_array_equal(pixels(encoded(rgba)), np.where(alpha[..., None] > 0, COLOUR, 0))
    grey = np.where(alpha > 0, GREY, hidden).astype(np.uint8)
    both = Image.merge("LA", [Image.fromarray(grey), Image.fromarray(alpha)])
    np.testing.assert_array_equal(pixels(encoded(both)), np.where(alpha > 0, GREY, 0))


def test_half_transparent_pixels_are_half_as_bright() -> None:
    """Catches alpha treated as binary."""
    rgba = Image.new("RGBA", (4, 4), (200, 100, 50, 128))
    np.testing.assert_allclose(pixels(rgba)[0, 0], [100, 50, 25], atol=1)


def test_palettes_are_looked_up() -> None:
    """Catches palette indices used as grey levels, and a visible transparent entry of a palette or a grey PNG."""
    grey = Image.fromarray(np.arange(4, dtype=np.uint8).reshape(2, 2))
    image = Image.new("P", (2, 2))
    image.putdata(list(range(4)))
    image.putpalette([9, 9, 9, 200, 200, 200, 50, 50, 50, 255, 255, 255])
    assert pixels(encoded(image)).tolist() == [[9, 200], [50, 255]]  # grey palette: mode "L"
    assert pixels(encoded(image, transparency=3)).tolist() == [[9, 200], [50, 0]]
    assert pixels(encoded(grey, transparency=3)).tolist() == [[0, 1], [2, 0]]
    image.putpalette([255, 0, 0, 200, 200, 200, 50, 50, 50, 255, 255, 255])
    assert pixels(encoded(image))[0, 0].tolist() == [255, 0, 0]


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB", "RGBX"])
def test_every_mode_keeps_its_colours(mode: str) -> None:
    """Catches a mode that raises, or whose colours are inverted or shifted."""
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
    """Catches a CMYK JPEG that becomes a negative because Adobe's inversion is undone twice or not at all."""
    image = Image.new("RGB", (16, 16), (200, 120, 40)).convert("CMYK")
    np.testing.assert_allclose(pixels(encoded(image, "JPEG", quality=100))[8, 8], [200, 120, 40], atol=4)


def test_three_equal_channels_become_one() -> None:
    """Catches three times the work for a grey image, and a colour image that loses its colours."""
    assert decode(encoded(Image.fromarray(GREY).convert("RGB")), "x").mode == "L"
    nearly = np.repeat(GREY[..., None], 3, axis=2)
    nearly[-1, -1, 2] ^= 1
    np.testing.assert_array_equal(pixels(encoded(Image.fromarray(nearly))), nearly)


def test_the_first_of_several_frames_is_decoded() -> None:
    """Catches a cine loop of which another frame is decoded."""
    frames = [Image.new("L", (8, 8), level) for level in (10, 90, 170)]
    for format in ("GIF", "TIFF", "PNG"):
        data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
        assert pixels(data)[0, 0] == 10


# ---- decode: refusals


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not recognize"),
        (encoded(Image.fromarray(COLOUR), "PNG")[:-900], "truncated"),
        (encoded(Image.fromarray(COLOUR), "JPEG")[:-300], "truncated"),
        (encoded(Image.fromarray(COLOUR), "PNG")[:60] + b"\xff" * 600, "."),
        ({"bytes": None, "path": None}, "empty"),
        (Image.new("L", (0, 5)), "0 x 5"),
    ],
)
def test_errors_name_the_unreadable_image(data: Any, reason: str) -> None:
    """Catches a traceback from Pillow, and a truncated image that counts as complete."""
    with pytest.raises(UnreadableImage, match=f"(?s)^Image scan 17.*{reason}"):
        decode(data, "scan 17")


def test_the_error_names_a_missing_file(tmp_path: Path) -> None:
    """Catches a FileNotFoundError that escapes, or a message without name and reason."""
    with pytest.raises(UnreadableImage, match="scan 17 cannot be read: No such file"):
        decode(tmp_path / "gone.png", "scan 17")


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_any_damage_raises_unreadable_image() -> None:
    """Catches exceptions of Pillow's readers other than OSError (struct.error, SyntaxError, ValueError, ...)."""
    rng = np.random.default_rng(0)
    for format in ("PNG", "JPEG", "TIFF", "GIF", "BMP"):
        data = np.frombuffer(encoded(Image.fromarray(COLOUR), format), np.uint8)
        for _ in range(40):
            damaged = data.copy()
            damaged[rng.integers(0, min(200, len(data)), 4)] = rng.integers(0, 256, 4)
            try:
                assert decode(damaged.tobytes(), "x").mode in ("L", "RGB")
            except UnreadableImage:
                pass


@pytest.mark.filterwarnings("error")
def test_large_radiographs_pass_and_bombs_do_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a mammogram refused because of Pillow's warning, and a disabled limit against decompression bombs."""
    # A copy of the module installs its filter again, above the one that turns warnings into errors in this test.
    decode_copy = runpy.run_path(images.__file__)["decode"]
    data = encoded(Image.fromarray(GREY))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size - 1)
    assert decode_copy(data, "x").size == (30, 20)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", GREY.size // 2 - 1)
    with pytest.raises(UserError, match="(?i)decompression bomb"):
        decode_copy(data, "x")


# ---- resize_and_crop


def radiograph(width: int, height: int, colour: bool) -> Image.Image:
    """Return smooth tissue, hard edges, a grid of fine lines and noise, which reveal a misplaced filter."""
    rng = np.random.default_rng(width * 1000 + height)
    y, x = np.mgrid[:height, :width]
    tissue, edges, noise = np.sin(x / 17) * np.cos(y / 11), (x // 9 + y // 7) % 2, rng.normal(0, 12, (height, width))
    image = 120 + 60 * tissue + 60 * edges + noise
    channels = np.stack([image, np.roll(image, 5, 1), 255 - image], axis=-1) if colour else image
    return Image.fromarray(np.clip(channels, 0, 255).astype(np.uint8))


# of the versions of transformers, each has two of these
NAMES = ("CLIPImageProcessor", "CLIPImageProcessorPil", "CLIPImageProcessorFast")
PROCESSORS = [getattr(clip, name) for name in NAMES if hasattr(clip, name)]
SIZES = [(224, 224), (300, 200), (200, 301), (113, 112), (97, 89), (31, 57), (1, 1), (3, 400), (400, 3), (111, 333),
         (641, 479), (479, 641), (1000, 90)]  # fmt: skip


@pytest.mark.parametrize("size", [112, 45])
@pytest.mark.parametrize("colour", [False, True])
@pytest.mark.parametrize("processor", PROCESSORS)
def test_pixels_match_clips_processors(size: int, colour: bool, processor: Any) -> None:
    """Catches a crop off by one pixel, another filter, missing antialiasing, a filter truncated at the crop's edge."""
    square = {"height": size, "width": size}
    reference = processor(size={"shortest_edge": size}, crop_size=square, do_rescale=False, do_normalize=False)
    for width, height in SIZES:
        image = radiograph(width, height, colour)
        ours = resize_and_crop(image, size)
        assert ours.dtype == np.uint8 and ours.shape == ((size, size, 3) if colour else (size, size))
        theirs = np.asarray(reference(image, return_tensors="np")["pixel_values"][0], float).transpose(1, 2, 0)
        error = np.abs(theirs - (ours if colour else ours[..., None]))
        assert error.mean() <= 1 and np.quantile(error, 0.999) <= 3, (width, height, error.mean(), error.max())


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr", "HSV", "I", "F", "I;16"])
def test_pixels_of_every_mode_match_clips_processor(mode: str) -> None:
    """Catches a mode decoded to other colours than CLIP's processor gives. All images are opaque with 8-bit values:
    transparent and wider ones differ on purpose, as CLIPImageProcessor shows hidden colours and clips at 255."""
    reference = CLIPImageProcessor(do_rescale=False, do_normalize=False)
    for width, height in [(301, 223), (97, 640), (31, 57)]:
        image = radiograph(width, height, colour=True)
        image = (image.convert("L").convert("I") if mode in ("F", "I;16") else image).convert(mode)
        ours = resize_and_crop(decode(image, mode), 224)
        theirs = np.asarray(reference(image, return_tensors="np")["pixel_values"][0], float).transpose(1, 2, 0)
        error = np.abs(theirs - (ours if ours.ndim == 3 else ours[..., None]))
        assert error.mean() <= 1 and np.quantile(error, 0.999) <= 3, (width, height, error.mean(), error.max())


@pytest.mark.parametrize("size", [112, 32])
def test_pixels_of_noise_match_clips_processor(size: int) -> None:
    """Catches height resized before width, as Pillow 13 does for some boxes: other pixels are then clipped."""
    square = {"height": size, "width": size}
    reference = CLIPImageProcessor(size={"shortest_edge": size}, crop_size=square, do_rescale=False, do_normalize=False)
    for width, height in SIZES:
        noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width), dtype=np.uint8))
        theirs = np.asarray(reference(noise, return_tensors="np")["pixel_values"][0, 0], float)
        error = np.abs(theirs - resize_and_crop(noise, size))
        assert error.mean() <= 0.2 and error.max() <= 3, (width, height, error.mean(), error.max())


@pytest.mark.parametrize(("width", "height"), [(200_000, 1), (1, 200_000), (30_000, 40), (40, 30_000)])
def test_long_strips_need_little_memory(width: int, height: int) -> None:
    """Catches resizing before cropping: 200,000 x 1 pixels would become 200,000 * 224 * 224 bytes = 10 GB."""
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


# ---- recorded hashes


def pattern(*shape: int, levels: int = 256) -> np.ndarray:
    """Return integers that depend on the indices alone, so that no random generator or codec can change them."""
    index = np.arange(np.prod(shape), dtype=np.int64)
    return (index * index // 7 % levels).reshape(shape)


def fixed_images() -> dict[str, bytes]:
    """Return one small lossless file for each path through `decode`."""
    grey, colour = (Image.fromarray(pattern(*shape).astype(np.uint8)) for shape in ((41, 60), (50, 37, 3)))
    palette = Image.fromarray(pattern(40, 40, levels=16).astype(np.uint8))
    palette.putpalette(pattern(16, 3).astype(np.uint8).tobytes())
    exif = Image.Exif()
    exif[0x0112] = 6  # orientation: rotated by 90 degrees
    return {
        "grey": encoded(grey),
        "RGB": encoded(colour),
        "16 bits": encoded(Image.fromarray(pattern(45, 30, levels=40_000).astype(np.uint16))),
        "palette with transparency": encoded(palette, transparency=3),
        "rotated by EXIF": encoded(grey, exif=exif),
    }


RECORDED = {  # the same with Pillow 10.1, 11.3, 12.0 and 13.0
    "grey": "ba028e393de757e7",
    "RGB": "951ec390b990e873",
    "16 bits": "892a6539c00702f3",
    "palette with transparency": "7dd9c2bada7c6885",
    "rotated by EXIF": "e740ecb2374bd48c",
}


@pytest.mark.parametrize("kind", RECORDED)
def test_pixels_change_only_together_with_the_format_of_the_cache(kind: str) -> None:
    """Catches a change of decoding or resizing that leaves existing caches in use, with the pixels of older code."""
    square = resize_and_crop(decode(fixed_images()[kind], kind), 32)
    digest = hashlib.sha256(square.tobytes()).hexdigest()[:16]
    assert digest == RECORDED[kind], "pixels changed: raise FORMAT in clip_medical/data/cache.py, record the new hash"
