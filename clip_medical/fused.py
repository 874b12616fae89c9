"""Parts of a transformer layer whose gradients are written out, as autograd's own way does more than it must.

Autograd takes one operation at a time: each keeps what it needs and makes a new tensor of the size of its input, and
where several read the same tensor their gradients are added up afterwards. Here matrix products add to what is there
already (addmm_), one tensor serves all that read it, and frozen weights get no gradient. Each function returns what the
layers would, values and gradients, to rounding; where they are other layers than it knows, it calls them as they are.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from lora import LoRALinear


def projected(layers: Sequence[nn.Module], rows: Tensor) -> Sequence[Tensor]:
    """layer(rows) of each layer, which all read the same rows (T, in).

    For LoRA layers and frozen ones: with the A of all of them in one matrix, the rows are read once for all branches,
    and so are they in the backward pass, where the gradients of all products and branches add up in one tensor.
    """
    adapted = [layer for layer in layers if isinstance(layer, LoRALinear)]
    known = all(_is_linear(layer) if layer not in adapted else _is_plain_lora(layer) for layer in layers)
    if not adapted or not known or torch.is_autocast_enabled(rows.device.type):
        return [layer(rows) for layer in layers]
    bases = [layer.base if isinstance(layer, LoRALinear) else layer for layer in layers]
    ranks = [layer.rank if isinstance(layer, LoRALinear) else 0 for layer in layers]
    A = torch.cat([layer.strength * layer.scaling * layer.lora_A for layer in adapted]).to(rows.dtype)
    results: tuple[Tensor, ...] = _Projected.apply(rows, bases, ranks, A, *[b.lora_B.to(rows.dtype) for b in adapted])
    return results


class _Projected(torch.autograd.Function):
    """y = W x + b + B A x of several layers; A (R, in) is that of all of them, B (out, r) that of each with a rank."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, bases: list[nn.Linear], ranks: list[int], A: Tensor, *Bs: Tensor) -> Any:
        inner, each_B, results = rows @ A.T, iter(Bs), []
        for base, part in zip(bases, inner.split(ranks, dim=1), strict=True):
            results.append(F.linear(rows, base.weight, base.bias))
            if part.shape[1]:
                results[-1].addmm_(part, next(each_B).T)
        ctx.save_for_backward(rows, inner, A, *Bs)
        ctx.bases, ctx.ranks = bases, ranks
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, A, *Bs = ctx.saved_tensors
        of_adapted = [grad for grad, rank in zip(grads, ctx.ranks, strict=True) if rank]
        to_inner = torch.cat([grad @ B for grad, B in zip(of_adapted, Bs, strict=True)], dim=1)
        parts = inner.split([rank for rank in ctx.ranks if rank], dim=1)
        to_B = [grad.T @ part for grad, part in zip(of_adapted, parts, strict=True)]
        to_rows = None
        if ctx.needs_input_grad[0]:
            to_rows = to_inner @ A
            for grad, base in zip(grads, ctx.bases, strict=True):
                to_rows.addmm_(grad, base.weight)
        return to_rows, None, None, to_inner.T @ rows, *to_B


def plus_projected(hidden: Tensor, layer: Any, rows: Tensor) -> Tensor:
    """hidden + layer(rows); hidden (T, out), rows (T, in). A frozen layer adds its product to hidden and bias."""
    if not _is_linear(layer) or torch.is_autocast_enabled(rows.device.type):
        return hidden + layer(rows)
    return (hidden + layer.bias).addmm_(rows, layer.weight.T)


SLOPE = 1.702


def plus_mlp(hidden: Tensor, mlp: Any, rows: Tensor) -> Tensor:
    """hidden + mlp(rows) with a CLIPMLP; (T, D) all three.

    CLIP's activation x * sigmoid(1.702 x) works on the widest tensors of the model. As it is written autograd makes
    eight of them, forward and backward, and keeps two. But with z = 1.702 x it is silu(z) / 1.702, and its derivative
    is silu'(z), as the constants cancel: torch has both as one kernel each.
    """
    if mlp.config.hidden_act != "quick_gelu":
        result: Tensor = hidden + mlp(rows)
    elif _is_linear(mlp.fc1) and _is_linear(mlp.fc2) and not torch.is_autocast_enabled(rows.device.type):
        result = _PlusMLP.apply(hidden, rows, mlp.fc1.weight, mlp.fc1.bias, mlp.fc2.weight, mlp.fc2.bias)
    else:  # an adapter does its own products, even a frozen one
        result = hidden + mlp.fc2(F.silu(SLOPE * mlp.fc1(rows)) / SLOPE)
    return result


class _PlusMLP(torch.autograd.Function):
    """h + W2 silu(z) / 1.702 + b2 with z = 1.702 (W1 x + b1). addmm's alpha applies the factors at no cost."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor) -> Tensor:
        z = torch.addmm(SLOPE * b1, rows, w1.T, alpha=SLOPE)
        ctx.save_for_backward(z, w1, w2)
        return (hidden + b2).addmm_(F.silu(z), w2.T, alpha=1 / SLOPE)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        z, w1, w2 = ctx.saved_tensors
        inner = grad @ w2
        torch.ops.aten.silu_backward.grad_input(inner, z, grad_input=inner)
        return grad, inner @ w1, None, None, None, None


def attend(
    attention: Any, query: Tensor, key: Tensor, value: Tensor, causal: bool = False, seen: Tensor | None = None
) -> Tensor:
    """softmax(Q K^T / sqrt(d)) V of each head, (n, heads, L, d). causal: each token sees itself and those before it, so
    no text token sees padding; seen (n, 1, 1, L): keys that a single query sees.

    On a CPU the backward pass of torch's fused kernel is slower than plain products: in half precision at any length,
    in fp32 up to about twice the width of a head, where it takes up to twice as long. Beyond that the L x L
    probabilities, which plain products keep, are many.
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
        scores = _scaled(scale, q, k.mT)
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
        to_scores = torch._softmax_backward_data(grad @ v.mT, p, 2, p.dtype)
        found = _scaled(ctx.scale, to_scores, k), _scaled(ctx.scale, to_scores.mT, q), p.mT @ grad
        return *(each.unflatten(0, (-1, ctx.heads)) for each in found), None, None


def _scaled(scale: float, a: Tensor, b: Tensor) -> Tensor:
    """scale * a @ b, matrix by matrix."""
    return torch.baddbmm(a.new_empty(()), a, b, beta=0, alpha=scale)


class _Picked(torch.autograd.Function):
    """rows[places], each place once: so the gradient is a copy, where torch would add up, which is slower."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.count = len(rows)
        return rows[places]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return grad.new_zeros(ctx.count, grad.shape[1]).index_copy_(0, places, grad), None


def picked(rows: Tensor, places: Tensor) -> Tensor:
    """rows[places], (T, D) -> (t, D); no place twice."""
    result: Tensor = _Picked.apply(rows, places)
    return result


def _is_linear(layer: nn.Module) -> bool:
    """Whether it is a frozen nn.Linear with a bias, and nothing else."""
    return type(layer) is nn.Linear and layer.bias is not None and not any(p.requires_grad for p in layer.parameters())


def _is_plain_lora(layer: LoRALinear) -> bool:
    """Whether it computes W x + b + scaling * B A x now, and nothing else."""
    return (
        type(layer) is LoRALinear
        and _is_linear(layer.base)
        and layer.strength != 0
        and not (layer.training and layer.dropout)
    )
