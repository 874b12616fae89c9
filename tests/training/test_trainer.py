"""The training loop: loss, batches, the best adapter, stopping, resuming, and numbers that are not finite."""

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from clip_medical.config import Config
from clip_medical.data.batches import Batch, row_batches
from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.run_folder import STATE
from clip_medical.training import checkpoint
from clip_medical.training import trainer as trainer_module
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.loss import same_rows
from clip_medical.training.trainer import Trainer
from lora import adapter_parameters
from tests.training.tools import N, random_pairs, sigmoid_loss, small_clip, small_trainer

CONFIG = Config(batch_size=8, steps=5, fragments=1, train_logit_scale=True)


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let every run receive Ctrl-C in step `steps`."""

    class Stop:
        def __init__(self) -> None:
            self.taken = 0

        @property
        def requested(self) -> bool:
            self.taken += 1
            return self.taken == steps

    monkeypatch.setattr(trainer_module, "StopRequest", Stop)


def test_the_loss_that_is_given_is_the_one_that_trains(tmp_path: Path) -> None:
    """Catches InfoNCE somewhere in the loop although the trainer has another loss."""
    trainer = small_trainer(tmp_path, CONFIG, loss=sigmoid_loss)
    clip, pairs = trainer.clip, random_pairs()
    rows = next(row_batches(N, 8, CONFIG.seed))
    positives = same_rows(pairs.caption_ids[rows], pairs.image_ids[rows])
    logit = clip.model.logit_scale.exp().item() - 2  # of every pair, where all features are equal
    of_pairs = torch.where(positives, math.log1p(math.exp(-logit)), math.log1p(math.exp(logit)))
    chance = of_pairs.sum().item() / len(rows)
    with torch.no_grad():
        texts = clip.text_features(pairs.tokens[rows], pairs.lengths[rows])
        first_loss = sigmoid_loss(clip.image_features(pairs.pixels[rows]), texts, clip.model.logit_scale, positives)
    trainer.train("small")
    assert records(tmp_path)[0]["loss"] == pytest.approx(first_loss.item(), rel=1e-5)
    assert trainer.facts()["chance level"] == pytest.approx(chance)


def test_each_step_takes_the_next_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a batch that the flight check uses up, and --overfit-batch on changing batches."""
    batches: list[list[int]] = []

    def recorded(clip: Clip, batch: Batch, *arguments: Any) -> Tensor:
        batches.append(batch.rows.tolist())
        return contrastive_backward(clip, batch, *arguments)

    monkeypatch.setattr(trainer_module, "contrastive_backward", recorded)
    in_order = [rows.tolist() for rows, _ in zip(row_batches(N, 8, CONFIG.seed), range(5), strict=False)]
    for overfit, expected in ((False, in_order), (True, 5 * in_order[:1])):
        batches.clear()
        small_trainer(tmp_path / str(overfit), replace(CONFIG, overfit_batch=overfit)).train("small")
        assert batches == expected


def test_the_best_adapter_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the last adapter, or the later of equals, taken for the best; and a validation that is left out."""
    recalls, weights = [0.1, 0.5, 0.5, 0.2], []

    def scripted_recall(clip: Clip, pairs: Any) -> float:
        weights.append([p.detach().clone() for p in adapter_parameters(clip.model)])
        return recalls[len(weights) - 1]

    monkeypatch.setattr(trainer_module, "validation_recall", scripted_recall)
    trainer = small_trainer(tmp_path, replace(CONFIG, steps=7, validate_every=2))
    trainer.train("small")
    measured = {r["step"]: r["validation_recall"] for r in records(tmp_path) if "validation_recall" in r}
    assert measured == {2: 0.1, 4: 0.5, 6: 0.5, 7: 0.2}
    assert (trainer.best.step, trainer.best.recall, trainer.best.measured) == (4, 0.5, 4)
    trainer.optimizer.load_weights(trainer.best.weights)
    assert all(map(torch.equal, adapter_parameters(trainer.clip.model), weights[1]))
    assert "step 4, the best of 4" in trainer.facts()["adapter"]


@pytest.mark.parametrize(
    "flags", [{}, {"dropout": 0.2, "augment": True, "fragments": 2, "validate_every": 2}, {"overfit_batch": True}]
)
def test_a_stopped_run_continues_to_the_bit(
    flags: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a resume without the optimizer, the schedule, the position in the data, the state of dropout, the
    augmentation of the epoch, or the best adapter so far."""
    config = replace(CONFIG, **flags)
    whole = small_trainer(tmp_path / "whole", config)
    whole.train("small")
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        stopped = small_trainer(tmp_path / "parts", config)
        stopped.train("small")
    assert stopped.done == 3
    resumed = small_trainer(tmp_path / "parts", replace(config, resume=True))
    torch.manual_seed(99)  # what the new process has drawn before does not matter
    resumed.train("small")
    assert resumed.done == 5 and resumed.chance == whole.chance
    assert all(map(torch.equal, whole.optimizer.weights(), resumed.optimizer.weights()))
    assert all(map(torch.equal, whole.best.weights, resumed.best.weights))
    losses = [[(record["step"], record["loss"]) for record in records(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]


def test_a_run_killed_before_its_first_checkpoint_starts_again(tmp_path: Path) -> None:
    """Catches a --resume that fails where config.json is written and no checkpoint yet."""
    (tmp_path / "config.json").write_text("{}")
    trainer = small_trainer(tmp_path, replace(CONFIG, resume=True))
    trainer.train("small")
    assert trainer.done == 5


def edit_checkpoint(folder: Path, **changes: Any) -> None:
    """Replace entries of the checkpoint in a run folder."""
    state = checkpoint.load(folder)
    assert state is not None
    checkpoint.save(folder, state | changes)


def test_another_precision_is_refused(tmp_path: Path) -> None:
    """Catches a run from a GPU, in fp16, that continues in fp32 elsewhere as if that were the same."""
    small_trainer(tmp_path, CONFIG).save()
    edit_checkpoint(tmp_path, precision="float16")
    with pytest.raises(UserError, match="was started in float16.*--precision fp16"):
        small_trainer(tmp_path, replace(CONFIG, resume=True)).train("small")


def test_another_encoder_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a change of the encoder, and so of the rounding, without a word."""
    small_trainer(tmp_path, CONFIG).save()
    edit_checkpoint(tmp_path, encoder="another")
    small_trainer(tmp_path, replace(CONFIG, resume=True)).train("small")
    assert "computed by the another encoder" in capsys.readouterr().out


def test_a_new_chunk_size_gets_a_new_plan(tmp_path: Path) -> None:
    """Catches a --chunk-size that an out-of-memory message has advised and that --resume ignores; and a plan that is
    made again, perhaps differently, where nothing changed."""
    small_trainer(tmp_path, CONFIG).save()
    plan = {"chunk_size": 5, "checkpointing": True, "forecast": 1, "limit": 2}
    edit_checkpoint(tmp_path, plan=plan)
    resumed = replace(CONFIG, resume=True)
    changed = replace(resumed, chunk_size=4, checkpointing="off")
    for config, chunk_size, checkpointing in ((resumed, 5, True), (changed, 4, False)):
        trainer = small_trainer(tmp_path, config)
        trainer.steps = 0
        trainer.train("small")
        assert (trainer.plan.chunk_size, trainer.plan.checkpointing) == (chunk_size, checkpointing)
        layer = trainer.clip.model.text_model.encoder.layers[0]
        assert layer.gradient_checkpointing == checkpointing
        edit_checkpoint(tmp_path, plan=plan)


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_number_that_is_not_finite_stops_the_run(what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches NaN weights in the checkpoint, and a message that does not help to find the image."""
    taken: list[list[int]] = []

    def poisoned(clip: Clip, batch: Batch, *arguments: Any) -> Tensor:
        taken.append(batch.rows.tolist())
        loss = contrastive_backward(clip, batch, *arguments)
        if len(taken) == 3 and what == "gradient":
            gradient = adapter_parameters(clip.model)[0].grad
            assert gradient is not None
            gradient.fill_(float("nan"))
        return loss * (float("nan") if len(taken) == 3 and what == "loss" else 1)

    monkeypatch.setattr(trainer_module, "contrastive_backward", poisoned)
    trainer = small_trainer(tmp_path, CONFIG)
    with pytest.raises(UserError, match=f"Non-finite {what} at step 3.*checkpoint of step 2 is intact"):
        trainer.train("small")
    listed = json.loads((tmp_path / "non_finite_batch.json").read_text())
    assert listed == {"step": 3, "rows": taken[2], "names": [f"image {row}" for row in taken[2]]}
    state = torch.load(tmp_path / STATE, weights_only=True)
    assert state["step"] == 2 and all(weight.isfinite().all() for weight in state["optimizer"]["parameters"])
    assert all(p.grad is None for p in trainer.clip.model.parameters())


def test_fp16_does_not_skip_steps_forever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a run that skips every step and then ends as if it had learned something."""

    def poisoned(clip: Clip, *arguments: Any) -> Tensor:
        loss = contrastive_backward(clip, *arguments)
        gradient = adapter_parameters(clip.model)[0].grad
        assert gradient is not None
        gradient.fill_(float("inf"))
        return loss

    monkeypatch.setattr(trainer_module, "contrastive_backward", poisoned)
    trainer = small_trainer(tmp_path, replace(CONFIG, steps=60), small_clip(dtype=torch.float16))
    with pytest.raises(UserError, match="Non-finite gradient at step 16"):  # the loss scale begins at 2 ** 16
        trainer.train("small")
    assert trainer.optimizer.skipped == 16 and records(tmp_path)[-1]["skipped_steps"] == 15
    assert records(tmp_path)[-1]["gradient_norm"] is None  # JSON has no infinity


def test_an_error_of_the_loader_reaches_the_user(tmp_path: Path) -> None:
    """Catches an image that cannot be read, after which the loop waits or trains on something else."""

    class Damaged:
        def __len__(self) -> int:
            return N

        def __getitem__(self, rows: Tensor) -> Tensor:
            if isinstance(rows, Tensor) and set(rows.tolist()) == set(third.tolist()):
                raise OSError("damaged")
            return random_pairs().pixels[rows]

    *_, third = (rows for rows, _ in zip(row_batches(N, 8, CONFIG.seed), range(3), strict=False))
    pixels: Any = Damaged()
    pairs = replace(random_pairs(), pixels=pixels)
    trainer = Trainer(small_clip(), pairs, pairs, CONFIG, tmp_path, sigmoid_loss)
    with pytest.raises(OSError, match="damaged"):
        trainer.train("small")
    assert trainer.done == 2
