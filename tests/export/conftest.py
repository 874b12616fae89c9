"""A finished run of a small CLIP with random weights, and its exports, each made once."""

import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import train
from clip_medical.model import Clip
from clip_medical.run_folder import load_run
from tests.export.tools import command, skip_if_not_installed
from tests.stand_in_hub import clip_folder


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return clip_folder(tmp_path_factory.mktemp("base") / "clip", bin_file=False)


@pytest.fixture(scope="session")
def run(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a trained temperature. The high learning rate makes the effect of the adapter large."""
    folder = tmp_path_factory.mktemp("runs") / "x"
    flags = "--limit 20 --batch-size 8 --steps 4 --lr 0.05 --train-logit-scale".split()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["train.py", *flags, "--model", str(base), "--output", str(folder)])
        assert train.main() == 0
    return folder


@pytest.fixture(scope="session")
def exported(run: Path) -> Callable[..., Path]:
    """Return the folder of an export, which is made at the first call for it."""

    def get(to: str, *flags: str) -> Path:
        skip_if_not_installed(to)
        folder = run / "export" / "-".join([to, *flags[1:]])
        assert folder.exists() or command("--run", run, "--to", to, *flags) == 0
        return folder

    return get


@pytest.fixture(scope="session")
def adapted(run: Path) -> Clip:
    return load_run(run)
