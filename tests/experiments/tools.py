"""Helpers of the experiments' tests."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

Command = Callable[..., int]  # (name of the experiment, *arguments) -> exit code


def results(folder: Path, name: str) -> dict[str, Any]:
    """Read the results file of an experiment."""
    content: dict[str, Any] = json.loads((folder / f"{name}.json").read_text())
    return content
