"""Upload to the Hub and download from it, with a local server in place of the Hub."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

import clip_medical
from clip_medical.export import __main__ as export
from clip_medical.model import Clip
from tests.export.tools import IMAGES, LABELS, command, edit
from tests.stand_in_upload import UploadHub


def test_a_dry_run_lists_the_files_and_uploads_nothing(
    run: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an upload without --yes, an incomplete list of files, and a dry run that changes the user's card."""
    folder = exported("merged")
    card = folder / "README.md"
    original = card.read_text()
    card.write_text(original + "\nA note by the user.\n")
    monkeypatch.setattr(export, "HfApi", lambda: pytest.fail("a dry run must not contact the Hub"))
    capsys.readouterr()
    assert command("--run", run, "--to", "merged", "--push", "me/chest") == 0
    output, edited = capsys.readouterr().out, card.read_text()
    for file in folder.iterdir():
        assert re.search(rf"{file.stat().st_size:,} bytes  {re.escape(file.name)}\n", output)
    assert "Nothing was uploaded" in output and "--yes" in output
    assert edited == original + "\nA note by the user.\n"
    card.write_text(original)


def test_a_missing_network_is_one_line(
    run: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback of the HTTP library, whose errors are not OSErrors. No server listens on port 9."""
    assert exported("merged").is_dir()
    monkeypatch.setattr(export, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    assert command("--run", run, "--to", "merged", "--push", "me/chest", "--yes") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export: Upload to me/chest failed") and "network" in line


def test_only_an_export_of_the_current_adapter_is_pushed(
    run: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    """Catches a push of an unrelated or outdated folder, such as an export made before the adapter changed."""
    shutil.copytree(exported("merged"), tmp_path / "old")
    flags = ["--run", run, "--output", tmp_path / "old", "--push", "me/chest"]
    assert command(*flags, "--to", "merged") == 0
    assert command(*flags, "--to", "merged", "--dtype", "fp16") == 2
    facts = json.loads((tmp_path / "old" / "provenance.json").read_text())
    edit(tmp_path / "old" / "provenance.json", export=facts["export"] | {"adapter": "0" * 64})
    assert command(*flags, "--to", "merged") == 2


def test_an_adapter_whose_base_nobody_else_has_is_not_pushed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches an adapter on the Hub that names a folder of this machine as its base."""
    assert command("--run", run, "--to", "adapter", "--output", run / "export" / "local", "--push", "me/chest") == 2
    assert "not on the Hub" in capsys.readouterr().err


UPLOAD_AND_LOAD = """
import json, os, sys
from PIL import Image
from clip_medical import load_run
from clip_medical.errors import UserError
from clip_medical.export.__main__ import main

token = os.environ.pop("HF_TOKEN")
codes = [main()]
os.environ["HF_TOKEN"] = token
codes += [main(), main()]
clip = load_run("me/chest")
try:
    load_run("me/nothing")
except UserError as error:
    message = str(error)
print(json.dumps([codes, clip.classify(Image.open(os.environ["IMAGE"]), json.loads(os.environ["LABELS"])), message]))
"""


@pytest.mark.slow
def test_an_uploaded_adapter_loads_by_its_name(run: Path, adapted: Clip, tmp_path: Path) -> None:
    """Catches a broken upload, a public repository, and a traceback where the login is missing.

    A subprocess with its own HF_HOME pushes without a token, pushes twice with one, and loads the adapter.
    """
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("export"))
    report = json.loads((run / "report.json").read_text())
    edit(tmp_path / "run" / "report.json", model=report["model"] | {"base": "me/base"})  # as if it were on the Hub
    folder = tmp_path / "run" / "export" / "adapter"
    IMAGES[0].save(tmp_path / "image.png")
    hub = UploadHub(tmp_path / "hub")
    with hub:
        variables = {"IMAGE": str(tmp_path / "image.png"), "LABELS": json.dumps(LABELS)}
        process = subprocess.run(
            [
                sys.executable,
                "-c",
                UPLOAD_AND_LOAD,
                "--run",
                tmp_path / "run",
                "--to",
                "adapter",
                "--push",
                "me/chest",
                "--yes",
            ],
            env=hub.environment(tmp_path / "home") | variables,
            cwd=Path(clip_medical.__file__).parent.parent,
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert process.returncode == 0, process.stderr
    codes, probabilities, message = json.loads(process.stdout.splitlines()[-1])
    assert codes == [2, 0, 0] and "hf auth login" in process.stderr and "Traceback" not in process.stderr
    assert probabilities == pytest.approx(adapted.classify(IMAGES[0], LABELS), abs=1e-5)
    assert "me/nothing" in message
    assert hub.visibility == {"me/chest": "private"} and 'load_run("me/chest")' in (folder / "README.md").read_text()
    for file in folder.iterdir():
        assert (tmp_path / "hub" / "me" / "chest" / file.name).read_bytes() == file.read_bytes()
