"""The two towers of CLIP, which compute in their last layer no more than is read of it.

A tower turns a sequence of L tokens into L vectors and keeps one: the class token's of a picture, the end token's of a
caption. The layers below the last need all L, as each token attends to the others. The last one needs the keys and
values of all, but query, output projection and the whole MLP, ten of its twelve D x D products, of that one token
alone. To leave out the rest saves 7 % of the twelve layers of ViT-B/32, forward and backward, and more of a small CLIP.
Values and gradients are those of transformers' towers to rounding.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPTextModel, CLIPVisionModel


def image_tower(tower: CLIPVisionModel, pixels: Tensor) -> Tensor:
    """Normalised pixels (N, 3, S, S) -> (N, D): what tower(pixels).pooler_output holds."""
    hidden = tower.pre_layrnorm(tower.embeddings(pixels))
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, None)
    class_token = torch.zeros(len(hidden), dtype=torch.long, device=hidden.device)
    pooled: Tensor = tower.post_layernorm(_read_at(tower.encoder.layers[-1], hidden, class_token))
    return pooled


def text_tower(tower: CLIPTextModel, ids: Tensor, lengths: Tensor) -> Tensor:
    """Token ids (N, L), the last of the `lengths` (N,) of each the end token -> (N, D): the pooler_output of `tower`.

    No mask hides what follows the end token: CLIP's text is causal, so that it changes nothing before.
    """
    hidden = tower.embeddings(input_ids=ids)
    mask = None
    if tower.config._attn_implementation == "eager":  # which has to be shown what the fused kernels need only be told
        mask = torch.full((ids.shape[1],) * 2, -torch.inf, dtype=hidden.dtype, device=hidden.device).triu(1)
    for layer in tower.encoder.layers[:-1]:
        hidden = layer(hidden, mask, is_causal=True)
    pooled: Tensor = tower.final_layer_norm(_read_at(tower.encoder.layers[-1], hidden, lengths - 1, causal=True))
    return pooled


def _read_at(layer: Any, hidden: Tensor, at: Tensor, causal: bool = False) -> Tensor:
    """hidden (N, L, D), at (N,) -> (N, D): of what the CLIPEncoderLayer makes of `hidden`, the token `at` of each.

    causal: that token sees itself and those before it.
    """
    attention, rows = layer.self_attn, torch.arange(len(hidden), device=hidden.device)
    heads = (len(hidden), -1, attention.num_heads, attention.head_dim)
    normed = layer.layer_norm1(hidden)
    query = attention.q_proj(normed[rows, at]).view(heads).transpose(1, 2)
    key, value = (projection(normed).view(heads).transpose(1, 2) for projection in (attention.k_proj, attention.v_proj))
    seen = (torch.arange(hidden.shape[1], device=hidden.device) <= at[:, None])[:, None, None] if causal else None
    dropout = attention.dropout if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(query, key, value, seen, dropout, scale=attention.scale)
    read = hidden[rows, at] + attention.out_proj(mixed.flatten(1))
    result: Tensor = read + layer.mlp(layer.layer_norm2(read))
    return result
