"""What all experiments promise: both models, the run's held-out pictures, whole files, one sentence a mistake."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from clip_medical import load_clip, load_run
from experiments import common
from experiments.recall import Recall
from tests.experiments.tools import Command, results


@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("recall", ["recall"]),
        ("stress_test", ["stress_test", "stress_test_reliability", "stress_test_confusions"]),
        ("zero_shot", ["zero_shot", "zero_shot_confusion_modality"]),
    ],
)
def test_both_models_and_where_the_numbers_come_from(
    name: str, figures: list[str], finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches results without the base beside them, without command, seed and hardware, and paths of one's machine."""
    assert command(name, "--run", finished, "--output", tmp_path) == 0
    printed = capsys.readouterr().out
    assert "unadapted" in printed and "adapted" in printed.replace("unadapted", "")
    found = results(tmp_path, name)
    assert found["command"].startswith(f"python -m experiments.{name} --run ") and "/somewhere" not in found["command"]
    assert found["seed"] == 0 and found["environment"]["torch"] and found["environment"]["device"]
    assert {"unadapted", "adapted"} <= found["results"].keys()
    assert found["results"]["unadapted"] != found["results"]["adapted"]
    provenance = json.loads((finished / "adapter" / "provenance.json").read_text())
    assert found["data"]["fingerprint"] == provenance["data"]["fingerprint"] and found["data"]["held-out pairs"] == 40
    for figure in figures:
        with Image.open(tmp_path / f"{figure}.png") as picture:
            assert picture.width > 400 and len(picture.convert("RGB").getcolors(2**24) or []) > 20
    assert not list(tmp_path.glob("*.part"))


def test_a_published_model_alone(finished: Path, tmp_path: Path, command: Command) -> None:
    """Catches a --model without the measures that stand beside an adapted one."""
    base = load_run(finished).name
    assert command("recall", "--run", finished, "--output", tmp_path / "a") == 0
    flags = ("--model", base, "--output", tmp_path / "b")
    assert command("recall", *flags, "--limit", 40) == 0
    (alone,) = results(tmp_path / "b", "recall")["results"].values()
    beside = results(tmp_path / "a", "recall")["results"]["unadapted"]
    assert alone["whole"]["pool"] == beside["whole"]["pool"] == 40
    assert alone["whole"]["text_to_image"].keys() == beside["whole"]["text_to_image"].keys()


def test_the_base_keeps_its_own_temperature(finished: Path, tmp_path: Path) -> None:
    """Catches the trained temperature left in the model whose adapter was switched off: its calibration would lie."""
    setup = common.load_models("recall", Recall(run=str(finished)))
    base = load_clip(load_run(finished).name)
    scales = {name: clip.model.logit_scale.item() for name, clip in setup.models.items()}
    assert scales["unadapted"] == base.model.logit_scale.item() != scales["adapted"]
    picture = [Image.new("L", (40, 40), 90)]
    assert torch.equal(setup.models["unadapted"].encode_images(picture), base.encode_images(picture))


def test_data_that_are_no_longer_those_of_the_run_are_refused(
    finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a held-out set that was drawn anew and holds pictures that the run was trained on."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "adapter" / "provenance.json"
    facts = json.loads(file.read_text())
    facts["data"]["fingerprint"] = "0" * 64
    file.write_text(json.dumps(facts))
    assert command("recall", "--run", run) == 2
    assert "holds other rows" in capsys.readouterr().err and not (run / "recall.json").exists()
    assert command("recall", "--run", run, "--data", "phantoms", "--limit", 12) == 0  # named: then it is meant


MISTAKES = {
    "neither": ("recall", [], "--run"),
    "both": ("recall", ["--run", "{run}", "--model", "tiny-clip"], "either"),
    "no run": ("stress_test", ["--run", "{tmp}/nowhere"], "holds no adapter"),
    "limit": ("recall", ["--run", "{run}", "--limit", "1"], "--limit"),
    "output is a file": ("recall", ["--run", "{run}", "--output", "{run}/config.json"], "--output"),
    "no folder for output": ("recall", ["--run", "{run}", "--output", "{run}/config.json/x"], "another --output"),
    "no folder for an index": (
        "search",
        ["--run", "{run}", "--index", "{run}/config.json/x", "--add", "{tmp}"],
        "--index",
    ),
    "seed": ("recall", ["--run", "{run}", "--seed", "-1"], "--seed"),
    "no labels": ("stress_test", ["--run", "{run}", "--data", "{tmp}/plain.csv"], "no labels"),
    "nothing to tell apart": ("zero_shot", ["--run", "{run}", "--data", "{tmp}/plain.csv"], "labelled"),
    "no such facet": ("zero_shot", ["--run", "{run}", "--facet", "colour"], "modality"),
    "no such class": ("zero_shot", ["--run", "{run}", "--facet", "modality", "--classes", "CT", "PET"], "'PET'"),
    "classes of nothing": ("zero_shot", ["--run", "{run}", "--classes", "CT", "MRI"], "--facet"),
    "labels of nothing": ("zero_shot", ["--run", "{run}", "--labels", "a", "b"], "--image"),
    "no such image": ("zero_shot", ["--run", "{run}", "--image", "{tmp}/no.png", "--labels", "a", "b"], "no such file"),
    "no index": ("search", ["--run", "{run}", "--text", "knee"], "--add"),
    "nothing to do": ("search", ["--run", "{run}"], "--add"),
    "no pictures": ("search", ["--run", "{run}", "--output", "{tmp}/o", "--add", "{tmp}/empty"], "no pictures"),
    "too many": ("search", ["--run", "{run}", "--text", "knee", "--k", "0"], "--k"),
    "too few for a batch": ("ablation", ["--run", "{run}", "--data", "{tmp}/plain.csv"], "too few"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_writes_nothing(
    mistake: str, finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, another exit code, and results written all the same."""
    name, arguments, named = MISTAKES[mistake]
    (tmp_path / "empty").mkdir()
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "plain.csv").write_text("file_name,text,split\n" + "a.png,one,train\na.png,two,validation\n")
    before = sorted(finished.rglob("*"))
    assert command(name, *(argument.format(run=finished, tmp=tmp_path) for argument in arguments)) == 2
    said = capsys.readouterr().err.strip().splitlines()
    assert len(said) == 1 and said[0].startswith(f"{name}: ") and named in said[0]
    assert sorted(finished.rglob("*")) == before
