"""The physical limit: how many operations a step asks for, how many it does, and how fast the machine multiplies."""

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count
from transformers import CLIPConfig, CLIPModel

from clip_medical.products import ONEDNN_CAN, product
from experiments.contenders import ALPHA, RANK
from lora import inject


def published_flops(lengths: Tensor) -> list[int]:
    """Floating-point operations that a step asks for, of each pair: those of transformers' CLIP with the adapter, for a
    picture and for a caption of each length (N,), not padded, forward and backward; counted from the shapes alone.

    The operations of "model FLOPs utilization" (Chowdhery et al. 2022, PaLM, appendix B): 8.8e9 for the forward pass of
    a picture, 6.0e9 for that of a caption of 77 tokens, and as much again backward, as frozen weights get no gradient.
    """
    with torch.device("meta"):
        model: Any = CLIPModel(CLIPConfig())
        inject(model, rank=RANK, alpha=ALPHA)

        def count(tower: Any, projection: Any, given: Tensor) -> int:
            return count_flops(lambda: projection(tower(given).pooler_output).sum().backward())

        picture = count(model.vision_model, model.visual_projection, torch.empty(1, 3, 224, 224))
        caption = {
            length: count(model.text_model, model.text_projection, torch.zeros(1, length, dtype=torch.long))
            for length in set(lengths.tolist())
        }
    return [picture + caption[length] for length in lengths.tolist()]


def count_flops(action: Callable[[], Any]) -> int:
    """Floating-point operations of the matrix products, convolutions and attentions that `action` really does."""
    aten = torch.ops.aten
    unknown: dict[Any, Any] = {  # to torch's counter: products in place or by oneDNN, and the fused attention of a CPU
        aten.addmm_: lambda to, a, b, *_, **__: 2 * a[0] * a[1] * b[1],
        aten._scaled_dot_product_flash_attention_for_cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        aten._scaled_dot_product_flash_attention_for_cpu_backward: (
            lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v)
        ),
    }
    if ONEDNN_CAN:
        unknown[torch.ops.mkldnn._linear_pointwise] = lambda a, w, *_, **__: 2 * a[:-1].numel() * w[0] * w[1]
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        action()
    return counter.get_total_flops()


def matrix_product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of a product of two matrices, over the shapes of ViT-B/32 and a large square, by the library that
    is the faster one on this processor."""
    best, shapes, times = 0.0, [(3200, 768, 768), (3200, 768, 3072), (2048, 2048, 2048)], 1
    if device.type == "cuda":  # where one product is over before the clock has been read
        shapes, times = [*shapes, (8192, 8192, 8192)], 20
    for n, k, m in shapes:
        a, b = torch.randn(n, k, device=device, dtype=dtype), torch.randn(k, m, device=device, dtype=dtype)
        product(a, b.T)
        for _ in range(3):
            seconds = timed(device, lambda a, b: [product(a, b.T) for _ in range(times)], a, b)
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
