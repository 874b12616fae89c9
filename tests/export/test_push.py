"""The way to the Hub and back, through a stand-in for it."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from clip_medical import export
from clip_medical.model import Clip
from tests.export.tools import LABELS, PICTURES, command, edit
from tests.stand_in_upload import UploadHub

ROOT = Path(export.__file__).resolve().parent.parent


def test_a_dry_run_lists_and_sends_nothing(
    run: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an upload nobody confirmed, a list that leaves files out, and a card made anew over edits."""
    folder = exported("merged")
    card = folder / "README.md"
    card.write_text(card.read_text() + "\nWords of the user.\n")
    monkeypatch.setattr(export, "HfApi", lambda: pytest.fail("nothing may be asked of the Hub"))
    capsys.readouterr()
    assert command("--run", run, "--to", "merged", "--push", "me/chest") == 0
    said = capsys.readouterr().out
    for file in folder.iterdir():
        assert re.search(rf"{file.stat().st_size:,} bytes  {re.escape(file.name)}\n", said)
    assert "Nothing was uploaded" in said and "--yes" in said
    assert "Words of the user." in card.read_text() and 'model="me/chest"' in card.read_text()


def test_no_network_is_one_sentence(
    run: Path, exported: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback of the HTTP library, whose exceptions are not OSErrors. Nothing listens on port 9."""
    assert exported("adapter").is_dir()
    monkeypatch.setattr(export, "HfApi", lambda: HfApi(endpoint="http://127.0.0.1:9"))
    assert command("--run", run, "--to", "adapter", "--push", "me/chest", "--yes") == 2
    (said,) = capsys.readouterr().err.splitlines()
    assert said.startswith("export: me/chest was not uploaded") and "network" in said


def test_only_the_export_of_this_adapter_is_pushed_again(
    run: Path, exported: Callable[..., Path], tmp_path: Path
) -> None:
    """Catches a push of whatever stands in the output folder: here an export made before the adapter changed."""
    shutil.copytree(exported("adapter"), tmp_path / "old")
    push = ["--run", run, "--output", tmp_path / "old", "--push", "me/chest"]
    assert command(*push, "--to", "adapter") == 0
    assert command(*push, "--to", "merged") == 2
    facts = json.loads((tmp_path / "old" / "provenance.json").read_text())
    edit(tmp_path / "old" / "provenance.json", export=facts["export"] | {"adapter": "0" * 64})
    assert command(*push, "--to", "adapter") == 2


UPLOAD_AND_LOAD = """
import json, os, sys
from PIL import Image
from clip_medical import export, load_run
from clip_medical.errors import UserError

sys.argv[0] = "export.py"
token = os.environ.pop("HF_TOKEN")
codes = [export.main()]
os.environ["HF_TOKEN"] = token
codes += [export.main(), export.main()]
clip = load_run("me/chest")
try:
    load_run("me/nothing")
except UserError as error:
    refusal = str(error)
print(json.dumps([codes, clip.classify(Image.open(os.environ["PICTURE"]), json.loads(os.environ["LABELS"])), refusal]))
"""


def test_what_was_pushed_loads_by_its_name(
    run: Path, exported: Callable[..., Path], adapted: Clip, tmp_path: Path
) -> None:
    """Catches a broken upload, a public repository that nobody asked for, a traceback where the login is missing.

    A process of its own, with a stand-in for the Hub: first without a token, then with it, twice; then it loads.
    """
    folder = exported("adapter")
    PICTURES[0].save(tmp_path / "picture.png")
    with UploadHub(tmp_path / "hub") as hub:
        mine = {"PICTURE": str(tmp_path / "picture.png"), "LABELS": json.dumps(LABELS)}
        done = subprocess.run(
            [sys.executable, "-c", UPLOAD_AND_LOAD, "--run", run, "--to", "adapter", "--push", "me/chest", "--yes"],
            env=hub.environment(tmp_path / "home") | mine, cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    codes, probabilities, refusal = json.loads(done.stdout.splitlines()[-1])
    assert codes == [2, 0, 0] and "hf auth login" in done.stderr and "Traceback" not in done.stderr
    assert probabilities == pytest.approx(adapted.classify(PICTURES[0], LABELS), abs=1e-5)
    assert refusal.startswith("me/nothing is neither a folder here nor an adapter on the Hub")
    assert hub.visibility == {"me/chest": "private"}
    for file in folder.iterdir():
        assert (tmp_path / "hub" / "me" / "chest" / file.name).read_bytes() == file.read_bytes()
