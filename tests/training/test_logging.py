"""Progress of a run: metrics.jsonl, TensorBoard, the share of time spent waiting, and the request to stop."""

import json
import signal
import sys
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from clip_medical.errors import UserError
from clip_medical.training.logging import METRICS, Progress, StopRequest

RECORD = {"step": 1, "loss": 2.5, "lr": 1e-3, "pairs_per_second": 9.0, "waiting": 0.1, "peak_gib": 1.0}


def test_lines_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    """Catches steps that are logged twice after a kill, and lines that the kill cut off."""
    with closing(Progress(tmp_path, 0, 9, tensorboard=False)) as progress:
        for step in (1, 2, 3):
            progress.log(RECORD | {"step": step})
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 4, "lo')
    with closing(Progress(tmp_path, 2, 9, tensorboard=False)) as progress:
        progress.log(RECORD | {"step": 3, "loss": 1.0})
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(1, 2.5), (2, 2.5), (3, 1.0)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    """Catches a traceback from metrics.jsonl, the first file to meet a full disk, as it grows at every step."""
    with closing(Progress(tmp_path, 0, 2, tensorboard=False)) as progress:
        progress.stream = open("/dev/full", "w", encoding="utf-8")
        with pytest.raises(UserError, match="metrics.jsonl cannot be written.*--resume"):
            progress.log(RECORD)


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    """Catches a flag that writes nothing, and values that are unknown written as numbers."""
    pytest.importorskip("tensorboard")
    with closing(Progress(tmp_path, 0, 2, tensorboard=True)) as progress:
        progress.log(RECORD | {"gradient_norm": None})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events: Any = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("loss")] == [(1, 2.5)]
    assert "gradient_norm" not in events.Tags()["scalars"]


def test_missing_tensorboard_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an ImportError, which does not tell the user what to install."""
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(UserError, match="pip install tensorboard"):
        Progress(tmp_path, 0, 2, tensorboard=True)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_requests_a_stop_and_the_second_interrupts(number: signal.Signals) -> None:
    """Catches SIGTERM, which schedulers and cloud machines send before they end a process, left to kill the run."""
    signal.signal(number, signal.SIG_IGN)  # a missing handler fails the test and does not end it
    stop = StopRequest()
    assert not stop.requested
    signal.raise_signal(number)
    assert stop.requested
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(number)
