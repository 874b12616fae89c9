"""train.py as a person uses it: what it writes, how it stops, how it goes on, and what it says to a mistake."""

import csv
import json
import os
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

import train
from clip_medical import load_clip, load_run
from clip_medical.config import PRESETS, Config
from clip_medical.errors import UserError
from lora import adapter_parameters

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--no-train-logit-scale", "--limit", "40", "--batch-size", "16", "--seed", "1"]


def run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, arguments)])
    return train.main()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 4 steps, with its report."""
    folder = tmp_path_factory.mktemp("runs") / "short"
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *SMALL, "--steps", "4", "--output", str(folder)) == 0
    return folder


def adapter(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_leaves_what_its_contract_says(finished: Path) -> None:
    """Catches a file of the run folder that is missing or has other keys than those who come after it expect."""
    files = {str(p.relative_to(finished)) for p in finished.rglob("*") if p.is_file()}
    figures = {f"figures/{name}.png" for name in ("loss", "recall", "zero_shot", "search")}
    expected = (
        {"config.json", "metrics.jsonl", "report.json", "report.md", "checkpoint/state.pt"}
        | figures
        | {"checkpoint/previous.pt"}
    )
    adapter = {f"adapter/{name}" for name in ("adapter_config.json", "adapter_model.safetensors", "provenance.json")}
    assert expected | adapter == files
    steps = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [s["step"] for s in steps] == [1, 2, 3, 4]
    assert all(np.isfinite(s["loss"]) and s["lr"] > 0 and s["pairs_per_second"] > 0 for s in steps)
    report = json.loads((finished / "report.json").read_text())
    for model in ("unadapted", "adapted"):
        row = report[model]["retrieval"]["image_to_text"]["recall@10"]
        assert row["low"] <= row["value"] <= row["high"] and 0 < row["chance"] < 1
        assert set(report[model]["zero_shot"]) == {"modality", "anatomy", "finding", "view"}
    assert report["unadapted"]["retrieval"]["pool"] == 40
    assert float(report["training"]["time spent waiting for data"].rstrip("%")) < 100
    assert json.loads((finished / "config.json").read_text())["batch_size"] == 16


@pytest.mark.parametrize(("precision", "named"), [("bf16", "bfloat16"), ("fp16", "float16")])
def test_a_run_in_half_precision_ends_well_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], precision: str, named: str
) -> None:
    """Catches the format asked of model.dtype, which is that of logit_scale, fp32 always: the adapter was read back
    beside a base in fp32, so that its features differed, and --resume would not notice another format."""
    assert run(monkeypatch, *SMALL, "--output", str(tmp_path), "--precision", precision, "--steps", "2") == 0
    assert "features differ by 0e+00" in capsys.readouterr().out
    assert f"precision: {named}" in (tmp_path / "report.md").read_text()
    assert torch.load(tmp_path / "checkpoint" / "state.pt")["precision"] == named  # which --resume compares


def test_the_unadapted_row_is_the_base_and_the_adapted_row_is_not(finished: Path) -> None:
    """Catches an adapter left on for the 'before' row, and one that was never trained for the 'after' row."""
    images = [Image.fromarray(np.full((50, 60), value, np.uint8)) for value in (10, 120, 240)]
    base, adapted = load_clip(), load_run(finished)
    assert any(tensor.any() for name, tensor in adapter(finished).items() if "lora_B" in name)
    assert (base.encode_images(images) - adapted.encode_images(images)).abs().max() > 1e-4
    report = json.loads((finished / "report.json").read_text())
    assert report["unadapted"] != report["adapted"]


def test_the_same_seed_trains_the_same_weights(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches randomness outside the seed; and a seed that is ignored."""
    run(monkeypatch, *SMALL, "--steps", "4", "--output", str(tmp_path / "again"))
    assert all(
        torch.equal(a, b) for a, b in zip(adapter(finished).values(), adapter(tmp_path / "again").values(), strict=True)
    )
    run(monkeypatch, *SMALL[:-1], "2", "--steps", "4", "--output", str(tmp_path / "other"))
    assert not all(
        torch.equal(a, b) for a, b in zip(adapter(finished).values(), adapter(tmp_path / "other").values(), strict=True)
    )


@pytest.mark.parametrize("extra", [[], ["--dropout", "0.2", "--train-logit-scale", "--augment"]])
def test_a_stopped_run_goes_on_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], extra: list[str]
) -> None:
    """Catches a resume that forgets the optimizer, the schedule, the place in the data, the state of dropout or how
    the pictures of an epoch are augmented."""
    flags = [*SMALL, "--steps", "5", *extra]
    assert run(monkeypatch, *flags, "--output", tmp_path / "whole") == 0

    class StopAfterThree(train.StopRequest):
        def __init__(self) -> None:
            self.looks = 0

        @property
        def asked(self) -> bool:  # type: ignore[override]
            self.looks += 1
            return self.looks == 3

    with monkeypatch.context() as patch:
        patch.setattr(train, "StopRequest", StopAfterThree)
        assert run(patch, *flags, "--output", tmp_path / "parts") == 130
    assert "Stopped after step 3 of 5" in capsys.readouterr().out
    assert (tmp_path / "parts" / "adapter" / "adapter_model.safetensors").is_file()
    assert run(monkeypatch, *flags, "--output", tmp_path / "parts", "--resume") == 0
    whole, parts = adapter(tmp_path / "whole"), adapter(tmp_path / "parts")
    assert all(torch.equal(whole[name], parts[name]) for name in whole)
    lines = [(tmp_path / name / "metrics.jsonl").read_text().splitlines() for name in ("whole", "parts")]
    losses = [[(json.loads(line)["step"], json.loads(line)["loss"]) for line in one] for one in lines]
    assert losses[0] == losses[1]
    scale = tmp_path / "parts" / "adapter" / "logit_scale.json"
    assert scale.is_file() == bool(extra)
    if extra:
        learned = json.loads(scale.read_text())["logit_scale"]
        assert learned != load_clip().model.logit_scale.item()
        assert load_run(tmp_path / "parts").model.logit_scale.item() == pytest.approx(learned)


def test_ctrl_c_ends_the_process_with_its_work_saved(tmp_path: Path) -> None:
    """Catches a traceback on Ctrl-C, and an adapter that was lost with it. Sends the signal to a real process."""
    command = [sys.executable, "train.py", *SMALL, "--steps", "100000", "--output", str(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        metrics = tmp_path / "run" / "metrics.jsonl"
        until = time.monotonic() + 120
        while time.monotonic() < until and not (metrics.is_file() and len(metrics.read_text().splitlines()) >= 2):
            time.sleep(0.2)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert "To go on:" in out and "--resume" in out and "Traceback" not in err
    load_run(tmp_path / "run")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_first_signal_is_a_wish_and_the_second_a_command(number: signal.Signals) -> None:
    """Catches SIGTERM, which queues and cloud machines send before they take the machine away, left to kill the run."""
    before = {n: signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)}
    signal.signal(number, signal.SIG_IGN)  # what is left out below shall fail here and not kill the tests
    try:
        stop = train.StopRequest()
        assert not stop.asked
        signal.raise_signal(number)
        assert stop.asked
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    finally:
        for n, handler in before.items():
            signal.signal(n, handler)


def test_a_full_disk_while_the_steps_are_written_is_one_sentence(tmp_path: Path) -> None:
    """Catches a traceback from metrics.jsonl, which grows at each step and so meets a full disk before all others."""
    from clip_medical.training.logging import Progress

    record = {"step": 1, "loss": 2.5, "lr": 1e-3, "pairs_per_second": 9.0, "waiting": 0.1, "peak_gib": 1.0}
    with pytest.raises(UserError, match="metrics.jsonl cannot be written.*--resume"):
        with Progress(tmp_path, 0, 2, tensorboard=False) as progress:
            progress.log = open("/dev/full", "w")  # a device that is always full
            progress.step(record)


def test_the_flight_check_stops_a_run_that_cannot_learn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches the silent failure of lost gradients: here the features are cut off from the graph on purpose."""
    from clip_medical.model import Clip

    original = Clip.image_features
    monkeypatch.setattr(Clip, "image_features", lambda self, pixels: original(self, pixels).detach())
    with pytest.raises(RuntimeError, match="gradients"):
        run(monkeypatch, *SMALL, "--steps", "2", "--output", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_chunks_and_checkpointing_train_the_same(
    finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a --chunk-size that makes small batches of a large one, and a flag that does not reach the loop."""
    flags = ["--chunk-size", "5", "--checkpointing", "on"]
    assert run(monkeypatch, *SMALL, "--steps", "4", *flags, "--output", tmp_path / "run") == 0
    for name, tensor in adapter(finished).items():  # as a whole: Adam makes a long step of a gradient that is rounding
        assert (adapter(tmp_path / "run")[name] - tensor).norm() < 1e-3 * tensor.norm(), name
    assert "4 chunks of up to 5, with checkpointing" in (tmp_path / "run" / "report.md").read_text()


def test_one_batch_is_learned_by_heart_and_the_best_adapter_is_kept(
    tmp_path: Path, capsys: Any, monkeypatch: Any
) -> None:
    """Catches a loop that cannot learn, --overfit-batch on changing batches, and a best that is the last one."""
    flags = ["--overfit-batch", "--validate-every", "3", "--lr", "1e-2", "--warmup", "0.1"]
    assert run(monkeypatch, *SMALL, "--steps", "30", *flags, "--output", tmp_path / "run") == 0
    records = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert records[0]["loss"] > 1 and records[-1]["loss"] < 0.05
    recalls = {r["step"]: r["validation_recall"] for r in records if "validation_recall" in r}
    assert list(recalls) == list(range(3, 31, 3))
    best = max(recalls, key=lambda step: recalls[step])  # the earliest of equals
    assert f"Adapter  of step {best}, best of 10" in capsys.readouterr().out
    report = json.loads((tmp_path / "run" / "report.json").read_text())["adapted"]["retrieval"]
    ways = [report[way][f"recall@{k}"]["value"] for way in ("image_to_text", "text_to_image") for k in (1, 5, 10)]
    assert np.mean(ways) == pytest.approx(recalls[best])


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_names_its_rows(what: str, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Catches NaN weights in the checkpoint, and a user who is left to guess which picture did it."""
    taken: list[torch.Tensor] = []
    original = train.contrastive_backward

    def poisoned(*arguments: Any) -> torch.Tensor:
        taken.append(arguments[2])
        loss = original(*arguments)
        if len(taken) == 3 and what == "gradient":
            adapter_parameters(arguments[0].model)[0].grad.fill_(float("nan"))  # type: ignore[union-attr]
        return loss * (float("nan") if len(taken) == 3 and what == "loss" else 1)

    monkeypatch.setattr(train, "contrastive_backward", poisoned)
    assert run(monkeypatch, *SMALL, "--steps", "9", "--output", tmp_path / "run") == 2
    assert f"the {what} of step 3 is nan, in a batch of 16 pairs" in capsys.readouterr().err
    named = json.loads((tmp_path / "run" / "non_finite_batch.json").read_text())
    assert named["rows"] == taken[2].tolist() and len(named["names"]) == 16
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 2 and all(w.isfinite().all() for w in state["learner"]["parameters"])


def test_fp16_does_not_skip_steps_for_ever(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Catches a run whose every step is skipped, which ends as if it had learned something."""
    original = train.contrastive_backward

    def poisoned(*arguments: Any) -> torch.Tensor:
        loss = original(*arguments)
        adapter_parameters(arguments[0].model)[0].grad.fill_(float("inf"))  # type: ignore[union-attr]
        return loss

    monkeypatch.setattr(train, "contrastive_backward", poisoned)
    assert run(monkeypatch, *SMALL, "--precision", "fp16", "--steps", "60", "--output", tmp_path / "run") == 2
    assert "the gradient of step 16 is " in capsys.readouterr().err  # the scale was 65,536 at first: 2 to the 16
    state = torch.load(tmp_path / "run" / "checkpoint" / "state.pt", weights_only=True)
    assert state["step"] == 15 and state["learner"]["skipped"] == 16


def test_tensorboard_has_the_curves_or_says_how_to_get_it(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    """Catches a flag that writes nothing, and an ImportError in the face of who has not installed it."""
    from clip_medical.training.logging import Progress

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(monkeypatch, *SMALL, "--steps", "2", "--tensorboard", "--output", tmp_path / "run") == 2
    assert "pip install" in capsys.readouterr().err.splitlines()[-1]
    monkeypatch.undo()
    pytest.importorskip("tensorboard")
    with Progress(tmp_path, 0, 2, tensorboard=True) as progress:
        progress.step({"step": 1, "loss": 2.5, "lr": 1e-3, "pairs_per_second": 9.0, "waiting": 0.1, "peak_gib": 1.0})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5)]


def picture_folder(folder: Path, rows: list[tuple[str, str]], header: tuple[str, str] = ("file_name", "text")) -> Path:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for name in {name for name, _ in rows if not name.startswith("missing")}:
        Image.fromarray(rng.integers(0, 255, (30, 40), dtype=np.uint8)).save(folder / name)
    with open(folder / "metadata.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    return folder


def test_a_folder_of_pictures_without_labels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a report that cannot live without label columns."""
    data = picture_folder(tmp_path / "data", [(f"{i}.png", f"picture number {i}") for i in range(30)])
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
    "empty caption": (["--data", "{tmp}/empty"], "empty caption"),
    "unreadable image": (["--data", "{tmp}/damaged", "--batch-size", "4"], "3.png"),
    "batch larger than the data": (["--data", "{tmp}/good", "--batch-size", "500"], "--batch-size"),
    "rank 0": (["--rank", "0"], "--rank"),
    "half a fragment": (["--fragments", "0.5"], "--fragments"),
    "rank above the width": (["--rank", "257"], "257"),
    "targets that match nothing": (["--targets", "query"], "query"),
    "a target that is no Linear": (["--targets", "layer_norm1"], "LayerNorm"),
    "no batch": (["--batch-size", "1"], "--batch-size"),
    "learning rate of zero": (["--lr", "0"], "--lr"),
    "learning rate that is no number": (["--lr", "nan"], "--lr"),
    "model that is no folder with a model": (["--model", "{tmp}/good"], "config.json"),
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
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_gets_one_sentence_and_writes_nothing(
    mistake: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a traceback, another exit code, a message that does not name what is wrong, and a stray folder."""
    rows = [(f"{i}.png", f"picture {i}") for i in range(20)]
    picture_folder(tmp_path / "good", rows)
    picture_folder(tmp_path / "columns", rows, header=("file_name", "words"))
    picture_folder(tmp_path / "missing", [*rows, ("missing.png", "a picture that is not there")])
    picture_folder(tmp_path / "empty", [*rows, ("0.png", " ")])
    (picture_folder(tmp_path / "damaged", rows) / "3.png").write_bytes(b"\x89PNG\r\n\x1a\n and no more")
    arguments, named = MISTAKES[mistake]
    monkeypatch.chdir(tmp_path)
    assert run(monkeypatch, *(a.format(tmp=tmp_path) for a in arguments)) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("train.py: ") and named in said and len(said) < 400
    assert not (tmp_path / "runs").exists() and not (tmp_path / "nothing").exists()


def test_a_reader_who_goes_away_gets_no_traceback() -> None:
    """Catches the traceback of `python train.py --help | head -1`."""
    command = [sys.executable, "train.py", "--help"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(timeout=60) == 141


def test_a_folder_that_holds_a_run_is_not_written_over(
    finished: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a second run written into the first; the sentence names the way on."""
    before = {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()}
    assert run(monkeypatch, *SMALL, "--steps", "4", "--output", finished) == 2
    assert "--resume" in capsys.readouterr().err
    assert run(monkeypatch, *SMALL, "--steps", "4", "--output", finished, "--resume") == 2
    assert "complete" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in finished.rglob("*") if p.is_file()} == before


def test_resume_refuses_another_configuration_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches a run that goes on with another learning rate as if nothing were different."""
    monkeypatch.setattr(train.StopRequest, "__init__", lambda self: setattr(self, "asked", True))
    assert run(monkeypatch, *SMALL, "--steps", "4", "--output", tmp_path / "run") == 130
    capsys.readouterr()
    assert run(monkeypatch, *SMALL, "--steps", "4", "--output", tmp_path / "run", "--resume", "--lr", "1e-5") == 2
    assert "--lr" in capsys.readouterr().err


def test_without_output_the_next_free_name_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a second `python train.py` that fails or writes over the first."""
    from clip_medical.run_folder import choose_folder

    monkeypatch.chdir(tmp_path)
    names: list[Any] = []
    for _ in range(3):
        folder = choose_folder("demo", Config())
        folder.mkdir(parents=True)
        names.append(str(folder))
    assert names == ["runs/demo", "runs/demo-2", "runs/demo-3"]


def test_help_names_each_flag_with_its_default(capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a field without help, and a preset whose values the help does not show."""
    with pytest.raises(SystemExit) as end:
        train.parse(["roco", "--help"])
    assert end.value.code == 0
    said = capsys.readouterr().out
    for field in Config.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in said
    assert "eltorio/ROCOv2-radiology" in said and "256" in said
    words = " ".join(said.replace("│", " ").split())
    assert "Plain gradient accumulation is not offered: the pairs of one part would not be negatives" in words


def test_presets_can_be_overridden() -> None:
    """Catches flags of a preset that silently keep their default, and a user's own pictures trained as phantoms are."""
    assert train.parse([]) == ("demo", PRESETS["demo"])
    for own in (["--data", "x.csv"], ["--data=x.csv"]):
        assert train.parse(own) == ("demo", replace(Config(), data="x.csv"))
    assert train.parse(["demo", "--data", "x.csv"])[1] == replace(PRESETS["demo"], data="x.csv")
    preset, config = train.parse(["roco", "--rank", "4", "--targets", "q_proj", "k_proj", "--data", "x.csv"])
    assert (preset, config.rank, config.targets, config.data) == ("roco", 4, ("q_proj", "k_proj"), "x.csv")
    assert config.model == "openai/clip-vit-base-patch32"
    with pytest.raises(UserError):
        train.parse(["roco", "--batch-size", "0"])


def test_a_full_demo_learns(tmp_path: Path) -> None:
    """Catches a pipeline that runs and teaches nothing: 32 steps must take a good part of the loss away."""
    command = [sys.executable, "train.py", "--limit", "128", "--steps", "32", "--output"]
    command += [str(tmp_path / "run"), "--batch-size", "32"]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, env=os.environ | {"TQDM_DISABLE": "1"})
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert np.mean(losses[-5:]) < 0.75 * losses[0]
