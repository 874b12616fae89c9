"""The physical limit: how many operations a step asks for, how many it does, and how fast the machine multiplies."""

import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode
from transformers import CLIPConfig, CLIPModel

from experiments.contenders import ALPHA, RANK
from lora import inject


def published_flops(lengths: Tensor) -> int:
    """Floating-point operations that a step on as many pairs asks for: those of transformers' CLIP with the adapter,
    forward and backward, each picture and each caption by itself and none padded, counted from the shapes alone.

    The operations of "model FLOPs utilization" (Chowdhery et al. 2022, PaLM, appendix B): 8.8e9 for the forward pass of
    a picture, 6.0e9 for that of a caption of 77 tokens, and as much again backward, as frozen weights get no gradient.
    """
    with torch.device("meta"):
        model = CLIPModel(CLIPConfig())
        inject(model, rank=RANK, alpha=ALPHA)
        towers: Any = model.get_image_features, model.get_text_features

        def count(encode: Any, given: Tensor) -> int:
            return count_flops(lambda: encode(given).pooler_output.sum().backward())

        picture = count(towers[0], torch.empty(1, 3, 224, 224))
        of_length = {n: count(towers[1], torch.zeros(1, n, dtype=torch.long)) for n in set(lengths.tolist())}
    return sum(picture + of_length[n] for n in lengths.tolist())


def count_flops(action: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions that `action` really does."""

    def attention(query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 4 * math.prod(query) * int(key[-2])

    def attention_backward(grad: Any, query: Any, key: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
        return 10 * math.prod(query) * int(key[-2])  # five products, of which one is done again

    fused = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu  # torch knows those of a GPU by itself
    mapping = {
        fused: attention,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward,
    }
    with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
        action()
    return counter.get_total_flops()


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of a product of two matrices, over the shapes of ViT-B/32 and a large square."""
    best, shapes, times = 0.0, [(3200, 768, 768), (3200, 768, 3072), (2048, 2048, 2048)], 1
    if device.type == "cuda":  # where one product is over before the clock has been read
        shapes, times = [*shapes, (8192, 8192, 8192)], 20
    for n, k, m in shapes:
        a, b = torch.randn(n, k, device=device, dtype=dtype), torch.randn(k, m, device=device, dtype=dtype)
        torch.mm(a, b)
        for _ in range(3):
            seconds = timed(device, lambda a, b: [torch.mm(a, b) for _ in range(times)], a, b)
            best = max(best, times * 2 * n * k * m / seconds)
    return best


def timed(device: torch.device, action: Callable[..., Any], *arguments: Any) -> float:
    """Seconds that `action(*arguments)` takes, all kernels done."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    began = time.perf_counter()
    action(*arguments)
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - began
