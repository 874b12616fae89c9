"""Fragments of captions: what an epoch reads."""

import torch

from clip_medical.data.batches import Pairs, epochs
from clip_medical.data.fragments import LONGEST, fragments
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
        tokens, lengths = fragments(TOKENS, LENGTHS, 1.0, 0, epoch)
        for row in range(len(TOKENS)):
            words = tokens[row, 1 : lengths[row] - 1].tolist()
            assert tokens[row, 0] == START and (tokens[row, lengths[row] - 1 :] == END).all()
            assert words == list(range(words[0], words[0] + len(words))) if words else LENGTHS[row] == 2
            assert not words or (words[0] >= 10 and words[-1] <= LENGTHS[row] + 7)
            assert len(words) <= LONGEST
        seen.add(tuple(tokens[3].tolist()))
    assert len(seen) > 100, "each epoch cuts anew"


def test_whole_captions_stay_as_they_are() -> None:
    """Catches a share that is ignored or turned round, and fragments that differ when an epoch is read again."""
    tokens, lengths = fragments(TOKENS, LENGTHS, 0.0, 0, 0)
    assert torch.equal(tokens, TOKENS) and torch.equal(lengths, LENGTHS)
    many, many_lengths = TOKENS[3:4].repeat(4000, 1), LENGTHS[3:4].repeat(4000)
    once, again = (fragments(many, many_lengths, 0.3, 5, 2)[0] for _ in range(2))
    assert torch.equal(once, again)
    cut = (once != many).any(dim=1).double().mean().item()
    assert 0.27 < cut < 0.33


def test_an_epoch_reads_fragments_first_and_whole_captions_last() -> None:
    """Catches a share that does not fall, an epoch cut anew half-way, and one that a resumed run reads otherwise."""
    number = torch.arange(8)
    pairs = Pairs(torch.zeros(8, 3, 2, 2), TOKENS[3:4].repeat(8, 1), LENGTHS[3:4].repeat(8), number, number)
    steps = [next_step for next_step, _ in zip(epochs(pairs, number, 4, 0, 0, 6, 1.0), range(6), strict=False)]
    whole = [int((read.tokens == pairs.tokens).all(dim=1).sum()) for read, _ in steps]
    assert whole[:2] == [0, 0] and 0 < whole[2] == whole[3] < 8 and whole[4:] == [8, 8]
    resumed = next(epochs(pairs, number, 4, 0, 3, 6, 1.0))
    assert torch.equal(resumed[0].tokens, steps[3][0].tokens) and torch.equal(resumed[1], steps[3][1])


def test_equal_fragments_are_right_for_each_other() -> None:
    """Catches "CT" under two pictures counted as wrong for one of them, and captions that no longer count as equal."""
    words = torch.tensor([[START, 10, END], [START, 10, END], [START, 11, END]])
    pairs = Pairs(torch.zeros(3, 3, 2, 2), words, torch.tensor([3, 3, 3]), torch.arange(3), torch.arange(3))
    assert same_rows(*pairs.ids).equal(torch.eye(3, dtype=torch.bool))
    expected = torch.tensor([[1, 1, 0], [1, 1, 0], [0, 0, 1]], dtype=torch.bool)
    assert same_rows(*pairs.in_epoch(1.0, 0, 0).ids).equal(expected)
