"""Captions cut to a few words in a row, so that the text tower learns to read labels and queries as well.

Captions are sentences; what a user types, and what zero-shot classification asks, is "chest CT". Radford et al. (2021)
and Zhang et al. (2020, ConVIRT, section 3.2) show the text tower a sentence of the text at random; a caption has only
one or two of those, so a run of words takes their place.
"""

import numpy as np
import torch
from torch import Tensor

LONGEST = 10  # tokens of a fragment


def fragments(tokens: Tensor, lengths: Tensor, share: float, seed: int, epoch: int) -> tuple[Tensor, Tensor]:
    """Token ids (N, L) and lengths (N,) as an epoch reads them: about `share` of the captions cut, the others whole.

    A fragment is 1 to LONGEST tokens in a row between the start and the end token of its caption. It is decided by
    (seed, epoch) alone, so that a resumed run reads what the undisturbed one would have read.
    """
    random = torch.from_numpy(np.random.default_rng((seed, epoch, 1)).random((3, len(tokens))))
    inner = lengths - 2
    cut = (random[0] < share) & (inner > 0)
    first = torch.where(cut, (random[1] * inner).long(), 0)
    longest = 1 + (random[2] * LONGEST).long()
    count = torch.where(cut, torch.minimum(longest, inner - first), inner)[:, None]
    column = torch.arange(tokens.shape[1])
    source = torch.where(column == 0, 0, (column + first[:, None]).clamp(max=tokens.shape[1] - 1))
    end = tokens.gather(1, lengths[:, None] - 1)
    return torch.where(column <= count, tokens.gather(1, source), end), count[:, 0] + 2
