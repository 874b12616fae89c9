"""Training pictures turned, shifted and enlarged a little, anew in every epoch.

Never mirrored: a heart on the right, or the finding on the other side, is another diagnosis. Never recoloured: grey
levels are tissue.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

DEGREES = 7.5  # turned at most so far, either way
SMALLEST = 0.9  # share of the picture's side that is left at least


def draw_views(count: int, seed: int, epoch: int) -> Tensor:
    """(count, 4), each even in [0, 1): the angle, the size, and the place across and down of each row's view.

    Decided by (seed, epoch) and the row alone, so that a resumed run, the second pass of a chunked step and each of
    several processes see the same pixels; no generator of torch is touched.
    """
    # (seed, epoch, 1), (seed, epoch, 2), ... draw the fragments; NumPy takes (seed, epoch, 0) for (seed, epoch)
    return torch.from_numpy(np.random.default_rng((seed, epoch, 0, 1)).random((count, 4)))


def augment(pixels: Tensor, views: Tensor) -> Tensor:
    """(n, 3, S, S) uint8 and the (n, 4) views of these n pictures -> (n, 3, S, S) uint8, on the device of `pixels`.

    A random square of the picture, turned and brought to full size, in one interpolation. What a turned corner shows
    from beyond the picture is black, as air is.
    """
    seen = []
    for picture, (angle, side, across, down) in zip(pixels, views.tolist(), strict=True):
        scale = 1 / (SMALLEST + (1 - SMALLEST) * side)
        margin = (scale - 1) * pixels.shape[-1]  # by which the enlarged picture is wider than what is seen
        turn, shift = DEGREES * (2 * angle - 1), [margin * (across - 0.5), margin * (down - 0.5)]
        seen.append(functional.affine(picture, turn, shift, scale, [0.0, 0.0], InterpolationMode.BILINEAR))
    return torch.stack(seen)
