"""train.py as a user runs it: the files it writes, how it stops and resumes, and its messages for mistakes."""

import csv
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

import train
from clip_medical import load_clip, load_run
from clip_medical.config import PRESETS, Config, parse
from clip_medical.data.batches import prepare
from clip_medical.data.dataset import load_data
from clip_medical.errors import UserError
from clip_medical.evaluation.report import evaluate
from clip_medical.evaluation.search import identity
from clip_medical.model import Clip
from clip_medical.run_folder import choose_folder, load_base
from clip_medical.training import trainer as trainer_module
from lora import BiasLoRALinear, DoRALinear, FullLinear
from lora.inject import lora_layers
from tests.encoders import ENCODERS

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--no-train-logit-scale", "--limit", "40", "--batch-size", "16", "--seed", "1"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str | Path) -> int:
    """Run train.py in this process and return its exit code."""
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return train.main()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, with its report."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *SMALL, "--steps", "4", "--output", folder) == 0
    return folder


def adapter(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def records(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


# ---- results


FIGURES = ("training", "recall", "zero_shot", "search", "features", "layers")


def test_a_run_leaves_the_files_of_its_contract(finished: Path) -> None:
    """Catches a file of the run folder that is missing, or has other keys than its readers expect."""
    files = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    expected = {"config.json", "metrics.jsonl", "report.json", "report.md", "training_images.txt"}
    expected |= {"checkpoint/state.pt", "checkpoint/previous.pt"}
    expected |= {f"figures/{name}.png" for name in FIGURES}
    expected |= {f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors")}
    expected |= {"adapter/calibration.json", "adapter/provenance.json"}
    assert files == expected
    steps = records(finished)
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert all(np.isfinite(step["loss"]) and step["lr"] > 0 and step["pairs_per_second"] > 0 for step in steps)
    assert all(0 <= step["waiting"] <= 1 and step["peak_gib"] > 0 for step in steps)
    report = json.loads((finished / "report.json").read_text())
    for model in ("unadapted", "adapted"):
        row = report[model]["retrieval"]["image_to_text"]["recall@10"]
        assert row["low"] <= row["value"] <= row["high"] and 0 < row["chance"] < 1
        assert set(report[model]["zero_shot"]) == {"modality", "anatomy", "finding", "view"}
    assert report["unadapted"]["retrieval"]["text_to_image"]["queries"] == report["data"]["validation pairs"] == 40
    assert report["data"]["training pairs"] == 40
    assert float(report["training"]["time spent waiting for data"].rstrip("%")) < 100
    config = json.loads((finished / "config.json").read_text())
    assert config["batch_size"] == 16 and config["preset"] == "demo"


def test_the_unadapted_row_is_the_base_and_the_adapted_row_is_not(finished: Path) -> None:
    """Catches an adapter left on for the row of the unadapted model, and one that was never trained."""
    images = [Image.fromarray(np.full((50, 60), value, np.uint8)) for value in (10, 120, 240)]
    assert any(tensor.any() for name, tensor in adapter(finished).items() if "lora_B" in name)
    assert (load_clip().encode_images(images) - load_run(finished).encode_images(images)).abs().max() > 1e-4
    report = json.loads((finished / "report.json").read_text())
    config = Config(**{k: v for k, v in json.loads((finished / "config.json").read_text()).items() if k != "preset"})
    base = load_base(load_run(finished), finished)
    data = load_data(config.data, limit=config.limit, seed=config.seed)
    results = json.loads(json.dumps(evaluate(base, prepare(data.validation, base.processor, "validation")).results))
    assert report["unadapted"] == results != report["adapted"]


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_run_in_half_precision_ends_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str, dtype: str
) -> None:
    """Catches model.dtype, which is that of logit_scale, taken for the dtype of the weights: the adapter was read back
    beside a base in fp32, where its features differ, and --resume did not notice another precision."""
    assert run(monkeypatch, *SMALL, "--output", tmp_path, "--precision", precision, "--steps", "2") == 0
    assert "features read back: 0e+00" in capsys.readouterr().out
    assert f"precision: {dtype}" in (tmp_path / "report.md").read_text()
    assert torch.load(tmp_path / "checkpoint" / "state.pt")["precision"] == dtype  # which --resume compares


@pytest.mark.slow
def test_the_same_seed_trains_the_same_weights(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches randomness outside the seed, and a seed that is ignored."""
    for seed, same in (("1", True), ("2", False)):
        run(monkeypatch, *SMALL[:-1], seed, "--steps", "4", "--output", tmp_path / seed)
        assert all(map(torch.equal, adapter(finished).values(), adapter(tmp_path / seed).values())) == same


@pytest.mark.slow
@pytest.mark.parametrize(
    ("flags", "reported"),
    [
        (["--chunk-size", "5", "--checkpointing", "on"], "4 chunks of up to 5, with checkpointing"),
        *((["--encoder", encoder], f"encoder: {encoder}") for encoder in ENCODERS),
    ],
)
def test_other_ways_to_compute_train_the_same(
    flags: list[str], reported: str, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a --chunk-size that makes small batches of a large one, an encoder with other gradients, and a flag that
    does not reach the loop."""
    assert run(monkeypatch, *SMALL, "--steps", "4", *flags, "--output", tmp_path / "run") == 0
    for name, tensor in adapter(finished).items():  # as a whole: Adam turns rounding of a gradient into a long step
        assert (adapter(tmp_path / "run")[name] - tensor).norm() < 1e-3 * tensor.norm(), name
    assert reported in (tmp_path / "run" / "report.md").read_text()


@pytest.mark.slow
def test_a_single_batch_is_overfitted_and_the_best_adapter_is_reported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a loop that cannot learn, and a report on another adapter than the best."""
    flags = ["--overfit-batch", "--validate-every", "3", "--lr", "1e-2", "--warmup", "0.1"]
    assert run(monkeypatch, *SMALL, "--steps", "30", *flags, "--output", tmp_path) == 0
    steps = records(tmp_path)
    assert steps[0]["loss"] > 1 and steps[-1]["loss"] < 0.05
    recalls = {step["step"]: step["validation_recall"] for step in steps if "validation_recall" in step}
    assert list(recalls) == list(range(3, 31, 3))
    best = max(recalls, key=lambda step: recalls[step])  # the earliest of equals
    assert f"Adapter  step {best}, the best of 10" in capsys.readouterr().out
    report = json.loads((tmp_path / "report.json").read_text())["adapted"]["retrieval"]
    ways = [report[way][f"recall@{k}"]["value"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert np.mean(ways) == pytest.approx(recalls[best])


@pytest.mark.slow
def test_a_short_demo_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a pipeline that runs and learns nothing: 32 steps must reduce the loss by a quarter."""
    flags = ["--limit", "128", "--steps", "32", "--batch-size", "32"]
    assert run(monkeypatch, *flags, "--output", tmp_path) == 0
    losses = [step["loss"] for step in records(tmp_path)]
    assert np.mean(losses[-5:]) < 0.75 * losses[0]


@pytest.mark.slow
def test_the_demo_learns_to_name_findings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches phantoms, captions, prompts, a base model or settings with which diagnosis is lost, as at a full learning
    rate of the vision tower: after a third of the demo the adapted model tells findings apart."""
    assert run(monkeypatch, "--steps", "288", "--output", tmp_path) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    before, after = (report[model]["zero_shot"]["finding"] for model in ("unadapted", "adapted"))
    assert after["accuracy"]["low"] > before["accuracy"]["high"] + 0.1
    assert after["auroc"]["low"] > before["auroc"]["high"]


# ---- stop and resume


@pytest.mark.slow
@pytest.mark.parametrize("extra", [[], ["--dropout", "0.2", "--train-logit-scale", "--augment"]])
def test_a_stopped_run_continues_as_if_it_had_not_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    """Catches a resumed run with other weights or losses, an adapter that is not saved at a stop, and a trained
    temperature that is not saved with it."""
    flags = [*SMALL, "--steps", "5", *extra]
    assert run(monkeypatch, *flags, "--output", tmp_path / "whole") == 0

    class StopAfterThree:
        def __init__(self) -> None:
            self.steps = 0

        @property
        def requested(self) -> bool:
            self.steps += 1
            return self.steps == 3

    with monkeypatch.context() as patch:
        patch.setattr(trainer_module, "StopRequest", StopAfterThree)
        assert run(patch, *flags, "--output", tmp_path / "parts") == 130
    assert "Stopped after step 3 of 5" in capsys.readouterr().out
    assert (tmp_path / "parts" / "adapter" / "adapter_model.safetensors").is_file()
    assert run(monkeypatch, *flags, "--output", tmp_path / "parts", "--resume") == 0
    whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    losses = [[(step["step"], step["loss"]) for step in records(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == losses[1]
    scale = tmp_path / "parts" / "adapter" / "logit_scale.json"
    assert scale.is_file() == bool(extra)
    if extra:
        trained = json.loads(scale.read_text())["logit_scale"]
        assert trained != load_clip().model.logit_scale.item()
        assert load_run(tmp_path / "parts").model.logit_scale.item() == pytest.approx(trained)


@pytest.mark.slow
def test_ctrl_c_ends_the_process_with_its_work_saved(tmp_path: Path) -> None:
    """Catches a traceback on Ctrl-C, and an adapter that is lost with it. Sends the signal to a real process."""
    command = [sys.executable, "train.py", *SMALL, "--steps", "100000", "--output", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "To continue:" in out and "--resume" in out and "Traceback" not in err
    load_run(tmp_path / "run")


def test_a_folder_that_holds_a_run_is_not_overwritten(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a second run written into the first."""
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert run(monkeypatch, *SMALL, "--steps", "4", "--output", finished) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(monkeypatch, *SMALL, "--steps", "4", "--output", finished, "--resume") == 2
    assert "complete" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


@pytest.mark.slow
def test_resume_refuses_another_configuration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that continues with another batch size, learning rate, data or base model as if nothing had
    changed."""

    class Stop:
        requested = True

    monkeypatch.setattr(trainer_module, "StopRequest", Stop)
    assert run(monkeypatch, *SMALL, "--steps", "4", "--output", tmp_path / "run") == 130
    capsys.readouterr()
    stopped: list[str | Path] = [*SMALL, "--steps", "4", "--output", tmp_path / "run", "--resume"]
    assert run(monkeypatch, *stopped, "--rank", "4") == 2
    assert "--rank 8, found 4" in capsys.readouterr().err
    config = tmp_path / "run" / "config.json"
    original = config.read_text()
    config.write_text(original.replace('"lr": 0.01', '"lr": 0.001'))
    assert run(monkeypatch, *stopped) == 2  # without --lr, its default would take over unseen
    assert "--lr 0.001, found 0.01" in capsys.readouterr().err
    config.write_text(original.replace('"vision_lr": 0.1,', ""))
    assert run(monkeypatch, *stopped) == 2  # a run of a version that had no such flag
    assert "--vision-lr 1.0, found 0.1" in capsys.readouterr().err
    config.write_text(original)
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt")
    for what in ("training pairs", "base model"):
        changed = state | {"identity": state["identity"] | {what: "other"}}
        torch.save(changed, tmp_path / "run" / "checkpoint" / "state.pt")
        assert run(monkeypatch, *stopped) == 2
        assert f"The {what} of the run" in capsys.readouterr().err


@pytest.mark.slow
def test_a_run_is_extended_where_its_flag_is_given(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches more steps refused, or taken with the learning rate of the old schedule, which has ended at 0."""
    shutil.copytree(finished, tmp_path / "run")
    steps = len((finished / "metrics.jsonl").read_text().splitlines())
    flags = ["--output", str(tmp_path / "run"), "--resume", "--steps", str(steps + 3), "--lr", "0.004"]
    assert run(monkeypatch, *SMALL, *flags) == 0
    output = capsys.readouterr().out
    assert f"--steps {steps} -> {steps + 3}" in output and "--lr 0.01 -> 0.004" in output
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert len(records) == steps + 3
    assert records[steps]["lr"] == pytest.approx(
        0.004 * (1 + math.cos(math.pi * (steps - 1) / (steps + 2))) / 2, rel=0.02
    )


@pytest.mark.slow
def test_training_goes_on_from_an_adapter_and_in_one_tower(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches --from-adapter that starts from B = 0, and --towers that is ignored."""
    flags = ["--steps", "1", "--lr", "1e-9", "--output"]
    assert run(monkeypatch, *SMALL, *flags, tmp_path / "on", "--from-adapter", finished) == 0
    before, after = adapter(finished), adapter(tmp_path / "on")
    assert before.keys() == after.keys()
    assert all((before[name] - after[name]).abs().max() < 1e-6 for name in before)
    assert run(monkeypatch, *SMALL, *flags, tmp_path / "tower", "--towers", "vision") == 0
    assert all("vision_model" in name for name in adapter(tmp_path / "tower"))


# ---- mistakes


def test_the_flight_check_ends_with_exit_code_2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches lost gradients that train.py does not report: the features are cut off from the graph on purpose."""
    original = Clip.image_features
    monkeypatch.setattr(Clip, "image_features", lambda clip, pixels: original(clip, pixels).detach())
    assert run(monkeypatch, *SMALL, "--steps", "2", "--output", tmp_path / "run") == 2
    assert "no gradient" in capsys.readouterr().err and not (tmp_path / "run").exists()


def test_dora_is_trained_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a --dora that trains plain LoRA, an adapter that no command can read, and --targets all-linear taken for
    the name of a layer."""
    flags = ["--dora", "--targets", "all-linear", "--steps", "2"]
    assert run(monkeypatch, *SMALL, *flags, "--output", tmp_path / "run") == 0
    assert any("magnitude" in name for name in adapter(tmp_path / "run"))
    layers = lora_layers(load_run(tmp_path / "run").model)
    assert all(type(layer) is DoRALinear for layer in layers.values())
    assert layers.keys() == {name for name, m in load_clip().model.named_modules() if type(m) is torch.nn.Linear}


def test_whole_layers_and_biases_are_trained_and_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a flag that trains plain LoRA, an adapter that cannot be trained further, and an index that takes two
    models of different projections for one."""
    flags = ["--bias", "lora_only", "--modules-to-save", "k_proj", "visual_projection"]
    first, second = tmp_path / "1", tmp_path / "2"
    assert run(monkeypatch, *SMALL, *flags, "--steps", "2", "--output", first) == 0
    assert {name.rpartition(".")[2] for name in adapter(first)} == {"weight", "bias"}
    assert json.loads((first / "report.json").read_text())["model"]["rank"] == 8, "not that of a whole layer"
    assert json.loads((first / "metrics.jsonl").read_text().splitlines()[0])["lr"] == PRESETS["demo"].lr
    for refused in (["--modules-to-save", "text_projection"], ["--bias", "lora_only"], ["--dora"]):
        assert run(monkeypatch, *SMALL, "--from-adapter", first, *refused) == 2
    assert run(monkeypatch, *SMALL, "--from-adapter", first, "--steps", "2", "--output", second) == 0
    clips = [load_run(folder) for folder in (first, second)]
    for clip in clips:
        kinds = {name: type(layer) for name, layer in lora_layers(clip.model).items()}
        whole_layers = {kinds.pop(name) for name in list(kinds) if not name.endswith(("q_proj", "v_proj"))}
        assert whole_layers == {FullLinear} and set(kinds.values()) == {BiasLoRALinear}
        assert clip.encoder.name == "fast"
    whole: list[Any] = [clip.model.visual_projection for clip in clips]
    assert not torch.equal(whole[0].trained_weight, whole[0].base.weight), "it was trained"
    assert not torch.equal(whole[0].trained_weight, whole[1].trained_weight), "and trained further"
    before = identity(clips[0])
    whole[0].trained_weight.data[0, 0] += 1
    assert identity(clips[0]) != before


def image_folder(folder: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("file_name", "text")) -> Path:
    """Write images with metadata.csv; names that begin with "missing" are listed and not written."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in {name for name, _ in rows if not name.startswith("missing")}:
        Image.fromarray(rng.integers(0, 255, (30, 40), dtype=np.uint8)).save(folder / name)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


@pytest.mark.slow
def test_a_folder_of_images_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a report that needs label columns."""
    data = image_folder(tmp_path / "data", [(f"{i}.png", f"image number {i}") for i in range(30)])
    assert run(monkeypatch, "--data", data, "--steps", "2", "--batch-size", "8", "--output", tmp_path / "run") == 0
    assert (tmp_path / "run" / "figures" / "search.png").is_file()
    assert not (tmp_path / "run" / "figures" / "zero_shot.png").exists()


MISTAKES: dict[str, tuple[list[str], str]] = {
    "unknown preset": (["rocco"], "no preset 'rocco'"),
    "unknown flag": (["--rnk", "4"], "--rnk"),
    "value of the wrong type": (["--steps", "many"], "--steps"),
    "unknown choice": (["--precision", "fp8"], "fp8"),
    "missing value": (["--lr"], "--lr"),
    "missing folder": (["--data", "{tmp}/nowhere"], "nowhere"),
    "no caption column": (["--data", "{tmp}/columns"], "--caption-column"),
    "no image column": (["--data", "{tmp}/columns", "--caption-column", "words", "--image-column", "file"], "'file'"),
    "path to a missing image": (["--data", "{tmp}/missing"], "missing.png"),
    "empty caption": (["--data", "{tmp}/empty"], "no text"),
    "unreadable image": (["--data", "{tmp}/damaged", "--batch-size", "4"], "3.png"),
    "batch larger than the data": (["--data", "{tmp}/good", "--batch-size", "500"], "--batch-size"),
    "one caption for all": (
        ["--data", "{tmp}/good", "--template", "X-ray", "--batch-size", "4"],
        "captions are 'X-ray'",
    ),
    "rank 0": (["--rank", "0"], "--rank"),
    "half a fragment": (["--fragments", "0.5"], "--fragments"),
    "rank above the width": (["--rank", "257"], "257"),
    "targets that match nothing": (["--targets", "query"], "query"),
    "a target that is no Linear": (["--targets", "layer_norm1"], "LayerNorm"),
    "a batch of one": (["--batch-size", "1"], "--batch-size"),
    "learning rate of zero": (["--lr", "0"], "--lr"),
    "learning rate that is no number": (["--lr", "nan"], "--lr"),
    "folder without a model": (["--model", "{tmp}/good"], "config.json"),
    "resume without output": (["--resume"], "--output"),
    "resume of nothing": (["--resume", "--output", "{tmp}/nothing"], "no run to resume"),
    "seed below 0": (["--seed", "-1"], "--seed"),
    "output below a file": (
        ["--data", "{tmp}/good", "--batch-size", "4", "--output", "{tmp}/good/0.png/x"],
        "--output",
    ),
    "chunk of no pairs": (["--chunk-size", "0"], "--chunk-size"),
    "LoRA+ ratio of zero": (["--lora-plus", "0"], "--lora-plus"),
    "validation every 0 steps": (["--validate-every", "0"], "--validate-every"),
    "fast encoder with dropout": (["--encoder", "fast", "--dropout", "0.1", "--limit", "40"], "--encoder fast"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_line_and_writes_nothing(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, another exit code, a message that does not name what is wrong, and a stray folder."""
    rows = [(f"{i}.png", f"image {i}") for i in range(20)]
    image_folder(tmp_path / "good", rows)
    image_folder(tmp_path / "columns", rows, header=("file_name", "words"))
    image_folder(tmp_path / "missing", [*rows, ("missing.png", "an image that is not there")])
    image_folder(tmp_path / "empty", [*rows, ("0.png", " ")])
    (image_folder(tmp_path / "damaged", rows) / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    arguments, named = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(argument.format(tmp=tmp_path) for argument in arguments)) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert message.startswith("train.py: ") and named in message and len(message) < 400
    assert not (tmp_path / "runs").exists() and not (tmp_path / "nothing").exists()


@pytest.mark.slow
def test_a_closed_pipe_causes_no_traceback() -> None:
    """Catches the traceback of `python train.py --help | head -1`."""
    command = [sys.executable, "train.py", "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


# ---- the command line


def test_without_output_the_next_free_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second `python train.py` that fails or overwrites the first run."""
    monkeypatch.chdir(tmp_path)
    names: list[str] = []
    for _ in range(3):
        folder = choose_folder("demo", Config())
        folder.mkdir(parents=True)
        names.append(str(folder))
    assert names == [os.path.join("runs", name) for name in ("demo", "demo-2", "demo-3")]


def test_help_names_each_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a field without help, and a preset whose values the help does not show."""
    with pytest.raises(SystemExit) as end:
        parse(["roco", "--help"])
    assert end.value.code == 0
    text = capsys.readouterr().out
    for field in Config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in text
    assert "eltorio/ROCOv2-radiology" in text and "256" in text
    words = " ".join(text.replace("│", " ").split())
    assert "Plain gradient accumulation is not offered: it would take away negatives" in words


def test_presets_can_be_overridden() -> None:
    """Catches flags that keep the preset's value, and the preset of the phantoms used for data of one's own."""
    assert parse([]) == ("demo", PRESETS["demo"])
    for own in (["--data", "x.csv"], ["--data=x.csv"]):
        assert parse(own) == ("demo", replace(Config(), data="x.csv"))
    assert parse(["demo", "--data", "x.csv"])[1] == replace(PRESETS["demo"], data="x.csv")
    preset, config = parse(["roco", "--rank", "4", "--targets", "q_proj", "k_proj", "--data", "x.csv"])
    assert (preset, config.rank, config.targets, config.data) == ("roco", 4, ("q_proj", "k_proj"), "x.csv")
    assert config.model == "openai/clip-vit-base-patch32"
    with pytest.raises(UserError):
        parse(["roco", "--batch-size", "0"])
