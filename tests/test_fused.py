"""The parts of a layer with gradients written out are what the layers themselves and autograd make, and keep less."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig
from transformers.models.clip.modeling_clip import CLIPMLP

from clip_medical.fused import attend, mlp_of, projected, repeated
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


class TwiceLinear(nn.Linear):
    """As a quantised layer might: computes something else than its weight tells."""

    def forward(self, rows: Tensor) -> Tensor:
        return 2 * super().forward(rows)


class TwiceLoRA(LoRALinear):
    def forward(self, rows: Tensor) -> Tensor:
        return 2 * super().forward(rows)


def linear(change: str = "") -> nn.Linear:
    kind = TwiceLinear if "subclass" in change else nn.Linear
    return kind(6, 5, bias="no bias" not in change).double().requires_grad_("learned" in change)


def lora(rank: int, change: str = "") -> LoRALinear:
    kind, base = TwiceLoRA if "subclass" in change else LoRALinear, linear(change.replace("subclass", ""))
    layer = kind(base, rank, alpha=3 * rank + 1, dropout=0.5 if "dropout" in change else 0.0).double()
    layer.strength = 0.5 if "strength" in change else 1.0
    base.requires_grad_("learned" in change)
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
    "subclass": lambda: [lora(2), linear("subclass")],
    "subclass of LoRA": lambda: [lora(2, "subclass"), linear()],
}


@pytest.mark.parametrize(
    ("kind", "learned_rows"),
    [(kind, learned) for kind in LAYERS for learned in (True, False) if learned or kind != "none"],
)
def test_projected_is_each_layer_by_itself(kind: str, learned_rows: bool) -> None:
    """Mistake: the branch of one layer added to another, its scaling or strength left out, dropout passed over, the
    gradient of a branch, of a layer without one, or of learned weights lost."""
    torch.manual_seed(0)
    layers = LAYERS[kind]()
    random_weights(*layers)
    rows = torch.randn(7, 6, dtype=torch.float64, requires_grad=learned_rows)
    learned = [p for layer in layers for p in layer.parameters() if p.requires_grad] + [rows] * learned_rows
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
    rows = torch.randn(5, 8, dtype=torch.float64, requires_grad=True)
    given = [rows, *(parameter for parameter in mlp.parameters() if parameter.requires_grad)]
    torch.testing.assert_close(*(with_gradients([result], given) for result in (mlp_of(mlp, rows), mlp(rows))))


def a_mlp(activation: str = "quick_gelu") -> CLIPMLP:
    torch.manual_seed(0)
    config = CLIPConfig(text_config=dict(hidden_size=8, intermediate_size=12, hidden_act=activation))
    return CLIPMLP(config.text_config).double()


def test_the_activation_keeps_one_tensor() -> None:
    """Mistake: a saved gate beside it, which costs a ViT-B/32 half a gigabyte at 64 pictures."""
    mlp, kept = a_mlp().requires_grad_(False), set()
    rows = torch.randn(7, 8, dtype=torch.float64, requires_grad=True)

    def note(saved: Tensor) -> Tensor:
        if 7 in saved.shape:
            kept.add((saved.data_ptr(), saved.shape))
        return saved

    with torch.autograd.graph.saved_tensors_hooks(note, lambda saved: saved):
        mlp_of(mlp, rows)
    assert [shape for _, shape in kept] == [(7, 12)]


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
        (9, torch.float32, Attention(), True),  # whatever the number of queries
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
    for queries in (1, keys):
        calls.clear()
        attend(kind, *heads(queries, keys, dtype))
        assert bool(calls) == fused


def everything(rows: Tensor, layers: list[nn.Module], mlp: nn.Module) -> Tensor:
    """All of them in a row, (20, 12) -> (20, 12), on four sequences of five tokens and three heads."""
    by_head = [each.view(4, 5, 3, 4).transpose(1, 2) for each in projected(layers, rows)]
    mixed = attend(Attention(), *by_head, causal=True).transpose(1, 2).reshape(20, 12)
    return mlp_of(mlp, repeated(mixed, torch.arange(20)))


def a_layer(dtype: torch.dtype) -> tuple[Tensor, list[nn.Module], nn.Module]:
    """Rows and what `everything` needs beside them, as in training: frozen weights in `dtype`, A and B in fp32."""
    torch.manual_seed(0)
    config = CLIPConfig(text_config=dict(hidden_size=12, intermediate_size=20, num_attention_heads=3))
    mlp = CLIPMLP(config.text_config).to(dtype).requires_grad_(False)
    layers: list[nn.Module] = [nn.Linear(12, 12, dtype=dtype).requires_grad_(False) for _ in range(3)]
    layers[0], layers[2] = LoRALinear(layers[0], 2), LoRALinear(layers[2], 3)
    for layer in layers[::2]:
        nn.init.normal_(layer.lora_B)
    return torch.randn(20, 12).to(dtype).requires_grad_(), layers, mlp


@pytest.mark.parametrize("how", ["autocast", "half"])
def test_bf16_is_near_to_fp32(how: str) -> None:
    """Mistake: a forward or backward pass of our own, which autocast does not see, that multiplies bf16 by fp32; the
    gradient of A or B in the format of the frozen weights."""
    found = []
    for low in (True, False):
        rows, layers, mlp = a_layer(torch.bfloat16 if low and how == "half" else torch.float32)
        with torch.autocast("cpu", torch.bfloat16, enabled=low and how == "autocast"):
            result = everything(rows, layers, mlp)
        learned = [p for layer in layers for p in layer.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(result.float().sum(), learned)
        assert {g.dtype for g in gradients} == {torch.float32}
        found.append(torch.cat([g.flatten() for g in gradients]))
    assert F.cosine_similarity(*found, dim=0) > 0.99


def test_a_pass_without_gradients_is_the_same_to_the_bit() -> None:
    """Mistake: another kernel where no graph is kept: the gradient of a batch in chunks would be that of features that
    the second pass does not make."""
    given = a_layer(torch.float32)
    with torch.no_grad():
        first = everything(*given)
    assert torch.equal(first, everything(*given))


def test_repeated_adds_up_the_gradients_of_each_row() -> None:
    """Mistake: the gradient of a token sent to another, or that of one of several places alone."""
    rows, places = torch.randn(6, 2, dtype=torch.float64, requires_grad=True), torch.tensor([4, 0, 5, 0, 0])
    torch.testing.assert_close(*(with_gradients([each], [rows]) for each in (repeated(rows, places), rows[places])))
