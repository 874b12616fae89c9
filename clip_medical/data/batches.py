"""Pictures and captions as tensors, and the order in which training meets them."""

import hashlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from clip_medical.config import Config
from clip_medical.data.augment import augment, draw_views
from clip_medical.data.cache import Cache, open_cache
from clip_medical.data.fragments import fragments
from clip_medical.data.splits import Split
from clip_medical.errors import UserError
from clip_medical.model import Clip


class CachedPixels:
    """The pixels of N pictures, read from the cache when they are asked for."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return len(self.cache)

    def __getitem__(self, rows: Tensor | slice) -> Tensor:
        """(n,) row numbers or a slice -> (n, 3, S, S) uint8; a view of one channel where all are grey. Where there is
        a GPU in pinned memory, from which it takes them while it computes."""
        numbers = np.arange(len(self))[rows] if isinstance(rows, slice) else rows.numpy()
        pixels = torch.from_numpy(self.cache.read(numbers))
        return (pixels.pin_memory() if torch.cuda.is_available() else pixels).expand(-1, 3, -1, -1)


class Squares:
    """Opens the pictures of a cache as PIL images, by row number of the cache."""

    def __init__(self, cache: Cache | None = None) -> None:
        self.cache = cache

    def __call__(self, row: int) -> Image.Image:
        if self.cache is None:
            raise IndexError(row)
        pixels = self.cache.read(np.array([row]))[0]
        return Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))


NO_ROWS = Split([], [], {}, Squares(), [])


@dataclass(frozen=True)
class Pairs:
    """N picture-caption pairs, ready for the model."""

    pixels: Tensor | CachedPixels  # pixels[rows]: (n, 3, S, S) uint8
    tokens: Tensor  # (N, L) token ids, padded to the longest of all
    lengths: Tensor  # (N,) tokens of each caption, with its start and end token
    caption_ids: Tensor  # (N,) the same number where the caption is the same
    image_ids: Tensor  # (N,) the same number where the picture is the same
    split: Split = NO_ROWS  # the N rows that the pairs were made from
    summary: str = ""  # for a report: how many, how many of them more than once, cut, unreadable
    ends_word: Tensor | None = None  # (V,) bool: a word ends with this token of the vocabulary; None: with each
    text_ids: Tensor | None = None  # (N,) of fragments: the same number where the words are the same
    weight: float = 1.0  # of the loss over these captions
    fragments: "tuple[Pairs, ...]" = ()  # the same pairs, each caption cut to a few words, as wide: for a second loss
    views: Tensor | None = None  # (N, 4) how each picture is augmented in this epoch

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def ids(self) -> list[Tensor]:
        """Rows that agree in any of these are right for each other."""
        return [ids for ids in (self.caption_ids, self.image_ids, self.text_ids) if ids is not None]

    def pictures(self, rows: Tensor, device: torch.device) -> Tensor:
        """(n,) row numbers -> (n, 3, S, S) uint8 on the device, as this epoch sees them."""
        pixels = self.pixels[rows]
        if pixels.stride(1) == 0:  # grey ones, one channel seen three times: once is enough on the way
            pixels = pixels[:, :1].to(device, non_blocking=True).expand(-1, 3, -1, -1)
        pixels = pixels.to(device, non_blocking=True)
        return pixels if self.views is None else augment(pixels, self.views[rows])

    def in_epoch(self, config: Config, epoch: int) -> "Pairs":
        """The pairs as an epoch reads them: with fragments of the captions and augmented pictures, where asked for."""
        cuts = []
        for number in range(config.fragments):
            tokens, lengths = fragments(self.tokens, self.lengths, self.ends_word, config.seed, epoch, number)
            ids = tokens.unique(dim=0, return_inverse=True)[1]
            cuts.append(replace(self, tokens=tokens, lengths=lengths, text_ids=ids, weight=1 / config.fragments))
        views = draw_views(len(self), config.seed, epoch) if config.augment else None
        return replace(self, fragments=tuple(cuts), views=views)


def prepare(split: Split, clip: Clip, name: str) -> Pairs:
    """The pairs of a split: each picture decoded once, on all cores, into the cache on disk; captions tokenized.

    Pictures that cannot be read are left out: `split` of the result is what remains, and opens the cached squares, so
    that the source is not needed any more. name: what the progress bar calls the pictures.
    """
    cache = open_cache(split, clip.image_size, name)
    kept = split.select(cache.rows.tolist())
    tokens, lengths, cut = _tokens(clip, kept.captions, cache.folder)
    captions, images = _numbered(kept.captions), torch.from_numpy(cache.image_ids)
    summary = (
        f"{len(kept):,} pictures in {cache.folder}; {_repeated(images):.1%} of them and {_repeated(captions):.1%} of "
        "the captions are there more than once"
    )
    if cut:
        summary += f"; {cut:,} captions cut to {clip.context_length} tokens"
    if len(kept) < len(split):
        summary += f"; {len(split) - len(kept):,} more were unreadable and left out, see unreadable.tsv there"
    squares = Split(kept.captions, kept.ids, kept.labels, Squares(cache), kept.origins)
    vocabulary = clip.tokenizer.convert_ids_to_tokens(list(range(len(clip.tokenizer))))
    ends_word = torch.tensor([token.endswith("</w>") for token in vocabulary])  # as CLIP's tokenizer writes it
    return Pairs(CachedPixels(cache), tokens, lengths, captions, images, squares, summary, ends_word)


def _tokens(clip: Clip, captions: list[str], folder: Path) -> tuple[Tensor, Tensor, int]:
    """Token ids, lengths, and how many captions were cut; kept beside the pixels by tokenizer and captions."""
    backend = clip.tokenizer.backend_tokenizer.to_str()
    key = hashlib.sha256(json.dumps([backend, clip.context_length, captions]).encode()).hexdigest()[:16]
    path = folder / f"tokens-{key}.safetensors"
    if not path.is_file():
        ids, lengths = clip.tokens(captions)
        full = [captions[i] for i in (lengths == clip.context_length).nonzero().flatten().tolist()]
        cut = (
            sum(len(ids) > clip.context_length for ids in clip.tokenizer(full, verbose=False)["input_ids"])
            if full
            else 0
        )
        part = path.with_suffix(f".{os.getpid()}")
        save_file({"ids": ids.int(), "lengths": lengths, "cut": torch.tensor(cut)}, part)
        part.replace(path)
    found = load_file(path)
    return found["ids"].long(), found["lengths"], int(found["cut"])


def _numbered(values: list[str]) -> Tensor:
    """(N,) int64: equal values get equal numbers."""
    numbers: dict[str, int] = {}
    return torch.tensor([numbers.setdefault(value, len(numbers)) for value in values])


def _repeated(ids: Tensor) -> float:
    """The share of rows whose number some other row has too."""
    return (ids.bincount()[ids] > 1).double().mean().item()


def row_batches(count: int, batch_size: int, seed: int, start: int = 0) -> Iterator[Tensor]:
    """Row numbers of one batch after another, without end, beginning with batch number `start`.

    Each epoch is a new permutation drawn from (seed, epoch) alone, so any position can be found again after a stop.
    The rows left over when the batches do not fill an epoch sit that epoch out: a smaller batch has fewer negatives.
    """
    batches_per_epoch = count // batch_size
    if not batches_per_epoch:
        raise UserError(f"only {count} pairs could be read, too few for a batch of {batch_size}: lower --batch-size.")
    for epoch in range(start // batches_per_epoch, 2**62):
        order = torch.from_numpy(np.random.default_rng((seed, epoch)).permutation(count))
        first = start % batches_per_epoch if epoch == start // batches_per_epoch else 0
        yield from order[: batches_per_epoch * batch_size].split(batch_size)[first:]


def epochs(pairs: Pairs, rows: Tensor, config: Config, start: int) -> Iterator[tuple[Pairs, Tensor]]:
    """The batches of `rows` from number `start` on, without end, each with the pairs as its epoch reads them."""
    per_epoch = len(rows) // config.batch_size
    read = pairs
    for step, batch in enumerate(row_batches(len(rows), config.batch_size, config.seed, start), start):
        if step == start or step % per_epoch == 0:
            read = pairs.in_epoch(config, step // per_epoch)
        yield read, rows[batch]
