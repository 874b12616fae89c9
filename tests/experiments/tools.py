"""What the tests of experiments share."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., int]  # name of the experiment, then its arguments -> exit code


def results(folder: Path, name: str) -> dict[str, Any]:
    """What an experiment has written."""
    found: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return found
