"""Progress of a run: the progress bar, metrics.jsonl; and the request to stop it."""

import contextlib
import json
import os
import signal
from pathlib import Path
from typing import Any

from tqdm import tqdm

from clip_medical.errors import UserError
from clip_medical.training import distributed

METRICS = "metrics.jsonl"


class Progress:
    """Log one record a step, on rank 0, to the progress bar and the files."""

    def __init__(self, folder: Path, done: int, steps: int) -> None:
        """done: steps already taken. Lines of later steps, logged after the checkpoint, are removed from the file."""
        self.file = folder / METRICS
        if distributed.rank() == 0:
            lines = self.file.read_bytes().splitlines(keepends=True)[:done] if self.file.is_file() else []
            part = self.file.with_suffix(".part")
            part.write_bytes(b"".join(lines))
            os.replace(part, self.file)
        self.stream = open(self.file if distributed.rank() == 0 else os.devnull, "a", encoding="utf-8")
        self.bar = tqdm(initial=done, total=steps, unit="step", disable=distributed.rank() > 0 or None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        """Close the bar and the files."""
        self.bar.close()
        with contextlib.suppress(OSError):  # a full disk, which `log` has reported
            self.stream.close()

    def log(self, record: dict[str, Any]) -> None:
        """record: "step", "loss", "lr", "pairs_per_second", "waiting", "peak_gib" and more; None where unknown."""
        try:
            print(json.dumps(record), file=self.stream, flush=True)
        except OSError as error:  # the first file to meet a full disk, as it grows at every step
            raise UserError(
                f"{self.file} cannot be written ({error.strerror}). Free space there, then continue with --resume."
            ) from error
        text = f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, {record['pairs_per_second']:.0f} pairs/s"
        self.bar.set_postfix_str(f"{text}, {record['waiting']:.0%} waiting for data, {record['peak_gib']:.1f} GiB")
        self.bar.update()


class StopRequest:
    """Record the first Ctrl-C (or SIGTERM), so that the loop can end after the current step; a second one
    interrupts."""

    def __init__(self) -> None:
        self.requested = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: Any) -> None:
        self.requested = True
        signal.signal(number, signal.default_int_handler)
