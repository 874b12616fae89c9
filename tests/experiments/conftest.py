"""Fixtures: a finished run of a small random CLIP, and experiments run as from the command line."""

import sys
from importlib import import_module
from pathlib import Path

import pytest

import train
from tests.experiments.tools import Command
from tests.stand_in_hub import clip_folder


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder; its high learning rate and trained temperature make adapted results differ from unadapted ones."""
    base = clip_folder(tmp_path_factory.mktemp("base") / "clip", bin_file=False)
    folder = tmp_path_factory.mktemp("runs") / "x"
    flags = "--limit 40 --batch-size 8 --steps 4 --rank 4 --lr 0.05 --train-logit-scale".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags, "--model", str(base), "--output", str(folder)])
        assert train.main() == 0
    return folder


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch) -> Command:
    """Run `python -m experiments.NAME ARGUMENTS` in this process and return its exit code."""
    from experiments import common

    def call(name: str, *arguments: object) -> int:
        module = import_module(f"experiments.{name}")
        (experiment,) = (
            value
            for value in vars(module).values()
            if isinstance(value, type) and issubclass(value, common.Experiment) and value.__module__ == module.__name__
        )
        monkeypatch.setattr(sys, "argv", [f"/somewhere/{name}.py", *map(str, arguments)])
        return common.main(experiment)

    return call
