"""The extension point: a PEFT method is a subclass of LoRALinear. DoRA is the example."""

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lora import (
    DoRALinear,
    LoRAError,
    LoRALinear,
    adapter_parameters,
    count_parameters,
    disabled,
    inject,
    load_adapter,
    merge,
    merged,
    save_adapter,
)


@pytest.fixture
def dora() -> Any:
    """The worked example."""
    return DoRALinear


class Tanh(LoRALinear):
    """A branch that is not linear: neither PEFT's file nor a merge can hold it."""

    def forward(self, x: Tensor) -> Tensor:
        branch = F.linear(torch.tanh(F.linear(x, self.lora_A)), self.scaling * self.lora_B)
        y: Tensor = self.base(x)
        return y + branch


class NamedTanh(Tanh):
    peft_fields = {"peft_type": "TANH"}


def a_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 10), nn.ReLU(), nn.Linear(10, 8))


def trained(layer: type[LoRALinear]) -> tuple[nn.Sequential, list[float]]:
    """A model after some steps on a fixed task, and its losses."""
    model = a_model()
    inject(model, ("0", "2"), rank=3, layer=layer)
    optimizer = torch.optim.AdamW(adapter_parameters(model), lr=0.02)
    x, y, losses = torch.randn(32, 12), torch.randn(32, 8), []
    for _ in range(30):
        loss = F.mse_loss(model(x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model, losses


def first_layer(model: nn.Sequential) -> LoRALinear:
    layer = model[0]
    assert isinstance(layer, LoRALinear)
    return layer


def test_a_subclass_starts_as_the_base_and_learns(dora: Any) -> None:
    """Catches an inject that builds LoRALinear whatever class it is given; own parameters that are not trained; a DoRA
    that does not start at W."""
    model, losses = trained(dora)
    assert losses[0] == pytest.approx(F.mse_loss(*same_inputs(a_model())).item()) and losses[-1] < 0.9 * losses[0]
    layer: Any = model[0]
    assert type(layer) is dora and not torch.equal(layer.magnitude, layer.base.weight.norm(dim=1))


def same_inputs(model: nn.Sequential) -> tuple[Tensor, Tensor]:
    """What `trained` computes its first loss from: the base draws no random number less than the adapted model does."""
    inject(model, ("0", "2"), rank=3)
    x, y = torch.randn(32, 12), torch.randn(32, 8)
    return model(x), y


def test_own_parameters_are_counted_and_are_no_part_of_the_base(dora: Any) -> None:
    """Catches a count that knows A and B by name only: magnitudes would be taken for parameters of the base."""
    model, plain = a_model(), a_model()
    inject(model, ("0", "2"), rank=3, layer=dora)
    inject(plain, ("0", "2"), rank=3)
    count, lora = count_parameters(model), count_parameters(plain)
    assert count.trainable == lora.trainable + 10 + 8 and count.total == lora.total
    assert len(adapter_parameters(model)) == 6


def test_merged_computes_what_the_subclass_computed(dora: Any) -> None:
    """Catches a merge of W + scaling * B A whatever the layer computes."""
    model, _ = trained(dora)
    x, layer = torch.randn(5, 12), first_layer(model)
    before = model(x)
    with disabled(model):  # strength 0 is the base, for the layer and for its weight
        assert torch.equal(layer(x), layer.base(x)) and not layer.delta_weight().any()
    torch.testing.assert_close(merged(layer)(x), layer(x))
    merge(model)
    torch.testing.assert_close(model(x), before)


def test_a_layer_that_is_not_linear_is_not_merged(tmp_path: Path) -> None:
    """Catches a merge that is believed: the merged model would compute something else, without a word."""
    model, _ = trained(Tanh)
    with pytest.raises(LoRAError, match="Tanh whose forward differs"):
        merge(model)
    assert type(model[0]) is Tanh  # untouched


def test_an_edit_of_forward_is_not_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the same in LoRALinear itself, after a reader has edited it."""
    model, _ = trained(LoRALinear)
    monkeypatch.setattr(LoRALinear, "forward", Tanh.forward)
    with pytest.raises(LoRAError, match="LoRALinear whose forward differs"):
        merged(first_layer(model))


def test_a_subclass_is_saved_only_if_it_says_how(tmp_path: Path, dora: Any) -> None:
    """Catches an adapter that PEFT would load as plain LoRA; a parameter that is left out of the file."""
    model, _ = trained(Tanh)
    with pytest.raises(LoRAError, match="found Tanh, a subclass of LoRALinear.*peft_fields"):
        save_adapter(model, tmp_path)

    class Forgotten(dora):  # type: ignore[misc]
        peft_fields = {"peft_type": "FORGOTTEN"}
        peft_tensors = LoRALinear.peft_tensors

    model, _ = trained(Forgotten)
    with pytest.raises(LoRAError, match="parameters.*magnitude"):
        save_adapter(model, tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["dora", "tanh"])
def test_a_saved_subclass_reads_back_as_itself(kind: str, tmp_path: Path, dora: Any) -> None:
    """Catches a file that loses a parameter, or that loads as LoRALinear."""
    model, _ = trained(dora if kind == "dora" else NamedTanh)
    save_adapter(model, tmp_path)
    loaded = a_model()
    load_adapter(loaded, tmp_path)
    assert type(loaded[0]).__name__ == type(model[0]).__name__
    x = torch.randn(5, 12)
    assert torch.equal(loaded(x), model(x))


def test_of_two_classes_with_the_same_fields_the_later_is_loaded(tmp_path: Path) -> None:
    """Catches the class of a notebook cell before it was edited and run again."""

    class First(NamedTanh):
        peft_fields = {"peft_type": "TWICE"}

    class Second(NamedTanh):
        peft_fields = {"peft_type": "TWICE"}

    model, _ = trained(First)
    save_adapter(model, tmp_path)
    loaded = a_model()
    load_adapter(loaded, tmp_path)
    assert type(loaded[0]) is Second


def test_peft_refuses_the_file_of_a_method_that_it_does_not_have(tmp_path: Path) -> None:
    """Catches a file that PEFT loads as plain LoRA, with other numbers than were trained."""
    peft = pytest.importorskip("peft")
    model, _ = trained(NamedTanh)
    save_adapter(model, tmp_path)
    with pytest.raises((ValueError, KeyError), match="TANH"):
        peft.PeftModel.from_pretrained(a_model(), tmp_path)


def test_a_constructor_that_fails_leaves_the_model_as_it_was() -> None:
    """Catches a model frozen by an injection that then fails."""

    class Broken(LoRALinear):
        def __init__(self, base: nn.Linear, *settings: Any) -> None:
            if base.out_features == 8:
                raise LoRAError("broken on purpose")
            super().__init__(base, *settings)

    model = a_model()
    with pytest.raises(LoRAError, match="2: broken on purpose"):
        inject(model, ("0", "2"), layer=Broken)
    assert type(model[0]) is nn.Linear and model[2].weight.requires_grad
