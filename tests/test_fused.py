"""The parts of a layer with gradients written out are what the layers themselves and autograd make, and keep less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPMLP

from clip_medical.fused import attend, picked, plus_mlp, plus_projected, projected
from lora import LoRALinear, inject


def random_weights(*modules: nn.Module) -> None:
    """Not zero anywhere: not B, so that a gradient reaches A too, and not the biases."""
    for module in modules:
        for parameter in module.parameters():
            nn.init.normal_(parameter)


def with_gradients(results: Any, given: list[Tensor]) -> list[Tensor]:
    """The results and the gradients, with respect to `given`, of a number in which each entry counts differently."""
    results = list(results)
    total = sum((i * result**2).sum() for i, result in enumerate(results, start=1))
    return [*results, *torch.autograd.grad(total, given)]


def linear(change: str = "") -> nn.Linear:
    layer = nn.Linear(6, 5, bias="no bias" not in change).double().requires_grad_("learned" in change)
    return layer


def lora(rank: int, change: str = "") -> LoRALinear:
    layer = LoRALinear(linear(change), rank, alpha=3 * rank + 1, dropout=0.5 if "dropout" in change else 0.0).double()
    layer.strength = 0.5 if "strength" in change else 1.0
    layer.base.requires_grad_("learned" in change)
    return layer.train("eval" not in change)


LAYERS: dict[str, Callable[[], list[nn.Module]]] = {
    "q and v": lambda: [lora(2), linear(), lora(3)],
    "all three": lambda: [lora(1), lora(2), lora(3, "strength")],
    "one alone": lambda: [lora(2)],
    "none": lambda: [linear(), linear()],
    "dropout": lambda: [lora(2, "dropout"), linear(), lora(2)],
    "dropout, evaluated": lambda: [lora(2, "dropout, eval"), linear()],
    "no bias": lambda: [lora(2, "no bias"), linear("no bias")],
    "learned weights": lambda: [lora(2), linear("learned")],
    "learned base": lambda: [lora(2, "learned"), linear()],
}


@pytest.mark.parametrize("learned_rows", [True, False])
@pytest.mark.parametrize("kind", LAYERS)
def test_projected_is_each_layer_by_itself(kind: str, learned_rows: bool) -> None:
    """Mistake: the branch of one layer added to another, its scaling or strength left out, dropout passed over, the
    gradient of a branch, of a layer without one, or of learned weights lost."""
    torch.manual_seed(0)
    layers = LAYERS[kind]()
    random_weights(*layers)
    rows = torch.randn(7, 6, dtype=torch.float64, requires_grad=learned_rows)
    learned = [p for layer in layers for p in layer.parameters() if p.requires_grad] + [rows] * learned_rows
    if not learned:  # frozen layers of frozen rows have no gradient
        return
    found = []
    for call in (lambda: projected(layers, rows), lambda: [layer(rows) for layer in layers]):
        torch.manual_seed(1)  # the same dropout
        found.append(with_gradients(call(), learned))
    torch.testing.assert_close(*found)


def test_an_adapter_that_is_switched_off_is_not_read() -> None:
    """Mistake: strength 0 taken for a factor: 0 * NaN is NaN, and "off" has to be the base bit for bit."""
    layers = [lora(2), linear(), lora(2)]
    for layer in layers[::2]:
        layer.strength = 0.0
        layer.lora_B.data.fill_(torch.nan)
    rows = torch.randn(7, 6, dtype=torch.float64)
    for found, base in zip(projected(layers, rows), (layers[0].base, layers[1], layers[2].base), strict=True):
        assert torch.equal(found, base(rows))


def test_projected_keeps_its_rows_once() -> None:
    """Mistake: rows kept by each layer, or what a frozen product does not need."""
    layers, kept = [lora(2), linear(), lora(3)], set()
    rows = torch.randn(7, 6, dtype=torch.float64, requires_grad=True)

    def note(saved: Tensor) -> Tensor:
        if len(saved) == 7:
            kept.add((saved.data_ptr(), saved.shape))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        projected(layers, rows)
    assert sorted(shape for _, shape in kept) == [(7, 5), (7, 6)]  # A x of both ranks, and x


@pytest.mark.parametrize("layer", [linear(), linear("no bias"), linear("learned"), lora(2)])
def test_plus_projected_adds_to_what_is_there(layer: nn.Module) -> None:
    """Mistake: hidden written over, which others still read; a bias or the gradient of learned weights lost."""
    random_weights(layer)
    hidden, rows = (torch.randn(7, n, dtype=torch.float64, requires_grad=True) for n in (5, 6))
    learned = [hidden, rows, *(p for p in layer.parameters() if p.requires_grad)]
    before = hidden.detach().clone()
    found = with_gradients([plus_projected(hidden, layer, rows)], learned)
    torch.testing.assert_close(found, with_gradients([hidden + layer(rows)], learned))
    assert torch.equal(hidden, before)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu"])
@pytest.mark.parametrize("learned", ["nothing", "adapter", "frozen adapter", "weights"])
def test_the_mlp_is_that_of_transformers(activation: str, learned: str) -> None:
    """Mistake: 1.702 left out before or after, or of the bias; another activation exchanged for CLIP's; an
    adapter passed over because it is frozen; the gradient of the weights lost, which full fine-tuning needs."""
    mlp = a_mlp(activation)
    mlp.requires_grad_(learned == "weights")
    if "adapter" in learned:
        inject(mlp, ("fc1", "fc2"), rank=2)
    if learned == "frozen adapter":
        mlp.requires_grad_(False)
    random_weights(mlp)
    hidden, rows = (torch.randn(5, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))
    given = [hidden, rows, *(parameter for parameter in mlp.parameters() if parameter.requires_grad)]
    results = (plus_mlp(hidden, mlp, rows), hidden + mlp(rows))
    torch.testing.assert_close(*(with_gradients([result], given) for result in results))


def a_mlp(activation: str = "quick_gelu") -> CLIPMLP:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=dict(hidden_size=8, intermediate_size=12, hidden_act=activation))
    return CLIPMLP(config.text_config).double()


def test_the_activation_keeps_one_tensor() -> None:
    """Mistake: a saved gate beside it, which costs a ViT-B/32 half a gigabyte at 64 pictures."""
    mlp, kept = a_mlp().requires_grad_(False), set()
    hidden, rows = (torch.randn(7, 8, dtype=torch.float64, requires_grad=True) for _ in range(2))

    def note(saved: Tensor) -> Tensor:
        if 7 in saved.shape:
            kept.add((saved.data_ptr(), saved.shape))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        plus_mlp(hidden, mlp, rows)
    assert [shape for _, shape in kept] == [(7, 12)]


def test_autocast_over_a_base_in_fp32() -> None:
    """Mistake: a forward or backward pass of our own, which autocast does not see, that multiplies bf16 by fp32."""
    layers, mlp, out = [LoRALinear(nn.Linear(8, 8), 2), nn.Linear(8, 8)], a_mlp().float(), nn.Linear(8, 8)
    for module in (layers[1], mlp, out):
        module.requires_grad_(False)
    random_weights(layers[0])
    rows = torch.randn(5, 8, requires_grad=True)
    found = []
    for enabled in (True, False):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            query, key = projected(layers, rows)
            result = plus_mlp(plus_projected(rows, out, query), mlp, key)
        found.append(
            torch.cat([g.flatten() for g in torch.autograd.grad(result.float().sum(), [rows, layers[0].lora_A])])
        )
    assert F.cosine_similarity(*found, dim=0) > 0.99


class Attention:
    """What `attend` reads of transformers' CLIPAttention."""

    def __init__(self, training: bool = True, dropout: float = 0.0) -> None:
        self.scale, self.training, self.dropout = 0.3, training, dropout


def heads(queries: int, keys: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, value of four sequences and three heads of width 4, laid out as the towers lay them out."""
    random = torch.Generator().manual_seed(0)
    laid = [torch.randn(4, n, 3, 4, dtype=torch.float64, generator=random) for n in (queries, keys, keys)]
    return [each.to(dtype).transpose(1, 2).requires_grad_() for each in laid]


@pytest.mark.parametrize("kind", ["image", "text", "last of text"])
def test_attention_by_hand_is_the_fused_kernel(kind: str) -> None:
    """Mistake: a head or a sequence that reads another's keys, text that sees ahead, keys of the padding seen, the
    scale left out of a gradient, rows and columns of the probabilities exchanged."""
    given = heads(1 if kind == "last of text" else 5, 5)
    seen = torch.arange(5) < torch.tensor([5, 2, 4, 1])[:, None, None, None] if kind == "last of text" else None
    found = []
    for training in (True, False):
        found.append(with_gradients([attend(Attention(training), *given, causal=kind == "text", seen=seen)], given))
    torch.testing.assert_close(*found)


@pytest.mark.parametrize(
    ("keys", "dtype", "kind", "fused"),
    [
        (8, torch.float32, Attention(), False),
        (9, torch.float32, Attention(), True),
        (9, torch.bfloat16, Attention(), False),
        (9, torch.float16, Attention(), False),
        (8, torch.float32, Attention(training=False), True),
        (8, torch.bfloat16, Attention(training=False), True),
        (8, torch.float32, Attention(dropout=0.1), True),
    ],
)
def test_the_fused_kernel_is_left_where_its_backward_pass_is_slow(
    keys: int, dtype: torch.dtype, kind: Attention, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistake: plain products in evaluation, where they are slower, at lengths where they keep more than they save, or
    without the dropout; the fused kernel in half precision, where its backward pass takes several times as long."""
    calls, kernel = [], F.scaled_dot_product_attention
    monkeypatch.setattr(F, "scaled_dot_product_attention", lambda *a, **k: calls.append(1) or kernel(*a, **k))
    attend(kind, *heads(keys, keys, dtype))
    assert bool(calls) == fused


def test_picked_sends_each_gradient_back() -> None:
    """Mistake: the gradient of a token sent to another, or left where nothing was picked."""
    rows, places = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 5])
    torch.testing.assert_close(*(with_gradients([each], [rows]) for each in (picked(rows, places), rows[places])))
