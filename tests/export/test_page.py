"""The code of the page about other libraries runs, and gives what the page says."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection

from clip_medical.model import Clip
from lora.inject import lora_layers

PAGE = Path(__file__).resolve().parents[2] / "clip_medical" / "export" / "README.md"


def test_the_code_of_the_page_runs(
    exported: Callable[..., Path], adapted: Clip, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a call that PEFT or transformers does not have, an adapter that is not switched, and a wrong mixture."""
    pytest.importorskip("peft")
    for name in ("a", "b"):
        shutil.copytree(exported("adapter"), tmp_path / "runs" / name / "export" / "adapter")
    shutil.copytree(exported("merged"), tmp_path / "runs" / "a" / "export" / "merged")
    file = tmp_path / "runs" / "b" / "export" / "adapter" / "adapter_model.safetensors"
    save_file({key: -2 * x if "lora_B" in key else x for key, x in load_file(file).items()}, file, {"format": "pt"})
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    mixed, swapped, native = [dict[str, Any]() for _ in blocks]
    for block, names in zip(blocks, (mixed, swapped, native), strict=True):
        exec(block.replace("openai/clip-vit-base-patch32", str(base)), names)

    own = {name: layer.delta_weight() for name, layer in lora_layers(adapted.model).items()}
    for name, delta in own.items():
        layer = mixed["model"].get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.get_delta_weight("b"), -2 * delta)
        torch.testing.assert_close(layer.get_delta_weight("mixed"), (0.7 - 0.3 * 2) * delta, rtol=1e-4, atol=1e-6)
        assert layer.active_adapters == ["mixed"]
        layer = swapped["model"].get_submodule(f"base_model.model.{name}")
        torch.testing.assert_close(layer.get_delta_weight("default"), -2 * delta)
        torch.testing.assert_close(native["model"].get_submodule(name).get_delta_weight("default"), delta)
    assert isinstance(native["vision"], CLIPVisionModelWithProjection)
