"""The flight check: each way in which an adapter would learn nothing stops the run before anything is written."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from clip_medical.config import Config
from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.training.loss import info_nce
from clip_medical.training.trainer import Trainer
from lora import LoRAError, LoRALinear
from tests.training.tools import small_clip, small_trainer

CONFIG = Config(batch_size=8, steps=2, fragments=1, train_logit_scale=True)


class Unsaved(LoRALinear):
    """A layer that does not state how PEFT's file holds it."""


class Gated(LoRALinear):
    """A layer with a non-linear branch, which no weight matrix can replace."""

    peft_fields = {"peft_type": "GATED"}

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        return y + torch.tanh(super().forward(x) - y)  # type: ignore[no-any-return]


def refusal(trainer: Trainer, kind: type[Exception] = UserError) -> str:
    """The message with which the run stops; the run folder must not exist."""
    with pytest.raises(kind) as caught:
        trainer.train("small")
    assert not trainer.folder.exists()
    return str(caught.value)


def test_a_run_that_can_learn_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a check that refuses a sound run, changes the adapter or the random state, or leaves gradients."""
    trainer = small_trainer(tmp_path / "run", CONFIG)
    before = trainer.optimizer.weights()
    trainer.steps = 0  # the check alone
    state = torch.get_rng_state()
    trainer.train("small")
    assert torch.equal(state, torch.get_rng_state()) and all(map(torch.equal, before, trainer.optimizer.weights()))
    assert all(p.grad is None for p in trainer.clip.model.parameters())
    assert "saved, reloaded and merged" in capsys.readouterr().out


def test_a_layer_whose_forward_is_not_called_is_named(tmp_path: Path) -> None:
    """Catches an encoder that bypasses the layers, or an adapter outside the computation."""
    clip = small_clip()
    clip.model.extra = LoRALinear(nn.Linear(8, 8), rank=2)
    assert "forward was not called (1, such as extra)" in refusal(small_trainer(tmp_path / "run", CONFIG, clip))


def test_a_layer_without_gradient_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches features that are cut off from the graph, after which the adapter of that tower stays as it is."""
    original = Clip.image_features
    monkeypatch.setattr(Clip, "image_features", lambda clip, pixels: original(clip, pixels).detach())
    message = refusal(small_trainer(tmp_path / "run", CONFIG))
    assert "no gradient (4, such as vision_model.encoder.layers.0.self_attn." in message and ".lora_B)" in message


def test_a_gradient_in_a_frozen_weight_is_named(tmp_path: Path) -> None:
    """Catches a base weight that is trained, or would be by the next optimizer that somebody builds."""
    clip = small_clip()
    weight = clip.model.visual_projection.weight

    def write_gradient(gradient: Tensor) -> None:
        weight.grad = torch.ones_like(weight)

    clip.model.logit_scale.register_hook(write_gradient)
    message = refusal(small_trainer(tmp_path / "run", CONFIG, clip))
    assert "gradient in a frozen weight (1, such as visual_projection.weight)" in message


def test_a_trainable_parameter_outside_the_optimizer_is_named(tmp_path: Path) -> None:
    """Catches a weight that is unfrozen after the optimizer was built, and so never moves."""
    trainer = small_trainer(tmp_path / "run", CONFIG)
    trainer.clip.model.visual_projection.weight.requires_grad_(True)
    assert "not in the optimizer (1, such as visual_projection.weight)" in refusal(trainer)


def test_a_first_loss_that_is_not_finite_is_named(tmp_path: Path) -> None:
    """Catches a run that starts from NaN and fills the checkpoint with it."""
    trainer = small_trainer(tmp_path / "run", CONFIG, loss=lambda *inputs: float("nan") * info_nce(*inputs))
    assert "not finite (1, such as the first loss)" in refusal(trainer)


def test_a_layer_that_cannot_be_saved_is_refused(tmp_path: Path) -> None:
    """Catches hours of training that end with an error in save_adapter."""
    assert "Unsaved" in refusal(small_trainer(tmp_path / "run", CONFIG, small_clip(layer=Unsaved)), LoRAError)


def test_a_layer_that_cannot_be_merged_is_reported_and_trained(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a subclass with its own forward that is refused, or trained without a word about merging."""
    trainer = small_trainer(tmp_path / "run", CONFIG, small_clip(layer=Gated))
    before = trainer.optimizer.weights()
    trainer.train("small")
    assert "cannot be merged" in capsys.readouterr().out
    assert trainer.done == 2 and not any(map(torch.equal, before, trainer.optimizer.weights()))


def test_the_log_shows_the_plan_and_the_chance_level(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a log with other chunks or another chance level than those of the run."""
    config = Config(batch_size=8, steps=1, fragments=0, chunk_size=4, checkpointing="on")
    trainer = small_trainer(tmp_path / "run", config)
    trainer.train("small")
    output = capsys.readouterr().out
    assert "1 steps of 8 pairs, in 2 chunks of up to 4, with checkpointing" in output
    assert f"chance level {trainer.chance:.2f}" in output
