"""The checkpoint: everything that a run needs to continue to the bit, written whole or not at all.

    folder/checkpoint/state.pt        the newest
    folder/checkpoint/previous.pt     the one before, kept until the newest is complete

A kill, a power cut or a full disk at any moment leaves at least one of the two readable.
"""

import contextlib
import os
from pathlib import Path
from typing import Any

import torch

from clip_medical.errors import UserError
from clip_medical.run_folder import STATE

PREVIOUS = STATE.with_name("previous.pt")


def save(folder: Path, state: dict[str, Any]) -> None:
    """Write to a temporary file, flush it to the disk, rename it. `state`: tensors, numbers, strings, lists and
    dicts."""
    file, part = folder / STATE, folder / STATE.with_suffix(".part")
    file.parent.mkdir(parents=True, exist_ok=True)
    try:
        with open(part, "wb") as handle:
            torch.save(state, handle)
            handle.flush()
            os.fsync(handle.fileno())
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError for a full disk
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise UserError(
            f"The checkpoint of step {state['step']} cannot be written to {file.parent} ({_innermost(error)}). The one "
            "before it is intact. Free space there, then continue with --resume."
        ) from error
    if file.exists():
        os.replace(file, folder / PREVIOUS)
    os.replace(part, file)


def load(folder: Path) -> dict[str, Any] | None:
    """Return the newest intact checkpoint, None if none was written yet. Raises UserError if all are damaged."""
    reasons = []
    for file in (folder / STATE, folder / PREVIOUS):
        if file.is_file():
            try:
                state: dict[str, Any] = torch.load(file, weights_only=True, map_location="cpu")
                return state
            except Exception as error:  # whatever a damaged pickle raises
                reasons.append(f"{file} cannot be read: {_innermost(error)}")
    if reasons:
        raise UserError(f"{'. '.join(reasons)}. The run cannot be resumed. Start a new one.")
    return None


def _innermost(error: BaseException) -> str:
    while error.__context__ is not None:
        error = error.__context__
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
