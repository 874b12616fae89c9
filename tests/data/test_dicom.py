"""The grey levels of DICOM files, which the tests write with pydicom."""

import hashlib
import io
import sys
from typing import Any

import numpy as np
import pytest

from clip_medical.data.images import UnreadableImage, decode, resize_and_crop
from clip_medical.errors import UserError

pydicom = pytest.importorskip("pydicom")


def dicom(pixels: np.ndarray, **tags: Any) -> bytes:
    """Return a Secondary Capture file with these stored values, (H, W), (frames, H, W) or, for RGB, (H, W, 3)."""
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


def grey_levels(pixels: np.ndarray, **tags: Any) -> list[Any]:
    return list(np.asarray(decode(dicom(pixels, **tags), "scan 17")).tolist())


def test_colours_of_a_palette_are_looked_up() -> None:
    """Catches the numbers of a palette shown as grey levels: Doppler and nuclear images."""
    index, colours = np.array([[0, 1], [2, 3]], np.uint8), [(255, 0, 0), (0, 0, 0), (10, 200, 10), (128, 128, 128)]
    tags: dict[str, Any] = {"PhotometricInterpretation": "PALETTE COLOR"}
    for channel, name in enumerate(("Red", "Green", "Blue")):
        table = np.zeros(256, np.uint16)
        table[:4] = np.array([colour[channel] for colour in colours]) * 257
        tags[f"{name}PaletteColorLookupTableDescriptor"] = [256, 0, 16]
        tags[f"{name}PaletteColorLookupTableData"] = table.tobytes()
    assert np.asarray(decode(dicom(index, **tags), "x")).reshape(4, 3).tolist() == [list(colour) for colour in colours]


@pytest.mark.parametrize("start", [132, "dataset"])
def test_an_old_file_without_a_preamble(start: int | str) -> None:
    """Catches files of old scanners refused as of no known format."""
    pixels = np.arange(16, dtype=np.uint8).reshape(4, 4) * 17
    data = dicom(pixels)
    if start == "dataset":  # without the header of the file either
        start = data.index(b"\x08\x00\x16\x00UI")
    assert np.array_equal(np.asarray(decode(data[int(start) :], "old")), pixels)


def test_a_missing_decoder_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches images recorded as unreadable for good because a package is not installed yet."""
    from pydicom.encaps import encapsulate
    from pydicom.pixels import decoders
    from pydicom.uid import JPEGLSLossless

    dataset = pydicom.dcmread(io.BytesIO(dicom(np.zeros((8, 8), np.uint8))))
    dataset.file_meta.TransferSyntaxUID = JPEGLSLossless
    dataset.PixelData = encapsulate([b"\xff\xd8\xff\xf7" + b"\0" * 60])
    dataset["PixelData"].is_undefined_length = True
    buffer = io.BytesIO()
    dataset.save_as(buffer)
    monkeypatch.setattr(vars(decoders)["JPEGLSLosslessDecoder"], "_available", {})
    with pytest.raises(UserError, match="JPEG-LS.*pip install pylibjpeg") as caught:
        decode(buffer.getvalue(), "scan")
    assert not isinstance(caught.value, UnreadableImage)


STORED = np.array([[0, 864, 1064, 1264, 4000]], np.int16)  # with the intercept -1024: air, -160, 40, 240, metal
CT = dict(RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)


def test_the_window_applies_to_rescaled_values() -> None:
    """Catches a window applied before the rescale, and an output range taken from the image, not the window."""
    assert grey_levels(STORED, **CT) == [[0, 0, 128, 255, 255]]
    assert grey_levels(STORED[:, :3], **CT) == [[0, 0, 128]]
    assert grey_levels(STORED, **CT | {"WindowCenter": [40, 500], "WindowWidth": [400, 90]}) == [[0, 0, 128, 255, 255]]


def test_without_a_window_the_full_range_is_mapped() -> None:
    """Catches 16-bit values clipped at 255, and a division by zero for a constant image."""
    assert grey_levels(np.array([[1000, 2000, 3000]], np.uint16)) == [[0, 128, 255]]
    assert grey_levels(np.full((2, 2), 700, np.uint16)) == [[0, 0], [0, 0]]


def test_a_lookup_table_takes_precedence_over_a_window() -> None:
    """Catches an ignored VOI LUT, or one scaled by the values that occur in the image."""
    from pydicom.dataset import Dataset

    table = Dataset()
    table.LUTDescriptor, table.LUTData = [4, 0, 16], (np.array([0, 10, 100, 200], np.uint16) * 257).tobytes()
    stored = np.array([[0, 1, 2, 3]], np.uint16)
    assert grey_levels(stored, VOILUTSequence=[table], WindowCenter=1, WindowWidth=2) == [[0, 10, 100, 200]]


def test_monochrome1_is_inverted() -> None:
    """Catches negatives, that is X-rays with white air."""
    assert grey_levels(STORED, **CT, PhotometricInterpretation="MONOCHROME1") == [[255, 255, 127, 0, 0]]


def test_the_middle_of_several_frames_is_decoded() -> None:
    """Catches a volume represented by the air at its end, and a whole volume decoded as one image."""
    frames = np.stack([np.full((2, 3), value, np.uint8) for value in (0, 10, 90, 20)])
    frames[:, 0, 0] = 255
    assert grey_levels(frames, WindowCenter=128, WindowWidth=256)[1][1] == 90


def test_colours_are_unchanged() -> None:
    """Catches Doppler ultrasound decoded to grey, or with its channels interchanged."""
    colours = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    assert grey_levels(colours, PhotometricInterpretation="RGB") == colours.tolist()


def test_errors_name_a_damaged_file() -> None:
    """Catches a traceback from pydicom, for a file truncated at any place."""
    complete = dicom(np.arange(600, dtype=np.uint16).reshape(20, 30))
    for end in (133, 200, 400, len(complete) - 600, len(complete) - 2):
        with pytest.raises(UnreadableImage, match="Image scan 17 cannot be read: "):
            decode(complete[:end], "scan 17")


def test_without_pydicom_the_error_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError, and a DICOM file that counts as damaged: the cache would leave it out for good."""
    monkeypatch.setitem(sys.modules, "pydicom", None)
    with pytest.raises(UserError, match=r"scan 17.*DICOM.*pip install 'clip-medical-lora\[dicom\]'") as caught:
        decode(dicom(STORED), "scan 17")
    assert not isinstance(caught.value, UnreadableImage)


def test_pixels_change_only_together_with_the_format_of_the_cache() -> None:
    """Catches a change of decoding that leaves existing caches in use, with the pixels of older code."""
    stored = (np.arange(1200) ** 2 // 7 % 4096).astype(np.int16).reshape(30, 40)
    square = resize_and_crop(decode(dicom(stored, **CT), "CT"), 32)
    digest = hashlib.sha256(square.tobytes()).hexdigest()[:16]
    assert digest == "6c75ce3b4934b343", (
        "pixels changed: raise FORMAT in clip_medical/data/cache.py, record the new hash"
    )
