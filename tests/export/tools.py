"""What the tests of exports share: a command, pictures, labels, and how far two models are apart."""

import json
import sys
from pathlib import Path

import pytest
import torch

from clip_medical import export
from clip_medical.data.phantoms import phantom
from clip_medical.model import Clip

LABELS = ["X-ray of the chest", "CT of the head", "MRI of the knee"]
PICTURES = [phantom(1, "validation", row).image for row in range(4)]


def command(*arguments: object) -> int:
    """`python -m clip_medical.export` with these arguments, in this process; returns its exit code."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["export.py", *map(str, arguments)])
        return export.main()


def differ(a: Clip, b: Clip) -> float:
    """The largest difference of a feature, of pictures and of texts."""
    features = [torch.cat([clip.encode_images(PICTURES), clip.encode_texts(LABELS)]) for clip in (a, b)]
    return (features[0] - features[1]).abs().max().item()


def edit(file: Path, **fields: object) -> None:
    """Replace fields of the object in a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))
