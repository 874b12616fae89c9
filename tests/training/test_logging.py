"""Progress of a run: metrics.jsonl, the share of time spent waiting, and the request to stop."""

import json
import signal
from pathlib import Path

import pytest

from clip_medical.errors import UserError
from clip_medical.training.logging import METRICS, Progress, StopRequest

RECORD = {"step": 1, "loss": 2.5, "lr": 1e-3, "pairs_per_second": 9.0, "waiting": 0.1, "peak_gib": 1.0}


def test_lines_after_the_checkpoint_are_removed(tmp_path: Path) -> None:
    """Catches steps that are logged twice after a kill, and lines that the kill cut off."""
    with Progress(tmp_path, 0, 9) as progress:
        for step in (1, 2, 3):
            progress.log(RECORD | {"step": step})
    with open(tmp_path / METRICS, "a") as file:
        file.write('{"step": 4, "lo')
    with Progress(tmp_path, 2, 9) as progress:
        progress.log(RECORD | {"step": 3, "loss": 1.0})
    records = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert [(record["step"], record["loss"]) for record in records] == [(1, 2.5), (2, 2.5), (3, 1.0)]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_disk_is_a_user_error(tmp_path: Path) -> None:
    """Catches a traceback from metrics.jsonl, the first file to meet a full disk, as it grows at every step."""
    with Progress(tmp_path, 0, 2) as progress:
        progress.stream = open("/dev/full", "w", encoding="utf-8")
        with pytest.raises(UserError, match="metrics.jsonl cannot be written.*--resume"):
            progress.log(RECORD)


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
