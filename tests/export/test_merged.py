"""The merged export, loaded by transformers."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    CLIPModel,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)

from clip_medical import load_clip
from clip_medical.export import __main__ as export
from clip_medical.model import Clip
from lora import LoRALinear, adapter_parameters, inject
from tests.export.tools import command, max_difference, skip_if_not_installed


def test_transformers_loads_the_adapted_model(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches an adapter that was not merged, and a base temperature in place of the trained one."""
    folder = exported("merged")
    model = CLIPModel.from_pretrained(folder)
    assert model.dtype == torch.float32 and not any("lora" in name for name in model.state_dict())
    assert model.logit_scale.item() == adapted.model.logit_scale.item()
    assert max_difference(load_clip(str(folder)), adapted) < 1e-5
    assert max_difference(load_clip(adapted.name), adapted) > 1e-2, "the effect of the adapter must be large"


def test_fp16_is_cast_once_after_the_merge(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches a merge computed in fp16 (base rounded first, then the sum), and a card with a wrong rounding error."""
    folder = exported("merged", "--dtype", "fp16")
    half, full = load_file(folder / "model.safetensors"), load_file(exported("merged") / "model.safetensors")
    assert all(torch.equal(half[name], full[name].half()) for name in full)
    difference = max_difference(load_clip(str(folder)), adapted)
    assert 0 < difference < 1e-2
    match = re.search(r"float16 and reloaded, they differ by at most (\S+),", (folder / "README.md").read_text())
    assert match and difference / 10 < float(match[1]) < difference * 10


def test_parts_of_the_model_load_in_the_dtype_of_the_export(exported: Callable[..., Path]) -> None:
    """Catches the dtype of the base in the configurations of the towers, by which an fp32 export loads as fp16."""
    for flags, dtype in (([], torch.float32), (["--dtype", "fp16"], torch.float16)):
        for part in (CLIPTextModel, CLIPVisionModel, CLIPTextModelWithProjection, CLIPVisionModelWithProjection):
            assert part.from_pretrained(exported("merged", *flags)).dtype == dtype


class TanhLoRA(LoRALinear):
    """A layer that is not linear, so no weight matrix equals it."""

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        return y + self.scaling * F.linear(torch.tanh(F.linear(x, self.lora_A)), self.lora_B)


@pytest.mark.parametrize("to", ["merged", "onnx"])
def test_a_layer_that_cannot_be_merged_is_refused(
    to: str, run: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Catches an export of a subclass of LoRALinear as if it were linear, a traceback, and files left behind."""
    skip_if_not_installed(to)
    clip = load_clip(str(base))
    inject(clip.model, layer=TanhLoRA)
    with torch.no_grad():
        for parameter in adapter_parameters(clip.model):
            parameter.normal_()
    monkeypatch.setattr(export, "load_run", lambda *_, **__: clip)
    assert command("--run", run, "--to", to, "--output", tmp_path / "out") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("export: ") and "TanhLoRA" in line
    assert not list(tmp_path.iterdir())
