"""Fragments of captions: what an epoch reads beside them."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_medical.config import Config
from clip_medical.data.batches import Pairs, epochs, prepare
from clip_medical.data.fragments import FIRST, LONGEST, fragments
from clip_medical.data.sources import load_data
from clip_medical.errors import UserError
from clip_medical.model import load_clip
from clip_medical.training.losses import same_rows

START, END = 1, 99
LENGTHS = torch.tensor([2, 3, 7, 30, 30])
TOKENS = torch.full((5, 30), END)
for row, length in enumerate(LENGTHS.tolist()):
    TOKENS[row, 0] = START
    TOKENS[row, 1 : length - 1] = torch.arange(10, 10 + length - 2)


def test_a_fragment_is_a_run_of_the_first_words_of_its_caption_between_start_and_end() -> None:
    """Catches a lost start or end token, words from the padding or from far back in the caption, gaps, fragments of one
    length or from one place alone or too long, and a caption without words."""
    seen = set()
    for epoch in range(400):
        tokens, lengths = fragments(TOKENS, LENGTHS, None, 0, epoch)
        for row in range(len(TOKENS)):
            words = tokens[row, 1 : lengths[row] - 1].tolist()
            assert tokens[row, 0] == START and (tokens[row, lengths[row] - 1 :] == END).all()
            assert words == list(range(words[0], words[0] + len(words))) if words else LENGTHS[row] == 2
            assert not words or (words[0] >= 10 and words[-1] < 10 + min(FIRST, LENGTHS[row] - 2))
        seen.add(tuple(tokens[3, 1 : lengths[3] - 1].tolist()))
    runs = {tuple(range(10 + a, 10 + b)) for b in range(1, FIRST + 1) for a in range(max(0, b - LONGEST), b)}
    assert seen == runs, "every run of the first words has its turn"


def test_a_word_is_never_cut() -> None:
    """Catches "rad" for "radiograph": words of two and three tokens that come apart, or count as two or three words;
    and the lost last word of a caption that was cut in the middle of it."""
    ends_word = torch.zeros(100, dtype=torch.bool)
    ends_word[[10, 12, 15, 16, 18, 19, 20, 21, 23, 24, 29]] = True
    long = [(10, 10), (11, 12), (13, 15), (16, 16), (17, 18), (19, 19), (20, 20), (21, 21)]  # first and last tokens
    short = [(10, 10), (11, 12), (13, 14)]  # the third word is not finished
    seen: dict[int, set[tuple[int, ...]]] = {2: set(), 3: set()}
    for epoch in range(400):
        tokens, lengths = fragments(TOKENS, LENGTHS, ends_word, 0, epoch)
        for row, found in seen.items():
            found.add(tuple(tokens[row, 1 : lengths[row] - 1].tolist()))
    for row, words in {2: short, 3: long}.items():
        runs = [words[a:b] for b in range(1, len(words) + 1) for a in range(max(0, b - LONGEST), b)]
        assert seen[row] == {tuple(range(run[0][0], run[-1][1] + 1)) for run in runs}


def test_the_words_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    """Catches a vocabulary whose ends of words are not found, so that every token, or the whole caption, is a word."""
    for number in range(4):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    lines = [f'{number}.png,"Orthopantomogram, lateral jaws"' for number in range(4)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *lines]))
    clip = load_clip()
    pairs = prepare(load_data(str(tmp_path / "pairs.csv")).train, clip, "training")
    read = {
        clip.tokenizer.decode(tokens[1 : length - 1])
        for epoch in range(60)
        for cut in pairs.in_epoch(Config(), epoch).fragments
        for tokens, length in zip(cut.tokens, cut.lengths, strict=True)
    }
    words = ["orthopantomogram", ",", "lateral", "jaws"]
    assert read == {" ".join(words[first:last]) for last in range(1, 5) for first in range(last)}


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
