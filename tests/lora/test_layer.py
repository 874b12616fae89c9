"""LoRALinear and merged(): the mathematics, checked against matrices written out by hand."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lora import LoRAError, LoRALinear, merged


def make_layer(n_in: int = 12, n_out: int = 20, seed: int = 0, trained: bool = True, **settings: Any) -> LoRALinear:
    """A layer of base (n_out, n_in); `trained` gives B random values, as after some steps."""
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(n_in, n_out), **{"rank": 4, "alpha": 6.0, **settings})
    if trained:
        nn.init.normal_(layer.lora_B, std=0.3)
    return layer


def test_a_new_layer_is_its_base() -> None:
    """Catches a B that is not zero at first, so that training starts from a damaged model; an A of zeros, which never
    gets a gradient."""
    layer = make_layer(trained=False)
    x = torch.randn(7, 12)
    assert torch.equal(layer(x), layer.base(x))
    assert torch.count_nonzero(layer.lora_A) == layer.lora_A.numel(), "A zero as well would never learn"


@pytest.mark.parametrize("rank", [1, 8, 64])
def test_entries_of_A_are_bounded_by_one_over_sqrt_in(rank: int) -> None:
    """Catches an A initialised as (in, r), whose bound is 1 / sqrt(r); another gain than that of a = sqrt(5)."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(768, 512), rank=rank)
    bound = 1 / math.sqrt(768)
    assert layer.lora_A.shape == (rank, 768) and layer.lora_B.shape == (512, rank)
    assert 0.95 * bound < layer.lora_A.abs().max().item() <= bound * (1 + 1e-6)  # the bound itself is rounded to fp32
    assert layer.lora_A.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)


@pytest.mark.parametrize("rslora, scaling", [(False, 6 / 4), (True, 6 / 2)])
@pytest.mark.parametrize("strength", [1.0, 0.5, -2.0])
def test_forward_is_the_formula(rslora: bool, scaling: float, strength: float) -> None:
    """Catches alpha not divided by r, or for rsLoRA by sqrt(r); an ignored strength; A and B in the wrong order."""
    layer = make_layer(rslora=rslora).double()
    layer.strength = strength
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    W, b, A, B = layer.base.weight, layer.base.bias, layer.lora_A, layer.lora_B
    by_hand = torch.einsum("oi,bti->bto", W + strength * scaling * torch.einsum("or,ri->oi", B, A), x) + b
    assert layer.scaling == scaling
    torch.testing.assert_close(layer(x), by_hand, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.delta_weight(), strength * scaling * B @ A, rtol=1e-12, atol=1e-12)


def test_the_correction_has_rank_r_at_most() -> None:
    """Catches a delta_weight whose rank is not r, of shape (in, out), or in another dtype than fp32."""
    layer = make_layer(40, 30, rank=5)
    assert torch.linalg.matrix_rank(layer.delta_weight()) == 5
    assert layer.delta_weight().shape == (30, 40) and layer.delta_weight().dtype == torch.float32


def test_gradients_are_the_closed_form() -> None:
    """Catches scaling missing from the backward pass, or a detached matrix: dB = s g (A x)^T, dA = s B^T g x^T."""
    layer = make_layer().double()
    x, g = torch.randn(9, 12, dtype=torch.float64), torch.randn(9, 20, dtype=torch.float64)
    layer(x).backward(g)
    A, B, s = layer.lora_A.detach(), layer.lora_B.detach(), layer.scaling
    torch.testing.assert_close(layer.lora_B.grad, s * g.T @ (x @ A.T))
    torch.testing.assert_close(layer.lora_A.grad, s * B.T @ g.T @ x)
    assert layer.base.weight.grad is None and layer.base.bias.grad is None


def test_gradcheck() -> None:
    """Catches an operation in the branch whose derivative by x, A or B differs from finite differences."""
    layer = make_layer(5, 6, rank=2).double()
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)

    def f(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
        y: Tensor = torch.func.functional_call(layer, {"lora_A": A, "lora_B": B}, (x,))
        return y

    assert torch.autograd.gradcheck(f, (x, layer.lora_A, layer.lora_B))


def test_A_has_no_gradient_at_the_first_step_and_some_at_the_second() -> None:
    """Catches A and B both zero at first, so that neither ever gets a gradient; a B that is not zero at first."""
    layer = make_layer(trained=False)
    optimizer = torch.optim.SGD([layer.lora_A, layer.lora_B], lr=0.1)
    x, target = torch.randn(16, 12), torch.randn(16, 20)
    norms = []
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.mse_loss(layer(x), target).backward()
        assert layer.lora_A.grad is not None and layer.lora_B.grad is not None
        norms.append((layer.lora_A.grad.norm().item(), layer.lora_B.grad.norm().item()))
        optimizer.step()
    assert norms[0][0] == 0 and norms[0][1] > 0
    assert norms[1][0] > 0 and norms[1][1] > 0


def test_dropout_leaves_the_base_path_alone() -> None:
    """Catches dropout applied to x before both paths, which changes the output of the pretrained layer."""
    layer = make_layer(trained=False, dropout=0.5).train()
    x = torch.randn(64, 12)
    assert torch.equal(layer(x), layer.base(x))


def test_dropout_drops_inputs_of_the_branch_and_rescales() -> None:
    """Catches dropout after A or on A, a missing factor 1 / (1 - p), or dropout that is active in eval mode."""
    layer = make_layer(dropout=0.25)
    x = torch.ones(20_000, 12)
    full = layer.eval()(x) - layer.base(x)
    torch.testing.assert_close(full, x @ layer.delta_weight().T)
    torch.manual_seed(3)
    dropped = layer.train()(x) - layer.base(x)
    torch.manual_seed(3)
    mask = nn.functional.dropout(x, 0.25)
    torch.testing.assert_close(dropped, mask @ layer.delta_weight().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dropped.mean(0), full.mean(0), rtol=0, atol=0.03)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_base_keeps_fp32_adapters(dtype: torch.dtype) -> None:
    """Catches A and B in the dtype of the base, whose fp16 gradients GradScaler refuses; an output promoted to fp32."""
    layer = LoRALinear(nn.Linear(12, 20).to(dtype), rank=4)
    nn.init.normal_(layer.lora_B, std=0.3)
    x = torch.randn(7, 12, dtype=dtype)
    y = layer(x)
    y.float().square().mean().backward()
    assert y.dtype == dtype and layer.base.weight.dtype == dtype
    for matrix in (layer.lora_A, layer.lora_B):
        assert matrix.grad is not None
        assert matrix.dtype == torch.float32 and matrix.grad.dtype == torch.float32
        assert matrix.grad.abs().max() > 0


# One rounding of W + D to the dtype, and of y in the unmerged path: a few units in the last place of numbers near 1.
@pytest.mark.parametrize("dtype, atol", [(torch.float32, 3e-6), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_merged_computes_the_same(dtype: torch.dtype, atol: float, bias: bool, strength: float) -> None:
    """Catches a merge that omits scaling, strength or bias, sums in half precision, or changes the dtype."""
    torch.manual_seed(0)
    layer = LoRALinear(nn.Linear(64, 48, bias=bias).to(dtype), rank=4)
    nn.init.normal_(layer.lora_B, std=0.05)
    layer.strength = strength
    plain = merged(layer)
    x = torch.randn(32, 64, dtype=dtype)
    assert type(plain) is nn.Linear and plain.weight.dtype == dtype and (plain.bias is not None) == bias
    torch.testing.assert_close(plain(x), layer(x), rtol=0, atol=atol)
    assert (plain(x) - layer.base(x)).abs().max() > 4 * atol, "the adapter must be visible above the tolerance"
    exact = (layer.base.weight.float() + layer.delta_weight()).to(dtype)
    assert torch.equal(plain.weight, exact), "summed in fp32, cast once"


def test_merging_mutates_nothing_and_gives_the_same_twice() -> None:
    """Catches a merge in place, a second merge that adds B A again, a shared bias, or a changed random state."""
    layer = make_layer()
    before = copy.deepcopy(layer.state_dict())
    random_state = torch.get_rng_state()
    first, second = merged(layer), merged(layer)
    assert torch.equal(torch.get_rng_state(), random_state)
    assert torch.equal(first.weight, second.weight) and torch.equal(first.bias, second.bias)
    assert first.bias.data_ptr() != layer.base.bias.data_ptr()
    with torch.no_grad():
        first.weight.zero_(), first.bias.zero_()
    after = layer.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(before[k], after[k]) for k in before)


def test_merged_keeps_mode_and_is_frozen_and_ignores_autocast() -> None:
    """Catches a merged layer in the wrong mode or trainable; a merge computed in bf16 because autocast was on."""
    layer = make_layer().eval()
    reference = merged(layer)
    with torch.autocast("cpu", torch.bfloat16):
        plain = merged(layer)
    assert not plain.training and not any(p.requires_grad for p in plain.parameters())
    assert torch.equal(plain.weight, reference.weight)
    assert merged(layer.train()).training


def test_merging_a_diverged_adapter_is_refused() -> None:
    """Catches NaN in the weights of a merged model without an error."""
    layer = make_layer()
    with torch.no_grad():
        layer.lora_A[0, 0] = math.nan
    with pytest.raises(LoRAError, match="NaN"):
        merged(layer)


def test_strength_zero_is_the_base_bit_for_bit() -> None:
    """Catches strength 0 computed as a multiplication by zero: 0 * NaN is NaN."""
    layer = make_layer()
    with torch.no_grad():
        layer.lora_A.fill_(math.nan)
    layer.strength = 0.0
    x = torch.randn(7, 12)
    assert torch.equal(layer(x), layer.base(x))
    assert torch.equal(merged(layer).weight, layer.base.weight)


def test_the_base_is_frozen_and_mode_and_device_are_inherited() -> None:
    """Catches a trainable base, a new layer in train mode over a base in eval mode, or A and B left on the CPU."""
    layer = LoRALinear(nn.Linear(6, 5, device="meta").eval(), rank=2)
    assert not layer.training and layer.train().base.training
    assert {p.device.type for p in layer.parameters()} == {"meta"}
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]


def test_state_dict_and_repr_are_readable() -> None:
    """Catches additional buffers, renamed parameters that saved checkpoints no longer match, or settings missing from
    the repr."""
    layer = make_layer(rslora=True)
    assert set(layer.state_dict()) == {"base.weight", "base.bias", "lora_A", "lora_B"}
    assert "rank=4" in repr(layer) and "scaling=3" in repr(layer)
    assert not hasattr(layer, "weight"), "a forwarded weight lets callers skip the adapter"


def test_autocast_deepcopy_compile_and_checkpoint() -> None:
    """Catches an output that autocast leaves in fp32, parameters shared with a deep copy, graph breaks, or gradients
    that differ under checkpointing."""
    layer = make_layer()
    x = torch.randn(7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.float(), layer(x), rtol=0, atol=0.05)

    twin = copy.deepcopy(layer)
    assert torch.equal(twin(x), layer(x)) and twin.lora_A.data_ptr() != layer.lora_A.data_ptr()

    torch.testing.assert_close(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), layer(x))

    layer(x).square().sum().backward()
    checkpoint(twin, x, use_reentrant=False).square().sum().backward()
    assert twin.lora_A.grad is not None and layer.lora_A.grad is not None
    assert torch.equal(twin.lora_A.grad, layer.lora_A.grad) and twin.lora_A.grad.abs().max() > 0


@pytest.mark.parametrize(
    "base, settings, says",
    [
        (nn.Conv1d(3, 4, 1), {}, "Conv1d"),
        (LoRALinear(nn.Linear(12, 20)), {}, "LoRALinear"),
        (nn.Linear(12, 20), {"rank": 0}, "rank is 0"),
        (nn.Linear(12, 20), {"rank": 2.0}, "rank is 2.0"),
        (nn.Linear(12, 20), {"rank": True}, "rank is True"),
        (nn.Linear(12, 20), {"alpha": 0}, "alpha"),
        (nn.Linear(12, 20), {"alpha": math.inf}, "alpha"),
        (nn.Linear(12, 20), {"alpha": "16"}, "alpha"),
        (nn.Linear(12, 20), {"dropout": 1.0}, "dropout"),
        (nn.Linear(12, 20), {"dropout": -0.1}, "dropout"),
        (nn.Linear(12, 20), {"dropout": math.nan}, "dropout"),
        (nn.Linear(12, 20), {"rslora": "false"}, "rslora"),
        (type("Other", (nn.Linear,), {})(12, 20), {}, "Other"),
    ],
)
def test_refusals(base: Any, settings: dict[str, Any], says: str) -> None:
    """Catches a setting out of range that raises no error, or a base frozen although the layer was refused."""
    flags = [p.requires_grad for p in base.parameters()]
    with pytest.raises(LoRAError, match=says):
        LoRALinear(base, **settings)
    assert [p.requires_grad for p in base.parameters()] == flags


def test_a_quantised_base_is_refused() -> None:
    """Catches packed integers used as a float weight, which a merge would turn into noise."""
    base = nn.Linear(12, 20)
    base.weight = nn.Parameter(torch.zeros(20, 12, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(LoRAError, match="uint8"):
        LoRALinear(base)
