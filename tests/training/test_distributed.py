"""Two processes learn what one learns from the same batch, and stay equal where they have to be."""

import json
import os
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from clip_medical.config import Config
from clip_medical.errors import UserError
from clip_medical.run_folder import STATE
from clip_medical.training import distributed
from clip_medical.training.grad_cache import WHOLE
from tests.training.children import batch_gradient, finish, measured_training, start
from tests.training.tools import relative_difference, small_trainer

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("chunk_size", [WHOLE, 4])
def test_two_processes_have_the_gradient_of_the_whole_batch(tmp_path: Path, chunk_size: int) -> None:
    """Catches negatives that stay on their own process, averaged gradients, positives lost between the halves, and the
    gradient of logit_scale counted once for each process."""
    runs = [start(batch_gradient, tmp_path, chunk_size, world_size=world_size) for world_size in (1, 2)]
    assert [finish(started) for started in runs] == [[0], [0, 0]]
    expected_loss, expected = torch.load(tmp_path / "0-of-1.pt")
    for rank in (0, 1):
        loss, gradients = torch.load(tmp_path / f"{rank}-of-2.pt")
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=0)
        assert relative_difference(gradients, expected) < 1e-5
        assert relative_difference(gradients[-1:], expected[-1:]) < 1e-5  # of logit_scale


@pytest.mark.slow
def test_two_processes_train_and_measure_as_one(tmp_path: Path) -> None:
    """Catches weights that drift apart, two processes that write one file, and a recall of half the pool."""
    config = Config(batch_size=10, steps=4, validate_every=2, train_logit_scale=True, lr=1e-2, augment=True)
    runs = [start(measured_training, tmp_path / str(size), config, world_size=size) for size in (1, 2)]
    assert [finish(started) for started in runs] == [[0], [0, 0]]
    reports = [(tmp_path / name / "recall.json").read_text() for name in ("1", "2")]
    assert reports[0] == reports[1] and json.loads(reports[0])["image_to_text"]["pool"] == 22
    one, two = (torch.load(tmp_path / name / STATE, weights_only=True) for name in ("1", "2"))
    assert relative_difference(two["optimizer"]["parameters"], one["optimizer"]["parameters"]) < 1e-5
    assert len(two["random"]) == 2 and not torch.equal(*(state[0] for state in two["random"]))  # other dropout masks
    lines = [[json.loads(line) for line in open(tmp_path / name / "metrics.jsonl")] for name in ("1", "2")]
    assert [line["step"] for line in lines[1]] == [1, 2, 3, 4]
    assert [line.get("validation_recall") for line in lines[0]] == [line.get("validation_recall") for line in lines[1]]
    assert [line["loss"] for line in lines[1]] == pytest.approx([line["loss"] for line in lines[0]], rel=1e-5)


@pytest.mark.slow
def test_a_failing_process_ends_the_others_with_its_message(tmp_path: Path) -> None:
    """Catches a run that waits for the timeout because one process is gone."""
    script = tmp_path / "fails.py"
    script.write_text(
        "import sys, torch.distributed as dist\n"
        "from clip_medical import cli\n"
        "from clip_medical.errors import UserError\n"
        "from clip_medical.training.distributed import processes, rank\n"
        "def action():\n"
        "    with processes():\n"
        "        if rank() == 1: raise UserError('rank 1 has no image')\n"
        "        dist.barrier()\n"
        "sys.exit(cli.exit_code('fails.py', action))\n"
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode != 0 and "fails.py: rank 1 has no image" in done.stderr


def test_processes_wait_while_rank_0_decodes_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches torch's timeout of ten minutes, which ends processes that wait for a first pass over the data."""
    timeouts: list[timedelta] = []
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(dist, "init_process_group", lambda backend, timeout: timeouts.append(timeout))
    monkeypatch.setattr(dist, "destroy_process_group", lambda: None)
    with distributed.processes():
        assert timeouts[0] > timedelta(hours=1)


def test_a_batch_that_the_processes_cannot_share_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches pairs that are dropped silently where the processes do not divide the batch."""
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(UserError, match="--batch-size 8 is not a multiple of the 3 processes"):
        small_trainer(tmp_path, Config(batch_size=8))
    assert small_trainer(tmp_path, Config(batch_size=9)).pairs_per_process == 3
