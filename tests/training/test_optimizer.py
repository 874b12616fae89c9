"""The optimizer step with all that hangs on it: order of operations, skipped steps, the schedule, the saved state."""

import copy
import math

import pytest
import torch
from torch import nn

from clip_medical.config import Config
from clip_medical.training.optimizer import Learner


def learner(steps: int = 20, scaled: bool = False, **fields: float) -> Learner:
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.tensor(2.0))]
    return Learner(parameters[:2], parameters[2], Config(**fields), steps, scaled)  # type: ignore[arg-type]


def backward(one: Learner, factor: float = 1.0) -> None:
    loss = factor * sum((p**2).sum() for p in one.parameters)
    one.scaler.scale(loss).backward()


def test_the_schedule_rises_in_a_line_and_falls_along_a_cosine() -> None:
    """Catches a first step at rate 0, a peak that is not --lr, and an end that is not 0."""
    one = learner(steps=20, lr=1e-2, warmup=0.2)
    rates = []
    for _ in range(20):
        rates.append(one.lr)
        backward(one)
        one.step(1.0)
    assert rates[:4] == pytest.approx([0.0025, 0.005, 0.0075, 0.01])
    assert rates[4:] == pytest.approx([0.005 * (1 + math.cos(math.pi * t / 16)) for t in range(16)])
    assert one.lr == pytest.approx(0, abs=1e-12)


def test_a_step_that_overflowed_moves_neither_weights_nor_schedule() -> None:
    """Catches the schedule that counts iterations: with fp16 it runs ahead of the weights by every skipped step."""
    one = learner(scaled=True, warmup=0.5)
    before, rate = [p.detach().clone() for p in one.parameters], one.lr
    backward(one, factor=float("inf"))
    one.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(before, one.parameters, strict=True)) and one.lr == rate
    backward(one)
    one.step(1.0)
    assert not torch.equal(before[0], one.parameters[0]) and one.lr != rate


@pytest.mark.parametrize("factor", [float("inf"), float("nan")])
def test_without_loss_scaling_a_bad_gradient_moves_nothing_either(factor: float) -> None:
    """Catches weights that are NaN from then on, and with them the checkpoint that was to be the way back."""
    one = learner()
    before, rate = one.weights(), one.lr
    backward(one, factor)
    assert not math.isfinite(one.step(1.0))
    assert all(torch.equal(a, b) for a, b in zip(before, one.weights(), strict=True)) and one.lr == rate
    assert all(p.grad is None for p in one.parameters) and one.skipped == 0


def test_the_gradient_is_clipped_after_the_loss_scale_is_taken_out() -> None:
    """Catches clip before unscale: the norm then is 65,536 times too large and every step is clipped to nothing."""
    plain, scaled = learner(), learner(scaled=True)
    norms = []
    for one in (plain, scaled):
        backward(one)
        norms.append(one.step(1e-3))
    assert norms[0] == pytest.approx(norms[1], rel=1e-5) and norms[0] > 1
    for a, b in zip(plain.parameters, scaled.parameters, strict=True):
        torch.testing.assert_close(a, b)


def test_the_temperature_is_not_decayed() -> None:
    """Catches weight decay on logit_scale, which pulls the temperature towards 1 whatever the data say."""
    one = learner(weight_decay=0.5, lr=0.1)
    before = [p.detach().clone() for p in one.parameters]
    for p in one.parameters:
        p.grad = torch.zeros_like(p)
    one.step(1.0)
    assert torch.equal(one.parameters[2], before[2]) and one.parameters[0].norm() < before[0].norm()


def test_skipped_steps_are_counted() -> None:
    """Catches a counter that forgets, or that counts the steps which were taken."""
    one = learner(scaled=True)
    for factor in (float("inf"), 1.0, float("nan"), 1.0, 1.0):
        backward(one, factor)
        one.step(1.0)
    assert one.skipped == 2 and one.schedule.last_epoch == 3


def test_a_b_and_the_temperature_learn_at_their_own_rates() -> None:
    """Catches LoRA+ on A instead of B, and a temperature that follows --lr. Adam's first step is one rate long."""
    one = learner(lr=1e-3, lora_plus=16.0, logit_scale_lr=0.5, warmup=0.0, weight_decay=0.0)
    before = one.weights()
    backward(one)
    one.step(1e9)
    moved = [(a - b).abs().mean().item() for a, b in zip(before, one.weights(), strict=True)]
    assert moved == pytest.approx([1e-3, 16e-3, 0.5], rel=1e-3)
    assert one.lr == pytest.approx(1e-3, rel=0.05)


@pytest.mark.parametrize(("begin", "direction", "end"), [(4.6, -1.0, math.log(100)), (0.01, 1.0, 0.0)])
def test_the_temperature_stays_in_its_range(begin: float, direction: float, end: float) -> None:
    """Catches a scale that runs away above 100, where fp16 logits saturate, or that turns rankings around below 1."""
    one = learner(logit_scale_lr=0.5, warmup=0.0)
    one.logit_scale.data.fill_(begin)
    for p in one.parameters:
        p.grad = torch.full_like(p, direction)
    one.step(1.0)
    assert one.logit_scale.item() == pytest.approx(end)


def test_a_frozen_temperature_is_left_alone() -> None:
    """Catches a logit_scale that is learned, or saved among what was, although nobody asked for it."""
    torch.manual_seed(0)
    adapter = [nn.Parameter(torch.randn(3, 4)), nn.Parameter(torch.randn(4, 3))]
    one = Learner(adapter, nn.Parameter(torch.tensor(2.0), requires_grad=False), Config(), 5, scaled=False)
    assert len(one.weights()) == 2 and len(one.optimizer.param_groups) == 2


def test_what_was_saved_goes_on_as_what_was_not() -> None:
    """Catches a moment of Adam, a place in the schedule or a loss scale that is left out of the state."""
    one = learner(scaled=True, dropout=0.0)
    for factor in (1.0, float("inf"), 1.0):
        backward(one, factor)
        one.step(1.0)
    other = learner(scaled=True)
    other.load_state_dict(copy.deepcopy(one.state_dict()))  # as from a file: sharing nothing
    for each in (one, other):
        backward(each)
        each.step(1.0)
    assert all(torch.equal(a, b) for a, b in zip(one.weights(), other.weights(), strict=True))
    assert (one.lr, one.skipped, one.scaler.get_scale()) == (other.lr, other.skipped, other.scaler.get_scale())
