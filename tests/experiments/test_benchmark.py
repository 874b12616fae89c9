"""The benchmarks, each end to end on inputs so small that their figures mean nothing."""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CLIPConfig, CLIPModel

from clip_medical.data.cache import ROOT_VARIABLE
from clip_medical.errors import UserError
from clip_medical.model import load_clip
from experiments.benchmark import __main__ as training_command
from experiments.benchmark import contenders, measure, training
from experiments.benchmark.contenders import CONTENDERS, Task
from experiments.benchmark.inputs import write_rows
from tests.encoders import ENCODERS

CPU = torch.device("cpu")
needs_the_fast_encoder = pytest.mark.skipif("fast" not in ENCODERS, reason="clip_medical/fast is deleted")
Perform = Callable[..., dict[str, Any]]  # flags -> the JSON that the benchmark writes


def small_clip() -> CLIPModel:
    """A CLIP with ViT-B/32's input format, far smaller than it."""
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    config: Any = CLIPConfig(text_config=tower, vision_config=tower | {"patch_size": 32}, projection_dim=16)
    config.text_config.eos_token_id = load_clip().processor.tokenizer.eos_token_id
    return CLIPModel(config)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Small models and batches; what would run in a fresh process runs in this one."""
    monkeypatch.setattr(contenders, "vit_b_32", small_clip)
    monkeypatch.setattr(training, "fresh_process", lambda action, *arguments: action(*arguments))
    monkeypatch.setenv(ROOT_VARIABLE, str(tmp_path / "cache"))


@pytest.fixture
def perform(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Perform:
    """Run a benchmark as from the command line and return the results that it wrote."""

    def call(*flags: object) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["benchmark", *map(str, flags), "--output", str(tmp_path / "results")])
        assert training_command.main() == 0
        (file,) = (tmp_path / "results").glob("*.json")
        results: dict[str, Any] = json.loads(file.read_text())
        assert results["command"].startswith("python -m experiments.benchmark ")
        assert results["settings"]["seed"] == 0
        assert results["environment"].keys() > {"processor", "torch", "peft"}
        return results

    return call


@pytest.mark.parametrize("flags", [{"repeats": 0}, {"batch_size": 1}, {"seed": -1}])
def test_settings_that_measure_nothing_are_refused(flags: dict[str, int]) -> None:
    """Catches a traceback at the end of the measurement: the median of no values."""
    ((name, value),) = flags.items()
    with pytest.raises(UserError, match=f"--{name.replace('_', '-')} {value}, expected"):
        training_command.Benchmark(**flags)  # type: ignore[arg-type]


def test_an_output_that_cannot_be_written_is_refused_first(tmp_path: Path) -> None:
    """Catches minutes of measuring whose results are lost."""
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="another --output"):
        training_command.Benchmark(output=str(tmp_path / "file" / "x")).perform()


@needs_the_fast_encoder
def test_contenders_with_an_adapter_have_the_same_losses(tmp_path: Path) -> None:
    """Catches contenders that differ in more than speed: in A, the batches, the loss, the optimizer or the gradient."""
    rows = write_rows(tmp_path, 9, load_clip().processor.tokenizer, seed=0)
    _, losses = training.training(Task(rows, 4, CPU, torch.float32), repeats=4, epochs=False)
    fast, reference, peft, full = (torch.tensor(losses[name]) for name in CONTENDERS)
    assert (fast - reference).abs().max() < 2e-5
    # torchvision and Pillow round a few resized pixels differently: an offset for each of the two batches
    offset = (peft - fast).view(3, 2)
    assert offset.abs().max() < 1e-3 and (offset - offset[0]).abs().max() < 2e-5
    assert (fast[4] - fast[0]).abs() > 0.01 and full[0] == peft[0]
    assert (full - peft)[2:].abs().min() > 0.01


def test_images_and_captions_are_those_of_rocov2(tmp_path: Path) -> None:
    """Catches images that cost a decoder less than real ones, and captions that all begin alike or have one length."""
    tokenizer = load_clip().processor.tokenizer
    rows = write_rows(tmp_path, 12, tokenizer, seed=0)
    sizes = [file.stat().st_size for file, _ in rows]
    assert 150_000 < sum(sizes) / len(sizes) < 320_000
    lengths = [len(ids) for ids in tokenizer([caption for _, caption in rows])["input_ids"]]
    assert len(set(lengths)) > 6 and max(lengths) <= 80
    assert len({caption.split()[0] for _, caption in rows}) > 6


@pytest.mark.slow
@needs_the_fast_encoder
def test_the_training_benchmark_runs(perform: Perform, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Catches a benchmark that no longer fits the code it measures, and a row that one contender lacks."""
    results = perform("--batch-size", 2, "--images", 4, "--repeats", 2)
    assert list(results["contenders"]) == list(CONTENDERS)
    rows = ["step, pairs/s", "later epoch from PNG files, pairs/s", "peak memory, GiB"]
    for values in results["contenders"].values():
        assert values.keys() > set(rows) and len(values) == 6
    assert results["contenders"]["peft, usual loop"]["step, ratio to peft"] == 1
    difference = results["largest difference between losses of the same step, without full fine-tuning"]
    assert 0 <= difference < 1e-2
    assert results["unadapted, images/s"] > 0 and results["merged to unadapted"] > 0
    assert "peak memory, GiB" in capsys.readouterr().out


def test_a_measurement_runs_in_a_fresh_process() -> None:
    """Catches a peak of memory that holds what the parent process did before."""
    assert measure.fresh_process(os.getpid) != os.getpid()
