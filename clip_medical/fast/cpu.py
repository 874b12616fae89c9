"""What only a CPU in half precision needs: attention without a slow backward pass, and matrix shapes that recur."""

import torch
from torch import Tensor


def padding_rows(count: int, device: torch.device, dtype: torch.dtype) -> int:
    """Rows to add to a packed batch so that its length is a multiple of 64, in half precision on a CPU; else 0.

    oneDNN computes the matmuls there, and compiles a kernel for each new shape: longer work than a small matmul.
    """
    return -count % 64 if device.type == "cpu" and dtype.itemsize == 2 else 0


def plain_attention(query: Tensor, key: Tensor, value: Tensor, scale: float, causal: bool) -> Tensor:
    """softmax(scale * Q K^T) V for (n, heads, L, d), as three operations.

    For training in bf16 or fp16 on a CPU, where the backward pass of torch's fused kernel takes six times as long.
    """
    scores = (scale * query) @ key.mT
    if causal:
        future = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool).triu(1)
        scores = scores.masked_fill(future, -torch.inf)
    return scores.softmax(dim=-1) @ value
