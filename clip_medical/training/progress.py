"""What a person sees of a run while it learns: the bar, metrics.jsonl, TensorBoard; and how they ask it to stop."""

import contextlib
import json
import os
import signal
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor
from tqdm import tqdm

from clip_medical.data.batches import Pairs
from clip_medical.errors import UserError
from clip_medical.training import distributed

METRICS = "metrics.jsonl"


class Progress:
    """Takes one record a step. On rank 0 it goes into the bar and the files, on other processes nowhere."""

    def __init__(self, folder: Path, done: int, steps: int, tensorboard: bool) -> None:
        """done: steps already taken; what the files hold of later ones, taken after the checkpoint, is cut off."""
        self.file = folder / METRICS
        self.writer = _summary_writer(folder, done) if tensorboard and distributed.rank() == 0 else None
        if distributed.rank() == 0:
            lines = self.file.read_bytes().splitlines(keepends=True)[:done] if self.file.is_file() else []
            beside = self.file.with_suffix(".part")
            beside.write_bytes(b"".join(lines))
            os.replace(beside, self.file)
        self.log = open(self.file if distributed.rank() == 0 else os.devnull, "a", encoding="utf-8")
        self.bar = tqdm(initial=done, total=steps, unit="step", disable=distributed.rank() > 0 or None)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.bar.close()
        with contextlib.suppress(OSError):  # of a full disk; `step` has told it
            self.log.close()
        if self.writer is not None:
            self.writer.close()

    def step(self, record: dict[str, Any]) -> None:
        """record: "step", "loss", "lr", "pairs_per_second" and whatever else is worth keeping; None where unknown."""
        try:
            print(json.dumps(record), file=self.log, flush=True)
        except OSError as error:  # a full disk is met here first: this file grows at every step
            raise UserError(
                f"{self.file} cannot be written ({error.strerror}): make room there, then go on with --resume."
            ) from error
        words = f"loss {record['loss']:.3f}, lr {record['lr']:.1e}, {record['pairs_per_second']:.0f} pairs/s"
        self.bar.set_postfix_str(f"{words}, {record['waiting']:.0%} waiting, {record['peak_gib']:.1f} GiB")
        self.bar.update()
        if self.writer is not None:
            for name, value in record.items():
                if name != "step" and value is not None:
                    self.writer.add_scalar(name, value, record["step"])


def _summary_writer(folder: Path, done: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("TensorBoard is not installed: pip install tensorboard, or leave out --tensorboard.") from None
    return SummaryWriter(folder / "tensorboard", purge_step=done + 1)


class Timed:
    """The pixels of a data set, read ahead where they are announced. Counts the seconds that their reader waits."""

    def __init__(self, pixels: Any) -> None:
        self.pixels, self.seconds = pixels, 0.0
        self.thread, self.announced = ThreadPoolExecutor(1), dict[tuple[int, ...], Future[Tensor]]()

    def announce(self, rows: Tensor) -> Future[Tensor]:
        """Begin to read `rows`, in a thread: they will soon be asked for."""
        coming = self.announced[tuple(rows.tolist())] = self.thread.submit(self.pixels.__getitem__, rows)
        return coming

    def __getitem__(self, rows: Tensor) -> Tensor:
        began, coming = time.perf_counter(), self.announced.pop(tuple(rows.tolist()), None)
        found: Tensor = self.pixels[rows] if coming is None else coming.result()
        self.seconds += time.perf_counter() - began
        return found


def timed(pairs: Pairs) -> tuple[Pairs, Timed]:
    """The same pairs, and the clock in them."""
    clock = Timed(pairs.pixels)
    return replace(pairs, pixels=clock), clock  # type: ignore[arg-type]


def waiting_share(records: Sequence[dict[str, Any]]) -> float:
    """The share of the time of all steps that the model waited for data; records: the lines of metrics.jsonl."""
    seconds = [1 / record["pairs_per_second"] for record in records]  # of a pair, and batches are of one size
    return sum(s * r["waiting"] for s, r in zip(seconds, records, strict=True)) / sum(seconds)


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a wish, which the loop meets after the step; a second one interrupts."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, signal.default_int_handler)
