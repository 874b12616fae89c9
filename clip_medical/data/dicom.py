"""Decode DICOM files to 8-bit pixels, with the rescaling and the window that a viewer applies.

Needs pydicom, an optional dependency: `pip install 'clip-medical-lora[dicom]'`.
"""

import io

import numpy as np
from PIL import Image


class MissingDecoder(Exception):
    """A compressed DICOM file whose decoder is not installed."""


def is_dicom(data: bytes) -> bool:
    """Whether a file is DICOM: with the preamble of PS3.10, section 7.1, or an old one that starts with its first tag.

    Such a file starts with an element of group 2 or 8: its numbers, and in most files the two letters of its type.
    """
    old = data[:2] in (b"\x02\0", b"\x08\0") and data[3:4] == b"\0"
    return data[128:132] == b"DICM" or old and (data[4:6].isupper() or data[6:8] == b"\0\0")


def read_dicom(data: bytes) -> Image.Image:
    """Decode a DICOM file to mode "L" or "RGB". Of several frames take the middle one, as volumes begin and end in air.

    The modality LUT (or rescale slope and intercept) maps stored values to units such as HU. The VOI LUT, the first
    window or else the range of the image maps these to grey levels. MONOCHROME1, in which 0 is white, is inverted.
    Raises ModuleNotFoundError without pydicom, MissingDecoder, and on a damaged file whatever pydicom raises.
    """
    import pydicom
    from pydicom.pixels.processing import apply_color_lut, apply_modality_lut, apply_voi_lut, apply_windowing
    from pydicom.pixels.utils import pixel_array

    dataset = pydicom.dcmread(io.BytesIO(data), force=data[128:132] != b"DICM")
    if "TransferSyntaxUID" not in dataset.file_meta:  # without a preamble there may be no header of the file either
        explicit = data[4:6].isupper()
        dataset.file_meta.TransferSyntaxUID = (
            pydicom.uid.ExplicitVRLittleEndian if explicit else pydicom.uid.ImplicitVRLittleEndian
        )
    frames = int(dataset.get("NumberOfFrames") or 1)
    try:
        stored = pixel_array(dataset, index=frames // 2)
    except RuntimeError as error:
        if "dependencies" not in str(error):
            raise
        compression = dataset.file_meta.TransferSyntaxUID.name
        raise MissingDecoder(
            f"its compression, {compression}, needs a decoder. "
            "Run pip install pylibjpeg pylibjpeg-libjpeg pylibjpeg-openjpeg."
        ) from error
    if dataset.PhotometricInterpretation == "PALETTE COLOR":
        colours = apply_color_lut(stored, dataset)
        return Image.fromarray((colours >> max(8 * colours.dtype.itemsize - 8, 0)).astype(np.uint8))
    if stored.ndim == 3:  # colour, which pixel_array has converted to RGB; colour images have no window
        return Image.fromarray((stored >> max(int(dataset.BitsStored) - 8, 0)).astype(np.uint8))
    units = apply_modality_lut(stored, dataset)
    values = apply_voi_lut(units, dataset).astype(np.float64)
    if dataset.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif "WindowCenter" in dataset:  # the output range of the window: its values far below and far above the window
        low, high = apply_windowing(np.array([-1e9, 1e9]), dataset)
    else:
        low, high = values.min(), values.max()
    grey = np.rint((values - low) / ((high - low) or 1.0) * 255).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey)
