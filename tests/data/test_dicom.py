"""DICOM files as pydicom writes them: the grey levels that a radiologist would be shown."""

import io
import sys
from typing import Any

import numpy as np
import pytest

from clip_medical.data.images import UnreadableImage, decode

pydicom = pytest.importorskip("pydicom")


def dicom(pixels: np.ndarray, **tags: Any) -> bytes:
    """A Secondary Capture file with these stored values (H, W), (frames, H, W) or, for RGB, (H, W, 3)."""
    from pydicom.dataset import Dataset, FileMetaDataset
    from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

    colour = tags.get("PhotometricInterpretation") == "RGB"
    dataset = Dataset()
    dataset.file_meta = FileMetaDataset()
    dataset.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    dataset.SOPClassUID = dataset.file_meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
    dataset.SOPInstanceUID = dataset.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset.Rows, dataset.Columns = pixels.shape[:2] if colour else pixels.shape[-2:]
    dataset.SamplesPerPixel = 3 if colour else 1
    dataset.PhotometricInterpretation = "MONOCHROME2"
    if colour:
        dataset.PlanarConfiguration = 0
    elif pixels.ndim == 3:
        dataset.NumberOfFrames = len(pixels)
    dataset.BitsAllocated = dataset.BitsStored = 8 * pixels.itemsize
    dataset.HighBit = dataset.BitsStored - 1
    dataset.PixelRepresentation = int(pixels.dtype.kind == "i")
    dataset.PixelData = pixels.tobytes()
    for name, value in tags.items():
        setattr(dataset, name, value)
    buffer = io.BytesIO()
    dataset.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def shown(pixels: np.ndarray, **tags: Any) -> list[Any]:
    return np.asarray(decode(dicom(pixels, **tags), "scan 17")).tolist()


STORED = np.array([[0, 864, 1064, 1264, 4000]], np.int16)  # with the intercept -1024: air, -160, 40, 240, metal
CT = dict(RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)


def test_the_window_is_in_the_units_of_the_scanner() -> None:
    """Catches stored values windowed before the rescale, and a range taken from the image and not from the window."""
    assert shown(STORED, **CT) == [[0, 0, 128, 255, 255]]
    assert shown(STORED[:, :3], **CT) == [[0, 0, 128]]
    assert shown(STORED, **CT | {"WindowCenter": [40, 500], "WindowWidth": [400, 90]}) == [[0, 0, 128, 255, 255]]


def test_without_a_window_from_the_darkest_to_the_lightest() -> None:
    """Catches 16 bits cut off at 255."""
    assert shown(np.array([[1000, 2000, 3000]], np.uint16)) == [[0, 128, 255]]
    assert shown(np.full((2, 2), 700, np.uint16)) == [[0, 0], [0, 0]]


def test_a_lookup_table_goes_before_a_window() -> None:
    """Catches a VOI LUT ignored, or scaled to what of it occurs in the image."""
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 16], (np.array([0, 10, 100, 200], np.uint16) * 257).tobytes()
    stored = np.array([[0, 1, 2, 3]], np.uint16)
    assert shown(stored, VOILUTSequence=[table], WindowCenter=1, WindowWidth=2) == [[0, 10, 100, 200]]


def test_monochrome1_is_inverted() -> None:
    """Catches negatives: an X-ray with white air."""
    inverted = [[255, 255, 127, 0, 0]]
    assert shown(STORED, **CT, PhotometricInterpretation="MONOCHROME1") == inverted


def test_the_middle_frame_of_several() -> None:
    """Catches a volume judged by the air at its end, and a whole volume taken for one image."""
    frames = np.stack([np.full((2, 3), value, np.uint8) for value in (0, 10, 90, 20)])
    frames[:, 0, 0] = 255
    assert shown(frames, WindowCenter=128, WindowWidth=256)[1][1] == 90


def test_colour_stays_colour() -> None:
    """Catches Doppler ultrasound in grey, or with its channels mixed up."""
    colours = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert shown(colours, PhotometricInterpretation="RGB") == colours.tolist()


def test_damaged_files_are_named() -> None:
    """Catches a traceback out of pydicom, for any place where a file can be cut off."""
    whole = dicom(np.arange(600, dtype=np.uint16).reshape(20, 30))
    for end in (133, 200, 400, len(whole) - 600, len(whole) - 2):
        with pytest.raises(UnreadableImage, match="image scan 17 cannot be read: "):
            decode(whole[:end], "scan 17")


def test_without_pydicom_the_sentence_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError out of an optional extra."""
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UnreadableImage, match=r"DICOM.*pip install 'clip-medical-lora\[dicom\]'"):
        decode(dicom(STORED), "scan 17")
