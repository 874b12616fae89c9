"""Pieces of a transformer layer as autograd Functions of our own: what the modules compute, in fewer tensors.

Autograd takes one operation at a time: each makes a new tensor, and where several read the same one their gradients
are added up afterwards. Here products add to what is there already, and one tensor serves all that read it; which
library does the products is the matter of products.py.

Values and gradients are those of the modules, to rounding. What these functions do not know (dropout, learned weights,
autocast) they call as it is; forward hooks on the layers inside are not run.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from clip_medical.products import add_product, by_onednn, linear, product, product_over_rows, scaled_product
from lora import LoRALinear


def projected(layers: Sequence[nn.Module], rows: Tensor) -> Sequence[Tensor]:
    """layer(rows) of each layer, which all read the same rows (T, in); one that is switched off is its base.

    For frozen layers, some with LoRA: with the A of all of them in one matrix, the rows are read once for all branches,
    and the gradients of all products and branches add up in one tensor.
    """
    layers = [layer.base if type(layer) is LoRALinear and layer.strength == 0 else layer for layer in layers]
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
    known = all(_is_frozen(layer) or _is_plain_lora(layer) for layer in layers)
    if not adapted or not known or torch.is_autocast_enabled(rows.device.type):
        return [_alone(layer, rows) for layer in layers]
    bases = [layer.base if isinstance(layer, LoRALinear) else layer for layer in layers]
    ranks = [layer.rank if isinstance(layer, LoRALinear) else 0 for layer in layers]
    # scaled is A, where LoRALinear scales B: one product for all of them, and autograd sees to gradients and casts
    A = torch.cat([layer.strength * layer.scaling * layer.lora_A for layer in adapted]).to(rows.dtype)
    results: tuple[Tensor, ...] = _Projected.apply(rows, bases, ranks, A, *[b.lora_B.to(rows.dtype) for b in adapted])
    return results


def linear_of(layer: nn.Module, rows: Tensor) -> Tensor:
    """layer(rows), for rows (T, in)."""
    return projected([layer], rows)[0]


class _Projected(torch.autograd.Function):
    """y = W x + b + B A x of several layers: A (R, in), scaled, of all of them; B (out, r) of each that has a rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bases: list[nn.Linear], ranks: list[int], A: Tensor, *Bs: Tensor) -> Any:
        inner, each_B, results = product(rows, A), iter(Bs), []
        for base, part in zip(bases, inner.split(ranks, dim=1), strict=True):
            results.append(product(rows, base.weight, base.bias))
            if part.shape[1]:
                add_product(results[-1], part, next(each_B))
        ctx.save_for_backward(rows, inner, A, *Bs)
        ctx.bases, ctx.ranks = bases, ranks
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, A, *Bs = ctx.saved_tensors
        of_adapted = [grad for grad, rank in zip(grads, ctx.ranks, strict=True) if rank]
        grad_inner = torch.cat([product(grad, B.T) for grad, B in zip(of_adapted, Bs, strict=True)], dim=1)
        parts = inner.split([rank for rank in ctx.ranks if rank], dim=1)
        grad_Bs = [product_over_rows(grad, part) for grad, part in zip(of_adapted, parts, strict=True)]
        grad_rows = None
        if ctx.needs_input_grad[0]:
            grad_rows = product(grad_inner, A.T)
            for grad, base in zip(grads, ctx.bases, strict=True):
                add_product(grad_rows, grad, base.weight.T)
        return grad_rows, None, None, product_over_rows(grad_inner, rows), *grad_Bs


SLOPE = 1.702


def mlp_of(mlp: Any, rows: Tensor) -> Tensor:
    """(T, D) -> (T, D), what a CLIPMLP makes of it.

    CLIP's activation x * sigmoid(1.702 x) works on the widest tensors of the model. As it is written autograd makes
    eight of them, forward and backward, and keeps two. But with z = 1.702 x it is silu(z) / 1.702, and its derivative
    is silu'(z), as the constants cancel: torch has both as one kernel each.
    """
    quick = mlp.config.hidden_act == "quick_gelu"
    if quick and _is_frozen(mlp.fc1) and _is_frozen(mlp.fc2) and not torch.is_autocast_enabled(rows.device.type):
        result: Tensor = _FrozenMLP.apply(rows, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
        return result
    inner = linear_of(mlp.fc1, rows)
    return linear_of(mlp.fc2, F.silu(SLOPE * inner) / SLOPE if quick else mlp.activation_fn(inner))


class _FrozenMLP(torch.autograd.Function):
    """W2 silu(z) / 1.702 + b2 with z = 1.702 (W1 x + b1)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        z = scaled_product(SLOPE, rows, w1, SLOPE * b1)
        ctx.save_for_backward(z, w1, w2)
        return scaled_product(1 / SLOPE, F.silu(z), w2, b2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None, None]:
        z, w1, w2 = ctx.saved_tensors
        inner = product(grad, w2.T)
        torch.ops.aten.silu_backward.grad_input(inner, z, grad_input=inner)
        return product(inner, w1.T), None, None, None, None


def attend(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool = False, seen: Tensor | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of each head, (n, heads, L, d). causal: each token sees itself and those before it, so
    no text token sees padding; seen (n, 1, 1, L): keys that a single query sees.

    torch's fused kernel has a backward pass that plain products outrun on a CPU: in half precision several times over,
    in fp32 for sequences up to about twice the width of a head. Beyond that the L x L probabilities, which they keep,
    take too much memory. In evaluation the fused kernel is the faster. The mode decides, not whether a graph is kept:
    the first pass of a chunked step keeps none, and the second has to repeat it to the bit.
    """
    dropout = attention.dropout if attention.training else 0.0
    short = key.shape[2] <= 2 * key.shape[3] or key.dtype.itemsize == 2
    if attention.training and key.device.type == "cpu" and short and not dropout:
        if causal:
            seen = torch.ones(key.shape[2], key.shape[2], dtype=torch.bool).tril()
        result: Tensor = _Attention.apply(query, key, value, attention.scale, seen)
        return result
    return F.scaled_dot_product_attention(query, key, value, seen, dropout, causal, scale=attention.scale)


class _Attention(torch.autograd.Function):
    """P V with P = softmax(scale Q K^T), -inf where `seen` is false; Q, K, V (n, heads, L, d)."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float, seen: Tensor | None) -> Tensor:
        q, k, v = (each.flatten(0, 1) for each in (query, key, value))
        scores = _scaled_bmm(scale, q, k.mT)
        if seen is not None:
            scores.view(*query.shape[:3], -1).masked_fill_(~seen, -torch.inf)
        p = scores.softmax(dim=2)
        ctx.save_for_backward(q, k, v, p)
        ctx.scale, ctx.heads = scale, query.shape[1]
        return (p @ v).unflatten(0, (-1, ctx.heads))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, p = ctx.saved_tensors
        grad = grad.flatten(0, 1)
        grad_scores = torch._softmax_backward_data(grad @ v.mT, p, 2, p.dtype)
        grads = _scaled_bmm(ctx.scale, grad_scores, k), _scaled_bmm(ctx.scale, grad_scores.mT, q), p.mT @ grad
        return *(each.unflatten(0, (-1, ctx.heads)) for each in grads), None, None


def _scaled_bmm(scale: float, a: Tensor, b: Tensor) -> Tensor:
    """scale * a @ b, matrix by matrix."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


class _Repeated(torch.autograd.Function):
    """rows.index_select(0, places), a row any number of times. Its gradients are added up in fp32 on every device: in
    bf16 a sum of ones stays at 256, and all captions of a batch read the start token."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.shape = rows.shape
        return rows.index_select(0, places)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        wide = torch.promote_types(grad.dtype, torch.float32)
        return grad.new_zeros(ctx.shape, dtype=wide).index_add_(0, places, grad.to(wide)).to(grad.dtype), None


def repeated(rows: Tensor, places: Tensor) -> Tensor:
    """rows[places], (T, D) -> (P, D)."""
    result: Tensor = _Repeated.apply(rows, places)
    return result


def _is_frozen(layer: nn.Module) -> bool:
    """Whether it is an nn.Linear with a bias that does not learn; no subclass, which may compute something else."""
    if type(layer) is not nn.Linear or layer.bias is None:
        return False
    return not (layer.weight.requires_grad or layer.bias.requires_grad)


def _is_plain_lora(layer: nn.Module) -> bool:
    """Whether it computes W x + b + scaling * B A x at the moment, without dropout."""
    if type(layer) is not LoRALinear or not _is_frozen(layer.base):
        return False
    return not (layer.training and layer.dropout)


def _alone(layer: nn.Module, rows: Tensor) -> Tensor:
    """layer(rows), by the faster library where that is not the layer's own."""
    if type(layer) is nn.Linear and by_onednn(rows.device, rows.dtype):
        return linear(rows, layer.weight, layer.bias)
    result: Tensor = layer(rows)
    return result
