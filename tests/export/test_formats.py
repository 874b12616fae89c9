"""Exports as their users meet them: PEFT and transformers load them, and give what the run gives."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import CLIPModel, pipeline

from clip_medical import load_clip, load_run
from clip_medical.model import Clip
from tests.export.tools import LABELS, PICTURES, differ


def test_the_adapter_works_in_peft(exported: Callable[..., Path], adapted: Clip, base: Path) -> None:
    """Catches an export that PEFT reads otherwise than we do, and files beside it that PEFT stumbles over."""
    peft = pytest.importorskip("peft")
    model = CLIPModel.from_pretrained(base)
    inputs = {"input_ids": adapted.tokens(LABELS)[0], "pixel_values": torch.randn(3, 3, 224, 224)}
    adapted.model.eval()
    with torch.no_grad():
        before = model(**inputs).logits_per_image
        theirs = peft.PeftModel.from_pretrained(model, exported("adapter")).eval()
        theirs.base_model.model.logit_scale.copy_(adapted.model.logit_scale)  # beside the adapter, as the card says
        logits, expected = theirs(**inputs).logits_per_image, adapted.model(**inputs).logits_per_image
    assert (before - expected).abs().max() > 1e-2, "the adapter must show"
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_the_adapter_folder_is_the_run(exported: Callable[..., Path], run: Path, adapted: Clip) -> None:
    """Catches an export without the trained temperature or without its provenance."""
    again = load_run(exported("adapter"))
    assert differ(again, adapted) == 0
    assert again.model.logit_scale.item() == adapted.model.logit_scale.item()
    assert again.model.logit_scale.item() != load_clip(adapted.name).model.logit_scale.item()
    facts = json.loads((exported("adapter") / "provenance.json").read_text())
    assert facts["model"]["fingerprint"] == adapted.fingerprint and facts["data"]["fingerprint"]
    assert facts["run"]["command"].startswith("python train.py") and facts["environment"]["torch"]


def test_the_merged_model_needs_no_code_of_ours(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches an adapter not merged, a temperature not baked in, and a missing or wrong preprocessor."""
    folder = exported("merged")
    model = CLIPModel.from_pretrained(folder)
    assert model.dtype == torch.float32 and not any("lora" in name for name in model.state_dict())
    assert model.logit_scale.item() == adapted.model.logit_scale.item()
    assert differ(load_clip(str(folder)), adapted) < 1e-5
    assert differ(load_clip(adapted.name), adapted) > 1e-2, "the adapter must show"
    classify = pipeline("zero-shot-image-classification", model=str(folder))
    for picture in PICTURES:
        answers = classify(picture.convert("RGB"), candidate_labels=LABELS, hypothesis_template="{}")
        expected = adapted.classify(picture, LABELS)
        assert {a["label"]: a["score"] for a in answers} == pytest.approx(expected, abs=1e-4)


def test_half_precision_is_cast_once_and_its_loss_told(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches a merge computed in fp16 (the base rounded first, then the sum), and a loss that nobody is told of."""
    half = load_file(exported("merged", "--dtype", "fp16") / "model.safetensors")
    full = load_file(exported("merged") / "model.safetensors")
    assert all(torch.equal(half[name], full[name].half()) for name in full)
    off = differ(load_clip(str(exported("merged", "--dtype", "fp16"))), adapted)
    assert 0 < off < 1e-2
    card = (exported("merged", "--dtype", "fp16") / "README.md").read_text()
    told = float(re.search(r"float16 and read back, by at most (\S+);", card)[1])  # type: ignore[index]
    assert off / 10 < told < off * 10
