"""Products with weights, by the library that is fast on this processor.

On a CPU torch leaves products in fp32 to MKL. That is Intel's, and on an AMD processor it does without the widest
vector instructions (AVX-512). oneDNN, the other library inside torch, which does the products in bf16, has them on any
processor: on a Zen 5 it is twice as fast. torch has no public name for oneDNN's product in fp32; the one below is what
torch.compile calls. Everywhere else these functions are torch's own.
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


def _by_onednn(rows: Tensor) -> bool:
    return MKL_IS_SLOW and rows.device.type == "cpu" and rows.dtype == torch.float32


def linear(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """F.linear: (..., in), (out, in), (out,) -> (..., out)."""
    if not _by_onednn(rows) or torch.is_autocast_enabled("cpu"):
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
    if not _by_onednn(rows):
        return F.linear(rows, weight, bias)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")
    return result


def scaled_product(scale: float, rows: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """scale * rows @ weight.T + bias, of matrices. To addmm the factor is no work; oneDNN has none, so that it is
    applied to the narrower of rows and result."""
    if not _by_onednn(rows):
        return torch.addmm(bias, rows, weight.T, alpha=scale)
    if len(weight) > rows.shape[1]:
        return product(scale * rows, weight, bias)
    return product(rows, weight, bias / scale).mul_(scale)


def add_product(to: Tensor, rows: Tensor, weight: Tensor) -> None:
    """to += rows @ weight.T, of matrices, in place."""
    if _by_onednn(rows):
        to.add_(product(rows, weight))
    else:
        to.addmm_(rows, weight.T)


def product_over_rows(a: Tensor, b: Tensor) -> Tensor:
    """a.T @ b: (T, m), (T, n) -> (m, n). oneDNN is slow where its first operand is transposed, so it gets the narrower
    one there: a thousand times as fast for T = 3,200, m = 768 and n = 8."""
    if not _by_onednn(a):
        return a.T @ b
    return product(a.T, b.T) if a.shape[1] < b.shape[1] else product(b.T, a.T).T
