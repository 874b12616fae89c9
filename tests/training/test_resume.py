"""A run that is killed and resumed ends with the same weights as one that was never killed.

The environment variable KILLS=25 raises the number of kills from 3 to 25.
"""

import json
import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from clip_medical.config import Config
from clip_medical.run_folder import STATE
from tests.training.children import finish, start, training

KILLS = int(os.environ.get("KILLS", "3"))
CONFIG = Config(batch_size=8, steps=30, dropout=0.2, train_logit_scale=True, checkpoint_every_steps=2, validate_every=5)


def outcome(folder: Path) -> tuple[list[torch.Tensor], list[tuple[int, float]]]:
    """The final weights and the best ones, and the loss of each step."""
    state = torch.load(folder / STATE, weights_only=True)
    assert state["step"] == CONFIG.steps
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return state["optimizer"]["parameters"] + state["best"]["weights"], [(line["step"], line["loss"]) for line in lines]


@pytest.mark.slow
def test_sigkill_at_random_moments_changes_no_bit(tmp_path: Path) -> None:
    """Catches anything that a checkpoint lacks, a torn checkpoint, and steps logged twice in metrics.jsonl."""
    assert finish(start(training, tmp_path / "undisturbed", CONFIG)) == [0]
    weights, losses = outcome(tmp_path / "undisturbed")
    times = [f.stat().st_mtime for f in (tmp_path / "undisturbed" / "config.json", tmp_path / "undisturbed" / STATE)]
    generator, killed = random.Random(KILLS), 0
    for number in range(KILLS):
        folder = tmp_path / str(number)
        while killed <= number:  # a process that ends before it is killed does not count
            shutil.rmtree(folder, ignore_errors=True)
            (process,) = start(training, folder, CONFIG)
            while not (folder / "config.json").is_file():
                time.sleep(0.001)
            time.sleep(generator.uniform(0, times[1] - times[0]))
            process.kill()
            killed += finish([process]) == [-signal.SIGKILL]
        assert finish(start(training, folder, CONFIG)) == [0]
        resumed_weights, resumed_losses = outcome(folder)
        assert all(map(torch.equal, weights, resumed_weights)), f"kill {number}"
        assert resumed_losses == losses
