"""What the card says, and what it must not say."""

import json
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from clip_medical.model_card import model_card


def report(run: Path, source: str, base: str, revision: str | None = None) -> dict[str, Any]:
    found = json.loads((run / "report.json").read_text())
    return found | {
        "data": found["data"] | {"source": source},
        "model": found["model"] | {"base": base, "revision": revision},
    }


@pytest.mark.parametrize("to", ["adapter", "merged", "onnx"])
@pytest.mark.parametrize(
    ("source", "model", "revision", "licence", "says"),
    [
        ("Hub eltorio/ROCOv2-radiology (train, validation)", "openai/clip", "abc", "cc-by-nc-sa-4.0", "non-commercial"),
        ("phantoms, seed 0", "tiny-clip", None, "mit", "no patient"),
        ("phantoms, seed 0", "openai/clip", "abc", None, "no patient"),
        ("folder ../phantoms", "tiny-clip", None, None, "fill them in"),
    ],
)
def test_the_card_claims_what_is_known(
    run: Path, tmp_path: Path, to: str, source: str, model: str, revision: str | None, licence: str | None, says: str
) -> None:
    """Catches a licence nobody gave, weights of ROCOv2 without its terms, bad YAML, a base that is not on the Hub."""
    (tmp_path / "README.md").write_text(model_card(to, report(run, source, model, revision), ["It was checked."]))
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.get("license") == licence and says in card.text
    assert card.data.library_name == {"adapter": "peft", "merged": "transformers", "onnx": "onnx"}[to]
    assert card.data.get("base_model") == (model if revision else None)
    assert "Not a medical device" in card.text and "It was checked." in card.text
    text = json.loads((run / "report.json").read_text())["adapted"]["retrieval"]["text_to_image"]["recall@5"]
    row = next(line for line in card.text.splitlines() if line.startswith("| text -> image, Recall@5"))
    assert f"{100 * text['value']:.1f} % [{100 * text['low']:.1f}, {100 * text['high']:.1f}]" in row
    assert row.endswith("| 20 |")
