"""The pixels of the next batch are read during this one, and what the reader waits for them is counted."""

import threading
import time
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from clip_medical.training.logging import timed
from tests.training.test_contrastive import pairs


class Slow:
    """Pixels that take a while, and know who asked for them."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels, self.readers = pixels, list[str]()

    def __getitem__(self, rows: Tensor) -> Tensor:
        time.sleep(0.2)
        self.readers.append("loop" if threading.current_thread() is threading.main_thread() else "thread")
        if rows.max() == 7:
            raise OSError("damaged")
        return self.pixels[rows]


def test_announced_pixels_are_read_meanwhile_and_once() -> None:
    """Mistake: read again by the loop; another batch's taken for them; the wait for all of it counted all the same."""
    data = pairs()
    slow = Slow(data.pixels)  # type: ignore[arg-type]
    read, clock = timed(replace(data, pixels=slow))  # type: ignore[arg-type]
    first, second = torch.tensor([3, 1]), torch.tensor([1, 3])
    clock.announce(first)
    clock.announce(second).result()
    assert torch.equal(read.pixels[second], data.pixels[second]) and torch.equal(read.pixels[first], data.pixels[first])
    assert clock.seconds < 0.1 and slow.readers == ["thread", "thread"]
    assert torch.equal(read.pixels[first], data.pixels[first])
    assert clock.seconds >= 0.2 and slow.readers[2:] == ["loop"]


def test_an_error_of_the_thread_reaches_the_loop() -> None:
    """Mistake: a picture that cannot be read leaves the loop waiting, or training on something else."""
    data = pairs()
    read, clock = timed(replace(data, pixels=Slow(data.pixels)))  # type: ignore[arg-type]
    clock.announce(torch.tensor([7]))
    with pytest.raises(OSError, match="damaged"):
        read.pixels[torch.tensor([7])]
