"""The occlusion map, on models whose evidence is known."""

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_medical import load_clip
from clip_medical.evaluation.evidence import occlusion


class Corner:
    """A model that looks at the brightness of the upper right corner only: the first text is "bright there"."""

    processor = load_clip().processor

    def scale(self, facet: str) -> float:
        return 10.0

    def image_features(self, pixels: Tensor) -> Tensor:
        bright = pixels[:, 0, :28, 84:].float().mean(dim=(1, 2)) / 255
        return torch.stack([bright, 1 - bright], dim=1)


@pytest.mark.parametrize(("first", "sign"), [([1.0, 0.0], 1), ([0.0, 1.0], -1)])
def test_the_evidence_is_where_the_model_looks(first: list[float], sign: int) -> None:
    """Catches a map that is transposed, upside down or of the wrong label."""
    pixels = np.zeros((112, 112), np.uint8)
    pixels[8:20, 92:104] = 255
    model: Any = Corner()
    evidence = sign * occlusion(model, Image.fromarray(pixels), torch.tensor([first, first[::-1]]))
    assert evidence.shape == (14, 14)
    row, column = divmod(int(evidence.argmax()), 14)
    assert row in (1, 2) and column in (11, 12)
    assert evidence[7:].abs().max() < 1e-6 and evidence[:, :7].abs().max() < 1e-6
