"""Any image file -> the 8-bit pixels that CLIP sees: grey ("L") where all is grey, else "RGB"."""

import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from clip_medical.data.dicom import is_dicom, read_dicom
from clip_medical.data.png import inflated
from clip_medical.errors import UserError

# Pillow warns above 89 megapixels and refuses above twice that. A large radiograph is no attack: the refusal is enough.
# Set once, here, as warnings.catch_warnings() is not safe where threads decode.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class UnreadableImage(UserError):
    """One image is damaged, missing or in no known format. A data set can do without a few of them."""


def decode(source: Path | bytes | Image.Image | dict[str, Any], name: str) -> Image.Image:
    """Read one whole image: mode "L" or "RGB", 8 bits, upright by its EXIF orientation, the first frame of several.

    source  a file, its bytes, a PIL image, or {"bytes": ..., "path": ...} as Hugging Face datasets stores images
    name    what an error message calls it
    Raises UnreadableImage, with the name and the reason, for whatever is not an intact image below Pillow's size limit.
    """
    try:
        if isinstance(source, dict):
            source = source.get("bytes") or (Path(source["path"]) if source.get("path") else b"")
        data = source.read_bytes() if isinstance(source, Path) else source
        if data == b"":
            raise ValueError("it is empty")
        if isinstance(data, bytes) and is_dicom(data):
            return read_dicom(data)
        image = Image.open(io.BytesIO(inflated(data))) if isinstance(data, bytes) else data
        image.load()
        if 0 in image.size:
            raise ValueError(f"it has {image.width} x {image.height} pixels")
        return _eight_bit(_upright(image))
    except Image.UnidentifiedImageError as error:
        raise UnreadableImage(f"image {name} cannot be read: it is in no image format that Pillow knows.") from error
    except Exception as error:  # on damaged files Pillow's readers raise anything from SyntaxError to struct.error
        reason = (getattr(error, "strerror", None) or str(error) or type(error).__name__).splitlines()[0].rstrip(".")
        raise UnreadableImage(f"image {name} cannot be read: {reason}.") from error


def resize_and_crop(image: Image.Image, size: int) -> np.ndarray:
    """CLIP's geometry and CLIPImageProcessor's pixels: shortest side to `size` (bicubic), then the centre square.

    image ("L" or "RGB") -> uint8, (size, size) for "L", (size, size, 3) for "RGB"

    Only what survives the crop is computed, else a 20000 x 1 strip would grow to 20000 * size columns first. `box`
    picks the columns, and the filter still sees beyond them. Width goes before height, in two calls: Pillow 13 picks
    the order by the shape of the box, and the order decides what is rounded and clipped in between.
    """
    width, height = image.size
    new_width, new_height = (size * side // min(width, height) for side in (width, height))
    x_scale, y_scale = width / new_width, height / new_height  # old pixels per new one
    left, top = (new_width - size) // 2 * x_scale, (new_height - size) // 2 * y_scale
    right, bottom = min(left + size * x_scale, width), min(top + size * y_scale, height)
    reach = 2 * max(y_scale, 1) + 1  # how far beyond the box the bicubic filter looks, and one more for rounding
    first, last = max(int(top - reach), 0), min(int(bottom + reach) + 1, height)
    rows = image.crop((0, first, width, last))
    rows = rows.resize((size, last - first), Image.Resampling.BICUBIC, box=(left, 0, right, last - first))
    return np.asarray(rows.resize((size, size), Image.Resampling.BICUBIC, box=(0, top - first, size, bottom - first)))


def _upright(image: Image.Image) -> Image.Image:
    try:
        turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
        return ImageOps.exif_transpose(image) if turned else image  # which would be copied, were it not asked first
    except Exception:  # sound pixels beside damaged EXIF data are common: such an image has no known orientation
        return image


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # 16 and 32 bits, floats: Pillow's convert("L") would clip them at 255
        return Image.fromarray(_stretch(np.asarray(image)))
    if image.has_transparency_data:  # outside the body is air, which is black; convert("RGB") would bring up whatever
        rgba = image.convert("RGBA")  # colour the file happens to keep under its transparent pixels
        image = Image.alpha_composite(Image.new("RGBA", rgba.size, "black"), rgba)
    if image.mode == "LAB":  # which convert() does not know in every Pillow
        lab, rgb = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
        image = ImageCms.profileToProfile(image, lab, rgb, outputMode="RGB") or image
    if image.mode in ("1", "L"):
        return image if image.mode == "L" else image.convert("L")
    image = image if image.mode == "RGB" else image.convert("RGB")
    red, green, blue = (band.tobytes() for band in image.split())
    return image.getchannel(0) if red == green == blue else image  # grey in disguise: a third of the work from here on


def _stretch(pixels: np.ndarray) -> np.ndarray:
    """(H, W) wide integers or floats -> uint8: smallest finite value to 0, largest to 255; NaN and infinity become 0.

    No window (say 0.5 to 99.5 %) is guessed: it would burn out small dense findings. Whole numbers that reach above 1
    and not above 255 are 8-bit data in a wide file and stay as they are. Any other constant image becomes 0.
    """
    finite = np.isfinite(pixels)
    low, high = (float(f(pixels[finite])) if finite.any() else 0.0 for f in (np.min, np.max))
    values = np.where(finite, pixels, low).astype(np.float64)
    if 0 <= low and 1 < high <= 255 and (values == np.rint(values)).all():
        return values.astype(np.uint8)
    return np.rint((values - low) / ((high - low) or 1.0) * 255).astype(np.uint8)
