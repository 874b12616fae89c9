"""The ablation: what each variant trains, how its learning rate is selected, and resuming."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_medical import load_clip
from clip_medical.config import Config
from clip_medical.data.batches import Pairs
from clip_medical.model import Clip
from experiments import ablation
from experiments.ablation import (
    FULL,
    LINEAR,
    UNADAPTED,
    Ablation,
    Bench,
    Variant,
    choose_lr,
    difference,
    fit,
    loss_on,
    variants,
)
from tests.experiments.tools import Command, results


@pytest.fixture
def bench() -> Bench:
    """20 pairs of black images and different captions, and a configuration of 7 steps."""
    processor, number = load_clip().processor, torch.arange(20)
    tokens, lengths = processor.tokens([f"number {n}" for n in number.tolist()])
    pixels = torch.zeros(20, 3, processor.image_size, processor.image_size, dtype=torch.uint8)
    pairs = Pairs(pixels, tokens, lengths, number, number)
    return Bench(Config(steps=7, batch_size=4), load_clip, pairs, pairs, pairs)


def test_trainable_parameters_of_each_variant(bench: Bench) -> None:
    """Catches a linear map that trains the encoders, and full fine-tuning that leaves a part of them frozen."""
    chosen = variants(Config(), (1, 8))
    assert len({variant.name for variant in chosen}) == 8
    for variant in chosen:
        model = fit(bench._replace(config=Config()), variant, 1e-3, torch.arange(20)).model
        trainable = {name for name, p in model.named_parameters() if p.requires_grad}
        if variant.name == LINEAR:
            assert trainable == {"visual_projection.weight", "text_projection.weight"}
        elif variant.name == FULL:
            assert {name for name, _ in model.named_parameters()} - trainable == {"logit_scale"}
        else:
            dora = ("magnitude",) if "DoRA" in variant.name else ()
            assert {name.rpartition(".")[2] for name in trainable} == {"lora_A", "lora_B", *dora}
            tower = next((tower for tower in ("vision", "text") if f"{tower} tower" in variant.name), "")
            assert all(name.startswith(tower) for name in trainable)
            layers: list[Any] = [module for module in model.modules() if hasattr(module, "lora_A")]
            assert {layer.scaling for layer in layers} == {2.0}, "a rank must not change the scaling"


def test_held_back_pairs_are_not_trained_on(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches rates tried for a part of the steps only, and training on the pairs that decide between rates."""
    trained: list[tuple[float, Tensor]] = []
    decided: list[Tensor] = []

    def fit(bench: Bench, variant: Variant, lr: float, rows: Tensor) -> Clip:
        trained.append((lr, rows))
        assert bench.config.steps == 7
        return bench.base()

    def loss_on(pairs: Pairs, rows: Tensor, clip: Clip) -> float:
        decided.append(rows)
        return 1.0

    monkeypatch.setattr(ablation, "fit", fit)
    monkeypatch.setattr(ablation, "loss_on", loss_on)
    monkeypatch.setattr(ablation, "MAX_RATES", 2)
    choose_lr(bench, Variant("any", (0.1, 0.2)))
    assert [lr for lr, _ in trained] == [0.1, 0.2]
    for (_, train_rows), held_back in zip(trained, decided, strict=True):
        assert len(held_back) == 2 and sorted([*train_rows.tolist(), *held_back.tolist()]) == list(range(20))


@pytest.mark.parametrize(
    ("best", "tried"),
    [
        (1.0, [0.5, 1, 2]),
        (2.5, [0.5, 1, 2, 6]),
        (9.0, [0.5, 1, 2, 6, 18]),
        (0.4, [0.5 / 3, 0.5, 1, 2]),
        (1e9, [0.5, 1, 2, 6, 18, 54]),
        (math.nan, [0.5 / 27, 0.5 / 9, 0.5 / 3, 0.5, 1, 2]),
    ],
)
def test_rates_are_tried_until_the_best_lies_between_two(
    best: float, tried: list[float], bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches the lowest or highest of a few rates taken for the best, and a search without end."""

    def loss_on(pairs: Pairs, rows: Tensor, lr: float) -> float:
        failed = math.isnan(best) or (lr == 0.5 and best != 0.4)
        return math.inf if failed else abs(math.log(lr / best))

    monkeypatch.setattr(ablation, "fit", lambda bench, variant, lr, rows: lr)
    monkeypatch.setattr(ablation, "loss_on", loss_on)
    chosen = choose_lr(bench, Variant("any", (0.5, 1, 2)))
    assert list(chosen["losses"]) == [f"{lr:.2g}" for lr in tried]
    assert chosen["lr"] == (tried[0] if math.isnan(best) else min(tried, key=lambda lr: abs(math.log(lr / best))))
    assert chosen["at the edge"] == (chosen["lr"] in (tried[0], tried[-1]))


def test_a_loss_that_is_not_a_number_is_the_worst(bench: Bench) -> None:
    """Catches a diverged training whose NaN loss counts as the lowest."""
    clip = load_clip()
    assert 0 < loss_on(bench.train, torch.arange(8), clip) < 10
    clip.model.visual_projection.weight.data.fill_(torch.nan)
    assert loss_on(bench.train, torch.arange(8), clip) == math.inf


Fit = Callable[..., Clip]


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> Fit:
    """Make the ablation small: few shapes, and the lowest of three rates wins. Returns the real `fit`."""
    monkeypatch.setattr(ablation, "SHAPES", 24)
    monkeypatch.setattr(ablation, "MAX_RATES", 3)
    monkeypatch.setattr(ablation, "loss_on", lambda *_: 1.0)
    return ablation.fit


@pytest.mark.slow
def test_an_interrupted_ablation_continues(
    small: Fit,
    finished: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches finished work that is repeated, and rows of other settings that are kept."""
    fitted: list[str] = []

    def interrupted_at_full(bench: Bench, variant: Variant, lr: float, rows: Tensor) -> Clip:
        if variant.name == FULL and len(rows) == len(bench.train):  # its learning rate was selected
            raise KeyboardInterrupt
        return small(bench, variant, lr, rows)

    def counted(bench: Bench, variant: Variant, lr: float, rows: Tensor) -> Clip:
        fitted.append(variant.name)
        return small(bench, variant, lr, rows)

    def interrupted(*_: object) -> Clip:
        raise KeyboardInterrupt

    flags = ("--run", finished, "--output", tmp_path, "--ranks", 1)
    monkeypatch.setattr(ablation, "fit", interrupted_at_full)
    assert command("ablation", *flags) == 130
    assert LINEAR in results(tmp_path, "ablation")["results"]["variants"]

    monkeypatch.setattr(ablation, "fit", counted)
    assert command("ablation", *flags) == 0
    assert fitted == [FULL]  # all else was measured, and its learning rate selected
    content = results(tmp_path, "ablation")["results"]
    rows = content["variants"]
    assert list(rows)[0] == UNADAPTED and list(rows)[-1] == FULL
    assert rows[UNADAPTED]["trained"] == 0 < rows["LoRA r = 1, q and v"]["trained"] < rows[FULL]["trained"]
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "minus LoRA r = 4" in printed and "Others may be better" in printed

    monkeypatch.setattr(ablation, "fit", interrupted)
    assert command("ablation", *flags, "--steps", 2) == 130  # other settings: everything is measured again
    assert list(results(tmp_path, "ablation")["results"]["variants"]) == [UNADAPTED]


def test_differences_are_paired() -> None:
    """Catches the interval of two independent samples: equal models on the same pairs differ by nothing."""
    number = torch.arange(100)
    pairs, one = Pairs(number, number, number, number, number), {"recall": {"hits": "02" * 50}}
    same = difference(pairs, one, one)
    assert same["value"] == 0 and 0 < same["high"] == -same["low"] < 0.04
    better = difference(pairs, {"recall": {"hits": "12" * 50}}, one)
    assert better["value"] == pytest.approx(0.25) and 0.15 < better["low"] < better["high"] < 0.35


def test_settings_are_those_of_the_run(finished: Path) -> None:
    """Catches an ablation with the settings of a preset instead of those of the run."""
    config = Ablation(run=str(finished)).read_config()
    assert (config.rank, config.batch_size, config.steps, config.targets) == (4, 8, 4, ("q_proj", "v_proj"))
