"""The choice between the encoders: fast where it is equal to the reference, else the reference with the reason."""

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from clip_medical import load_clip
from clip_medical.errors import UserError
from clip_medical.model import Clip
from lora import BiasLoRALinear, DoRALinear, LoRALinear, adapter_parameters, disabled, inject
from lora.inject import lora_layers

packed = pytest.importorskip("clip_medical.fast.packed")


def adapted(encoder: str = "auto", dropout: float = 0.0, layer: type[LoRALinear] = LoRALinear) -> Clip:
    clip = load_clip(encoder=encoder)
    inject(clip.model, dropout=dropout, layer=layer)
    return clip


class Doubled(LoRALinear):
    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return 2 * super().forward(x) - y


def hooked() -> Clip:
    clip = adapted()
    clip.model.vision_model.encoder.layers[1].register_forward_hook(lambda *_: None)
    return clip


def replaced() -> Clip:
    clip = adapted()
    layer = clip.model.text_model.encoder.layers[0].mlp
    layer.forward = layer.forward  # what a reader does who patches one module
    return clip


def unknown() -> Clip:
    class Scaled(torch.nn.LayerNorm):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    clip = adapted()
    clip.model.vision_model.encoder.layers[0].layer_norm1 = Scaled(256)
    return clip


def attention_dropout() -> Clip:
    clip = adapted()
    clip.model.text_model.encoder.layers[1].self_attn.dropout = 0.1  # where the configuration puts it
    return clip


REASONS: dict[str, Callable[[], Clip]] = {
    "a hook is registered on vision_model.encoder.layers.1": hooked,
    "forward of text_model.encoder.layers.0.mlp was replaced": replaced,
    "is a Doubled, a layer that CLIP does not have": lambda: adapted(layer=Doubled),
    "dropout is on in text_model.encoder.layers.0.self_attn.v_proj": lambda: adapted(dropout=0.1),
    "dropout is on in text_model.encoder.layers.1.self_attn": attention_dropout,
    "vision_model.encoder.layers.0.layer_norm1 is a Scaled": unknown,
}


@pytest.mark.parametrize("reason", REASONS)
def test_the_reference_takes_over_and_the_reason_is_named(reason: str) -> None:
    """Catches a fast encoder that computes something else than the layers say, and a reason that names no cause."""
    clip = REASONS[reason]()
    choice = clip.encoder_choice()
    assert choice.encoder.name == "reference" and reason in choice.reason
    clip.requested_encoder = "fast"
    with pytest.raises(UserError, match="--encoder fast is not possible"):
        clip.encoder_choice()


@pytest.mark.parametrize("layer", [LoRALinear, BiasLoRALinear, DoRALinear])
def test_all_layers_of_lora_run_in_the_fast_encoder(layer: type[LoRALinear]) -> None:
    """Catches a kind of adapter that is trained by the slower encoder for no reason."""
    clip = load_clip()
    inject(clip.model, layer=layer, modules_to_save=["visual_projection", "text_projection"])
    assert clip.encoder_choice().encoder.name == "fast", clip.encoder_choice().reason


def test_an_edit_of_the_layer_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check with B = 0, as it is at the start of training, where an edit of the branch changes nothing."""
    original = LoRALinear.forward
    monkeypatch.setattr(LoRALinear, "forward", lambda self, x: self.base(x) + 10 * (original(self, x) - self.base(x)))
    choice = adapted().encoder_choice()
    assert choice.encoder.name == "reference" and "LoRALinear was edited" in choice.reason


@pytest.mark.parametrize("wrong", ["forward", "gradient"])
def test_different_numbers_are_found(wrong: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a check of the features alone: here they are right and their gradients are not; and no check at all."""
    original = packed.PackedEncoder.text

    def text(self: object, model: torch.nn.Module, ids: Tensor, lengths: Tensor) -> Tensor:
        features: Tensor = original(self, model, ids, lengths)
        if wrong == "forward":
            return features + 1e-3
        return 2 * features - features.detach()

    monkeypatch.setattr(packed.PackedEncoder, "text", text)
    choice = adapted().encoder_choice()
    assert choice.encoder.name == "reference" and "differ by" in choice.reason


def test_the_check_leaves_the_model_as_it_was() -> None:
    """Catches random B left in the adapter, gradients left behind, a random state moved on, a mode changed."""
    clip = adapted()
    clip.model.train()
    before, state = [p.detach().clone() for p in adapter_parameters(clip.model)], torch.get_rng_state()
    assert clip.encoder.name == "fast" and clip.model.training
    assert all(torch.equal(a, b) for a, b in zip(before, adapter_parameters(clip.model), strict=True))
    assert all(p.grad is None for p in clip.model.parameters()) and torch.equal(torch.get_rng_state(), state)


CHANGES: dict[str, Callable[[LoRALinear], object]] = {
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "backward pre-hook": lambda layer: layer.register_full_backward_pre_hook(lambda *_: None),
    "subclass": lambda layer: setattr(layer, "__class__", Doubled),
    "dropout": lambda layer: setattr(layer, "dropout", 0.5),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_choice_is_made_again_when_the_model_changes(change: str) -> None:
    """Catches an adapter, a hook, a subclass or dropout that comes after the first encoding and is overlooked."""
    clip = load_clip()
    first = clip.encoder_choice()
    inject(clip.model)
    assert clip.encoder_choice() is not first and clip.encoder.name == "fast"
    CHANGES[change](next(iter(lora_layers(clip.model).values())))
    assert clip.encoder.name == "reference"


def test_an_adapter_that_is_switched_off_is_checked_as_well() -> None:
    """Catches a check of branches that are skipped: their gradients are zero, and nothing can be compared with them."""
    clip = adapted()
    with disabled(clip.model):
        assert clip.encoder_choice().encoder.name == "fast", clip.encoder_choice().reason
        assert all(layer.strength == 0 for layer in lora_layers(clip.model).values())


def test_everything_runs_without_the_folder(project_copy: Path) -> None:
    """Catches an import of clip_medical.fast outside the one place that may do without it."""
    shutil.rmtree(project_copy / "clip_medical" / "fast")
    # An editable installation would find the folder of the original.
    code = "import sys; sys.meta_path = [f for f in sys.meta_path if 'editable' not in repr(f)]; "
    code += "from clip_medical import load_clip; print(load_clip().encoder_choice().reason)"
    done = subprocess.run([sys.executable, "-c", code], cwd=project_copy, capture_output=True, text=True)
    assert done.stdout.strip() == "clip_medical/fast is not installed", done.stderr
