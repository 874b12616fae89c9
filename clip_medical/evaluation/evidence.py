"""Where in an image the evidence for a label is, by occlusion (Zeiler and Fergus 2014, section 2.4).

One window of the image after another is replaced by its surroundings, blurred. Where the score of the label drops, the
window held evidence for it. That is a statement about this model, not about the patient: a model that is right for the
wrong reason has its evidence in the wrong place. It needs no access to the model, only as many forward passes as
windows.
"""

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageFilter
from torch import Tensor

from clip_medical.model import CAPTIONS, Clip


@torch.no_grad()
def occlusion(clip: Clip, image: Image.Image, texts: Tensor, windows: int = 14, width: int = 3) -> Tensor:
    """Return the evidence for the first of L texts over the others -> (windows, windows), rows from top to bottom.

    texts: (L, D) unit-length features, L of 2 or more. The image is cut into windows x windows cells. The value of a
    cell is the mean drop in log-odds, at clip's temperature, over the windows of `width` x `width` cells that cover it.
    """
    pixels = clip.processor.pixels(image)  # (3, S, S) uint8, as the model sees it
    size = pixels.shape[-1]
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    blurred = np.asarray(picture.filter(ImageFilter.GaussianBlur(size / 8))).transpose(2, 0, 1)
    edges, reach = np.linspace(0, size, windows + 1).round().astype(int), width // 2
    hidden = np.repeat(pixels[None], windows * windows + 1, axis=0)  # the last one stays whole
    spans = [(edges[max(0, i - reach)], edges[min(windows, i + reach + 1)]) for i in range(windows)]
    for cell in range(windows * windows):
        (top, bottom), (left, right) = spans[cell // windows], spans[cell % windows]
        hidden[cell, :, top:bottom, left:right] = blurred[:, top:bottom, left:right]
    features = torch.cat([clip.image_features(part).cpu() for part in torch.from_numpy(hidden).split(64)])
    logits = clip.scale(CAPTIONS) * features @ texts.T
    odds = logits[:, 0] - logits[:, 1:].logsumexp(dim=1)  # the last is that of the whole image
    drop = (odds[-1] - odds[:-1]).view(1, 1, windows, windows)
    return F.avg_pool2d(drop, width, 1, reach, count_include_pad=False)[0, 0]
