"""Helpers for the tests of exports: run the command, compare two models, edit a JSON file."""

import json
import sys
from pathlib import Path

import pytest
import torch

from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.export import __main__ as export
from clip_medical.export.onnx import PACKAGES
from clip_medical.model import Clip

LABELS = ["X-ray of the chest", "CT of the head", "MRI of the knee"]
IMAGES = [phantom(1, "validation", row).image for row in range(4)]


def command(*arguments: object) -> int:
    """Run `python -m clip_medical.export` with these arguments in this process and return its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export", *map(str, arguments)])
        return export.main()


def skip_if_not_installed(to: str) -> None:
    """Skip the test if the packages that this exporter needs are not installed."""
    for name in PACKAGES if to == "onnx" else ():
        pytest.importorskip(name)


def max_difference(a: Clip, b: Clip) -> float:
    """Return the largest difference of an image or text feature between two models."""
    features = [torch.cat([clip.encode_images(IMAGES), clip.encode_texts(LABELS)]) for clip in (a, b)]
    return (features[0] - features[1]).abs().max().item()


def edit(file: Path, **fields: object) -> None:
    """Replace fields of the object in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
