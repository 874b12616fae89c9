"""Captions cut to a few words in a row, so that the text tower learns to read labels and queries as well.

Captions are sentences; what a user types, and what zero-shot classification asks, is "chest CT". Radford et al. (2021)
and Zhang et al. (2020, ConVIRT, section 3.2) show the text tower a sentence of the text at random; a caption has only
one or two of those, so a run of words takes their place. It is one of the first words: "Chest CT of a 64-year-old woman
with fever and a history of travel, ..." says what the picture is before it says of whom, and what stands further back
would only teach that this one picture goes with "history of travel".
"""

import numpy as np
import torch
from torch import Tensor

FIRST = 8  # words of a caption that its fragments are taken from
LONGEST = 6  # words of a fragment


def fragments(
    tokens: Tensor, lengths: Tensor, ends_word: Tensor | None, seed: int, epoch: int, number: int = 0
) -> tuple[Tensor, Tensor]:
    """Of captions, token ids (N, L) and their lengths (N,), a fragment each: the one of this number in this epoch.

    A fragment is a run of 1 to LONGEST of the FIRST words of its caption, between its own start and end token. Words
    are the tokenizer's: CLIP's takes each digit and sign for one. ends_word (V,) bool: a word ends with this token of
    the vocabulary; None: with each; and with the last of a caption that was cut. The fragment is decided by (seed,
    epoch, number) alone, so that a resumed run reads what the undisturbed one would have read.
    """
    random = torch.from_numpy(np.random.default_rng((seed, epoch, 1 + number)).random((2, len(tokens))))
    column = torch.arange(tokens.shape[1])
    inner = (column > 0) & (column < lengths[:, None] - 1)
    ended = (inner if ends_word is None else inner & ends_word[tokens]).long()
    word = ended.cumsum(dim=1) - ended  # of each token, the number of its word in the caption
    words = torch.where(inner, word + 1, 0).amax(dim=1).clamp(max=FIRST)
    count = torch.minimum(1 + (random[0] * LONGEST).long(), words)
    first = (random[1] * (words - count + 1)).long()
    kept = inner & (word >= first[:, None]) & (word < (first + count)[:, None])
    start, size = kept.long().argmax(dim=1), kept.sum(dim=1)
    source = torch.where(column == 0, 0, (column + start[:, None] - 1).clamp(max=tokens.shape[1] - 1))
    end = tokens.gather(1, lengths[:, None] - 1)
    return torch.where(column <= size[:, None], tokens.gather(1, source), end), size + 2
