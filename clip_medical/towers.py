"""The two towers of CLIP, which compute no more than what is read of them: no padding, and one token in the last layer.

A tower turns a sequence of L tokens into L vectors and keeps one: the class token's of a picture, the end token's of a
caption. Two things follow.

Captions differ in length, those of radiology fill less than half of their 77 tokens, and text is causal, so that what
follows the end token changes nothing before it. All layers but attention work on each token by itself: they see the
tokens of all captions as rows of one matrix, with nothing in between. Attention alone, a few per cent of the
arithmetic, needs them side by side, padded to the longest: short ones and long ones by themselves where that pays.

The layers below the last need all L, as each token attends to the others. The last one needs the keys and values of
all, but query (one D x D product), output projection (one) and the whole MLP (eight) of that one token alone.

Values and gradients are those of transformers' towers to rounding. What a layer is made of is in fused.py.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import CLIPTextModel, CLIPVisionModel

from clip_medical.fused import attend, mlp_of, picked, projected


@dataclass(frozen=True)
class Group:
    """Sequences that attention sees side by side: n of them, whose tokens are the rows of a matrix (t, D), one sequence
    after the other."""

    count: int  # n
    longest: int  # L
    tokens: int  # t
    places: Tensor | None = None  # (t,) of each row in the padded (n * L); None: all are equally long, t = n * L
    seen: Tensor | None = None  # (n, 1, 1, L) of causal text, false in the padding; None: images

    def side_by_side(self, rows: Tensor, heads: int) -> Tensor:
        """(t, D) -> (n, heads, L, D / heads), zero in the padding."""
        if self.places is not None:
            rows = rows.new_zeros(self.count * self.longest, rows.shape[1]).index_copy_(0, self.places, rows)
        return rows.view(self.count, self.longest, heads, -1).transpose(1, 2)

    def as_rows(self, by_head: Tensor) -> Tensor:
        """(n, heads, L, D / heads) -> (t, D), the way back."""
        rows = by_head.transpose(1, 2).reshape(self.count * self.longest, -1)
        return rows if self.places is None else picked(rows, self.places)


@dataclass(frozen=True)
class Sequences:
    """N sequences, whose tokens are the rows of a matrix (T, D), group after group."""

    groups: list[Group]
    kept: Tensor  # (N,) the row of each sequence that is kept in the end

    def split(self, matrix: Tensor) -> tuple[Tensor, ...]:
        """(T, D) -> (t, D) of each group."""
        return (matrix,) if len(self.groups) == 1 else matrix.split([group.tokens for group in self.groups])


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
    sequences = Sequences([Group(count, length, count * length)], kept)
    pooled: Tensor = tower.post_layernorm(_encode(tower, hidden.flatten(0, 1), sequences, checkpointing))
    return pooled


def _patches(pixels: Tensor, weight: Tensor) -> Tensor:
    """(N, 3, S, S) -> (N, G * G, D): a convolution (D, 3, P, P) with stride P, as the matrix product that it is.

    Patches do not overlap, so that each pixel is copied once; convolutions of this kind find slow kernels on GPUs.
    """
    side, patch = pixels.shape[-1], weight.shape[-1]
    grid = side // patch
    cut = pixels[:, :, : grid * patch, : grid * patch].unflatten(3, (grid, patch)).unflatten(2, (grid, patch))
    return F.linear(cut.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2), weight.flatten(1))


def text_tower(tower: CLIPTextModel, ids: Tensor, lengths: Tensor, checkpointing: bool = False) -> Tensor:
    """Token ids (N, L), padded on the right, and lengths (N,) without padding -> (N, D): the pooler_output of `tower`.

    Best given on the CPU, where counting the tokens waits for no GPU; the result is where the tower is.
    """
    device = tower.embeddings.token_embedding.weight.device
    order = lengths.argsort(stable=True)
    ids, lengths = ids[order], lengths[order]
    columns = torch.arange(int(lengths[-1]), device=ids.device)
    held = columns < lengths[:, None]
    tokens = _send(ids[:, : len(columns)][held], device)
    positions = _send(columns.expand_as(held)[held], device)
    groups = [_group(each, device) for each in held.split(_like_length(lengths, device))]
    sequences = Sequences(groups, _send(lengths.cumsum(0) - 1, device))
    hidden = tower.embeddings.token_embedding(tokens) + tower.embeddings.position_embedding(positions)
    pooled: Tensor = tower.final_layer_norm(_encode(tower, hidden, sequences, checkpointing))
    return pooled[_send(order.argsort(), device)]


def _like_length(lengths: Tensor, device: torch.device) -> list[int]:
    """How many captions, sorted by their lengths (N,), to lay side by side: so many short ones and the rest by itself,
    with the least padding. All together where that leaves out nothing, or on a GPU less than a third: a further group
    is further kernels to launch, for which a GPU waits at small batches. (The third is a guess, not measured.)"""
    count = torch.arange(1, len(lengths) + 1, device=lengths.device)
    padded = count * lengths + (len(lengths) - count) * lengths[-1]  # rows, if the first `count` are a group
    short = int(padded.argmin()) + 1
    pays = padded[short - 1] < padded[-1] * (2 / 3 if device.type == "cuda" else 1)
    return [short, len(lengths) - short] if pays else [len(lengths)]


def _group(held: Tensor, device: torch.device) -> Group:
    """Captions, the longest of which is the last; held (n, L): true where they have a token."""
    held = held[:, held[-1]]  # (n, L) of these
    places = held.flatten().nonzero().flatten()
    return Group(len(held), held.shape[1], len(places), _send(places, device), _send(held[:, None, None], device))


def _send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device. A copy from pinned memory does not wait for what the GPU still has to do, any other does."""
    waits = device.type == "cuda" and tensor.device.type == "cpu"
    return tensor.pin_memory().to(device, non_blocking=True) if waits else tensor.to(device)


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
    attention, mixed = layer.self_attn, []
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    parts = (sequences.split(each) for each in projected(projections, layer.layer_norm1(hidden)))
    for group, *rows in zip(sequences.groups, *parts, strict=True):
        query, key, value = (group.side_by_side(each, attention.num_heads) for each in rows)
        mixed.append(group.as_rows(attend(attention, query, key, value, causal=group.seen is not None)))
    hidden = hidden + attention.out_proj(_joined(mixed))
    return hidden + mlp_of(layer.mlp, layer.layer_norm2(hidden))


def _last_layer(layer: Any, hidden: Tensor, sequences: Sequences) -> Tensor:
    """(T, D) -> (N, D), of what `_layer` would make of it the rows that are kept."""
    attention, normed, mixed = layer.self_attn, layer.layer_norm1(hidden), []
    queries = attention.q_proj(normed[sequences.kept])[:, None].unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
    parts = (sequences.split(each) for each in projected((attention.k_proj, attention.v_proj), normed))
    counts = [group.count for group in sequences.groups]
    for group, query, *rows in zip(sequences.groups, queries.split(counts), *parts, strict=True):
        key, value = (group.side_by_side(each, attention.num_heads) for each in rows)
        mixed.append(attend(attention, query, key, value, seen=group.seen).flatten(1))
    kept = hidden[sequences.kept] + attention.out_proj(_joined(mixed))
    return kept + mlp_of(layer.mlp, layer.layer_norm2(kept))


def _joined(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)
