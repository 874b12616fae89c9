"""The pointing game: hits, misses and the chance level."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from clip_medical import load_clip
from clip_medical.data.synthetic.phantoms import phantom
from experiments import pointing
from experiments.pointing import Pointing


@pytest.mark.parametrize(("sign", "expected"), [(1, 1), (-1, 0)])
def test_a_maximum_in_the_finding_is_a_hit(monkeypatch: pytest.MonkeyPatch, sign: int, expected: int) -> None:
    """Catches rows taken for columns, twins of another patient, and a chance level that is not the size of the
    region."""
    seen = []

    def difference(clip: object, image: Image.Image, texts: Tensor, windows: int) -> Tensor:
        assert texts.shape == (2, 128)
        twin = next(
            phantom(0, "pointing", i, healthy=True).image for i in range(99) if phantom(0, "pointing", i).image == image
        )
        pixels = torch.from_numpy(np.abs(np.asarray(image, float) - np.asarray(twin, float)))
        seen.append(((F.avg_pool2d(pixels[None, None], 5, 1, 2) > 20).double().mean()).item())
        return sign * F.adaptive_avg_pool2d(pixels[None], (windows, windows))[0]

    monkeypatch.setattr(pointing, "occlusion", difference)
    report = Pointing(model="tiny-clip", limit=4).play(load_clip())["pointing game"]
    assert report["n"] == len(seen) == 4 and report["maximum in the finding"]["value"] == expected
    assert np.mean(seen) < report["maximum in the finding"]["chance"] < 0.5  # cells are coarser than pixels
