"""`clip-medical`: the same commands as those of the repository, from a checkout and from an installed wheel."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from clip_medical import cli

ROOT = Path(__file__).resolve().parents[1]


def console(*arguments: object, cwd: Path, package: Path = ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "clip_medical", *map(str, arguments)]
    return subprocess.run(
        command, cwd=cwd, env=os.environ | {"PYTHONPATH": str(package)}, capture_output=True, text=True, timeout=600
    )


def test_every_command_is_there(tmp_path: Path) -> None:
    """Catches a command that is listed and cannot be started, help that names another one, and flags without their
    help, which tyro reads from the source of the command."""
    listed = console("--help", cwd=tmp_path)
    assert listed.returncode == 0
    names = listed.stdout.partition("clip-medical ")[2].partition(",")[0].split(" | ")
    assert {"train", "search", "classify", "export", "app"} <= set(names)
    for name in names:
        result = console(name, "--help", cwd=tmp_path)
        assert result.returncode == 0 and f"clip-medical {name}" in result.stdout, result.stderr
        assert "Training data" in result.stdout if name == "train" else "un folder" in result.stdout, name


def test_mistakes_get_a_sentence(tmp_path: Path) -> None:
    """Catches a traceback, success after an unknown command, and advice that names a command that was not typed."""
    for arguments in ([], ["nonsense"]):
        result = console(*arguments, cwd=tmp_path)
        assert result.returncode == 2 and "train | search" in result.stderr and "Traceback" not in result.stderr
    result = console("train", "--nonsense", cwd=tmp_path)
    assert result.returncode == 2 and "`clip-medical train demo --help`" in result.stderr
    assert "Traceback" not in result.stderr


def test_no_package_is_forgotten_in_the_wheel() -> None:
    """Catches a new package that works in a checkout and is missing where the project is installed."""
    tomllib = pytest.importorskip("tomllib")
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = {
        str(file.parent.relative_to(ROOT)) for top in ("lora", "clip_medical") for file in (ROOT / top).rglob("*.py")
    }
    assert {name.replace(".", "/") for name in listed if ".commands" not in name} == {
        x.replace("\\", "/") for x in found
    }


@pytest.mark.slow
def test_a_run_with_the_installed_wheel(tmp_path: Path) -> None:
    """Catches a wheel without train.py, an experiment or a data file; results written into the installed package."""
    pytest.importorskip("setuptools")
    flags = ["--no-deps", "--no-build-isolation", "--target", str(tmp_path / "site")]
    keep_out = shutil.ignore_patterns(".git", ".venv*", "runs", "build", "results")
    shutil.copytree(ROOT, tmp_path / "source", ignore=keep_out)  # a build leaves files in its folder
    install = [sys.executable, "-m", "pip", "install", *flags, str(tmp_path / "source")]
    subprocess.run(install, check=True, capture_output=True)
    assert {path.name for path in (tmp_path / "site").iterdir() if path.is_dir()} >= {"lora", "clip_medical"}
    assert not (tmp_path / "site" / "experiments").exists() and not (tmp_path / "site" / "train.py").exists()
    small = ["--limit", 64, "--batch-size", 8]
    result = console("train", "--steps", 2, *small, "--output", "run", cwd=tmp_path, package=tmp_path / "site")
    assert result.returncode == 0, result.stderr
    command = json.loads((tmp_path / "run" / "report.json").read_text())["run"]["command"]
    assert command == "clip-medical train --steps 2 --limit 64 --batch-size 8 --output run"
    model = ["--model", "tiny-clip", "--limit", 20]
    result = console("classify", *model, "--facet", "modality", cwd=tmp_path, package=tmp_path / "site")
    assert result.returncode == 0 and (tmp_path / "zero_shot.json").is_file(), result.stderr


@pytest.mark.parametrize(
    ("variables", "printed"),
    [
        ({}, True),
        ({"RANK": "1"}, True),
        ({"RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"RANK": "1", "WORLD_SIZE": "2"}, False),
    ],
)
def test_one_process_of_torchrun_prints(
    variables: dict[str, str], printed: bool, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches each line N times on N GPUs, and a command that is silent for a variable that is no business of ours."""
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert cli.exit_code("name", lambda: print("a line") or 0) == 0
    assert ("a line" in capsys.readouterr().out) == printed
