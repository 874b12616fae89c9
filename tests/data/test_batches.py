"""Pairs from the cache, and the order in which training meets them."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from clip_medical import load_clip
from clip_medical.data import cache
from clip_medical.data.batches import prepare, row_batches
from clip_medical.data.images import UnreadableImage
from clip_medical.data.dataset import Split
from clip_medical.errors import UserError
from clip_medical.model import Clip


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip()


def picture(row: int) -> Image.Image:
    if row == 2:
        raise UnreadableImage("image 2 cannot be read: on purpose.")
    shape = (120, 130, 3) if row == 4 else (120, 130)
    return Image.fromarray(np.random.default_rng(row).integers(0, 256, shape, dtype=np.uint8))


@pytest.fixture
def split(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Split:
    """Six rows; row 2 cannot be read, row 4 is coloured, rows 0 and 5 have one caption, row 3 a far too long one."""
    monkeypatch.setenv(cache.ROOT_VARIABLE, str(tmp_path))
    monkeypatch.setattr(cache, "TOLERATED", 0.5)
    captions = ["a chest", "a knee", "lost", "very " * 300 + "long", "a hand", "a chest"]
    labels = {"anatomy": [f"label {row}" for row in range(6)]}
    return Split(captions, [f"id {row}" for row in range(6)], labels, picture, [f"origin {row}" for row in range(6)])


def test_pictures_captions_and_labels_stay_together(split: Split, clip: Clip) -> None:
    """Catches labels, captions or ids that shift by one after a row that could not be read."""
    pairs = prepare(split, clip, "test")
    kept = [0, 1, 3, 4, 5]
    assert len(pairs) == len(pairs.pixels) == 5
    assert pairs.split.ids == [f"id {row}" for row in kept]
    assert pairs.split.labels == {"anatomy": [f"label {row}" for row in kept]}
    for place, row in enumerate(kept):
        expected = clip.picture(picture(row))
        np.testing.assert_array_equal(pairs.pixels[torch.tensor([place])][0].numpy(), expected)
        opened = np.asarray(pairs.split.open_image(place).convert("RGB"))
        np.testing.assert_array_equal(opened.transpose(2, 0, 1), expected)
        ids, lengths = clip.tokens([split.captions[row]])
        assert pairs.lengths[place] == lengths[0]
        assert torch.equal(pairs.tokens[place, : lengths[0]], ids[0])
    assert pairs.pixels[torch.tensor([3, 0])].shape == pairs.pixels[:2].shape == (2, 3, 112, 112)
    assert torch.equal(pairs.pixels[1:4], pairs.pixels[torch.tensor([1, 2, 3])])


def test_what_is_equal_cut_or_lost_is_said(split: Split, clip: Clip) -> None:
    """Catches captions cut without a word, or without their end token; duplicates that nobody hears of."""
    pairs = prepare(split, clip, "test")
    assert pairs.caption_ids.tolist() == [0, 1, 2, 3, 0] and len(pairs.image_ids.unique()) == 5
    for part in ("5 pictures", "0.0% of them", "40.0% of the captions", "1 captions cut to", "1 more were unreadable"):
        assert part in pairs.summary
    assert pairs.tokens[2, -1] == clip.tokenizer.eos_token_id and pairs.lengths[2] == clip.context_length
    again = prepare(split, clip, "test")  # tokens from the cache
    assert again.summary == pairs.summary and torch.equal(again.tokens, pairs.tokens)


def test_other_captions_are_tokenized_anew(split: Split, clip: Clip) -> None:
    """Catches old token ids beside new captions of the same pictures: the pixels stay, the tokens do not."""
    pairs = prepare(split, clip, "test")
    captions = ["another caption", *split.captions[1:]]
    other = prepare(Split(captions, split.ids, {}, split.open_image, split.origins), clip, "test")
    assert other.pixels.cache.folder == pairs.pixels.cache.folder  # type: ignore[union-attr]
    assert not torch.equal(other.tokens[0], pairs.tokens[0])


def test_grey_pictures_travel_once(split: Split, clip: Clip) -> None:
    """Catches one channel copied three times on the CPU and sent three times to the GPU."""
    pairs, device = prepare(split, clip, "test"), torch.device("meta")
    grey, mixed = (pairs.pictures(torch.tensor(rows), device) for rows in ([0, 1], [0, 3]))  # the latter is coloured
    assert grey.shape == mixed.shape == (2, 3, clip.image_size, clip.image_size)
    assert grey.stride(1) == 0 != mixed.stride(1)


def test_an_epoch_meets_every_row_once_in_another_order() -> None:
    """Catches rows that are left out or met twice, epochs in one order, and a seed without effect."""
    two_epochs = [[batch.tolist() for batch in islice(row_batches(90, 10, seed), 18)] for seed in (0, 1)]
    for batches in two_epochs:
        for epoch in (batches[:9], batches[9:]):
            assert sorted(row for batch in epoch for row in batch) == list(range(90))
        assert batches[:9] != batches[9:]
    assert two_epochs[0] != two_epochs[1]


@pytest.mark.parametrize("start", [0, 1, 8, 9, 10, 40])
def test_any_position_is_found_again(start: int) -> None:
    """Catches a resumed run that meets other batches than the one that was not stopped; 95 rows leave 5 over."""
    whole = [batch.tolist() for batch in islice(row_batches(95, 10, 3), 50)]
    resumed = [batch.tolist() for batch in islice(row_batches(95, 10, 3, start), 50 - start)]
    assert resumed == whole[start:]


def test_fewer_pairs_than_a_batch_are_a_mistake() -> None:
    """Catches a division by zero where unreadable pictures left fewer pairs than one batch."""
    with pytest.raises(UserError, match="only 9 pairs could be read.*--batch-size"):
        next(row_batches(9, 10, 0))


def test_the_benchmark_runs(tmp_path: Path, clip: Clip, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark that no longer fits the code it measures; and shards unlike those of ROCOv2."""
    from experiments import benchmark_data as benchmark

    monkeypatch.setattr(cache, "TOLERATED", 0)
    benchmark.write_shards(tmp_path, 3, seed=0)
    (shard,) = tmp_path.glob("*.parquet")
    assert 300_000 < shard.stat().st_size < 1_500_000
    monkeypatch.setattr(benchmark, "BATCH", 2)
    monkeypatch.setattr(benchmark, "small_clip", lambda: clip)
    monkeypatch.setenv(cache.ROOT_VARIABLE, "set by the benchmark and put back by this")
    first, cached = benchmark.first_pass_and_cached(tmp_path)
    assert first > 0 and cached > 0
