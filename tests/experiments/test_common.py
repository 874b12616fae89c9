"""Common behaviour of the experiments: both models, the run's validation pairs, complete files, user errors."""

import json
import shutil
import sys
import textwrap
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import train
from clip_medical import load_clip, load_run
from clip_medical.data.dataset import load_data
from experiments import common
from experiments.recall import Recall
from tests.experiments.tools import Command, results


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "figures"),
    [
        ("recall", ["recall"]),
        ("stress_test", ["stress_test", "stress_test_reliability"]),
        ("zero_shot", ["zero_shot", "zero_shot_confusion_modality", "zero_shot_reliability"]),
    ],
)
def test_results_of_both_models_with_provenance(
    name: str, figures: list[str], finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches results without the unadapted model, without command, seed, encoder and hardware, or with local paths."""
    assert command(name, "--run", finished, "--output", tmp_path) == 0
    source, heading, *_ = capsys.readouterr().out.splitlines()
    assert source == "Data     phantoms, seed 0: 40 pairs (splits of the source)"
    assert heading.split()[:2] == ["unadapted", "adapted"]
    content = results(tmp_path, name)
    assert content["command"].startswith(f"python -m experiments.{name} --run ")
    assert "/somewhere" not in content["command"]
    assert content["seed"] == 0 and content["environment"]["torch"] and content["environment"]["device"]
    assert content["model"]["encoder"] in ("fast", "reference")
    assert list(content["results"]) == ["unadapted", "adapted"]
    assert content["results"]["unadapted"] != content["results"]["adapted"]
    provenance = json.loads((finished / "adapter" / "provenance.json").read_text())
    assert content["data"]["fingerprint"] == provenance["data"]["fingerprint"]
    assert content["data"]["validation pairs"] == 40
    for figure in figures:
        with Image.open(tmp_path / f"{figure}.png") as image:
            assert image.width > 400 and len(image.convert("RGB").getcolors(2**24) or []) > 20
    assert not list(tmp_path.glob("*.part"))


@pytest.mark.slow
def test_unadapted_model_alone(finished: Path, tmp_path: Path, command: Command) -> None:
    """Catches a --model that is measured differently from the unadapted model of a run."""
    base = load_run(finished).name
    assert command("recall", "--run", finished, "--output", tmp_path / "a") == 0
    assert command("recall", "--model", base, "--output", tmp_path / "b", "--limit", 40) == 0
    (alone,) = results(tmp_path / "b", "recall")["results"].values()
    beside = results(tmp_path / "a", "recall")["results"]["unadapted"]
    assert alone["image -> text"]["pool"] == beside["image -> text"]["pool"] == 40
    assert alone["text -> image"].keys() == beside["text -> image"].keys()


def test_unadapted_model_keeps_its_temperature(finished: Path) -> None:
    """Catches the trained temperature in the unadapted model, whose calibration would then be wrong."""
    models = Recall(run=str(finished)).load_models().models
    base = load_clip(load_run(finished).name)
    scales = {name: clip.model.logit_scale.item() for name, clip in models.items()}
    assert scales["unadapted"] == base.model.logit_scale.item() != scales["adapted"]
    image = [Image.new("L", (40, 40), 90)]
    assert torch.equal(models["unadapted"].encode_images(image), base.encode_images(image))


@pytest.mark.slow
def test_changed_data_of_the_run_are_refused(
    finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a validation split that was drawn again and contains training pairs of the run."""
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    file = run / "adapter" / "provenance.json"
    facts = json.loads(file.read_text())
    facts["data"]["fingerprint"] = "0" * 64
    file.write_text(json.dumps(facts))
    assert command("recall", "--run", run) == 2
    assert "has changed since" in capsys.readouterr().err and not (run / "recall.json").exists()
    assert command("recall", "--run", run, "--data", "phantoms", "--limit", 12) == 0  # other data are the user's choice


def test_the_skeleton_of_the_docstring_is_an_experiment(finished: Path, tmp_path: Path) -> None:
    """Catches a new experiment that needs more than a subclass with `measure`, and a skeleton that does not run."""
    skeleton = textwrap.dedent(str(common.__doc__).partition(":\n\n")[2].rpartition("\n\nWith")[0])
    names: dict[str, Any] = {"__name__": "experiments.cosine"}
    exec(skeleton, names)
    experiment = names["Cosine"](run=str(finished), output=str(tmp_path), limit=12)
    assert experiment.perform() == 0
    content = results(tmp_path, "cosine")
    assert content["data"]["validation pairs"] == 12
    assert (
        -1 < content["results"]["adapted"]["pairs"]["cosine_similarity"]["value"] < 1
        and (tmp_path / "cosine.png").is_file()
    )


def folder_of_images(folder: Path, numbers: range, header: str = "file_name,text,modality") -> Path:
    """Write a table metadata.csv and its images, whose texture is drawn from their number."""
    folder.mkdir(parents=True)
    rows = [f"{n}.png,caption {n},{('CT', 'ct', 'MRI')[n % 3]}" for n in numbers]
    (folder / "metadata.csv").write_text("\n".join([header, *rows]) + "\n")
    for n in numbers:
        noise = np.random.default_rng(n).integers(0, 256, (40, 40), dtype=np.uint8)
        Image.fromarray(noise).save(folder / f"{n}.png")
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, finished: Path) -> Path:
    """A folder with run/, trained with seed 3 on 40 images, and data/, which have been moved there since."""
    folder = tmp_path_factory.mktemp("own")
    data = folder_of_images(folder / "before", range(40), "file_name,my words,modality")
    flags = ["--data", data, "--caption-column", "my words", "--model", load_run(finished).name, "--fragments", 0]
    with pytest.MonkeyPatch.context() as patch:
        arguments = [*flags, "--steps", 1, "--batch-size", 8, "--seed", 3, "--output", folder / "run"]
        patch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
        assert train.main() == 0
    data.rename(folder / "data")
    return folder


def test_moved_data_are_recognised_with_the_split_of_the_run(trained: Path, tmp_path: Path, command: Command) -> None:
    """Catches training pairs measured as held out: another seed would split the moved data in another way."""
    assert command("recall", "--run", trained / "run", "--data", trained / "data", "--output", tmp_path) == 0
    data = results(tmp_path, "recall")["data"]
    provenance = json.loads((trained / "run" / "adapter" / "provenance.json").read_text())
    assert data["fingerprint"] == provenance["data"]["fingerprint"] and data["validation pairs"] == 4


def test_another_split_of_the_data_of_the_run_is_read_as_in_training(
    trained: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches --split that forgets the columns of the run."""
    settings = json.loads((trained / "run" / "config.json").read_text()) | {"data": str(trained / "data")}
    shutil.copytree(trained / "run", tmp_path / "run")
    (tmp_path / "run" / "config.json").write_text(json.dumps(settings))
    assert command("recall", "--run", tmp_path / "run", "--split", "test") == 2
    assert "Choose one of them with --split" in capsys.readouterr().err  # not: no caption column


def test_a_table_to_measure_on_is_taken_whole(
    trained: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a tenth of the rows measured in silence, and CT and ct as two classes."""
    other = folder_of_images(tmp_path / "other", range(100, 130))
    flags = ["--run", trained / "run", "--data", other, "--caption-column", "text", "--output", tmp_path]
    assert command("zero_shot", *flags) == 0
    content = results(tmp_path, "zero_shot")
    assert content["results"]["adapted"]["modality"]["n"] == 30
    assert sorted(content["results"]["adapted"]["modality"]["classes"]) in (["CT", "MRI"], ["MRI", "ct"])
    assert f"{other}: 30 pairs (all of its rows)" in capsys.readouterr().out
    assert command("recall", *flags, "--limit", 12) == 0
    assert "12 of 30 pairs" in capsys.readouterr().out
    assert command("recall", *flags, "--split", "test") == 2
    assert "Choose one of them with --split" in capsys.readouterr().err


def test_images_that_were_trained_on_are_told_or_left_out(
    trained: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches training images, copied under other names into a test set, reported as unseen."""
    other = folder_of_images(tmp_path / "other", range(100, 112))
    for n in range(3):
        shutil.copy(trained / "data" / f"{train_number(trained, n)}.png", other / f"{100 + n}.png")
    flags = ["--run", trained / "run", "--data", other, "--caption-column", "text", "--output", tmp_path]
    assert command("recall", *flags) == 0
    table, warning = capsys.readouterr().out.rpartition("3 of 12 images")[::2]
    assert "Recall@1" in table and "not of held-out data" in warning and "--leave-out-trained" in warning
    assert results(tmp_path, "recall")["data"]["trained on"] == 3
    assert command("recall", *flags, "--leave-out-trained") == 0
    assert results(tmp_path, "recall")["data"]["validation pairs"] == 9
    assert results(tmp_path, "recall")["results"]["adapted"]["image -> text"]["pool"] == 9
    only = folder_of_images(tmp_path / "only", range(200, 203))
    for n in range(3):
        shutil.copy(trained / "data" / f"{train_number(trained, n)}.png", only / f"{200 + n}.png")
    assert command("recall", *flags[:3], only, *flags[4:], "--leave-out-trained") == 2
    assert "none is left" in capsys.readouterr().err


def train_number(trained: Path, place: int) -> str:
    """The number of an image that was trained on."""
    split = load_data(str(trained / "data"), caption_column="my words", seed=3).train
    return split.ids[place].removesuffix(".png")


def test_findings_of_which_an_image_can_have_several(trained: Path, tmp_path: Path, command: Command) -> None:
    """Catches label sets measured as classes that exclude each other."""
    other = folder_of_images(tmp_path / "other", range(100, 124))
    rows = (other / "metadata.csv").read_text().splitlines()
    kinds = ("Edema|Effusion", "Effusion", "No Finding")
    table = "\n".join([f"{rows[0]},finding", *(f"{row},{kinds[n % 3]}" for n, row in enumerate(rows[1:]))])
    (other / "metadata.csv").write_text(table)
    flags = ["--run", trained / "run", "--data", other, "--caption-column", "text", "--output", tmp_path]
    assert command("zero_shot", *flags, "--facet", "finding") == 0
    reports = results(tmp_path, "zero_shot")["results"]["adapted"]
    assert set(reports) == {"finding", "finding Edema", "finding Effusion", "finding No Finding"}
    assert reports["finding Effusion"]["n"] == "16 of 24" and 0 <= reports["finding Edema"]["auroc"]["value"] <= 1
    assert reports["finding"]["average_precision"]["chance"] == pytest.approx((8 + 16 + 8) / 24 / 3)


USER_ERRORS = {
    "neither run nor model": ("recall", [], "--run"),
    "both run and model": ("recall", ["--run", "{run}", "--model", "tiny-clip"], "either"),
    "no run": ("stress_test", ["--run", "{tmp}/nowhere"], "{tmp}/nowhere"),
    "limit": ("recall", ["--run", "{run}", "--limit", "1"], "--limit"),
    "output is a file": ("recall", ["--run", "{run}", "--output", "{run}/config.json"], "--output"),
    "output below a file": ("recall", ["--run", "{run}", "--output", "{run}/config.json/x"], "--output"),
    "index below a file": ("search", ["--run", "{run}", "--index", "{run}/config.json/x", "--add", "{tmp}"], "--index"),
    "seed": ("recall", ["--run", "{run}", "--seed", "-1"], "--seed"),
    "no settings": ("ablation", ["--run", "{tmp}/exported"], "config.json"),
    "no labels": ("stress_test", ["--run", "{run}", "--data", "{tmp}/plain.csv"], "labels"),
    "fewer than two classes": ("zero_shot", ["--run", "{run}", "--data", "{tmp}/plain.csv"], "labelled"),
    "no such facet": ("zero_shot", ["--run", "{run}", "--facet", "colour"], "modality"),
    "no such class": ("zero_shot", ["--run", "{run}", "--facet", "modality", "--classes", "CT", "PET"], "'PET'"),
    "classes without facet": ("zero_shot", ["--run", "{run}", "--classes", "CT", "MRI"], "--facet"),
    "labels without image": ("zero_shot", ["--run", "{run}", "--labels", "a", "b"], "--image"),
    "repeated labels": ("zero_shot", ["--run", "{run}", "--image", "{tmp}/a.png", "--labels", "a", "a"], "labels"),
    "no such image": ("zero_shot", ["--run", "{run}", "--image", "{tmp}/no.png", "--labels", "a", "b"], "no.png"),
    "no index": ("search", ["--run", "{run}", "--text", "knee"], "--add"),
    "nothing to do": ("search", ["--run", "{run}"], "--add"),
    "no images": ("search", ["--run", "{run}", "--output", "{tmp}/o", "--add", "{tmp}/empty"], "{tmp}/empty"),
    "k": ("search", ["--run", "{run}", "--text", "knee", "--k", "0"], "--k"),
    "too few for a batch": ("ablation", ["--run", "{run}", "--data", "{tmp}/plain.csv"], "too few"),
}


@pytest.mark.parametrize("error", USER_ERRORS)
def test_user_errors_are_one_line_and_write_nothing(
    error: str, finished: Path, tmp_path: Path, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, another exit code than 2, and results written in spite of the error."""
    name, arguments, named = USER_ERRORS[error]
    (tmp_path / "empty").mkdir()
    shutil.copytree(finished / "adapter", tmp_path / "exported")
    Image.new("L", (40, 40)).save(tmp_path / "a.png")
    (tmp_path / "plain.csv").write_text("file_name,text,split\n" + "a.png,one,train\na.png,two,validation\n")
    before = sorted(finished.rglob("*"))
    assert command(name, *(argument.format(run=finished, tmp=tmp_path) for argument in arguments)) == 2
    *progress, line = capsys.readouterr().err.strip().splitlines()
    assert line.startswith(f"{name}: ") and named.format(tmp=tmp_path) in line
    assert not any("Traceback" in other for other in progress)
    assert sorted(finished.rglob("*")) == before
