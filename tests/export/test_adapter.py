"""The adapter export, loaded by PEFT and by load_run."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from clip_medical import load_clip, load_run
from clip_medical.model import Clip
from tests.export.tools import LABELS, max_difference


def test_peft_computes_the_same_logits(exported: Callable[..., Path], adapted: Clip, base: Path) -> None:
    """Catches an adapter that PEFT interprets differently, and extra files that PEFT cannot load."""
    peft = pytest.importorskip("peft")
    model = CLIPModel.from_pretrained(base)
    inputs = {"input_ids": adapted.processor.tokens(LABELS)[0], "pixel_values": torch.randn(3, 3, 224, 224)}
    with torch.no_grad():
        unadapted = model(**inputs).logits_per_image
        peft_model = peft.PeftModel.from_pretrained(model, exported("adapter")).eval()
        peft_model.base_model.model.logit_scale.copy_(adapted.model.logit_scale)  # not part of PEFT's format
        logits, expected = peft_model(**inputs).logits_per_image, adapted.model(**inputs).logits_per_image
    assert (unadapted - expected).abs().max() > 1e-2, "the effect of the adapter must be large"
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-6)


def test_load_run_restores_the_run(exported: Callable[..., Path], adapted: Clip) -> None:
    """Catches an export without the trained temperature or without its provenance."""
    clip = load_run(exported("adapter"))
    assert max_difference(clip, adapted) == 0
    assert clip.model.logit_scale.item() == adapted.model.logit_scale.item()
    assert clip.model.logit_scale.item() != load_clip(adapted.name).model.logit_scale.item()
    facts = json.loads((exported("adapter") / "provenance.json").read_text())
    assert facts["model"]["fingerprint"] == adapted.fingerprint and facts["data"]["fingerprint"]
    assert facts["run"]["command"].startswith("python train.py") and facts["environment"]["torch"]
