"""The checkpoint on disk: whole whatever happens while it is written, and complete enough to go on from."""

import random
import resource
from pathlib import Path

import numpy as np
import pytest
import torch

from clip_medical.errors import UserError
from clip_medical.run_folder import STATE
from clip_medical.training import checkpoint


def state(step: int, size: int = 10) -> dict:
    return {"step": step, "weights": torch.full((size,), float(step))}


def test_a_damaged_checkpoint_gives_way_to_the_one_before(tmp_path: Path) -> None:
    """Catches a previous checkpoint that is deleted first or never read: a torn file would be the end of the run."""
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state(step))
    newest = tmp_path / STATE
    assert checkpoint.load(tmp_path)["step"] == 3  # type: ignore[index]
    newest.write_bytes(newest.read_bytes()[:200])
    assert checkpoint.load(tmp_path)["step"] == 2  # type: ignore[index]
    newest.unlink()  # killed between the two swaps of names
    assert checkpoint.load(tmp_path)["step"] == 2  # type: ignore[index]


def test_damage_without_a_way_back_is_one_sentence(tmp_path: Path) -> None:
    """Catches a traceback from unpickling, and damage that is taken for a run which had not begun."""
    assert checkpoint.load(tmp_path) is None
    for step in (1, 2):
        checkpoint.save(tmp_path, state(step))
    for file in (tmp_path / STATE, tmp_path / checkpoint.PREVIOUS):
        file.write_bytes(b"no checkpoint")
    with pytest.raises(UserError, match="cannot be read.*start a new one"):
        checkpoint.load(tmp_path)


def test_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    """Catches a checkpoint written in place. The kernel itself cuts the file off, as a full disk does."""
    checkpoint.save(tmp_path, state(1))
    checkpoint.save(tmp_path, state(2))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match="step 3 cannot be written.*make room"):
            checkpoint.save(tmp_path, state(3, size=100_000))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert {f.name for f in (tmp_path / STATE).parent.iterdir()} == {"state.pt", "previous.pt"}
    assert checkpoint.load(tmp_path)["step"] == 2  # type: ignore[index]
    checkpoint.save(tmp_path, state(3, size=100_000))  # room was made
    assert checkpoint.load(tmp_path)["step"] == 3  # type: ignore[index]


def test_every_source_of_randomness_goes_on_where_it_was(tmp_path: Path) -> None:
    """Catches a generator that is left out: dropout's, or one that a data source will use one day."""

    def draw() -> tuple[float, float, float]:
        return torch.rand(()).item(), random.random(), float(np.random.rand())

    torch.randn(1), np.random.randn()  # leave each in the middle of something
    checkpoint.save(tmp_path, {"step": 0, "random": checkpoint.random_states()})
    expected = draw()
    draw()
    checkpoint.restore_random_states(checkpoint.load(tmp_path)["random"])  # type: ignore[index]
    assert draw() == expected
