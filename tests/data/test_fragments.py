"""Fragments of captions: runs of complete words between the start and the end token."""

from itertools import islice
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_medical.config import Config
from clip_medical.data.batches import Pairs, batches, prepare
from clip_medical.data.dataset import load_data
from clip_medical.data.fragments import FIRST, LONGEST, WordTokens, fragments, word_tokens
from clip_medical.model import load_clip
from clip_medical.training.loss import same_rows

START, END = 1, 99
LENGTHS = torch.tensor([2, 3, 7, 30, 30])
TOKENS = torch.full((5, 30), END)
for row, length in enumerate(LENGTHS.tolist()):
    TOKENS[row, 0] = START
    TOKENS[row, 1 : length - 1] = torch.arange(10, 10 + length - 2)


def test_a_fragment_is_a_run_of_the_first_words_between_start_and_end() -> None:
    """Catches a lost start or end token, words from the padding or the end of the caption, gaps, fragments of one
    length, of one position or too long, and a caption without words."""
    drawn = set()
    for epoch in range(400):
        tokens, lengths = fragments(TOKENS, LENGTHS, None, 0, epoch, 2 * (epoch % 2))
        for row in range(len(TOKENS)):
            words = tokens[row, 1 : lengths[row] - 1].tolist()
            assert tokens[row, 0] == START and (tokens[row, lengths[row] - 1 :] == END).all()
            assert words == list(range(words[0], words[0] + len(words))) if words else LENGTHS[row] == 2
            assert not words or (words[0] >= 10 and words[-1] < 10 + min(FIRST, int(LENGTHS[row]) - 2))
        drawn.add(tuple(tokens[3, 1 : lengths[3] - 1].tolist()))
    runs = {tuple(range(10 + a, 10 + b)) for b in range(1, FIRST + 1) for a in range(max(0, b - LONGEST), b)}
    assert drawn == runs


def test_the_second_fragment_reaches_the_whole_caption() -> None:
    """Catches findings, which stand at the end of many captions, that no fragment ever contains."""
    tokens = torch.cat([fragments(TOKENS, LENGTHS, None, 0, epoch, number=1)[0][3] for epoch in range(200)])
    assert tokens[tokens < END].max() == TOKENS[3, LENGTHS[3] - 2]


def test_a_denied_finding_is_never_affirmed() -> None:
    """Catches "fracture" cut from "no evidence of fracture", which teaches the finding on images that lack it; and a
    negation that reaches into the next sentence, or to the words before it."""
    tokenizer = load_clip().processor.tokenizer
    text = "ct without contrast , no evidence of cyst , fracture or mass . calcification"
    ids = torch.tensor([tokenizer(text)["input_ids"]])
    kinds = word_tokens(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    drawn = set[str]()
    for epoch in range(600):
        tokens, lengths = fragments(ids, torch.tensor([ids.shape[1]]), kinds, 0, epoch, 1)
        drawn.add(str(tokenizer.decode(tokens[0, 1 : lengths[0] - 1])))
    for fragment in drawn:
        for denied in ("cyst", "fracture", "mass"):
            assert denied not in fragment or "no evidence of" in fragment[: fragment.index(denied)]
        assert "contrast" not in fragment or "without" in fragment
    assert {"ct", "calcification", "without", "without contrast"} <= drawn
    assert any(fragment.startswith("no evidence of") and "mass" in fragment for fragment in drawn)


def test_words_are_never_cut() -> None:
    """Catches "rad" for "radiograph", that is words of two or three tokens that are split or count as several words;
    and the loss of the last word of a caption that was truncated inside this word."""
    nothing, ends_word = torch.zeros(2, 100, dtype=torch.bool)
    ends_word[[10, 12, 15, 16, 18, 19, 20, 21, 23, 24, 29]] = True
    long = [(10, 10), (11, 12), (13, 15), (16, 16), (17, 18), (19, 19), (20, 20), (21, 21)]  # first and last tokens
    short = [(10, 10), (11, 12), (13, 14)]  # the third word is truncated
    drawn: dict[int, set[tuple[int, ...]]] = {2: set(), 3: set()}
    for epoch in range(400):
        tokens, lengths = fragments(TOKENS, LENGTHS, WordTokens(ends_word, nothing, nothing), 0, epoch)
        for row, runs in drawn.items():
            runs.add(tuple(tokens[row, 1 : lengths[row] - 1].tolist()))
    for row, words in {2: short, 3: long}.items():
        expected = [words[a:b] for b in range(1, len(words) + 1) for a in range(max(0, b - LONGEST), b)]
        assert drawn[row] == {tuple(range(run[0][0], run[-1][1] + 1)) for run in expected}


def test_a_fragment_depends_on_seed_epoch_and_number() -> None:
    """Catches fragments that a resumed run does not repeat, equal ones in all epochs or in all fragments of an epoch,
    and captions that are modified in place."""
    captions = TOKENS[3:].repeat(10, 1)
    original, lengths = captions.clone(), torch.full((20,), 30)
    drawn = fragments(captions, lengths, None, 1, 2, 3)[0]
    torch.rand(3)
    assert torch.equal(fragments(captions, lengths, None, 1, 2, 3)[0], drawn)
    for other in ((0, 2, 3), (1, 3, 3), (1, 2, 0)):
        assert not torch.equal(fragments(captions, lengths, None, *other)[0], drawn)
    assert torch.equal(captions, original)


def test_words_are_those_of_the_tokenizer(tmp_path: Path) -> None:
    """Catches a vocabulary without word ends, with which each token or the whole caption counts as a word."""
    for number in range(4):
        Image.new("L", (8, 8), number).save(tmp_path / f"{number}.png")
    lines = [f'{number}.png,"Orthopantomogram, lateral jaws"' for number in range(4)]
    (tmp_path / "pairs.csv").write_text("\n".join(["image,caption", *lines]))
    processor = load_clip().processor
    pairs = prepare(load_data(str(tmp_path / "pairs.csv")).train, processor, "training")
    drawn = {
        processor.tokenizer.decode(tokens[1 : length - 1])
        for epoch in range(200)
        for tokens, length in zip(*fragments(pairs.tokens, pairs.lengths, pairs.kinds, 0, epoch), strict=True)
    }
    words = ["orthopantomogram", ",", "lateral", "jaws"]
    assert drawn == {" ".join(words[first:last]) for last in range(1, 5) for first in range(last)}


def test_batches_hold_captions_and_fragments() -> None:
    """Catches captions cut in place, fragments of other rows or of another epoch, a resumed run with other fragments,
    equal fragments within an epoch, a weight that grows with their number, and fragments although there are none."""
    rows = torch.arange(8)
    pairs = Pairs(torch.zeros(8, 3, 2, 2), TOKENS[3:4].repeat(8, 1), LENGTHS[3:4].repeat(8), rows, rows)
    config = Config(batch_size=4, fragments=3, seed=5)
    steps = list(islice(batches(pairs, config), 4))
    for step, batch in enumerate(steps):
        captions, *cut = batch.captions
        assert captions.weight == 1 and torch.equal(captions.tokens, pairs.tokens[batch.rows])
        assert sum(fragment.weight for fragment in cut) == pytest.approx(1)
        assert len({fragment.tokens.numpy().tobytes() for fragment in cut}) == 3
        for number, fragment in enumerate(cut):
            tokens, lengths = fragments(pairs.tokens, pairs.lengths, None, 5, step // 2, number)
            assert torch.equal(fragment.tokens, tokens[batch.rows]) and torch.equal(
                fragment.lengths, lengths[batch.rows]
            )
    resumed = next(batches(pairs, config, start=3))
    assert torch.equal(resumed.rows, steps[3].rows)
    assert torch.equal(resumed.captions[1].tokens, steps[3].captions[1].tokens)
    assert len(next(batches(pairs, Config(batch_size=4, fragments=0))).captions) == 1


def test_equal_fragments_are_positives_of_each_other() -> None:
    """Catches "CT" under two images that counts as a negative of one of them, and captions whose positives change."""
    words, rows = torch.tensor([[START, 10, END], [START, 10, END], [START, 11, END]]), torch.arange(3)
    pairs = Pairs(torch.zeros(3, 3, 2, 2), words, torch.tensor([3, 3, 3]), rows, rows)
    batch = next(batches(pairs, Config(batch_size=3, fragments=1)))
    captions, cut = batch.captions
    word = words[batch.rows, 1]
    assert same_rows(*captions.ids).equal(torch.eye(3, dtype=torch.bool))
    assert same_rows(*cut.ids).equal(word[:, None] == word)
