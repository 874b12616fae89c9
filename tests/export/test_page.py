"""The code of the page about other libraries runs, and gives what the page says."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionModelWithProjection

from clip_medical import load_clip
from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.evaluation import search
from clip_medical.evaluation.search import Index, Item
from clip_medical.model import Clip
from lora.inject import lora_layers

PAGE = Path(__file__).resolve().parents[2] / "clip_medical" / "export" / "README.md"


def blocks(about: str) -> list[str]:
    """The code of the sections whose titles match."""
    sections = re.split("^## ", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return [code for s in sections if re.match(about, s) for code in re.findall(r"```python\n(.*?)```", s, re.DOTALL)]


def test_the_code_about_adapters_runs(
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
    mixed, swapped, native = dict[str, Any](), dict[str, Any](), dict[str, Any]()
    for block, names in zip(blocks("Several adapters|transformers"), (mixed, swapped, native), strict=True):
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


def test_the_code_about_search_runs(
    exported: Callable[..., Path],
    adapted: Clip,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a column of the index that was renamed, features of the unadapted model, and an index of distances."""
    pytest.importorskip("faiss")
    shutil.copytree(exported("adapter"), tmp_path / "runs" / "a" / "export" / "adapter")
    index = Index(tmp_path / "runs" / "a" / "index", {"unadapted": load_clip(str(base)), "adapted": adapted})
    monkeypatch.setattr(search, "PART", 16)  # two parts
    images = [phantom(3, "validation", row).image for row in range(24)]
    index.add(Item(str(row), "phantoms", "", {}, image.copy) for row, image in enumerate(images))
    monkeypatch.chdir(tmp_path)
    (code,) = blocks("Search at scale")
    names: dict[str, Any] = {}
    capsys.readouterr()
    exec(code, names)
    ours = [index.search("adapted", torch.from_numpy(query), 10) for query in names["queries"]]
    np.testing.assert_allclose(names["cosines"], [[hit.score for hit in hits] for hits in ours], atol=1e-5)
    assert capsys.readouterr().out == f"{ours[0][0].name} recall@10 of the approximate index: 100 %\n"
