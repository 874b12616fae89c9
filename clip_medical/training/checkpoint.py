"""The checkpoint: everything that a run needs to go on as if it had never been stopped, swapped in whole.

    folder/checkpoint/state.pt        the newest
    folder/checkpoint/previous.pt     the one before, kept until the newest has been written whole

A kill, a power cut or a full disk at any moment leaves at least one of the two readable.
"""

import contextlib
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from clip_medical.errors import UserError
from clip_medical.runs import STATE

PREVIOUS = STATE.with_name("previous.pt")


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write beside, flush to the disk, swap names. `state`: tensors, numbers, strings, lists and dicts of them."""
    file, beside = folder / STATE, folder / STATE.with_suffix(".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(beside, "wb") as handle:
            torch.save(state, handle)
            handle.flush()
            os.fsync(handle.fileno())
    except (OSError, RuntimeError) as error:  # torch wraps a full disk into its own RuntimeError
        with contextlib.suppress(OSError):
            beside.unlink(missing_ok=True)
        raise UserError(
            f"the checkpoint of step {state['step']} cannot be written to {file.parent} ({_innermost(error)}): the one "
            "before it is whole; make room there, then go on with --resume."
        ) from error
    if file.exists():
        os.replace(file, folder / PREVIOUS)
    os.replace(beside, file)
    if hasattr(os, "O_DIRECTORY"):  # the new names too have to reach the disk
        directory = os.open(file.parent, os.O_DIRECTORY)
        os.fsync(directory)
        os.close(directory)


def load(folder: Path) -> dict[str, Any] | None:
    """The newest whole checkpoint; None where none was written yet. Raises UserError if there are but damaged ones."""
    reasons = []
    for file in (folder / STATE, folder / PREVIOUS):
        if file.is_file():
            try:
                state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
                return state
            except Exception as error:  # whatever a damaged pickle raises
                reasons.append(f"{file} cannot be read: {_innermost(error)}")
    if reasons:
        raise UserError(f"{'; '.join(reasons)}: the run cannot be resumed; start a new one.")
    return None


def _innermost(error: BaseException) -> str:
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")


def random_states() -> dict[str, Any]:
    """Of torch, on the CPU and on this process's GPU, of Python and of NumPy."""
    legacy: Any = np.random.get_state()
    _, keys, *place = legacy
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state() if torch.cuda.is_available() else None,
        "python": random.getstate(),
        "numpy": [keys.tolist(), *place],
    }


def restore_random_states(states: dict[str, Any]) -> None:
    """Put back what `random_states` took."""
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(states["cuda"])
    random.setstate(states["python"])
    keys, *place = states["numpy"]
    np.random.set_state(("MT19937", np.array(keys, np.uint32), *place))
