"""Random rotation, shift and enlargement of training images, drawn anew in each epoch.

Images are never mirrored, because a heart on the right is a different diagnosis. Grey levels never change, because they
encode tissue.
"""

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms.v2 import InterpolationMode, functional

DEGREES = 7.5  # largest rotation, in either direction
SMALLEST = 0.9  # smallest side of the visible square, as a fraction of the image's side


def draw_views(count: int, seed: int, epoch: int) -> Tensor:
    """Draw the random view of each of `count` rows in one epoch.

    Returns (count, 4), uniform in [0, 1): rotation angle, side of the square, its horizontal and its vertical position.
    The values depend only on (seed, epoch) and the row, so that resumed runs and all ranks get the same pixels. The
    generators of torch are not used.
    """
    # The seeds (seed, epoch, 1), (seed, epoch, 2), ... belong to fragments.py, and NumPy treats (seed, epoch, 0) like
    # (seed, epoch), which orders the batches. A fourth number keeps all draws independent.
    return torch.from_numpy(np.random.default_rng((seed, epoch, 0, 1)).random((count, 4)))


def augment(pixels: Tensor, views: Tensor) -> Tensor:
    """Cut a rotated square out of each image and resize it to full size, with one bilinear interpolation.

    pixels: (n, 3, S, S) or (n, 1, S, S) uint8. views: the (n, 4) rows of `draw_views` for these images. Returns the
    shape, dtype and device of `pixels`. Corners that the rotation moves outside the image are black, as air is.
    """
    augmented = []
    for image, (angle, side, horizontal, vertical) in zip(pixels, views.tolist(), strict=True):
        scale = 1 / (SMALLEST + (1 - SMALLEST) * side)
        margin = (scale - 1) * pixels.shape[-1]  # pixels by which the enlarged image exceeds the visible square
        degrees, shift = DEGREES * (2 * angle - 1), [margin * (horizontal - 0.5), margin * (vertical - 0.5)]
        augmented.append(functional.affine(image, degrees, shift, scale, [0.0, 0.0], InterpolationMode.BILINEAR))
    return torch.stack(augmented)
