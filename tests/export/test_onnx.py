"""The ONNX encoders, run by onnxruntime."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPImageProcessor, CLIPTokenizer

from clip_medical import export, load_clip
from clip_medical.model import Clip
from tests.export.tools import LABELS, PICTURES, command


@pytest.fixture
def needs_onnx() -> None:
    for name in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(name)


@pytest.mark.usefixtures("needs_onnx")
def test_onnx_gives_the_features_of_the_model(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches a batch or length that the tracing froze, features that are not normalised, an adapter left out."""
    from clip_medical.onnx_export import compare, image_cases, text_cases

    pixels, texts = export.samples(adapted)
    folder = exported("onnx")
    assert compare(folder / "image_encoder.onnx", list(image_cases(adapted, pixels))) < 1e-4
    cases = list(text_cases(adapted, texts, range(5, 78)))
    assert {tuple(case["input_ids"].shape) for case, _ in cases} == {(n, k) for n in (1, 3, 17) for k in range(5, 78)}
    assert compare(folder / "text_encoder.onnx", cases) < 1e-4
    assert compare(folder / "text_encoder.onnx", list(text_cases(load_clip(adapted.name), texts, [9]))) > 1e-3


@pytest.mark.usefixtures("needs_onnx")
def test_onnx_serves_with_what_lies_in_its_folder(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches a folder without tokenizer, preprocessor or temperature; and this machine's paths in a published file."""
    import onnxruntime

    folder = exported("onnx")
    names = ("image_encoder.onnx", "text_encoder.onnx")
    images, texts = (onnxruntime.InferenceSession(folder / name) for name in names)
    pixels = CLIPImageProcessor.from_pretrained(folder)([PICTURES[0].convert("RGB")], return_tensors="np")
    ids = CLIPTokenizer.from_pretrained(folder)(LABELS, padding=True, return_tensors="np")
    cosines = torch.from_numpy(images.run(None, dict(pixels))[0] @ texts.run(None, dict(ids))[0].T)
    scale = json.loads((folder / "logit_scale.json").read_text())["logit_scale"]
    probabilities = (torch.tensor(scale).exp() * cosines).softmax(-1)[0].tolist()
    assert dict(zip(LABELS, probabilities, strict=True)) == pytest.approx(
        adapted.classify(PICTURES[0], LABELS), abs=1e-4
    )
    for name in names:
        content = (folder / name).read_bytes()
        assert b"site-packages" not in content and str(Path(export.__file__).parent).encode() not in content


@pytest.mark.usefixtures("needs_onnx")
def test_an_onnx_file_that_differs_is_not_published(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a comparison whose result nobody looks at."""
    from clip_medical import onnx_export

    monkeypatch.setattr(onnx_export, "TOLERANCE", 1e-12)
    with pytest.raises(RuntimeError, match="differ"):
        command("--run", run, "--to", "onnx", "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_extra_is_named(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an ImportError from the depths, after the model was loaded and the folder made."""
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find(name))
    assert command("--run", run, "--to", "onnx", "--output", run / "out") == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err
    assert not (run / "out").exists()
