"""Captions cut to a few words in a row, so that the text tower learns to read labels and queries as well.

Captions are sentences; what a user types, and what zero-shot classification asks, is "chest CT". Radford et al. (2021)
and Zhang et al. (2020, ConVIRT, section 3.2) show the text tower a sentence of the text at random; a caption has only
one or two of those, so a run of words takes their place.
"""

import numpy as np
import torch
from torch import Tensor

LONGEST = 10  # tokens of a fragment


def fragments(tokens: Tensor, lengths: Tensor, seed: int, epoch: int, number: int = 0) -> tuple[Tensor, Tensor]:
    """Of captions, token ids (N, L) and their lengths (N,), a fragment each: the one of this number in this epoch.

    A fragment is 1 to LONGEST tokens in a row between the start and the end token of its caption. It is decided by
    (seed, epoch, number) alone, so that a resumed run reads what the undisturbed one would have read.
    """
    random = torch.from_numpy(np.random.default_rng((seed, epoch, 1 + number)).random((2, len(tokens))))
    inner = lengths - 2
    first = (random[0] * inner).long()
    count = torch.minimum(1 + (random[1] * LONGEST).long(), inner - first)[:, None]
    column = torch.arange(tokens.shape[1])
    source = torch.where(column == 0, 0, (column + first[:, None]).clamp(max=tokens.shape[1] - 1))
    end = tokens.gather(1, lengths[:, None] - 1)
    return torch.where(column <= count, tokens.gather(1, source), end), count[:, 0] + 2
