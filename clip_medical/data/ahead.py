"""A second process draws the demo's phantoms while train.py imports torch: `start`.

It fills the image cache as train.py would, some seconds earlier: who comes second waits at the cache's lock, and finds
the pictures there. If it fails it says nothing: train.py then does all of it, and tells what is wrong.
"""

import atexit
import os
import subprocess
import sys
import threading


def start(arguments: list[str]) -> subprocess.Popen[bytes] | None:
    """Draw, beside this process, the phantoms that `train.py` with these arguments will ask for, if it will for any.

    Returns the other process, which ends with its work or with this one, whatever ends it; None if there can be none.
    """
    # python -m would look for modules in the current folder first, where this process may not
    code = f"import sys; sys.path[:] = {sys.path}; from {__name__} import _draw; _draw(sys.argv[1:])"
    pipe, quiet = subprocess.PIPE, subprocess.DEVNULL
    try:
        process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdin=pipe, stdout=quiet, stderr=quiet)
    except OSError:  # such as a limit of processes
        return None
    atexit.register(process.communicate)
    return process


def _draw(arguments: list[str]) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    # imported here, as `start` need not wait for them; command_line.parse is not, as it would wait for torch
    import tyro

    from clip_medical.config import Config, choose
    from clip_medical.data.cache import open_cache
    from clip_medical.data.shapes import SIZE
    from clip_medical.data.sources import load_data

    _, base, flags = choose(arguments)
    config = tyro.cli(Config, args=flags, default=base)
    if (config.data, config.model) == ("phantoms", "tiny-clip"):
        data = load_data(config.data, limit=config.limit, seed=config.seed)
        for split in (data.train, data.validation):
            open_cache(split, SIZE, "phantom")  # the size that tiny-clip sees


def _end_with_parent() -> None:
    sys.stdin.read()  # until whatever ends the other process closes the pipe
    os._exit(0)  # the cache's first pass can be killed at any time
