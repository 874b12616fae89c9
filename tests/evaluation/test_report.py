"""What stands beside the figures says which machine they are of."""

import platform
from pathlib import Path
from typing import Any

import pytest

from clip_medical.evaluation.report import environment


@pytest.mark.skipif(not Path("/proc/cpuinfo").is_file(), reason="only Linux tells the processor's name so")
def test_the_processor_is_named() -> None:
    """Mistake: "x86_64" beside a time: two processors of that architecture differ by three."""
    named = environment()["processor"]
    assert named and named in Path("/proc/cpuinfo").read_text()


def test_a_system_that_does_not_tell_gives_the_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: a report that fails at its last step on macOS, for the want of a name."""

    def missing(*_: Any, **__: Any) -> str:
        raise FileNotFoundError("/proc/cpuinfo")

    monkeypatch.setattr(Path, "read_text", missing)
    assert environment()["processor"] == platform.machine()
