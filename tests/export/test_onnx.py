"""The ONNX encoders, run by ONNX Runtime."""

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import clip_medical
from clip_medical import load_clip
from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.export import onnx
from clip_medical.model import Clip
from tests.export.tools import command, skip_if_not_installed

FILES = ("image_encoder.onnx", "text_encoder.onnx")


@pytest.mark.slow
@torch.no_grad()
def test_features_match_at_every_batch_size_and_length(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches a constant batch size or length in the ONNX graph, unnormalised features, and a missing adapter."""
    folder = exported("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    image_encoder, text_encoder = (onnxruntime.InferenceSession(folder / name) for name in FILES)
    phantoms = [phantom(2, "validation", row) for row in range(17)]
    pixels = torch.from_numpy(np.stack([adapted.processor.pixels(p.image) for p in phantoms]))
    for n in (1, 3, 17):
        (features,) = image_encoder.run(None, {"pixel_values": adapted.normalised(pixels[:n]).numpy()})
        np.testing.assert_allclose(features, adapted.image_features(pixels[:n]), rtol=0, atol=1e-4)
    captions = [p.caption for p in phantoms]
    texts = [" ".join(captions), "CT", *captions[2:]]
    options: dict[str, Any] = dict(padding="max_length", truncation=True, return_tensors="pt")
    for length in range(5, 78):
        for n in (1, 3, 17):
            tokens = adapted.processor.tokenizer(texts[:n], max_length=length, **options)
            assert tokens["input_ids"].shape == (n, length)
            (features,) = text_encoder.run(None, {name: tensor.numpy() for name, tensor in tokens.items()})
            expected = adapted.text_features(tokens["input_ids"], tokens["attention_mask"].sum(dim=1))
            np.testing.assert_allclose(features, expected, rtol=0, atol=1e-4)
    unadapted = load_clip(adapted.name).text_features(tokens["input_ids"], tokens["attention_mask"].sum(dim=1))
    assert np.abs(features - unadapted.numpy()).max() > 1e-3, "the effect of the adapter must be large"


@pytest.mark.slow
def test_the_files_hold_no_local_paths(exported: Callable[..., Path]) -> None:
    """Catches stack traces of the export, with folder names of this machine, in a file that may be published."""
    for name in FILES:
        content = (exported("onnx") / name).read_bytes()
        assert b"site-packages" not in content and str(Path(clip_medical.__file__).parent).encode() not in content


@pytest.mark.slow
def test_an_encoder_that_differs_is_not_saved(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an export that ignores the result of its comparison with PyTorch."""
    skip_if_not_installed("onnx")
    monkeypatch.setattr(onnx, "TOLERANCE", 1e-12)
    with pytest.raises(RuntimeError, match="differ"):
        command("--run", run, "--to", "onnx", "--output", tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an ImportError with a traceback where an optional package is not installed."""
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "onnxscript" else find_spec(name))
    assert command("--run", run, "--to", "onnx", "--output", tmp_path / "out") == 2
    assert "pip install onnx onnxscript onnxruntime" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
