"""An adapted model in Python: load_run, classify and search."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import CLIPModel

from clip_medical import load_clip, load_run
from clip_medical.errors import UserError
from clip_medical.model import weights_fingerprint
from tests.export.tools import IMAGES, LABELS


def test_load_run_takes_an_adapter_saved_by_peft(base: Path, tmp_path: Path) -> None:
    """Catches a loader that needs provenance.json, which PEFT does not write."""
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(CLIPModel.from_pretrained(base), peft.LoraConfig(r=2, target_modules=["k_proj"]))
    model.save_pretrained(tmp_path / "peft")
    assert load_run(tmp_path / "peft").classify(IMAGES[0], LABELS)


@pytest.mark.parametrize("name", ["runs/nowhere", "nowhere", "merged", "too/many/parts"])
def test_load_run_refuses_a_folder_without_an_adapter(
    name: str, exported: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a Hub request for a misspelt folder, and a merged model taken for a run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").mkdir()
    with pytest.raises(UserError, match="load_clip"):
        load_run(exported("merged") if name == "merged" else name)


def test_the_fingerprint_depends_on_values_and_not_on_dtype(base: Path) -> None:
    """Catches a fingerprint that ignores a weight, or that changes when the same values are stored in fp16."""
    model = load_clip(str(base)).model.half()
    fingerprint = weights_fingerprint(model)
    assert weights_fingerprint(model.float()) == fingerprint
    with torch.no_grad():
        model.text_model.encoder.layers[0].mlp.fc1.weight[0, 0] += 1e-3
    assert weights_fingerprint(model) != fingerprint
    assert load_clip(str(base), dtype=torch.bfloat16).fingerprint == load_clip(str(base)).fingerprint


def test_classify_is_a_softmax_at_the_temperature_of_the_model(base: Path) -> None:
    """Catches a temperature that is ignored or not exponentiated, and probabilities assigned to the wrong labels."""
    clip = load_clip(str(base))
    cosines = (clip.encode_images(IMAGES[:1]) @ clip.encode_texts(LABELS).T)[0].double()
    clip.model.logit_scale.data.fill_(3.0)
    expected = dict(zip(LABELS, (torch.tensor(3.0).double().exp() * cosines).softmax(dim=0).tolist(), strict=True))
    assert clip.classify(IMAGES[0], LABELS) == pytest.approx(expected, abs=1e-5)
    assert len({round(p, 4) for p in expected.values()}) == 3, "the labels must differ"
    for labels in ([], "chest", ["chest", "chest"]):
        with pytest.raises(UserError, match="labels"):
            clip.classify(IMAGES[0], labels)


def test_search_returns_the_most_similar_image_first(base: Path) -> None:
    """Catches an ascending order, row numbers that do not match the features, and a failure for k above N."""
    clip = load_clip(str(base))
    features = clip.encode_images(IMAGES)
    cosines = (features @ clip.encode_texts([LABELS[0]])[0]).tolist()
    results = clip.search(LABELS[0], features, k=99)
    assert [row for row, _ in results] == sorted(range(4), key=lambda row: -cosines[row])
    assert [cosine for _, cosine in results] == pytest.approx(sorted(cosines, reverse=True), abs=1e-6)
    assert clip.search(LABELS[0], features, k=2) == results[:2]
    with pytest.raises(UserError, match="encode_images"):
        clip.search(LABELS[0], features[0])
