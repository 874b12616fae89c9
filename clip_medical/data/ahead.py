"""Phantoms drawn ahead, by a process beside this one, which imports torch meanwhile: `start`.

It fills the image cache as train.py would, some seconds earlier: who comes second waits at the cache's lock, and finds
the pictures there. It says nothing, as whatever goes wrong here goes wrong in train.py too, where it is told.
"""

import atexit
import os
import subprocess
import sys
import threading

import tyro

from clip_medical.config import Config, choose
from clip_medical.data.cache import open_cache
from clip_medical.data.shapes import SIZE
from clip_medical.data.sources import load_data


def start(arguments: list[str]) -> "subprocess.Popen[bytes]":
    """Begin to draw the phantoms that train.py needs with these arguments, if any. It ends when this process does."""
    process = subprocess.Popen(
        [sys.executable, "-m", __name__, *arguments],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},  # the modules of this process, wherever it runs
        stdin=subprocess.PIPE,  # closed by whatever ends this process
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # Ctrl-C is meant for this process alone
    )
    atexit.register(process.communicate)
    return process


def _draw(arguments: list[str]) -> None:
    _, base, flags = choose(arguments)
    config = tyro.cli(Config, args=flags, default=base)
    if (config.data, config.model) == ("phantoms", "tiny-clip"):
        data = load_data(config.data, limit=config.limit, seed=config.seed)
        for split in (data.train, data.validation):
            open_cache(split, SIZE, "phantom")


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(0)  # the cache's first pass can be killed at any time


if __name__ == "__main__":
    threading.Thread(target=_end_with_parent, daemon=True).start()
    _draw(sys.argv[1:])
