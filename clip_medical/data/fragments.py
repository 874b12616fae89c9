"""Cut captions to short runs of words, so that the text encoder also learns labels and short queries.

Captions are sentences, while search queries and zero-shot prompts are as short as "chest CT". Radford et al. (2021) and
Zhang et al. (2020, ConVIRT, section 3.2) train on a random sentence of each text. Captions have only one or two
sentences, so a run of words replaces the sentence. It is taken from the first words, as in "Chest CT of a 64-year-old
woman with fever and a history of travel, ...": they describe the image, and later words often describe the patient.
"""

import numpy as np
import torch
from torch import Tensor

FIRST = 8  # number of words at the start of a caption from which fragments are taken
LONGEST = 6  # maximum number of words in a fragment


def fragments(
    tokens: Tensor, lengths: Tensor, ends_word: Tensor | None, seed: int, epoch: int, number: int = 0
) -> tuple[Tensor, Tensor]:
    """Cut each caption to a random run of 1 to LONGEST of its FIRST words, between its start and end token.

    tokens: (N, L) token ids. lengths: (N,) including start and end token. ends_word: (V,) bool, whether a word ends
    with this token of the vocabulary; None means that each token is a word. CLIP's tokenizer counts each digit and
    punctuation mark as a word. The last word of a truncated caption ends where the caption does.
    Returns tokens (N, L), padded with the end token, and lengths (N,). The result depends only on the captions and
    (seed, epoch, number), so that resumed runs get the same fragments; `number` distinguishes fragments of one epoch.
    """
    random = torch.from_numpy(np.random.default_rng((seed, epoch, 1 + number)).random((2, len(tokens))))
    column = torch.arange(tokens.shape[1])
    inner = (column > 0) & (column < lengths[:, None] - 1)
    word_end = (inner if ends_word is None else inner & ends_word[tokens]).long()
    word = word_end.cumsum(dim=1) - word_end  # (N, L) index of the word that each token belongs to
    words = torch.where(inner, word + 1, 0).amax(dim=1).clamp(max=FIRST)
    count = torch.minimum(1 + (random[0] * LONGEST).long(), words)
    first = (random[1] * (words - count + 1)).long()
    selected = (column == 0) | (inner & (word >= first[:, None]) & (word < (first + count)[:, None]))
    size = selected.sum(dim=1)
    fragment = tokens.gather(1, lengths[:, None] - 1).repeat(1, len(column))  # end tokens
    fragment[column < size[:, None]] = tokens[selected]
    return fragment, size + 1
