"""The memory curve: what is counted, the search for the largest batch, and rows that wait for a GPU."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from clip_medical.errors import UserError
from experiments import memory_curve
from tests.training.test_contrastive import small_clip


def test_the_largest_batch_is_found_to_two_per_cent() -> None:
    """Catches a search that gives back a batch which does not fit, or stops at a power of two."""
    tried = []

    def step(batch: int) -> dict[str, Any] | None:
        tried.append(batch)
        return {"batch": batch} if batch <= 700 else None

    found = memory_curve.largest(step)
    assert found is not None and 0.98 * 700 <= found["batch"] <= 700 and len(tried) < 15
    assert memory_curve.largest(lambda batch: None) is None


@pytest.mark.parametrize(("checkpointing", "said"), [("off", "without checkpointing"), ("on", "with checkpointing")])
def test_a_planned_step_is_run_as_it_was_planned(checkpointing: str, said: str) -> None:
    """Catches rows of a GPU whose code no machine without one has ever run: it is the same, on another device."""
    found = memory_curve.planned_step(small_clip(), 24, 8, checkpointing, seed=0)
    assert found["batch"] == 24 and found["plan"] == f"in 3 chunks of up to 8, {said}"
    assert found["forecast"] > 0 and found["peak"] > 0


def test_a_step_that_does_not_fit_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a search that ends with the first batch that is too large, gradients of which stay in memory."""
    clip = small_clip()

    def too_large(*_: Any) -> None:
        next(clip.model.parameters()).grad = torch.zeros_like(next(clip.model.parameters()))
        raise torch.OutOfMemoryError

    monkeypatch.setattr(memory_curve, "planned_step", too_large)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    assert memory_curve.step_if_it_fits(clip, 64, 64, "off", 0) is None
    assert all(parameter.grad is None for parameter in clip.model.parameters())


def test_an_output_that_cannot_be_written_is_told_before_the_measurement(tmp_path: Path) -> None:
    """Catches a traceback after minutes of measuring, whose result is lost."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another --output"):
        memory_curve.run(memory_curve.Options(output=str(tmp_path / "file" / "x")))


def test_the_result_says_what_was_not_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """Catches figures of a GPU where there was none, and a result without its command, seed and hardware."""
    monkeypatch.setattr(
        memory_curve, "fresh_process", lambda action, batch, chunk, seed: 2**29 + 1000 * min(batch, chunk)
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert memory_curve.run(memory_curve.Options(output=str(tmp_path))) == 0
    found = json.loads((tmp_path / "memory_curve.json").read_text())
    assert found["command"].startswith("python -m experiments.memory_curve") and found["seed"] == 0
    assert found["environment"]["torch"] and set(found["T4"].values()) == {"not yet measured"}
    last = found["curve"]["in chunks"][-1]
    assert (last["batch"], last["features"], last["logits"]) == (4096, 2 * 4096 * 128 * 4, 2**22)
    assert found["curve"]["largest to smallest"] < 1
    assert capsys.readouterr().out.count("not yet measured") == 3
    with Image.open(tmp_path / "memory_curve.png") as picture:
        assert picture.width > 400
