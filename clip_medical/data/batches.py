"""Pictures and captions as tensors, and the order in which training meets them."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from clip_medical.data.sources import Split
from clip_medical.model import Clip


@dataclass(frozen=True)
class Pairs:
    """N picture-caption pairs, decoded once and held in memory."""

    pixels: Tensor  # (N, 3, S, S) uint8
    tokens: Tensor  # (N, L) token ids, padded to the longest of all
    lengths: Tensor  # (N,) tokens of each caption, with its start and end token
    caption_ids: Tensor  # (N,) the same number where the caption is the same
    image_ids: Tensor  # (N,) the same number where the picture is the same

    def __len__(self) -> int:
        return len(self.tokens)


def prepare(split: Split, clip: Clip, name: str) -> Pairs:
    """Decode, resize and crop every picture of a split, on all cores, and tokenize its captions."""

    pixels = np.empty((len(split), 3, clip.image_size, clip.image_size), np.uint8)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        pictures = pool.map(lambda row: clip.picture(split.open_image(row)), range(len(split)))
        for row, made in enumerate(tqdm(pictures, total=len(split), desc=f"{name} images", unit="image", leave=False)):
            pixels[row] = made
    tokens, lengths = clip.tokens(split.captions)
    captions, images = _numbered(split.captions), _numbered([hash(picture.tobytes()) for picture in pixels])
    return Pairs(torch.from_numpy(pixels), tokens, lengths, captions, images)


def _numbered(values: list) -> Tensor:
    """(N,) int64: equal values get equal numbers."""
    numbers: dict = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def row_batches(count: int, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Row numbers of one batch after another, without end, beginning with batch number `start`.

    Each epoch is a new permutation drawn from (seed, epoch) alone, so any position can be found again after a stop.
    The rows left over when the batches do not fill an epoch sit that epoch out: a smaller batch has fewer negatives.
    """
    batches_per_epoch = count // batch_size
    for epoch in range(start // batches_per_epoch, 2**62):
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))
        first = start % batches_per_epoch if epoch == start // batches_per_epoch else 0
        yield from order[: batches_per_epoch * batch_size].split(batch_size)[first:]
