"""Decode image files of any kind to 8-bit pixels, then resize and crop them as CLIP's own image processor does.

Greyscale images stay in one channel (mode "L"), so that decoding, resizing and the cache handle a third of the data.
A change that alters pixels makes existing caches stale: raise FORMAT in cache.py with it.
"""

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from clip_medical.data.dicom import MissingDecoder, is_dicom, read_dicom
from clip_medical.errors import UserError

# Pillow warns above 89 megapixels and refuses above twice that. Large radiographs are legitimate, so only the refusal
# stays. The filter is global because warnings.catch_warnings() is not safe while several threads decode.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


IMAGE_SUFFIXES = {".png", ".jpg", ".jpeg", ".tif", ".tiff", ".bmp", ".webp", ".gif", ".dcm"}

# What is met under the name of an image: first bytes (after an offset) -> what it is, and what to do
OTHER_FORMATS = {
    (344, b"n+1\0"): "a NIfTI volume: export slices of it as PNG",
    (0, b"\x1f\x8b"): "a gzip file (NIfTI volumes are often packed so): unpack it, and export slices as PNG",
    (0, b"NRRD"): "an NRRD volume: export slices of it as PNG",
    (0, b"\x93NUMPY"): "a NumPy array: save it as PNG",
    (4, b"ftypheic"): "a HEIC photograph: convert it to JPEG",
    (4, b"ftypmif1"): "a HEIC photograph: convert it to JPEG",
    (4, b"ftyp"): "a video: export frames of it as PNG",
    (0, b"%PDF"): "a PDF: export its pages as PNG",
    (0, b"PK"): "a zip archive: unpack it",
    (0, b"version https://git-lfs"): "a Git LFS pointer: run git lfs pull",
    (0, b"<!DOCTYPE"): "a web page, as a failed download leaves it: download it again",
    (0, b"<html"): "a web page, as a failed download leaves it: download it again",
}


class UnreadableImage(UserError):
    """One image is damaged, missing or in an unknown format. A dataset can be used without a few of its images."""


def decode(source: Path | bytes | Image.Image | dict[str, Any], name: str) -> Image.Image:
    """Decode one complete image to 8 bits, mode "L" or "RGB", rotated upright by its EXIF orientation.

    source: a path, the bytes of a file, a PIL image, or {"bytes": ..., "path": ...} as Hugging Face datasets stores
    images. Of several frames the first is decoded (in DICOM the middle one). name: used in messages.
    Raises UnreadableImage for anything that is not an intact image below Pillow's size limit, and UserError for a DICOM
    file if pydicom is not installed.
    """
    try:
        if isinstance(source, dict):
            source = source.get("bytes") or (Path(source["path"]) if source.get("path") else b"")
        data = source.read_bytes() if isinstance(source, Path) else source
        if data == b"":
            raise ValueError("it is empty")
        if isinstance(data, bytes) and is_dicom(data):
            return read_dicom(data)
        image = Image.open(io.BytesIO(data)) if isinstance(data, bytes) else data
        image.load()
        if 0 in image.size:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        with contextlib.suppress(Exception):  # damaged EXIF data beside intact pixels are common
            image = ImageOps.exif_transpose(image)
        return _eight_bit(image)
    except ModuleNotFoundError as error:
        # Not UnreadableImage: the cache would record the image as unreadable, and keep that after pydicom is installed.
        raise UserError(
            f"Image {name} is a DICOM file, which needs pydicom. Run pip install 'clip-medical-lora[dicom]'."
        ) from error
    except MissingDecoder as error:
        raise UserError(f"Image {name}: {error}") from error
    except UnidentifiedImageError as error:
        start = data[:400] if isinstance(data, bytes) else b""
        known = (f"it is {what}" for (at, magic), what in OTHER_FORMATS.items() if start[at:].startswith(magic))
        reason = next(known, "Pillow does not recognize its format")
        raise UnreadableImage(f"Image {name} cannot be read: {reason}.") from error
    except Exception as error:  # on damaged files Pillow raises many types, from SyntaxError to struct.error
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UnreadableImage(f"Image {name} cannot be read: {reason}.") from error


def resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    """Resize the shorter side to `size` (bicubic) and crop the central square, as CLIPImageProcessor does.

    Equal to rounding: pixels differ by a grey level here and there, as they do between its torchvision and PIL forms.

    image: mode "L" or "RGB". Returns uint8, (size, size) for "L" and (size, size, 3) for "RGB".

    Only the cropped square is computed. Resizing first would turn a 20,000 x 1 strip into 20,000 * size columns.
    """
    width, height = image.size
    new_width, new_height = (size * side // min(width, height) for side in (width, height))
    x_scale, y_scale = width / new_width, height / new_height  # source pixels per output pixel
    left, top = (new_width - size) // 2 * x_scale, (new_height - size) // 2 * y_scale
    right, bottom = min(left + size * x_scale, width), min(top + size * y_scale, height)
    support = 2 * max(y_scale, 1) + 1  # rows beyond the box that the bicubic filter reads, plus one for rounding
    first, last = max(int(top - support), 0), min(int(bottom + support) + 1, height)
    rows = image.crop((0, first, width, last))
    # Width before height, in two calls: each call rounds and clips, so the order matters. In a single call Pillow 13
    # chooses the order by the shape of the box. `box` limits the output, and the filter still reads beyond it.
    rows = rows.resize((size, last - first), Image.Resampling.BICUBIC, box=(left, 0, right, last - first))
    return np.asarray(rows.resize((size, size), Image.Resampling.BICUBIC, box=(0, top - first, size, bottom - first)))


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits, floats: Pillow's convert("L") would clip them at 255
        return Image.fromarray(_stretch(np.asarray(image)))
    if image.has_transparency_data:
        # Transparent pixels show black, as air does. convert("RGB") would show the colours stored beneath them.
        rgba = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    if image.mode in ("1", "L"):
        return image.convert("L")
    image = image.convert("RGB")
    red, green, blue = (band.tobytes() for band in image.split())
    return image.getchannel(0) if red == green == blue else image


def _stretch(pixels: np.ndarray) -> np.ndarray:
    """Map (H, W) wide integers or floats to uint8: smallest finite value to 0, largest to 255, NaN and infinity to 0.

    No percentile window (say 0.5 to 99.5 %) is applied, because it would saturate small dense findings. Integer values
    with a maximum from 2 to 255 are 8-bit data in a wide file and stay unchanged. Other constant images become 0.
    """
    finite = np.isfinite(pixels)
    low, high = (float(f(pixels[finite])) if finite.any() else 0.0 for f in (np.min, np.max))
    values = np.where(finite, pixels, low).astype(np.float64)
    if 0 <= low and 1 < high <= 255 and (values == np.rint(values)).all():
        return values.astype(np.uint8)
    return np.rint((values - low) / ((high - low) or 1.0) * 255).astype(np.uint8)
