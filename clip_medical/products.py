"""Products with weights, by the library that is fast on this processor.

On an x86 processor torch leaves products in fp32 to MKL. That is Intel's, and on AMD's processors it does without the
widest vector instructions (AVX-512). oneDNN, the other library inside torch, which does the products in bf16, has them
on all: with the weights of ViT-B/32, 3,200 rows and torch 2.14.1 it is twice as fast on a Zen 5, the only one measured.
torch has no public name for oneDNN's product in fp32; the one below is what torch.compile calls. On other processors,
under a torch that cannot tell which it is, and in other formats these functions are torch's own.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

ONEDNN_CAN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _mkl_is_slow() -> bool:
    able: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot say
    return ONEDNN_CAN and "AMD" in able.get("cpu_name", "") and able.get("avx512_f", False)


MKL_IS_SLOW = _mkl_is_slow()
MULTIPLE = 64  # rows


def by_onednn(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether products of such tensors are given to oneDNN here, where torch would leave them to MKL."""
    return MKL_IS_SLOW and device.type == "cpu" and dtype == torch.float32


def spare_rows(count: int, device: torch.device, dtype: torch.dtype) -> int:
    """How many rows to add to `count`, so that batches of different size have products of the same shape.

    For each new shape oneDNN makes a kernel, which takes longer than a product of the tiny CLIP. In half precision
    torch itself gives it the products of a CPU.
    """
    made_for_each = by_onednn(device, dtype) or device.type == "cpu" and dtype.itemsize == 2
    return -count % MULTIPLE if made_for_each else 0


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: (..., in), (out, in), (out,) -> (..., out)."""
    if not by_onednn(rows.device, rows.dtype) or torch.is_autocast_enabled("cpu"):
        return F.linear(rows, weight, bias)
    result: Tensor = _Linear.apply(rows, weight, bias)
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weight)
        return product(rows, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        rows, weight = ctx.saved_tensors
        of_rows, of_weight, of_bias = ctx.needs_input_grad
        flat = grad.flatten(0, -2)
        return (
            product(grad, weight.T) if of_rows else None,
            flat.T @ rows.flatten(0, -2) if of_weight else None,  # by MKL: oneDNN would want it transposed first
            flat.sum(dim=0) if of_bias else None,
        )


# What follows is for the passes of a Function: autograd does not see what oneDNN does.


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """rows @ weight.T + bias, shapes as in `linear`."""
    if not by_onednn(rows.device, rows.dtype):
        return F.linear(rows, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def scaled_product(scale: float, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """scale * rows @ weight.T + bias, of matrices. To addmm the factor is no work; oneDNN has none, so that it is
    applied to the narrower of rows and result."""
    if not by_onednn(rows.device, rows.dtype):
        return torch.addmm(bias, rows, weight.T, alpha=scale)
    if len(weight) > rows.shape[1]:
        return product(scale * rows, weight, bias)
    return product(rows, weight, bias / scale).mul_(scale)


def add_product(to: Tensor, rows: Tensor, weight: Tensor) -> None:
    """to += rows @ weight.T, of matrices, in place."""
    if by_onednn(rows.device, rows.dtype):
        to.add_(product(rows, weight))
    else:
        to.addmm_(rows, weight.T)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b: (T, m), (T, n) -> (m, n). The narrower one first: the other way round oneDNN took a thousand times as
    long, for T = 3,200, 768 columns and 8."""
    if not by_onednn(a.device, a.dtype):
        return a.T @ b
    return product(a.T, b.T) if a.shape[1] < b.shape[1] else product(b.T, a.T).T
