"""DICOM -> the 8-bit pixels that a radiologist would be shown.

Needs pydicom, an optional extra: `pip install 'clip-medical-lora[dicom]'`.
"""

import io

import numpy as np
from PIL import Image


def is_dicom(data: bytes) -> bool:
    """Whether these are the first bytes of a DICOM file (PS3.10: a preamble of 128 bytes, then DICM)."""
    return data[128:132] == b"DICM"


def read_dicom(data: bytes) -> Image.Image:
    """The image of a DICOM file, mode "L" or "RGB"; of several frames the middle one: a volume begins and ends in air.

    Stored values become the scanner's units (rescale slope and intercept, or modality LUT), then grey levels as the
    file wishes (VOI LUT or its first window; without one from the smallest value to the largest). MONOCHROME1, where
    0 is white, is inverted. Raises ValueError without pydicom, and whatever pydicom raises on a damaged file.
    """
    try:
        import pydicom
        from pydicom.pixels import apply_modality_lut, apply_voi_lut, apply_windowing, pixel_array
    except ImportError as error:
        raise ValueError("it is a DICOM file, to read which pip install 'clip-medical-lora[dicom]'") from error
    dataset = pydicom.dcmread(io.BytesIO(data))
    frames = int(dataset.get("NumberOfFrames") or 1)
    stored = pixel_array(dataset, index=frames // 2)
    if stored.ndim == 3:  # colour, which pixel_array has already turned into RGB; it has no window
        return Image.fromarray((stored >> max(int(dataset.BitsStored) - 8, 0)).astype(np.uint8))
    units = apply_modality_lut(stored, dataset)
    values = apply_voi_lut(units, dataset).astype(np.float64)
    if dataset.get("VOILUTSequence"):
        low, high = 0.0, 2.0 ** dataset.VOILUTSequence[0].LUTDescriptor[2] - 1
    elif "WindowCenter" in dataset:  # what the window makes of values far below and far above it
        low, high = apply_windowing(np.array([-1e9, 1e9]), dataset)
    else:
        low, high = values.min(), values.max()
    grey = np.rint((values - low) / ((high - low) or 1.0) * 255).clip(0, 255).astype(np.uint8)
    return Image.fromarray(255 - grey if dataset.PhotometricInterpretation == "MONOCHROME1" else grey)
