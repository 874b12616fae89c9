"""A run that is killed without warning ends, resumed, with the weights of one that never was. KILLS=25 for more."""

import json
import os
import random
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_medical.config import Config
from clip_medical.errors import UserError
from clip_medical.run_folder import STATE
from tests.training.children import finish, start, training
from tests.training.test_contrastive import small_clip

KILLS = int(os.environ.get("KILLS", "3"))
CONFIG = Config(batch_size=8, steps=30, dropout=0.2, train_logit_scale=True, checkpoint_every_steps=2, validate_every=5)


def outcome(folder: Path) -> tuple[list[torch.Tensor], list[tuple[int, float]]]:
    """The weights at the end and the losses on the way."""
    state = torch.load(folder / STATE, weights_only=True)
    assert state["step"] == CONFIG.steps
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return state["learner"]["parameters"] + state["best"]["weights"], [(line["step"], line["loss"]) for line in lines]


def test_sigkill_at_random_moments_changes_no_bit(tmp_path: Path) -> None:
    """Catches anything that a checkpoint leaves out, a torn one, and steps written twice into metrics.jsonl."""
    assert finish(start(training, tmp_path / "undisturbed", CONFIG)) == [0]
    weights, losses = outcome(tmp_path / "undisturbed")
    times = [f.stat().st_mtime for f in (tmp_path / "undisturbed" / "config.json", tmp_path / "undisturbed" / STATE)]
    draw, killed = random.Random(KILLS), 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        while killed <= number:  # one that had ended before it was to be killed does not count
            shutil.rmtree(folder, ignore_errors=True)
            started = start(training, folder, CONFIG)
            while not (folder / "config.json").is_file():
                time.sleep(0.001)
            time.sleep(draw.uniform(0, times[1] - times[0]))
            started[0].kill()
            killed += finish(started) == [-signal.SIGKILL]
        assert finish(start(training, folder, CONFIG)) == [0]
        again, losses_again = outcome(folder)
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True)), f"kill {number}"
        assert losses_again == losses


def test_another_precision_is_refused_by_name(tmp_path: Path) -> None:
    """Catches a run begun in fp16 on a GPU that goes on in fp32 elsewhere as if that were the same."""
    from clip_medical.training import checkpoint
    from clip_medical.training.trainer import Job
    from clip_medical.training.optimizer import Learner
    from lora import adapter_parameters
    from tests.training.children import data

    clip = small_clip()
    learner = Learner(adapter_parameters(clip.model), clip.model.logit_scale, CONFIG, 30, scaled=False)
    job = Job(tmp_path, CONFIG, clip, data(), data(), learner, 30, [])
    job.save()
    state = checkpoint.load(tmp_path)
    assert state is not None
    checkpoint.save(tmp_path, state | {"precision": "float16"})
    with pytest.raises(UserError, match="begun in float16.*--precision fp16"):
        job.resume()


def test_a_new_plan_counts_the_fragments(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory planned for the captions alone, by the very --chunk-size that an "out of memory" asks for."""
    from clip_medical.training import job as job_module
    from clip_medical.training.optimizer import Learner
    from clip_medical.training.memory import Plan
    from lora import adapter_parameters
    from tests.training.children import data

    planned: list[int] = []

    def make_plan(clip: object, pairs: Any, *_: object) -> Plan:
        planned.append(len(pairs.fragments))
        return Plan()

    monkeypatch.setattr(job_module, "make_plan", make_plan)
    config, clip = replace(CONFIG, fragments=3), small_clip()
    learner = Learner(adapter_parameters(clip.model), clip.model.logit_scale, config, 30, scaled=False)
    job = job_module.Job(tmp_path, config, clip, data(), data(), learner, 30, [])
    job.save()
    job.config = replace(config, chunk_size=2)
    assert job.resume() and planned == [3]
