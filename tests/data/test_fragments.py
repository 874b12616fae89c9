"""Fragments of captions: what an epoch reads beside them."""

from itertools import islice

import pytest
import torch

from clip_medical.config import Config
from clip_medical.data.batches import Pairs, epochs
from clip_medical.data.fragments import LONGEST, fragments
from clip_medical.errors import UserError
from clip_medical.training.losses import same_rows

START, END = 1, 99
LENGTHS = torch.tensor([2, 3, 7, 30, 30])
TOKENS = torch.full((5, 30), END)
for row, length in enumerate(LENGTHS.tolist()):
    TOKENS[row, 0] = START
    TOKENS[row, 1 : length - 1] = torch.arange(10, 10 + length - 2)


def test_a_fragment_is_a_run_of_its_caption_between_start_and_end() -> None:
    """Catches a lost start or end token, words from the padding, gaps, and runs that are too long."""
    seen = set()
    for epoch in range(200):
        tokens, lengths = fragments(TOKENS, LENGTHS, 0, epoch)
        for row in range(len(TOKENS)):
            words = tokens[row, 1 : lengths[row] - 1].tolist()
            assert tokens[row, 0] == START and (tokens[row, lengths[row] - 1 :] == END).all()
            assert words == list(range(words[0], words[0] + len(words))) if words else LENGTHS[row] == 2
            assert not words or (words[0] >= 10 and words[-1] <= LENGTHS[row] + 7)
            assert len(words) <= LONGEST
        seen.add(tuple(tokens[3].tolist()))
    assert len(seen) > 100, "each epoch cuts anew"


def test_an_epoch_reads_captions_and_their_fragments() -> None:
    """Catches captions cut in place, an epoch cut anew half-way, one that a resumed run reads otherwise, fragments that
    are all the same, a weight that grows with their number, and a number of 0 that reads fragments all the same."""
    number = torch.arange(8)
    pairs = Pairs(torch.zeros(8, 3, 2, 2), TOKENS[3:4].repeat(8, 1), LENGTHS[3:4].repeat(8), number, number)
    config = Config(batch_size=4, fragments=3)
    steps = list(islice(epochs(pairs, number, config, 0), 4))
    cut = [read.fragments for read, _ in steps]
    for read, each in zip(steps, cut, strict=True):
        assert sum(one.weight for one in each) == pytest.approx(1)
        assert read[0].weight == 1 and read[0].tokens is pairs.tokens
        assert len({one.tokens.numpy().tobytes() for one in each}) == 3
    first, second, third, last = (each[1].tokens for each in cut)
    assert torch.equal(first, second) and torch.equal(third, last) and not torch.equal(second, third)
    resumed, rows = next(epochs(pairs, number, config, 3))
    assert torch.equal(resumed.fragments[1].tokens, last)
    assert torch.equal(rows, steps[3][1])
    assert next(epochs(pairs, number, Config(batch_size=4, fragments=0), 0))[0].fragments == ()


def test_equal_fragments_are_right_for_each_other() -> None:
    """Catches "CT" under two pictures counted as wrong for one of them, and captions that no longer count as equal."""
    words = torch.tensor([[START, 10, END], [START, 10, END], [START, 11, END]])
    pairs = Pairs(torch.zeros(3, 3, 2, 2), words, torch.tensor([3, 3, 3]), torch.arange(3), torch.arange(3))
    assert same_rows(*pairs.ids).equal(torch.eye(3, dtype=torch.bool))
    expected = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    cut = pairs.in_epoch(Config(), 0).fragments[0]
    assert same_rows(*cut.ids).equal(expected)


def test_a_weight_of_an_older_run_is_no_number_of_fragments() -> None:
    """Catches a config.json from when this was a weight, 0.5, that would end in a traceback of range()."""
    with pytest.raises(UserError, match="--fragments is 0.5: give a whole number"):
        Config(fragments=0.5)  # type: ignore[arg-type]
