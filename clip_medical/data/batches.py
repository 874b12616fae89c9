"""Image-caption pairs as tensors, and the order in which training meets them."""

from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from clip_medical.config import Config
from clip_medical.data.augment import augment, draw_views
from clip_medical.data.cache import Cache, open_cache
from clip_medical.data.fragments import WordTokens, fragments, word_tokens
from clip_medical.data.processor import Processor
from clip_medical.data.splits import Split
from clip_medical.errors import UserError


@dataclass(frozen=True)
class Pairs:
    """N image-caption pairs, ready for the model."""

    pixels: Tensor | Cache  # pixels[rows]: (n, 3, S, S) uint8
    tokens: Tensor  # (N, L) token ids, padded to the longest caption
    lengths: Tensor  # (N,) tokens of each caption, with start and end token
    caption_ids: Tensor  # (N,) equal numbers for captions that are equal to the model: after the cut, in any case
    image_ids: Tensor  # (N,) equal numbers for equal pixels
    split: Split = Split([], [], {}, list[Image.Image]().__getitem__, [])  # the N rows that the pairs were made from
    summary: str = ""  # for the log: how many images; repeated, cut and unreadable ones
    kinds: WordTokens | None = None  # which tokens end a word or negate what follows; None: each token is a word
    cut: str = ""  # for the report: how many captions were cut, and how much of them was lost
    kept_back: "Pairs | None" = None  # training pairs of the same source, neither trained nor reported on
    digests: Sequence[str] = ()  # N hashes of the pixels: the same image has the same hash, wherever it lies

    def __len__(self) -> int:
        return len(self.tokens)


def prepare(split: Split, processor: Processor, name: str) -> Pairs:
    """Decode each image of a split once into the cache on disk, on all cores, and tokenize the captions.

    Unreadable images are left out: `split` of the result holds the remaining rows and opens the cached images, so that
    the source is not needed any more. name: label of the progress bar.
    """
    cache = open_cache(split, processor.image_size, name)
    readable = split.select(cache.rows.tolist())
    tokens, lengths = processor.tokens(readable.captions)
    filled = [readable.captions[row] for row in (lengths == processor.context_length).nonzero().flatten().tolist()]
    uncut = processor.tokenizer(filled, verbose=False)["input_ids"] if filled else []
    excess = [len(ids) - processor.context_length for ids in uncut]  # 0: the caption fits to the token
    numbers: dict[bytes, int] = {}
    caption_ids = torch.tensor([numbers.setdefault(row.tobytes(), len(numbers)) for row in tokens.numpy()])
    image_ids = torch.from_numpy(cache.image_ids)
    # share of the rows whose image, or caption, occurs more than once
    images, captions = ((ids.bincount()[ids] > 1).double().mean().item() for ids in (image_ids, caption_ids))
    summary = (
        f"{len(readable):,} in {cache.folder}, {images:.1%} of them repeated; {captions:.1%} of the captions repeated"
    )
    cut_text = ""
    if cut := sum(n > 0 for n in excess):
        lost = sum(excess) / (int(lengths.sum()) + sum(excess))
        cut_text = f"{cut:,} captions cut to {processor.context_length} tokens ({lost:.1%} of all tokens lost)"
        summary += f"; {cut_text}"
    if len(readable) < len(split):
        summary += f"; {len(split) - len(readable):,} unreadable images left out, listed there in unreadable.tsv"
    rows = Split(readable.captions, readable.ids, readable.labels, cache.image, readable.origins)
    kinds = word_tokens(processor.tokenizer.convert_ids_to_tokens(list(range(len(processor.tokenizer)))))
    return Pairs(cache, tokens, lengths, caption_ids, image_ids, rows, summary, kinds, cut_text, digests=cache.digests)


@dataclass(frozen=True)
class Captions:
    """One text for each pair of a batch: its caption, or a fragment of it."""

    tokens: Tensor  # (n, L), of the pairs that this process encodes
    lengths: Tensor  # (n,)
    ids: list[Tensor]  # each (N,), of the whole batch: pairs that agree in any of these are positives of each other
    weight: float = 1.0  # of the loss over these texts


@dataclass(frozen=True)
class Batch:
    """A contrastive batch of N pairs, in memory, of which this process encodes n (all N on a single process)."""

    rows: Tensor  # (N,) row numbers in the pairs
    pixels: Tensor  # (n, 3, S, S) uint8
    captions: list[Captions]  # the captions, then the fragments


class Epoch:
    """The pairs as one epoch reads them: with fragments of the captions and augmented images, where configured."""

    def __init__(self, pairs: Pairs, config: Config, number: int) -> None:
        self.pairs = pairs
        self.fragments = [
            fragments(pairs.tokens, pairs.lengths, pairs.kinds, config.seed, number, which)
            for which in range(config.fragments)
        ]
        self.views = draw_views(len(pairs), config.seed, number) if config.augment else None

    def batch(self, rows: Tensor, rank: int = 0, world_size: int = 1) -> Batch:
        """Load the pairs `rows` (N,); process `rank` of `world_size` encodes its N / world_size neighbours of them."""
        pairs, own = self.pairs, rows.split(len(rows) // world_size)[rank]
        pixels = pairs.pixels[own]
        grey = pixels.stride(1) == 0  # one channel, seen three times: it is augmented and pinned once
        pixels = pixels[:, :1] if grey else pixels
        if self.views is not None:
            pixels = augment(pixels, self.views[own])
        if torch.cuda.is_available():
            pixels = pixels.pin_memory()
        pixels = pixels.expand(-1, 3, -1, -1)
        ids = [pairs.caption_ids[rows], pairs.image_ids[rows]]
        captions = [Captions(pairs.tokens[own], pairs.lengths[own], ids)]
        for tokens, lengths in self.fragments:
            equal_texts = tokens[rows].unique(dim=0, return_inverse=True)[1]
            captions.append(Captions(tokens[own], lengths[own], [*ids, equal_texts], 1 / len(self.fragments)))
        return Batch(rows, pixels, captions)


def row_batches(count: int, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Yield the row numbers of one batch after another, without end, beginning with batch number `start`.

    Each epoch is a permutation drawn from (seed, epoch) alone, so any position can be found again after a stop. Rows
    left over when the batches do not fill an epoch sit that epoch out: a smaller batch would have fewer negatives.
    """
    batches_per_epoch = count // batch_size
    if not batches_per_epoch:
        raise UserError(f"Only {count} pairs could be read, too few for a batch of {batch_size}. Lower --batch-size.")
    for epoch in range(start // batches_per_epoch, 2**62):
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))
        first = start % batches_per_epoch if epoch == start // batches_per_epoch else 0
        yield from order[: batches_per_epoch * batch_size].split(batch_size)[first:]


def batches(
    pairs: Pairs, config: Config, start: int = 0, rank: int = 0, world_size: int = 1, rows: Tensor | None = None
) -> Iterator[Batch]:
    """Yield the batches of training from number `start` on, without end, each loaded while the one before is used.

    rows: train on these rows only. rank, world_size: see Epoch.batch.
    """
    rows = torch.arange(len(pairs)) if rows is None else rows
    per_epoch = len(rows) // config.batch_size

    ready: Future[Batch] | None = None
    with ThreadPoolExecutor(1) as thread:
        for step, places in enumerate(row_batches(len(rows), config.batch_size, config.seed, start), start):
            if step == start or step % per_epoch == 0:
                epoch = thread.submit(Epoch, pairs, config, step // per_epoch)
            order = rows[places]  # the thread takes its tasks in turn, so that the epoch is ready by then
            loading = thread.submit(lambda e, r: e.result().batch(r, rank, world_size), epoch, order)
            if ready is not None:
                yield ready.result()
            ready = loading
