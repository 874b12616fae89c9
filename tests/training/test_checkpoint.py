"""The checkpoint on disk: whole whatever happens while it is written, and complete enough to continue from."""

import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from clip_medical.errors import UserError
from clip_medical.run_folder import STATE
from clip_medical.training import checkpoint


def state(step: int, size: int = 10) -> dict[str, Any]:
    return {"step": step, "weights": torch.full((size,), float(step))}


def load_step(folder: Path) -> int:
    """The step of the checkpoint that `load` returns."""
    loaded = checkpoint.load(folder)
    assert loaded is not None
    return int(loaded["step"])


def test_a_damaged_checkpoint_gives_way_to_the_previous_one(tmp_path: Path) -> None:
    """Catches a previous checkpoint that is deleted first, or never read: a torn file would end the run."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    newest = tmp_path / STATE
    assert load_step(tmp_path) == 3
    newest.write_bytes(newest.read_bytes()[:200])
    assert load_step(tmp_path) == 2
    newest.unlink()  # as after a kill between the two renamings
    assert load_step(tmp_path) == 2


def test_damage_of_both_is_a_user_error(tmp_path: Path) -> None:
    """Catches a traceback from unpickling, and damage that is treated like a run without a checkpoint."""
    assert checkpoint.load(tmp_path) is None
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    for file in (tmp_path / STATE, tmp_path / checkpoint.PREVIOUS):
        file.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="cannot be read.*Start a new one"):
        checkpoint.load(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Catches a checkpoint written in place. The kernel itself cuts off the file, as a full disk does."""
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="step 3 cannot be written.*Free space"):
            checkpoint.save(tmp_path, state(3, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {f.name for f in (tmp_path / STATE).parent.iterdir()} == {"state.pt", "previous.pt"}
    assert load_step(tmp_path) == 2
    checkpoint.save(tmp_path, state(3, size=100_000))  # after space was freed
    assert load_step(tmp_path) == 3
