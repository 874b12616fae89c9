"""The two towers of CLIP, which compute no more than what is read: no common beginning twice, no padding, and in the
last layer one token.

A tower turns a sequence of L tokens into L vectors and keeps one: the class token's of a picture, the end token's of a
caption. Text is causal: what a token becomes depends on those before it alone. Three things follow.

Captions that begin alike are alike until they part, so that each beginning is computed once: that of "chest CT showing"
for all captions of a batch which begin so, and the start token for all. And what follows the end token changes nothing
before it: the captions of radiology fill less than half of their 77 tokens, the rest is padding. All layers but
attention work on each token by itself: they see a matrix with one row for each token that is not, with all before it,
in another caption too (and on some CPUs up to 63 spare rows, which nobody reads: see spare_rows). Attention alone, a
few per cent of the arithmetic, needs the captions whole, side by side, padded to the longest: short ones and long ones
by themselves where that pays.

The layers below the last need all L, as each token attends to the others. The last one needs the keys and values of
all, but query (one D x D product), output projection (one) and the whole MLP (eight) of that one token alone.

Values and gradients are those of transformers' towers to rounding. Under LoRA's dropout, captions that share a token
share its mask. What a layer is made of is in fused.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPVisionModel

from clip_medical.fused import attend, linear_of, mlp_of, projected, repeated
from clip_medical.products import linear, spare_rows


@dataclass(frozen=True)
class Group:
    """Sequences that attention sees side by side, padded to the longest of them."""

    count: int  # n
    longest: int  # L
    seen: Tensor | None = None  # (n, 1, 1, L) of causal text, false in the padding; None: images


@dataclass(frozen=True)
class Sequences:
    """N sequences, whose tokens are the rows of a matrix (T, D): tokens with the same beginning share one."""

    groups: list[Group]
    kept: Tensor  # (N,) the row of each sequence that is kept in the end
    read: Tensor | None = None  # (P,) the row that each place of the groups reads, P = sum of n * L; None: its own
    written: Tensor | None = None  # (T,) the place whose result becomes each row

    def side_by_side(self, rows: Tensor, heads: int) -> list[Tensor]:
        """(T, D) -> (n, heads, L, D / heads) of each group; the padding holds what no token of its caption sees."""
        rows = rows if self.read is None else repeated(rows, self.read)
        places = [group.count * group.longest for group in self.groups]
        parts = rows.split(places) if len(places) > 1 else [rows]  # a split copies the gradient, even of one part
        tokens = zip(self.groups, parts, strict=True)
        return [part.view(group.count, group.longest, heads, -1).transpose(1, 2) for group, part in tokens]

    def as_rows(self, by_head: list[Tensor]) -> Tensor:
        """(n, heads, L, D / heads) of each group -> (T, D), the way back."""
        rows = _joined([each.transpose(1, 2).flatten(2).flatten(0, 1) for each in by_head])
        return rows if self.written is None else rows.index_select(0, self.written)


def image_tower(tower: CLIPVisionModel, pixels: Tensor, checkpointing: bool = False) -> Tensor:
    """Normalised pixels (N, 3, S, S) -> (N, D): what tower(pixels).pooler_output holds.

    checkpointing: compute the activations of each layer but the last twice instead of keeping them.
    """
    embeddings, hidden = tower.embeddings, _patches(pixels, tower.embeddings.patch_embedding.weight)
    class_tokens = embeddings.class_embedding.expand(len(hidden), 1, -1)
    hidden = torch.cat([class_tokens, hidden], dim=1) + embeddings.position_embedding.weight
    hidden = tower.pre_layrnorm(hidden)  # transformers' spelling
    count, length = hidden.shape[:2]
    kept = torch.arange(count, device=hidden.device) * length
    sequences = Sequences([Group(count, length)], kept)
    pooled: Tensor = tower.post_layernorm(_encode(tower, hidden.flatten(0, 1), sequences, checkpointing))
    return pooled


def _patches(pixels: Tensor, weight: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, G * G, D): a convolution (D, 3, P, P) with stride P, as the matrix product that it is.

    Patches do not overlap, so that each pixel is copied once; convolutions of this kind find slow kernels on GPUs.
    """
    side, patch = pixels.shape[-1], weight.shape[-1]
    grid = side // patch
    cut = pixels[:, :, : grid * patch, : grid * patch].unflatten(3, (grid, patch)).unflatten(2, (grid, patch))
    return linear(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), weight.flatten(1))


def text_tower(tower: CLIPTextModel, ids: Tensor, lengths: Tensor, checkpointing: bool = False) -> Tensor:
    """Token ids (N, L), padded on the right, and lengths (N,) without padding -> (N, D): the pooler_output of `tower`.

    Best given on the CPU, where counting the tokens waits for no GPU; the result is where the tower is.
    """
    device = tower.embeddings.token_embedding.weight.device
    columns = torch.arange(int(lengths.max()), device=ids.device)
    # each caption once, -1 in its padding; sorted, so that those which begin alike are neighbours
    ids, place = ids[:, : len(columns)].where(columns < lengths[:, None], -1).unique(dim=0, return_inverse=True)
    held = ids >= 0
    first = held.clone()  # (N, L) where no caption above has the same tokens up to this one: here it is computed
    first[1:] &= (ids[1:] == ids[:-1]).cumprod(dim=1) == 0
    # of each token: its own, or that of the next caption above which has one here, as what lies between is the same
    row = torch.where(first, first.flatten().cumsum(0).view_as(first) - 1, 0).cummax(dim=0).values
    tokens, positions = ids[first], columns.expand_as(first)[first]
    spare = spare_rows(len(tokens), device, tower.embeddings.token_embedding.weight.dtype)  # which nobody reads
    tokens, positions = (_send(F.pad(each, (0, spare)), device) for each in (tokens, positions))

    order = held.sum(dim=1).argsort(stable=True)
    sequences = _sequences(held[order], first[order], row[order], spare, device)
    hidden = tower.embeddings.token_embedding(tokens) + tower.embeddings.position_embedding(positions)
    pooled: Tensor = tower.final_layer_norm(_encode(tower, hidden, sequences, checkpointing))
    return repeated(pooled, _send(order.argsort()[place], device))


def _sequences(held: Tensor, first: Tensor, row: Tensor, spare: int, device: torch.device) -> Sequences:
    """Captions sorted by length: where they have a token, where it is computed, and its row; all (N, L)."""
    lengths = held.sum(dim=1)
    counts = _like_length(lengths, device)
    groups, read, computed = [], [], []
    for has, computes, rows in zip(*(each.split(counts) for each in (held, first, row)), strict=True):
        longest = int(has[-1].sum())
        groups.append(Group(len(has), longest, _send(has[:, None, None, :longest], device)))
        read.append(rows[:, :longest].flatten())
        computed.append(computes[:, :longest].flatten())
    places = torch.cat(computed).nonzero().flatten()
    written = F.pad(places[torch.cat(read)[places].argsort()], (0, spare))
    kept = row.gather(1, lengths[:, None] - 1).flatten()
    return Sequences(groups, *(_send(each, device) for each in (kept, torch.cat(read), written)))


def _like_length(lengths: Tensor, device: torch.device) -> list[int]:
    """How many captions, sorted by their lengths (N,), to lay side by side: so many short ones and the rest by itself,
    with the least padding. All together where that leaves out nothing, or on a GPU less than a third: a further group
    is further kernels to launch, for which a GPU waits at small batches. (The third is a guess, not measured.)"""
    count = torch.arange(1, len(lengths) + 1, device=lengths.device)
    padded = count * lengths + (len(lengths) - count) * lengths[-1]  # rows, if the first `count` are a group
    short = int(padded.argmin()) + 1
    pays = padded[short - 1] < padded[-1] * (2 / 3 if device.type == "cuda" else 1)
    return [short, len(lengths) - short] if pays else [len(lengths)]


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device. A contiguous copy from pinned memory does not wait for what the GPU still has to do, any other
    does."""
    waits = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.contiguous().pin_memory().to(device, non_blocking=True) if waits else tensor.to(device)


def _encode(tower: Any, hidden: Tensor, sequences: Sequences, checkpointing: bool) -> Tensor:
    """(T, D) -> (N, D), through all layers."""
    *layers, last = tower.encoder.layers
    for layer in layers:
        if checkpointing and torch.is_grad_enabled():
            # not the reentrant kind: it would lose the gradients, as the input is frozen
            hidden = checkpoint(_layer, layer, hidden, sequences, use_reentrant=False)
        else:
            hidden = _layer(layer, hidden, sequences)
    return _last_layer(last, hidden, sequences)


def _layer(layer: Any, hidden: Tensor, sequences: Sequences) -> Tensor:
    """(T, D) -> (T, D), what a CLIPEncoderLayer makes of it."""
    attention = layer.self_attn
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    normed = layer.layer_norm1(hidden)
    parts = (sequences.side_by_side(each, attention.num_heads) for each in projected(projections, normed))
    mixed = [
        attend(attention, query, key, value, causal=group.seen is not None)
        for group, query, key, value in zip(sequences.groups, *parts, strict=True)
    ]
    hidden = hidden + linear_of(attention.out_proj, sequences.as_rows(mixed))
    return hidden + mlp_of(layer.mlp, layer.layer_norm2(hidden))


def _last_layer(layer: Any, hidden: Tensor, sequences: Sequences) -> Tensor:
    """(T, D) -> (N, D), of what `_layer` would make of it the rows that are kept."""
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    query = attention.q_proj(normed.index_select(0, sequences.kept))
    queries = query.view(len(query), 1, attention.num_heads, -1).transpose(1, 2)
    projections = (attention.k_proj, attention.v_proj)
    parts = (sequences.side_by_side(each, attention.num_heads) for each in projected(projections, normed))
    by_group = zip(sequences.groups, queries.split([group.count for group in sequences.groups]), *parts, strict=True)
    mixed = [attend(attention, q, k, v, seen=group.seen).flatten(1) for group, q, k, v in by_group]
    kept = hidden.index_select(0, sequences.kept) + linear_of(attention.out_proj, _joined(mixed))
    return kept + mlp_of(layer.mlp, layer.layer_norm2(kept))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
