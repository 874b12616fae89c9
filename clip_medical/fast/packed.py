"""CLIP encoders on packed sequences.

A radiology caption fills less than half of CLIP's 77 tokens, so most of a padded text batch is wasted work. Here a
batch of captions is one sequence of T token rows without padding, and captions that start with the same tokens share
those rows: text attention is causal, so a shared prefix has the same hidden states in all of them. Transformers' own
encoder layers run on these rows, with whatever LoRALinear layers are injected in them. Only attention mixes tokens, so
only attention unpacks the rows into a padded batch: see `packed_attention`, which transformers calls for "packed".

    <start> CT of the chest <end>        two captions: 8 rows (T) instead of 12 padded tokens (N * L)
                      head  <end>

CLIP reads one token of each sequence: the class token of an image, the end token of a caption. So the last layer needs
keys and values of all tokens, but query, output projection and MLP (five sixths of its parameters) of that token alone.

Features and gradients equal transformers' to rounding; `fast.check` verifies that at the start of each run.
"""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, CLIPModel
from transformers.activations import QuickGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask


class Packing(NamedTuple):
    """Where the T rows of N distinct captions stand in the padded batch, in which attention mixes them."""

    gather: Tensor  # (N * L,) row of each place; some row in the padding, which no token attends to
    scatter: Tensor  # (T,) place that each row is read from
    end: Tensor  # (N,) row of each caption's end token
    valid: Tensor  # (N, 1, 1, L) bool, False in the padding


IMAGES = object()  # passed as `packing` for images, which are all of one length


def pack(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor, Packing, Tensor]:
    """Pack captions (ids (N, L), lengths (N,), on the CPU) -> tokens (T,), positions (T,), packing, inverse (N,).

    Equal captions are packed once; `inverse` is the place of each caption among the distinct ones.
    """
    columns = torch.arange(int(lengths.max()))
    # Sorted, so that captions with a common prefix are neighbours. -1 in the padding.
    ids, inverse = ids[:, : len(columns)].where(columns < lengths[:, None], -1).unique(dim=0, return_inverse=True)
    valid = ids >= 0
    new = valid.clone()  # False where the caption above has the same tokens up to here: the row is shared
    new[1:] &= (ids[1:] == ids[:-1]).cumprod(dim=1) == 0
    # A shared token takes the row of the nearest caption above that has a row in its column.
    row = torch.where(new, new.flatten().cumsum(0).view_as(new) - 1, 0).cummax(dim=0).values
    end = row.gather(1, valid.sum(dim=1, keepdim=True) - 1).flatten()
    packing = Packing(row.flatten(), new.flatten().nonzero().flatten(), end, valid[:, None, None])
    return ids[new], columns.expand_as(new)[new], packing, inverse


def packed_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any = None, *,
    packing: Any = None, **options: Any,
) -> tuple[Tensor, Any]:  # fmt: skip
    """Attend within each caption of a packed batch: query, key, value (1, heads, T, d) -> (1, T, heads, d).

    Without `packing` (the reference encoder on the same model) this is transformers' own SDPA.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    causal = packing is not IMAGES
    if causal:
        query, key, value = (unpack(x[0].transpose(0, 1), packing) for x in (query, key, value))
    mixed = F.scaled_dot_product_attention(query, key, value, is_causal=causal, scale=options["scaling"])
    mixed = mixed.transpose(1, 2)  # (N, L, heads, d)
    return (mixed.flatten(0, 1).index_select(0, packing.scatter)[None] if causal else mixed), None


AttentionInterface.register("packed", packed_attention)
AttentionMaskInterface.register("packed", sdpa_mask)


def unpack(rows: Tensor, packing: Packing) -> Tensor:
    """The captions as a padded batch, shared rows repeated: (T, heads, d) -> (N, heads, L, d).

    The backward pass adds up the gradients of a shared row. It does so in fp32: in bf16 a sum of ones stays at 256,
    and every caption shares the start token. On a CPU torch already accumulates in fp32.
    """
    wide = rows if rows.device.type == "cpu" else rows.float()
    padded: Tensor = wide.index_select(0, packing.gather).to(rows.dtype).unflatten(0, (len(packing.valid), -1))
    return padded.transpose(1, 2)


class QuickGELU(nn.Module):
    """x * sigmoid(1.702 x), CLIP's activation, as silu(1.702 x) / 1.702: autograd keeps one wide tensor, not three."""

    def forward(self, x: Tensor) -> Tensor:
        return F.silu(1.702 * x) / 1.702


class PackedEncoder:
    """The fast encoder for one model. It changes two settings of that model, both harmless to the reference encoder:
    the attention implementation ("packed", which is SDPA where nothing is packed) and the form of QuickGELU."""

    name = "fast"

    def __init__(self, model: CLIPModel) -> None:
        model.set_attn_implementation("packed")
        for module in model.modules():
            if isinstance(getattr(module, "activation_fn", None), QuickGELUActivation):
                module.activation_fn = QuickGELU()

    def image(self, model: CLIPModel, pixel_values: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, S, S) -> (N, D)."""
        tower: Any = model.vision_model
        hidden = tower.pre_layrnorm(tower.embeddings(pixel_values))  # (N, L, width); transformers' spelling
        *layers, last = tower.encoder.layers
        for layer in layers:
            hidden = layer(hidden, None, packing=IMAGES)
        pooled = last_layer(last, hidden, hidden[:, 0], None)
        features: Tensor = model.visual_projection(tower.post_layernorm(pooled))
        return features

    def text(self, model: CLIPModel, ids: Tensor, lengths: Tensor) -> Tensor:
        """Encode token ids (N, L), padded on the right, of `lengths` (N,) tokens each -> (N, D)."""
        tower: Any = model.text_model
        weight = tower.embeddings.token_embedding.weight
        tokens, positions, packing, inverse = pack(ids.cpu(), lengths.cpu())
        tensors = [tokens, positions, inverse, *packing]
        if weight.is_cuda:  # from pinned memory the copy does not wait for kernels that the GPU still has queued
            tensors = [x.contiguous().pin_memory() for x in tensors]
        tokens, positions, inverse, *rest = (x.to(weight.device, non_blocking=weight.is_cuda) for x in tensors)
        packing = Packing(*rest)
        hidden = tower.embeddings.token_embedding(tokens) + tower.embeddings.position_embedding(positions)
        hidden = hidden[None]  # (1, T, width): the packed batch is one sequence to all that is not attention
        *layers, last = tower.encoder.layers
        for layer in layers:
            hidden = layer(hidden, None, packing=packing)
        pooled = last_layer(last, hidden, hidden[0].index_select(0, packing.end), packing)
        features: Tensor = model.text_projection(tower.final_layer_norm(pooled).index_select(0, inverse))
        return features


def last_layer(layer: Any, hidden: Tensor, pooled: Tensor, packing: Packing | None) -> Tensor:
    """The output of the last encoder layer at the pooled tokens (N, width), whose inputs are `pooled`.

    hidden: inputs of all tokens, (N, L, width) of images, (1, T, width) of a packed batch of captions.
    """
    attention, normed = layer.self_attn, layer.layer_norm1(hidden)
    query = attention.q_proj(layer.layer_norm1(pooled)).unflatten(-1, (attention.num_heads, -1))[:, :, None]
    key, value = (projection(normed) for projection in (attention.k_proj, attention.v_proj))
    key, value = (rows.unflatten(-1, (attention.num_heads, -1)) for rows in (key, value))
    if packing is None:
        key, value, valid = key.transpose(1, 2), value.transpose(1, 2), None
    else:
        key, value, valid = unpack(key[0], packing), unpack(value[0], packing), packing.valid
    mixed = F.scaled_dot_product_attention(query, key, value, valid, scale=attention.scale).flatten(1)
    pooled = pooled + attention.out_proj(mixed)
    result: Tensor = pooled + layer.mlp(layer.layer_norm2(pooled))
    return result
