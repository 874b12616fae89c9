"""Both libraries that torch has for products give the same, and what is slow in one is left to the other."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from clip_medical import load_clip, products
from clip_medical.products import add_product, linear, product, product_over_rows, scaled_product, spare_rows
from lora import adapter_parameters, inject

ONEDNN = pytest.mark.skipif(not products.ONEDNN_CAN, reason="a torch without oneDNN")
BOTH = [False, pytest.param(True, marks=ONEDNN)]


def close(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("onednn", BOTH)
def test_products_are_those_of_mathematics(onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: a factor applied to the bias as well, or on one side only; a sum that replaces what was there; rows and
    columns exchanged where oneDNN wants the narrower matrix first."""
    monkeypatch.setattr(products, "MKL_IS_SLOW", onednn)
    random = torch.Generator().manual_seed(0)
    for inner, outer in ((4, 9), (9, 4), (5, 5)):
        rows, weight, bias, to = (
            torch.randn(shape, generator=random) for shape in ((7, inner), (outer, inner), (outer,), (7, outer))
        )
        x, w, b, t = rows.double(), weight.double(), bias.double(), to.double()
        close(product(rows, weight), x @ w.T)
        close(product(rows, weight, bias), x @ w.T + b)
        close(product(to, weight.T), t @ w)
        close(scaled_product(1.7, rows, weight, bias), 1.7 * x @ w.T + b)
        close(product_over_rows(rows, to), x.T @ t)
        add_product(to, rows, weight)
        close(to, t + x @ w.T)


@ONEDNN
@pytest.mark.parametrize("learned", ["rows", "weight", "bias"])
def test_linear_has_the_gradients_of_torch(learned: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: oneDNN's product, which has no gradient, taken where a weight learns; the gradient of rows lost."""
    monkeypatch.setattr(products, "MKL_IS_SLOW", True)
    torch.manual_seed(0)
    given = {"rows": torch.randn(2, 7, 4), "weight": torch.randn(9, 4), "bias": torch.randn(9)}
    given[learned].requires_grad_()
    results = [function(*given.values()) for function in (linear, F.linear)]
    torch.testing.assert_close(*results)
    counts = torch.arange(results[0].numel()).view_as(results[0]) / 10
    torch.testing.assert_close(*(torch.autograd.grad((counts * each).sum(), given[learned]) for each in results))


@ONEDNN
def test_autocast_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: a product in fp32 where autocast asks for bf16."""
    monkeypatch.setattr(products, "MKL_IS_SLOW", True)
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(torch.randn(3, 4), torch.randn(5, 4)).dtype == torch.bfloat16


@ONEDNN
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "v_proj", "out_proj", "fc1", "fc2")])
def test_a_step_is_the_same_in_both(targets: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: a layer left to the slow library, whose result is as right; a gradient lost or taken twice."""
    torch.manual_seed(0)
    clip = load_clip()
    inject(clip.model, targets)
    clip.model.train()
    for parameter in adapter_parameters(clip.model):
        torch.nn.init.normal_(parameter, std=0.05)
    ids, lengths = clip.tokens(["axial CT of the chest", "knee", "axial CT of the head"])
    pixels = torch.randint(0, 256, (3, 3, clip.image_size, clip.image_size), dtype=torch.uint8)
    found, done = [], {}
    for onednn in (False, True):
        monkeypatch.setattr(products, "MKL_IS_SLOW", onednn)
        by_onednn: Any = {torch.ops.mkldnn._linear_pointwise: lambda a, b, *_, **__: 2 * a[:-1].numel() * b[0] * b[1]}
        with FlopCounterMode(display=False, custom_mapping=by_onednn) as counter:
            features = clip.image_features(pixels), clip.text_features(ids, lengths)
            total = sum((each**3).sum() for each in features)
            found.append([*features, *torch.autograd.grad(total, adapter_parameters(clip.model))])
        done[onednn] = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)
    assert "mkldnn._linear_pointwise" not in done[False]
    left = done[True]["aten.addmm"] + done[True]["aten.mm"]  # what is done on one row a picture or caption
    assert left < done[True]["mkldnn._linear_pointwise"] / 100


@pytest.mark.parametrize(
    ("able", "slow"),
    [
        ({"cpu_name": "AMD EPYC 9755", "avx512_f": True}, True),
        ({"cpu_name": "AMD EPYC 7763", "avx512_f": False}, False),
        ({"cpu_name": "Intel(R) Xeon(R) Processor", "avx512_f": True}, False),
        ({}, False),
    ],
)
def test_mkl_is_slow_on_a_wide_processor_of_amd(
    able: dict[str, Any], slow: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistake: another library where MKL is as good: every digit of every run would change for nothing."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    assert products._mkl_is_slow() == (slow and products.ONEDNN_CAN)


@pytest.mark.parametrize(
    ("dtype", "mkl_is_slow", "spare"),
    [
        (torch.float32, True, 28),
        (torch.float32, False, 0),
        (torch.bfloat16, False, 28),
        (torch.float16, False, 28),
        (torch.float64, True, 0),
    ],
)
def test_rows_are_rounded_up_where_each_shape_has_its_kernel(
    dtype: torch.dtype, mkl_is_slow: bool, spare: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistake: a kernel made for every batch, or rows computed for nothing where none is made."""
    monkeypatch.setattr(products, "MKL_IS_SLOW", mkl_is_slow)
    assert spare_rows(100, torch.device("cpu"), dtype) == spare
    assert spare_rows(128, torch.device("cpu"), dtype) == 0
    assert spare_rows(100, torch.device("meta"), dtype) == 0
