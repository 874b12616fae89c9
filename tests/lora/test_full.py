"""A trained bias and a whole weight beside LoRA: FullLinear (modules_to_save) and BiasLoRALinear (bias="lora_only")."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPModel

from lora import (
    BiasLoRALinear,
    DoRALinear,
    FullLinear,
    LoRAError,
    LoRALinear,
    adapter_parameters,
    count_parameters,
    disabled,
    inject,
    load_adapter,
    merge,
    merged,
    remove,
    save_adapter,
    set_strength,
)


class Net(nn.Module):
    """Two projections to adapt, and a head."""

    def __init__(self, head_bias: bool = False) -> None:
        super().__init__()
        self.q_proj: Any = nn.Linear(8, 8)
        self.v_proj: Any = nn.Linear(8, 8)
        self.head: Any = nn.Linear(8, 5, bias=head_bias)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(self.v_proj(self.q_proj(x).tanh()).tanh())
        return y


X = torch.randn(7, 8, generator=torch.Generator().manual_seed(3))


def make(**named: Any) -> Net:
    torch.manual_seed(0)
    return Net(**named)


def adapted(layer: type[LoRALinear] = LoRALinear, **named: Any) -> Net:
    """With a random adapter: LoRA in q_proj and v_proj, and a whole head."""
    net = make(**named)
    inject(net, rank=2, layer=layer, modules_to_save=["head"])
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter_parameters(net):
        parameter.data += torch.randn(parameter.shape, generator=generator)
    return net


def test_the_formulas() -> None:
    """Catches a difference that is not scaled by strength, that is added twice, or whose bias is forgotten."""
    net, s = adapted(BiasLoRALinear, head_bias=True), 0.5
    set_strength(net, s)
    head, q = net.head, net.q_proj
    assert isinstance(head, FullLinear) and isinstance(q, BiasLoRALinear)
    W, b = head.base.weight, head.base.bias
    expected = F.linear(X, W + s * (head.trained_weight - W), b + s * (head.trained_bias - b))
    torch.testing.assert_close(head(X), expected)
    W, b = q.base.weight, q.base.bias
    expected = F.linear(X, W + s * q.scaling * q.lora_B @ q.lora_A, b + s * (q.trained_bias - b))
    torch.testing.assert_close(q(X), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_it_starts_as_its_base_and_can_be_switched_off_and_removed(dtype: torch.dtype) -> None:
    """Catches a copy that is not the original, in half precision either; a base that was trained itself, so that
    "before" is not before."""
    base, x = make(head_bias=True).to(dtype), X.to(dtype)
    before, original = base(x), base.head
    inject(base, layer=BiasLoRALinear, modules_to_save="head")
    assert torch.equal(base(x), before)
    with torch.no_grad():
        for parameter in adapter_parameters(base):
            assert parameter.dtype == torch.float32
            parameter.add_(1)
    assert not torch.allclose(base(x), before)
    base.head.trained_weight.data[0, 0] = base.head.trained_bias.data[0] = torch.nan
    with disabled(base):
        assert torch.equal(base(x), before)
    remove(base)
    assert torch.equal(base(x), before) and base.head is original


def test_what_is_trained_and_counted() -> None:
    """Catches a base that is trained along, a copy that is not, and numbers that a paper would get wrong."""
    with torch.device("meta"):
        clip = CLIPModel(CLIPConfig())
    projections = ["visual_projection", "text_projection"]
    names = inject(clip, within="vision_model", modules_to_save=projections)
    assert names[-2:] == projections and len(names) == 24 + 2, "whole layers may lie outside of `within`"
    assert count_parameters(clip)[:2] == (24 * 8 * 2 * 768 + 768 * 512 + 512 * 512, 151_277_313)
    assert {p.requires_grad for p in adapter_parameters(clip)} == {True}
    remove(clip)
    inject(clip, layer=BiasLoRALinear, modules_to_save=projections)
    assert count_parameters(clip).trainable == 491_520 + 24 * 768 + 24 * 512 + 768 * 512 + 512 * 512


def test_steps_train_the_copies_alone() -> None:
    """Catches a gradient that does not reach the copies, or that reaches the originals."""
    net = make(head_bias=True)
    originals = {name: p.clone() for name, p in net.named_parameters()}
    inject(net, rank=2, layer=BiasLoRALinear, modules_to_save=["head"])
    optimizer = torch.optim.SGD(adapter_parameters(net), lr=0.1)
    for _ in range(2):  # A moves at the second step
        optimizer.zero_grad()
        net(X).square().mean().backward()
        optimizer.step()
    assert (
        all(p.grad is not None and p.grad.any() for p in adapter_parameters(net)) and len(adapter_parameters(net)) == 8
    )
    remove(net)
    assert all(torch.equal(p, originals[name]) for name, p in net.named_parameters())


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"modules_to_save": ["hed"]}, "matches \\['hed'\\]"),
        ({"modules_to_save": [""]}, "matches \\[''\\]"),
        ({"targets": ["head"], "modules_to_save": ["q_proj"], "exclude": ["head"]}, "matches \\['head'\\]"),
        ({"targets": ["head", "q_proj"], "modules_to_save": ["head"]}, "matches \\['head'\\]"),
        ({"targets": "all-linear", "modules_to_save": ["q_proj", "v_proj", "head"]}, "matches"),
        ({"modules_to_save": ["all-linear"]}, "matches \\['all-linear'\\]"),
        ({"targets": ["q_proj", "all-linear"]}, "matches \\['all-linear'\\]"),
    ],
)
def test_names_that_are_refused(settings: dict[str, Any], says: str) -> None:
    """Catches a slip of the pen that passes unseen: the layer would stay frozen."""
    net = make()
    with pytest.raises(LoRAError, match=says):
        inject(net, **settings)
    assert type(net.head) is nn.Linear and all(p.requires_grad for p in net.parameters())


def test_only_linear_layers_are_trained_whole() -> None:
    """Catches a norm or an embedding wrapped as if it were linear."""
    net = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
    with pytest.raises(LoRAError, match="1: found LayerNorm, expected nn.Linear"):
        inject(net, ["0"], modules_to_save=["1"])
    assert type(net[0]) is nn.Linear


def test_a_whole_layer_is_none_of_the_targets() -> None:
    """Catches a layer that gets LoRA although it is to be trained whole, and a file that selects it as a target."""
    net = make()
    inject(net, "all-linear", rank=2, modules_to_save=["v_proj"])
    assert [type(net.q_proj), type(net.v_proj), type(net.head)] == [LoRALinear, FullLinear, LoRALinear]


@pytest.mark.parametrize("layer", [LoRALinear, BiasLoRALinear, DoRALinear])
@pytest.mark.parametrize("head_bias", [False, True])
def test_round_trip_and_merge(tmp_path: Path, layer: type[LoRALinear], head_bias: bool) -> None:
    """Catches a copy that is left out of the file or rounded in it, and a merge that forgets a bias."""
    net = adapted(layer, head_bias=head_bias)
    save_adapter(net, tmp_path)
    again = make(head_bias=head_bias)
    assert load_adapter(again, tmp_path) == ["q_proj", "v_proj", "head"]
    assert torch.equal(again(X), net(X)) and type(again.q_proj) is layer and type(again.head) is FullLinear
    expected = net(X)
    merge(net)
    torch.testing.assert_close(net(X), expected)
    assert (net.head.bias is None) == (not head_bias) and not any(p.requires_grad for p in net.parameters())


def test_merged_in_double_precision_keeps_the_bias() -> None:
    """Catches a bias that is rounded to fp32 on the way."""
    layer = adapted(BiasLoRALinear).double().q_proj
    torch.testing.assert_close(merged(layer)(X.double()), layer(X.double()), rtol=1e-13, atol=1e-13)


def test_a_name_that_is_a_target_elsewhere(tmp_path: Path) -> None:
    """Catches leaf names in target_modules that would give a layer LoRA which was trained whole."""
    torch.manual_seed(0)
    net = nn.Sequential(make(), make())
    inject(net, rank=2, modules_to_save=["1.q_proj"])
    save_adapter(net, tmp_path)
    again = nn.Sequential(make(), make())
    assert load_adapter(again, tmp_path) == ["0.q_proj", "0.v_proj", "1.q_proj", "1.v_proj"]
    assert [type(again[0].q_proj), type(again[1].q_proj)] == [LoRALinear, FullLinear]


def test_a_whole_layer_at_another_strength_is_not_saved(tmp_path: Path) -> None:
    """Catches a file that is not what was measured."""
    net = adapted()
    net.head.strength = 0.5
    with pytest.raises(LoRAError, match="one set for LoRA, strength 1"):
        save_adapter(net, tmp_path)
    remove(net)
    head = FullLinear(net.head)
    net.head = head
    with pytest.raises(LoRAError, match="expected one set"):
        save_adapter(net, tmp_path)


def test_a_name_that_ends_like_another_is_not_saved(tmp_path: Path) -> None:
    """Catches a file in which PEFT finds another layer to be whole, and which nobody can read back."""
    net = make()
    net.aux_head = nn.Linear(5, 5)
    inject(net, rank=2, modules_to_save=["head"])
    with pytest.raises(LoRAError, match="found \\['head'\\] trained whole"):
        save_adapter(net, tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_bias_beyond_half_precision_is_not_merged() -> None:
    """Catches inf in a merged bias."""
    net = make().half()
    inject(net, layer=BiasLoRALinear)
    net.q_proj.trained_bias.data[0] = 7e4
    with pytest.raises(LoRAError, match="NaN or inf in the merged torch.float16"):
        merged(net.q_proj)


def test_a_subclass_is_not_saved_as_a_whole_layer(tmp_path: Path) -> None:
    """Catches a forward of one's own that reads back as another one."""

    class Doubled(FullLinear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    net = adapted()
    net.head = Doubled(net.head.base)
    with pytest.raises(LoRAError, match="Doubled.*expected one set"):
        save_adapter(net, tmp_path)
