"""The variants learn what their names say, from the same start, and are compared on the same pictures."""

import math
from pathlib import Path

import pytest
import torch

import experiments.variants
from clip_medical import load_clip
from clip_medical.config import Config
from clip_medical.data.batches import Pairs
from experiments import ablation
from experiments.ablation import UNADAPTED, Ablation, difference, read_config
from experiments.variants import FULL, LINEAR, Bench, Variant, choose_lr, variants
from tests.experiments.tools import Command, results


def test_what_each_variant_trains() -> None:
    """Catches a linear map that lets the towers learn, and full fine-tuning that leaves part of them frozen."""
    for variant in variants(Config(), (1, 8)):
        clip = load_clip()
        learned = variant.make(clip)
        names = {name for name, p in clip.model.named_parameters() if p.requires_grad}
        assert sum(p.numel() for p in learned) == sum(p.numel() for p in clip.model.parameters() if p.requires_grad), (
            variant.name
        )
        if variant.name == LINEAR:
            assert names == {"visual_projection.weight", "text_projection.weight"}
        elif variant.name == FULL:
            assert {n for n, _ in clip.model.named_parameters()} - names == {"logit_scale"}
        else:
            assert all(name.endswith(("lora_A", "lora_B")) for name in names)
            tower = next((t for t in ("vision", "text") if f"{t} tower" in variant.name), "")
            assert all(name.startswith(tower) for name in names)
            layers = [m for m in clip.model.modules() if hasattr(m, "lora_A")]
            assert {layer.scaling for layer in layers} == {2.0}, "a rank must not change the step size"
    assert len({variant.name for variant in variants(Config(), (1, 8))}) == 7


def bench_of(pairs: int, steps: int) -> Bench:
    clip, number = load_clip(), torch.arange(pairs)
    tokens, lengths = clip.tokens([f"number {n}" for n in number.tolist()])
    pixels = torch.zeros(pairs, 3, clip.image_size, clip.image_size, dtype=torch.uint8)
    made = Pairs(pixels, tokens, lengths, number, number)
    return Bench(Config(), steps, load_clip, made, made, {}, made)


def test_a_rate_is_chosen_with_all_the_steps_and_nine_tenths_of_the_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: a rate that is good for a quarter of the steps taken for all; learning from the tenth that decides."""
    bench, fitted = bench_of(pairs=20, steps=7), []
    monkeypatch.setattr(
        experiments.variants, "fit", lambda b, v, lr, rows, steps: fitted.append((lr, len(rows), steps)) or b.base()
    )
    monkeypatch.setattr(experiments.variants, "BEYOND", 0)
    found = choose_lr(bench, Variant("any", lambda clip: [], (0.1, 0.2)))
    assert fitted == [(0.1, 18, 7), (0.2, 18, 7)] and set(found["losses"]) == {"0.1", "0.2"}


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
    best: float, tried: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistake: the lowest or highest of a few rates taken for the best of all; a search without an end; a loss that is
    not a number taken for the lowest, or a rate that diverges taken where a lower one is left."""
    fit = lambda b, v, lr, rows, steps: lr  # noqa: E731
    loss = lambda b, lr, rows: abs(math.log(lr / best)) if lr != 0.5 or best == 0.4 else math.nan  # noqa: E731
    monkeypatch.setattr(experiments.variants, "fit", fit)
    monkeypatch.setattr(experiments.variants, "kept_back_loss", loss)
    found = choose_lr(bench_of(pairs=20, steps=7), Variant("any", lambda clip: [], (0.5, 1, 2)))
    assert list(found["losses"]) == [f"{lr:.2g}" for lr in tried]
    assert found["lr"] == (tried[0] if math.isnan(best) else min(tried, key=lambda lr: abs(math.log(lr / best))))


def test_one_table_that_goes_on_where_it_stopped(
    finished: Path,
    tmp_path: Path,
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches work that an interruption throws away, rows of another setting taken over, and a verdict without rows."""
    monkeypatch.setattr(ablation, "SHAPES", 24)
    monkeypatch.setattr(ablation, "STRENGTHS", (0.0, 0.5, 1.0))
    monkeypatch.setattr(experiments.variants, "BEYOND", 0)
    monkeypatch.setattr(experiments.variants, "kept_back_loss", lambda bench, clip, rows: 1.0)  # the lowest rate wins
    real, fitted = ablation.fit, []

    def stop_at_full(bench, variant, lr, rows, steps):  # type: ignore[no-untyped-def]
        if variant.name == FULL and steps > 1:
            raise KeyboardInterrupt
        fitted.append(variant.name)
        return real(bench, variant, lr, rows, steps)

    flags = ("--run", finished, "--output", tmp_path, "--steps", 4, "--ranks", 1)
    monkeypatch.setattr(ablation, "fit", stop_at_full)
    assert command("ablation", *flags) == 130
    assert LINEAR in results(tmp_path, "ablation")["results"]["variants"]
    fitted.clear()
    monkeypatch.setattr(ablation, "fit", lambda b, v, *a: fitted.append(v.name) or real(b, v, *a))  # type: ignore[func-returns-value]
    assert command("ablation", *flags) == 0
    assert fitted == [FULL]  # its learning rate had been chosen, all else had been measured
    found = results(tmp_path, "ablation")["results"]
    rows = found["variants"]
    assert list(rows)[0] == UNADAPTED and list(rows)[-1] == FULL and "LoRA r = 4, q and v" in rows
    assert len(found["verdict"]) == 2 and LINEAR in found["verdict"][0] and FULL in found["verdict"][1]
    # strength 0 is the base, strength 1 the adapter as trained
    assert found["strength"]["0.0"]["hits"] == rows[UNADAPTED]["hits"]
    assert found["strength"]["1.0"]["hits"] == rows["LoRA r = 4, q and v"]["hits"]
    assert rows[UNADAPTED]["trained"] == 0 < rows["LoRA r = 1, q and v"]["trained"] < rows[FULL]["trained"]
    assert (tmp_path / "ablation.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "less that of LoRA" in printed and "a better one may lie beyond" in printed

    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ablation, "fit", stop)
    assert command("ablation", *flags[:-3], 2, *flags[-2:]) == 130  # 2 steps: all of it anew
    assert list(results(tmp_path, "ablation")["results"]["variants"]) == [UNADAPTED]


def test_differences_are_taken_pair_by_pair() -> None:
    """Catches the interval of two independent samples: on the same pictures, two equal models differ by nothing."""
    bench = type("Bench", (), {"held_out": type("Pairs", (), {"image_ids": torch.arange(100)})})
    one = {"hits": "02" * 50}
    same = difference(bench, one, one)  # type: ignore[arg-type]
    assert same["value"] == 0 and 0 < same["high"] == -same["low"] < 0.04
    better = {"hits": "12" * 50}
    found = difference(bench, better, one)  # type: ignore[arg-type]
    assert found["value"] == pytest.approx(0.25) and 0.15 < found["low"] < found["high"] < 0.35


def test_the_budget_is_that_of_the_run(finished: Path) -> None:
    """Catches an ablation with the preset's settings where those of the run were asked for."""
    config = read_config(Ablation(run=str(finished)))
    assert (config.rank, config.batch_size, config.steps, config.targets) == (4, 8, 4, ("q_proj", "v_proj"))
    assert read_config(Ablation(run=str(finished), steps=2)).steps == 2
