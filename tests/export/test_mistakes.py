"""Interruptions and mistakes: nothing is left under the final name, and one sentence names the remedy."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from clip_medical import export
from tests.export.tools import command, edit


def test_an_interrupted_export_leaves_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an export that is written under its final name from the start: here Ctrl-C comes before the card."""

    def stop(*_: object) -> str:
        assert [p.name for p in tmp_path.rglob("model.safetensors")], "the weights were there already"
        raise KeyboardInterrupt

    monkeypatch.setattr(export, "model_card", stop)
    assert command("--run", run, "--to", "merged", "--output", tmp_path / "out") == 130
    assert not list(tmp_path.iterdir())


def another_base(copy: Path, base: Path) -> None:
    """The same folder name in the adapter's config, other weights in the folder."""
    shutil.copytree(base, copy / "base")
    weights = load_file(copy / "base" / "model.safetensors")
    weights["visual_projection.weight"] += 0.01
    save_file(weights, copy / "base" / "model.safetensors", {"format": "pt"})
    edit(copy / "adapter" / "adapter_config.json", base_model_name_or_path=str(copy / "base"))


def another_architecture(copy: Path, base: Path) -> None:
    edit(copy / "adapter" / "adapter_config.json", r=3)


MISTAKES: dict[str, tuple[list[str], Callable[[Path, Path], object], str]] = {
    "no run": (["--run", "{copy}/nowhere", "--to", "merged"], lambda *_: 0, "train.py"),
    "half a run": (["--to", "merged"], lambda copy, _: (copy / "report.json").unlink(), "--resume"),
    "no adapter": (["--to", "merged"], lambda copy, _: shutil.rmtree(copy / "adapter"), "--resume"),
    "damaged report": (["--to", "merged"], lambda copy, _: (copy / "report.json").write_text("{"), "report.json"),
    "another base": (["--to", "merged"], another_base, "bring back that version"),
    "another rank": (["--to", "adapter"], another_architecture, "another model or rank"),
    "base is gone": (
        ["--to", "merged"],
        lambda copy, _: edit(copy / "adapter" / "adapter_config.json", base_model_name_or_path=str(copy / "gone")),
        "gone",
    ),
    "output exists": (["--to", "adapter", "--output", "{copy}"], lambda *_: 0, "choose another --output"),
    "output below a file": (["--to", "adapter", "--output", "{copy}/config.json/x"], lambda *_: 0, "--output"),
    "unknown kind": (["--to", "tflite"], lambda *_: 0, "tflite"),
    "kind not given": ([], lambda *_: 0, "--to"),
    "dtype of an adapter": (["--to", "adapter", "--dtype", "fp16"], lambda *_: 0, "leave it out"),
    "bad name": (["--to", "adapter", "--push", "thing"], lambda *_: 0, "owner/name"),
    "yes to nothing": (["--to", "adapter", "--yes"], lambda *_: 0, "--push"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_writes_nothing(
    mistake: str, run: Path, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, another exit code, a sentence without the remedy, and an export made all the same."""
    arguments, harm, named = MISTAKES[mistake]
    copy = tmp_path / "run"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("export"))
    harm(copy, base)
    before = sorted(tmp_path.rglob("*"))
    given = [argument.format(copy=copy) for argument in arguments]
    assert command(*([] if "--run" in given else ["--run", copy]), *given) == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("export: ") and named in said and len(said) < 500
    assert not (copy / "export" / "merged").exists() and not (copy / "export" / "adapter").exists()
    assert [p for p in sorted(tmp_path.rglob("*")) if p.name != "export"] == before
