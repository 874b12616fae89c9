"""The command line: an interrupted export leaves no files, and a user error is one message with a remedy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from clip_medical.export import __main__ as export
from tests.export.tools import command, edit


def test_an_interrupted_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an export written under its final name from the start. Ctrl-C comes after the weights are saved."""

    def interrupt(*_: object) -> None:
        assert list(tmp_path.rglob("model.safetensors")), "the weights must have been saved"
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "model_card", interrupt)
    assert command("--run", run, "--to", "merged", "--output", tmp_path / "out") == 130
    assert not list(tmp_path.iterdir())


def change_base(run: Path, base: Path) -> None:
    """Let the adapter's config name a folder with other weights than those it was trained on."""
    shutil.copytree(base, run / "base")
    weights = load_file(run / "base" / "model.safetensors")
    weights["visual_projection.weight"] += 0.01
    save_file(weights, run / "base" / "model.safetensors", {"format": "pt"})
    edit(run / "adapter" / "adapter_config.json", base_model_name_or_path=str(run / "base"))


# name -> arguments, a function that damages a copy of the run, and a phrase of the expected message
ERRORS: dict[str, tuple[str, Callable[[Path, Path], object], str]] = {
    "no run": ("--run {run}/nowhere --to merged", lambda *_: 0, "train.py"),
    "incomplete run": ("--to merged", lambda run, _: (run / "report.json").unlink(), "--resume"),
    "no adapter": ("--to merged", lambda run, _: shutil.rmtree(run / "adapter"), "--resume"),
    "damaged report": ("--to merged", lambda run, _: (run / "report.json").write_text("{"), "report.json"),
    "another base": ("--to merged", change_base, "fingerprint"),
    "another rank": ("--to adapter", lambda run, _: edit(run / "adapter" / "adapter_config.json", r=3), "rank"),
    "missing base": (
        "--to merged",
        lambda run, _: edit(run / "adapter" / "adapter_config.json", base_model_name_or_path=str(run / "missing")),
        "missing",
    ),
    "output exists": ("--to adapter --output {run}", lambda *_: 0, "choose another --output"),
    "output below a file": ("--to adapter --output {run}/config.json/x", lambda *_: 0, "--output"),
    "unknown exporter": ("--to tflite", lambda *_: 0, "tflite"),
    "no exporter": ("", lambda *_: 0, "--to"),
    "dtype of an adapter": ("--to adapter --dtype fp16", lambda *_: 0, "Leave it out"),
    "invalid repository": ("--to adapter --push thing", lambda *_: 0, "owner/name"),
    "--yes without --push": ("--to adapter --yes", lambda *_: 0, "--push"),
}


@pytest.mark.parametrize("error", ERRORS)
def test_a_user_error_is_one_line_and_writes_nothing(
    error: str, run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, another exit code, a message without the remedy, and an export made all the same."""
    flags, damage, phrase = ERRORS[error]
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("export"))
    damage(copy, base)
    files = sorted(tmp_path.rglob("*"))
    arguments = flags.format(run=copy).split()
    assert command(*([] if "--run" in arguments else ["--run", copy]), *arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export: ") and phrase in line and len(line) < 500
    assert [path for path in sorted(tmp_path.rglob("*")) if path != copy / "export"] == files
