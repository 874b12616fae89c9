"""The optimizer step: order of operations, skipped steps, learning rates, the schedule, the saved state."""

import copy
import math
from typing import Any

import pytest
import torch
from torch import nn

from clip_medical.config import Config
from clip_medical.training.optimizer import Optimizer
from lora import FullLinear


class Model(nn.Module):
    """What an optimizer needs of an adapted CLIP: one pair of adapter matrices, a frozen weight and logit_scale."""

    def __init__(self, logit_scale: float = 2.0, train_logit_scale: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.weight = nn.Parameter(torch.randn(3, 3), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 3))
        self.logit_scale = nn.Parameter(torch.tensor(logit_scale), requires_grad=train_logit_scale)


def make(steps: int = 20, scaled: bool = False, model: Model | None = None, **fields: Any) -> Optimizer:
    return Optimizer(model or Model(), Config(**fields), steps, scaled)


def rate(optimizer: Optimizer) -> float:
    """The learning rate of the next step, of A."""
    return float(optimizer.schedule.get_last_lr()[0])


def backward(optimizer: Optimizer, factor: float = 1.0) -> None:
    loss = factor * torch.stack([(p**2).sum() for p in optimizer.parameters]).sum()
    optimizer.scaler.scale(loss).backward()


def test_the_schedule_rises_linearly_and_falls_along_a_cosine() -> None:
    """Catches a first step at rate 0, a peak that is not --lr, and an end that is not 0."""
    optimizer = make(steps=20, lr=1e-2, warmup=0.2)
    rates = []
    for _ in range(20):
        rates.append(rate(optimizer))
        backward(optimizer)
        optimizer.step(1.0)
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4:] == pytest.approx([0.005 * (1 + math.cos(math.pi * t / 16)) for t in range(16)])
    assert rate(optimizer) == pytest.approx(0, abs=1e-12)


def test_a_step_that_overflows_moves_neither_weights_nor_schedule() -> None:
    """Catches a schedule that counts iterations: in fp16 it runs ahead of the weights by every skipped step."""
    optimizer = make(scaled=True, warmup=0.5)
    before, first_rate = optimizer.weights(), rate(optimizer)
    backward(optimizer, factor=float("inf"))
    optimizer.step(1.0)
    assert all(map(torch.equal, before, optimizer.weights())) and rate(optimizer) == first_rate
    backward(optimizer)
    optimizer.step(1.0)
    assert not torch.equal(before[0], optimizer.weights()[0]) and rate(optimizer) != first_rate


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_without_loss_scaling_a_gradient_that_is_not_finite_moves_nothing(factor: float) -> None:
    """Catches weights that become NaN, and with them the next checkpoint, which the user would resume from."""
    optimizer = make()
    before, first_rate = optimizer.weights(), rate(optimizer)
    backward(optimizer, factor)
    assert not math.isfinite(optimizer.step(1.0))
    assert all(map(torch.equal, before, optimizer.weights())) and rate(optimizer) == first_rate
    assert all(p.grad is None for p in optimizer.parameters) and optimizer.skipped == 0


def test_the_gradient_is_unscaled_before_it_is_clipped() -> None:
    """Catches clipping before unscaling: the norm is then 65,536 times too large and every gradient becomes tiny."""
    plain, scaled = make(), make(scaled=True)
    norms = []
    for optimizer in (plain, scaled):
        backward(optimizer)
        norms.append(optimizer.step(1e-3))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 1
    torch.testing.assert_close(plain.weights(), scaled.weights())


def test_logit_scale_is_not_decayed() -> None:
    """Catches weight decay of logit_scale, which moves the temperature whatever the data say."""
    optimizer = make(weight_decay=0.5, lr=0.1)
    before = optimizer.weights()
    for p in optimizer.parameters:
        p.grad = torch.zeros_like(p)
    optimizer.step(1.0)
    a, b, scale = optimizer.weights()
    assert torch.equal(scale, before[2]) and a.norm() < before[0].norm() and b.norm() < before[1].norm()


def test_skipped_steps_are_counted() -> None:
    """Catches a counter that is not kept, or that counts the steps that were taken."""
    optimizer = make(scaled=True)
    for factor in (float("inf"), 1.0, float("nan"), 1.0, 1.0):
        backward(optimizer, factor)
        optimizer.step(1.0)
    assert optimizer.skipped == 2 and optimizer.schedule.last_epoch == 3


def test_a_b_and_logit_scale_have_their_own_rates() -> None:
    """Catches LoRA+ on A instead of B, and a temperature that follows --lr. Adam's first step is one rate long."""
    optimizer = make(lr=1e-3, lora_plus=16.0, logit_scale_lr=0.5, warmup=0.0, weight_decay=0.0)
    before = optimizer.weights()
    backward(optimizer)
    optimizer.step(1e9)
    moved = [(a - b).abs().mean().item() for a, b in zip(before, optimizer.weights(), strict=True)]
    assert moved == pytest.approx([1e-3, 16e-3, 0.5], rel=1e-3)
    assert rate(optimizer) == pytest.approx(1e-3, rel=0.05)


def test_the_vision_tower_can_have_its_own_rate() -> None:
    """Catches a rate that is given to the text tower, to both, or to A alone, and one that --lora-plus overrides."""
    model = nn.Module()
    model.logit_scale = Model().logit_scale
    model.text_model, model.vision_model = Model(), Model()
    optimizer = make(model=model, lr=1e-3, vision_lr=0.1, lora_plus=2.0, warmup=0.0, weight_decay=0.0)  # type: ignore[arg-type]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(optimizer)
    optimizer.step(1e9)
    moved = {name: (p - before[name]).abs().mean().item() for name, p in model.named_parameters()}
    for tower, rate_of_a in (("text_model", 1e-3), ("vision_model", 1e-4)):
        assert moved[f"{tower}.lora_A"] == pytest.approx(rate_of_a, rel=1e-2)
        assert moved[f"{tower}.lora_B"] == pytest.approx(2 * rate_of_a, rel=1e-2)


def test_a_whole_weight_has_a_tenth_of_the_rate() -> None:
    """Catches the rate of LoRA on a whole weight, which destroys in a few steps what was pretrained."""
    model = Model()
    model.projection = FullLinear(nn.Linear(4, 4))
    optimizer = make(model=model, lr=1e-3, warmup=0.0, weight_decay=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    backward(optimizer)
    optimizer.step(1e9)
    moved = {name: (p - before[name]).abs().mean().item() for name, p in model.named_parameters()}
    assert moved["lora_B"] == pytest.approx(1e-3, rel=1e-2)
    for name in ("projection.trained_weight", "projection.trained_bias"):
        assert moved[name] == pytest.approx(1e-4, rel=1e-2)


def test_the_order_of_the_parameters_does_not_depend_on_the_rate() -> None:
    """Catches groups by learning rate: 10 * 0.1 * lr is lr for some rates, and a resumed run would mix up moments."""

    def tower_first(lr: float) -> Optimizer:
        model = nn.Module()
        model.logit_scale = Model().logit_scale
        model.text_model, model.vision_model = Model(), Model()
        return make(model=model, lr=lr, vision_lr=0.1, lora_plus=10.0)  # type: ignore[arg-type]

    a, b = tower_first(1e-2), tower_first(2e-3)
    backward(a)
    a.step(1.0)
    b.load_state_dict(a.state_dict())
    assert [len(group["params"]) for group in a.adamw.param_groups] == [2, 2, 1, 1, 1]
    assert all(map(torch.equal, a.weights(), b.weights()))


def test_every_trainable_parameter_is_optimized() -> None:
    """Catches a parameter that a subclass of LoRALinear adds, or a weight that was unfrozen, left out."""
    model = Model()
    model.magnitude = nn.Parameter(torch.ones(3))
    optimizer = make(model=model)
    assert {id(p) for p in optimizer.parameters} == {id(p) for p in model.parameters() if p.requires_grad}


@pytest.mark.parametrize(("start", "direction", "end"), [(4.6, -1.0, math.log(100)), (0.01, 1.0, 0.0)])
def test_logit_scale_stays_in_its_range(start: float, direction: float, end: float) -> None:
    """Catches a scale above 100, where a few pairs decide the loss, and one below 1."""
    optimizer = make(model=Model(start), logit_scale_lr=0.5, warmup=0.0)
    for p in optimizer.parameters:
        p.grad = torch.full_like(p, direction)
    optimizer.step(1.0)
    assert optimizer.logit_scale.item() == pytest.approx(end)


def test_a_frozen_logit_scale_is_neither_trained_nor_saved() -> None:
    """Catches a temperature that is trained without --train-logit-scale."""
    optimizer = make(model=Model(train_logit_scale=False))
    assert len(optimizer.weights()) == 2 and sum(len(g["params"]) for g in optimizer.adamw.param_groups) == 2


def test_a_loaded_state_continues_like_the_original() -> None:
    """Catches a moment of Adam, a position in the schedule or a loss scale that is missing from the state."""
    original = make(scaled=True)
    for factor in (1.0, float("inf"), 1.0):
        backward(original, factor)
        original.step(1.0)
    loaded = make(scaled=True)
    loaded.load_state_dict(copy.deepcopy(original.state_dict()))  # as from a file: nothing is shared
    for optimizer in (original, loaded):
        backward(optimizer)
        optimizer.step(1.0)
    assert all(map(torch.equal, original.weights(), loaded.weights()))
    assert (rate(original), original.skipped) == (rate(loaded), loaded.skipped)
    assert original.scaler.get_scale() == loaded.scaler.get_scale()
