"""CLIP's activation x * sigmoid(1.702 x), with a quarter of the tensors that autograd makes of it.

It works on the widest tensors of the model, four times as wide as the residual stream, and does almost no arithmetic:
its time goes into memory that is taken, written and given back. Autograd makes eight tensors of it, and keeps two for
the backward pass. But with z = 1.702 x it is silu(z) / 1.702, and its derivative is silu'(z), as the constants cancel:
torch has both as one kernel each. That makes two tensors, of which neither is kept: x is enough.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from transformers.activations import QuickGELUActivation

SLOPE = 1.702


class _ThroughSiLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return F.silu(SLOPE * x, inplace=True).div_(SLOPE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        z = SLOPE * x
        result: Tensor = torch.ops.aten.silu_backward.grad_input(grad, z, grad_input=z)
        return result


class QuickGELU(QuickGELUActivation):
    """transformers' module, equal to it to rounding. Any shape, any floating type."""

    def forward(self, input: Tensor) -> Tensor:
        if torch.is_grad_enabled() and input.requires_grad:
            trained: Tensor = _ThroughSiLU.apply(input)
            return trained
        plain: Tensor = super().forward(input)  # also what an export traces
        return plain


def use_quick_gelu(model: nn.Module) -> None:
    """Put it in place of each of transformers' QuickGELUs; a model with another activation stays as it is."""
    for module in model.modules():
        for name, child in module.named_children():
            if type(child) is QuickGELUActivation:
                setattr(module, name, QuickGELU())
