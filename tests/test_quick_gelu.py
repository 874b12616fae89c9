"""The activation by way of silu is that of transformers, and stands where CLIP has it."""

from typing import Any

import pytest
import torch
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel
from transformers.activations import QuickGELUActivation

from clip_medical.model import Clip
from clip_medical.quick_gelu import QuickGELU


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_value_and_gradient_are_those_of_transformers_to_rounding(dtype: torch.dtype) -> None:
    """Mistake: 1.702 left out, of the value or of the gradient; a tensor overwritten that somebody else still holds."""
    draw = torch.Generator().manual_seed(0)
    x, grad = ((4 * torch.randn(257, 65, generator=draw)).to(dtype) for _ in range(2))
    given, found = grad.clone(), []
    for activation in (QuickGELU(), QuickGELUActivation()):
        own = x.clone().requires_grad_()
        before = own * 1  # not a leaf, as in a model
        y = activation(before)
        y.backward(grad)
        assert torch.equal(before, x) and torch.equal(grad, given)
        found.append((y.detach(), own.grad))
    (y, dx), (expected_y, expected_dx) = found
    assert y.dtype == dtype
    tolerance = 8 * torch.finfo(dtype).eps
    torch.testing.assert_close(y, expected_y, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(dx, expected_dx, rtol=tolerance, atol=4 * tolerance)  # sums of terms up to 4 x 4


def test_gradient_against_finite_differences() -> None:
    """Mistake: a derivative that agrees with another implementation's error."""
    x = torch.randn(7, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(QuickGELU(), x)


def test_nothing_but_its_input_is_kept_for_the_backward_pass() -> None:
    """Mistake: a saved gate, which costs a ViT-B/32 half a gigabyte at 64 pictures."""
    kept = []
    x = torch.randn(7, 5).requires_grad_()
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: kept.append(saved.data_ptr()), lambda saved: saved):
        QuickGELU()(x)
    assert kept == [x.data_ptr()]


@pytest.mark.parametrize(("activation", "there"), [("quick_gelu", 2), ("gelu", 0)])
def test_a_clip_has_it_in_both_towers_where_its_configuration_says_so(activation: str, there: int) -> None:
    """Mistake: a tower passed over, or another activation exchanged for one that the model was not trained with."""
    tower: dict[str, Any] = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    tower["hidden_act"] = activation
    model = CLIPModel(CLIPConfig(text_config=tower | dict(vocab_size=9), vision_config=tower | dict(image_size=32)))
    clip = Clip(model, None, CLIPImageProcessor(), "small")  # type: ignore[arg-type]
    modules: list[nn.Module] = list(clip.model.modules())
    assert sum(type(module) is QuickGELU for module in modules) == there
    assert not any(type(module) is QuickGELUActivation for module in modules)
