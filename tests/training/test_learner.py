"""The optimizer step with all that hangs on it: order of operations, skipped steps, the schedule, the saved state."""

import math

import pytest
import torch
from torch import nn

from clip_medical.config import Config
from clip_medical.training.learner import Learner


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
