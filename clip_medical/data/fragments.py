"""Cut captions to short runs of words, so that the text encoder also learns labels and short queries.

Captions are sentences, while search queries and zero-shot prompts are as short as "chest CT". Radford et al. (2021) and
Zhang et al. (2020, ConVIRT, section 3.2) train on a random sentence of each text. Captions have only one or two
sentences, so a run of words replaces the sentence. It is taken from the first words, as in "Chest CT of a 64-year-old
woman with fever and a history of travel, ...": they describe the image, and later words often describe the patient.
Only the second fragment of a caption is taken from all of it, as findings often stand at its end.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

FIRST = 8  # number of words at the start of a caption from which fragments are taken
WHOLE = 1  # the fragment with this number is taken from the whole caption
LONGEST = 6  # maximum number of words in a fragment
# Before what they deny ("effusion is absent" is not understood), and where the vocabulary has them as one token: CLIP's
# has all, the tiny CLIP's has no, without and negative.
NEGATIONS = {"no", "not", "without", "negative", "absent", "absence"}
STOPS = {".", ";", ":", "but", "however"}  # these end what a negation refers to; a comma does not: "no mass, no cyst"


class WordTokens(NamedTuple):
    """What each token of a vocabulary is, (V,) bool each."""

    ends: Tensor  # a word ends with it
    negates: Tensor
    stops: Tensor


def word_tokens(vocabulary: Sequence[str]) -> WordTokens:
    """Classify the V tokens of CLIP's tokenizer, which marks the last token of a word with </w>."""
    words = [token.removesuffix("</w>") if token.endswith("</w>") else "" for token in vocabulary]
    masks = [[word != "" for word in words], *([word in of for word in words] for of in (NEGATIONS, STOPS))]
    return WordTokens(*map(torch.tensor, masks))


def fragments(
    tokens: Tensor, lengths: Tensor, kinds: WordTokens | None, seed: int, epoch: int, number: int = 0
) -> tuple[Tensor, Tensor]:
    """Cut each caption to a random run of 1 to LONGEST words, between its start and end token.

    It is taken from the FIRST words, with number WHOLE from all of them. A run that would begin after a negation, in
    the same sentence, begins with the negation: "no evidence of a fracture" never becomes "a fracture".

    tokens: (N, L) token ids. lengths: (N,) including start and end token. kinds: see WordTokens; None means that each
    token is a word. CLIP's tokenizer counts each digit and punctuation mark as a word. The last word of a truncated
    caption ends where the caption does.
    Returns tokens (N, L), padded with the end token, and lengths (N,). The result depends only on the captions and
    (seed, epoch, number), so that resumed runs get the same fragments; `number` distinguishes fragments of one epoch.
    """
    random = torch.from_numpy(np.random.default_rng((seed, epoch, 1 + number)).random((2, len(tokens))))
    column = torch.arange(tokens.shape[1])
    inner = (column > 0) & (column < lengths[:, None] - 1)
    word_end = (inner if kinds is None else inner & kinds.ends[tokens]).long()
    word = word_end.cumsum(dim=1) - word_end  # (N, L) index of the word that each token belongs to
    words = torch.where(inner, word + 1, 0).amax(dim=1).clamp(max=tokens.shape[1] if number == WHOLE else FIRST)
    count = torch.minimum(1 + (random[0] * LONGEST).long(), words)
    first = (random[1] * (words - count + 1)).long()
    last = first + count
    if kinds is not None:
        # the words from which the last negation and the last stop before each token come, -1: none
        negation, stop = (torch.where(mask[tokens], word, -1).cummax(dim=1).values for mask in kinds[1:])
        begin = torch.where(negation > stop, negation, word)
        first = torch.where(inner & (word == first[:, None]), begin, len(column)).amin(dim=1)
    selected = (column == 0) | (inner & (word >= first[:, None]) & (word < last[:, None]))
    size = selected.sum(dim=1)
    fragment = tokens.gather(1, lengths[:, None] - 1).repeat(1, len(column))  # end tokens
    fragment[column < size[:, None]] = tokens[selected]
    return fragment, size + 1
