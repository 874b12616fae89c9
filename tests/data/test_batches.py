"""Pairs from the cache, the order in which training meets them, and the batches that a thread loads ahead."""

import threading
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from clip_medical import load_clip
from clip_medical.config import Config
from clip_medical.data import cache
from clip_medical.data.augment import augment, draw_views
from clip_medical.data.batches import Batch, Pairs, batches, prepare, row_batches
from clip_medical.data.images import UnreadableImage
from clip_medical.data.processor import Processor
from clip_medical.data.splits import Split
from clip_medical.errors import UserError

# ---- pairs from the cache


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_clip().processor


def open_image(row: int) -> Image.Image:
    if row == 2:
        raise UnreadableImage("image 2 cannot be read: on purpose.")
    shape = (120, 130, 3) if row == 4 else (120, 130)
    return Image.fromarray(np.random.default_rng(row).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    """Six rows. Row 2 cannot be read, row 4 has colour, rows 0 and 5 have the same caption, that of row 3 is cut."""
    monkeypatch.setenv(cache.ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(cache, "UNREADABLE_LIMIT", 0.5)
    captions = ["a chest", "a knee", "lost", "very " * 300 + "long", "a hand", "a chest"]
    labels = {"anatomy": [f"label {row}" for row in range(6)]}
    return Split(captions, [f"id {row}" for row in range(6)], labels, open_image, [f"origin {row}" for row in range(6)])


def test_captions_that_are_equal_after_the_cut_are_one(processor: Processor, split: Split) -> None:
    """Catches reports that begin alike as negatives of each other, though the model sees the same tokens, and a cut
    that the report does not mention."""
    captions = ["a chest", "A Chest", "x", "very " * 300 + "long", "very " * 300 + "short", "a hand"]
    pairs = prepare(replace(split, captions=captions), processor, "test")
    assert pairs.caption_ids.tolist() == [0, 0, 1, 1, 2]  # row 2 cannot be read
    assert pairs.cut.startswith("2 captions cut to 77 tokens (86") and "of all tokens lost" in pairs.cut


def test_images_captions_and_labels_stay_together(split: Split, processor: Processor) -> None:
    """Catches labels, captions or ids that are shifted by one after a row that could not be read."""
    pairs = prepare(split, processor, "test")
    readable = [0, 1, 3, 4, 5]
    assert len(pairs) == len(pairs.pixels) == 5
    assert pairs.split.ids == [f"id {row}" for row in readable]
    assert pairs.split.labels == {"anatomy": [f"label {row}" for row in readable]}
    for place, row in enumerate(readable):
        expected = processor.pixels(open_image(row))
        np.testing.assert_array_equal(pairs.pixels[torch.tensor([place])][0].numpy(), expected)
        cached = np.asarray(pairs.split.open_image(place).convert("RGB"))
        np.testing.assert_array_equal(cached.transpose(2, 0, 1), expected)
        ids, lengths = processor.tokens([split.captions[row]])
        assert pairs.lengths[place] == lengths[0]
        assert torch.equal(pairs.tokens[place, : lengths[0]], ids[0])
    assert pairs.pixels[torch.tensor([3, 0])].shape == pairs.pixels[:2].shape == (2, 3, 112, 112)
    assert torch.equal(pairs.pixels[1:4], pairs.pixels[torch.tensor([1, 2, 3])])


def test_repeated_cut_and_unreadable_rows_are_reported(split: Split, processor: Processor) -> None:
    """Catches captions cut silently or without their end token, and duplicates that are not reported."""
    pairs = prepare(split, processor, "test")
    assert pairs.caption_ids.tolist() == [0, 1, 2, 3, 0] and len(pairs.image_ids.unique()) == 5
    for part in ("5 in ", "0.0% of them", "40.0% of the captions", "1 captions cut to", "1 unreadable images left out"):
        assert part in pairs.summary
    assert pairs.tokens[2, -1] == processor.tokenizer.eos_token_id and pairs.lengths[2] == processor.context_length


@pytest.mark.parametrize("augmented", [False, True])
def test_grey_images_are_stored_once(augmented: bool, split: Split, processor: Processor) -> None:
    """Catches one grey channel that is read, augmented or kept three times."""
    pairs = prepare(split.select([0, 1, 3, 5]), processor, "test")
    batch = next(batches(pairs, Config(batch_size=4, fragments=0, augment=augmented)))
    assert batch.pixels.shape == (4, 3, processor.image_size, processor.image_size)
    assert batch.pixels.stride(1) == 0
    coloured = prepare(split, processor, "test").pixels[torch.tensor([0, 3])]
    assert coloured.stride(1) > 0 and torch.equal(coloured[0, 0], coloured[0, 1])


# ---- the order of rows


def test_an_epoch_meets_every_row_once_in_another_order() -> None:
    """Catches rows that are left out or met twice, epochs in one order, and a seed without effect."""
    two_epochs = [[batch.tolist() for batch in islice(row_batches(90, 10, seed), 18)] for seed in (0, 1)]
    for rows in two_epochs:
        for epoch in (rows[:9], rows[9:]):
            assert sorted(row for batch in epoch for row in batch) == list(range(90))
        assert rows[:9] != rows[9:]
    assert two_epochs[0] != two_epochs[1]


@pytest.mark.parametrize("start", [0, 1, 8, 9, 10, 40])
def test_rows_continue_at_any_position(start: int) -> None:
    """Catches a resumed run that meets other batches than one that was not stopped. 95 rows leave 5 over."""
    whole = [batch.tolist() for batch in islice(row_batches(95, 10, 3), 50)]
    resumed = [batch.tolist() for batch in islice(row_batches(95, 10, 3, start), 50 - start)]
    assert resumed == whole[start:]


def test_fewer_pairs_than_a_batch_are_a_user_error() -> None:
    """Catches a division by zero where unreadable images leave fewer pairs than one batch."""
    with pytest.raises(UserError, match="Only 9 pairs could be read.*--batch-size"):
        next(row_batches(9, 10, 0))


# ---- batches

N, SIZE, END = 22, 16, 99


@pytest.fixture(scope="module")
def pairs() -> Pairs:
    """22 pairs of random pixels and tokens; captions 2 and 7 are equal."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(4, 12, (N,), generator=generator)
    tokens = torch.randint(0, 90, (N, 12), generator=generator)
    tokens[7], lengths[7] = tokens[2], lengths[2]
    tokens = tokens.where(torch.arange(12) < lengths[:, None] - 1, END)
    pixels = torch.randint(0, 256, (N, 3, SIZE, SIZE), dtype=torch.uint8, generator=generator)
    caption_ids = torch.arange(N)
    caption_ids[7] = 2
    return Pairs(pixels, tokens, lengths, caption_ids, torch.arange(N))


CONFIG = Config(batch_size=4, fragments=2, augment=True, seed=3)  # five batches an epoch, two rows left over


def assert_equal(batch: Batch, other: Batch) -> None:
    assert torch.equal(batch.rows, other.rows) and torch.equal(batch.pixels, other.pixels)
    for captions, others in zip(batch.captions, other.captions, strict=True):
        assert torch.equal(captions.tokens, others.tokens) and torch.equal(captions.lengths, others.lengths)
        assert captions.weight == others.weight and all(map(torch.equal, captions.ids, others.ids))


def test_batches_hold_the_pairs_of_their_rows(pairs: Pairs) -> None:
    """Catches pixels, captions or ids of other rows, and an order other than that of row_batches."""
    config = replace(CONFIG, fragments=0, augment=False)
    for batch, rows in islice(zip(batches(pairs, config), row_batches(N, 4, config.seed), strict=False), 12):
        (captions,) = batch.captions
        assert torch.equal(batch.rows, rows) and torch.equal(batch.pixels, pairs.pixels[rows])
        assert torch.equal(captions.tokens, pairs.tokens[rows]) and torch.equal(captions.lengths, pairs.lengths[rows])
        assert torch.equal(captions.ids[0], pairs.caption_ids[rows]) and captions.weight == 1


@pytest.mark.parametrize("start", [0, 1, 4, 5, 13])
def test_batches_continue_at_any_position(start: int, pairs: Pairs) -> None:
    """Catches a resumed run with the fragments or views of another epoch."""
    whole = list(islice(batches(pairs, CONFIG), 15))
    for batch, expected in zip(batches(pairs, CONFIG, start), whole[start:], strict=False):
        assert_equal(batch, expected)


def test_fragments_and_views_are_those_of_the_epoch(pairs: Pairs) -> None:
    """Catches fragments or augmented images that are the same in each epoch, and views of other rows."""
    assert isinstance(pairs.pixels, Tensor)
    two_epochs = list(islice(batches(pairs, CONFIG), 10))
    for epoch in (0, 1):
        views = draw_views(N, CONFIG.seed, epoch)
        for batch in two_epochs[5 * epoch : 5 * epoch + 5]:
            assert torch.equal(batch.pixels, augment(pairs.pixels[batch.rows], views[batch.rows]))
            assert [captions.weight for captions in batch.captions] == [1, 0.5, 0.5]
    drawn: list[dict[int, list[list[int]]]] = [{}, {}]
    for number, batch in enumerate(two_epochs):
        fragments = [captions.tokens.tolist() for captions in batch.captions[1:]]
        for place, row in enumerate(batch.rows.tolist()):
            drawn[number // 5][row] = [texts[place] for texts in fragments]
    both = drawn[0].keys() & drawn[1].keys()
    assert sum(drawn[0][row] != drawn[1][row] for row in both) > len(both) / 2


@pytest.mark.parametrize("world_size", [2, 4])
def test_processes_split_a_batch(world_size: int, pairs: Pairs) -> None:
    """Catches pairs that two processes encode or none, and positives between the parts that are lost."""
    whole = batches(pairs, CONFIG)
    processes = [batches(pairs, CONFIG, 0, rank, world_size) for rank in range(world_size)]
    for batch, *parts in islice(zip(whole, *processes, strict=True), 6):
        assert torch.equal(torch.cat([part.pixels for part in parts]), batch.pixels)
        for part in parts:
            assert torch.equal(part.rows, batch.rows) and len(part.pixels) == 4 // world_size
        for number, captions in enumerate(batch.captions):
            own = [part.captions[number] for part in parts]
            assert torch.equal(torch.cat([each.tokens for each in own]), captions.tokens)
            assert torch.equal(torch.cat([each.lengths for each in own]), captions.lengths)
            assert all(all(map(torch.equal, each.ids, captions.ids)) for each in own)


def test_training_on_some_rows_meets_no_other(pairs: Pairs) -> None:
    """Catches rows that are numbers within the selection taken for numbers of pairs."""
    rows = torch.tensor([21, 3, 5, 8, 13, 2])
    config = replace(CONFIG, batch_size=3, augment=False)
    epoch = list(islice(batches(pairs, config, rows=rows), 2))
    assert sorted(torch.cat([batch.rows for batch in epoch]).tolist()) == sorted(rows.tolist())
    assert all(torch.equal(batch.pixels, pairs.pixels[batch.rows]) for batch in epoch)


class SlowPixels:
    """Pixels that take a while to read; for each read, whether the main thread waited for it."""

    def __init__(self, pixels: Any) -> None:
        self.pixels = pixels
        self.reads: list[bool] = []

    def __getitem__(self, rows: Tensor) -> Tensor:
        self.reads.append(threading.current_thread() is threading.main_thread())
        time.sleep(0.1)
        result: Tensor = self.pixels[rows]
        return result


def test_the_next_batch_is_loaded_during_a_step(pairs: Pairs) -> None:
    """Catches loading in the training thread, and a thread that runs far ahead and fills the memory."""
    pixels: Any = SlowPixels(pairs.pixels)
    loader = batches(replace(pairs, pixels=pixels), replace(CONFIG, augment=False))
    next(loader)
    time.sleep(0.3)  # a step
    assert pixels.reads == [False, False]


def test_an_error_while_loading_reaches_the_training_thread(pairs: Pairs) -> None:
    """Catches an image that cannot be read, after which training waits or goes on with another batch."""

    class Damaged(SlowPixels):
        def __getitem__(self, rows: Tensor) -> Tensor:
            if len(self.reads) == 2:
                raise OSError("damaged")
            return super().__getitem__(rows)

    pixels: Any = Damaged(pairs.pixels)
    loader = batches(replace(pairs, pixels=pixels), CONFIG)
    next(loader)
    next(loader)
    with pytest.raises(OSError, match="damaged"):
        next(loader)
