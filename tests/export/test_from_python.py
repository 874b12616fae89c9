"""An adapted model in Python: what load_run takes, classify and search."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from clip_medical import load_clip, load_run
from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.provenance import weights_fingerprint
from tests.export.tools import LABELS, PICTURES


def test_a_foreign_adapter_without_provenance_loads(base: Path, tmp_path: Path) -> None:
    """Catches a loader that takes its own exports alone: an adapter that PEFT saved names its base itself."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(CLIPModel.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["k_proj"]))
    model.save_pretrained(tmp_path / "theirs")
    assert load_run(tmp_path / "theirs").classify(PICTURES[0], LABELS)


@pytest.mark.parametrize("name", ["runs/nowhere", "nowhere", "merged", "too/many/parts"])
def test_load_run_refuses_what_is_no_adapter(
    name: str, exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a search of the Hub for a folder that was misspelt, and a merged model taken for a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="load_clip"):
        load_run(exported("merged") if name == "merged" else name)


def test_fingerprints_tell_weights_apart_and_not_formats(base: Path) -> None:
    """Catches a fingerprint that ignores a weight, or that changes where the same values are stored in fp16."""
    model = load_clip(str(base)).model.half()
    before = weights_fingerprint(model)
    assert weights_fingerprint(model.float()) == before
    weight = model.text_model.encoder.layers[0].mlp.fc1.weight
    with torch.no_grad():
        weight[0, 0] += 1e-3
    assert weights_fingerprint(model) != before
    assert load_clip(str(base), dtype=torch.bfloat16).fingerprint == load_clip(str(base)).fingerprint


def test_classify_is_a_softmax_at_the_temperature_of_the_model(adapted: Clip) -> None:
    """Catches a temperature that is forgotten or not exponentiated, and labels that get each other's probability."""
    clip = load_clip(adapted.name)
    cosines = (clip.encode_images(PICTURES[:1]) @ clip.encode_texts(LABELS).T)[0].double()
    clip.model.logit_scale.data.fill_(3.0)
    weights = (torch.tensor(3.0).double().exp() * cosines).exp()
    expected = dict(zip(LABELS, (weights / weights.sum()).tolist(), strict=True))
    assert clip.classify(PICTURES[0], LABELS) == pytest.approx(expected, abs=1e-5)
    assert len({round(p, 4) for p in expected.values()}) == 3, "labels must differ"
    for wrong in ([], "chest", ["chest", "chest"]):
        with pytest.raises(UserError, match="labels"):
            clip.classify(PICTURES[0], wrong)


def test_search_gives_the_nearest_first(adapted: Clip) -> None:
    """Catches an order from worst to best, rows of another order than the features, and a k beyond their number."""
    features = adapted.encode_images(PICTURES)
    cosines = (features @ adapted.encode_texts([LABELS[0]])[0]).tolist()
    found = adapted.search(LABELS[0], features, k=99)
    assert [row for row, _ in found] == sorted(range(4), key=lambda row: -cosines[row])
    assert [cosine for _, cosine in found] == pytest.approx(sorted(cosines, reverse=True), abs=1e-6)
    assert adapted.search(LABELS[0], features, k=2) == found[:2]
    with pytest.raises(UserError, match="encode_images"):
        adapted.search(LABELS[0], features[0])
