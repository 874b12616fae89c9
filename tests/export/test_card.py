"""The model card: facts, licence, and runnable snippets."""

import ast
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from clip_medical.export.card import model_card
from clip_medical.model import Clip
from tests.export.tools import IMAGES


def report(run: Path, source: str, base: str, revision: str | None) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((run / "report.json").read_text())
    content["data"]["source"] = source
    content["model"] |= {"base": base, "revision": revision}
    return content


@pytest.mark.parametrize("to", ["adapter", "merged", "onnx"])
@pytest.mark.parametrize(
    ("source", "base_model", "revision", "licence", "phrase"),
    [
        ("Hub eltorio/ROCOv2-radiology (train, validation)", "openai/clip", "abc", "cc-by-nc-sa-4.0", "non-commercial"),
        ("phantoms, seed 0", "tiny-clip", None, "mit", "no patient"),
        ("phantoms, seed 0", "openai/clip", "abc", None, "no patient"),
        ("folder ../phantoms", "tiny-clip", None, None, "Fill\nthem in"),
    ],
)
def test_the_card_states_only_what_is_certain(
    run: Path, to: str, source: str, base_model: str, revision: str | None, licence: str | None, phrase: str
) -> None:
    """Catches an invented licence, ROCOv2 weights without their terms, bad YAML, a base that is not on the Hub."""
    content = report(run, source, base_model, revision)
    card = model_card(to, content, ["It was checked."])
    assert card.data.get("license") == licence and phrase in card.text
    assert card.data.get("library_name") == {"adapter": "peft", "merged": "transformers", "onnx": "onnx"}[to]
    assert card.data.get("base_model") == (base_model if revision else None)
    assert "Not a medical device" in card.text and "\n- It was checked.\n" in card.text
    assert (
        f"{content['data']['training pairs']:,} training pairs" in card.text and content["run"]["command"] in card.text
    )


def test_the_card_holds_the_results_and_settings_of_the_run(run: Path) -> None:
    """Catches a value without its interval or the number of pairs, and a blank where the template misspells a name."""
    content = report(run, "phantoms, seed 0", "tiny-clip", None)
    text = model_card("merged", content, []).text
    recall = content["adapted"]["retrieval"]["text_to_image"]["recall@5"]
    row = next(line for line in text.splitlines() if line.startswith("| text -> image, Recall@5"))
    assert f"{100 * recall['value']:.1f} % [{100 * recall['low']:.1f}, {100 * recall['high']:.1f}]" in row
    assert row.endswith("| 20 |")
    training, model = content["training"], content["model"]
    assert f"{training['steps']} steps with a batch size of {training['batch size']}, seed 0: `python train.py" in text
    assert f"rank {model['rank']}, {model['trainable parameters']:,} trainable parameters" in text


@pytest.mark.parametrize("to", ["adapter", "merged", pytest.param("onnx", marks=pytest.mark.slow)])
def test_the_snippet_runs(
    to: str,
    exported: Callable[..., Path],
    adapted: Clip,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Catches a missing import, a folder without tokenizer, image processor or temperature, and other probabilities."""
    folder = exported(to)
    code, *others = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name: name)
    monkeypatch.chdir(tmp_path)
    IMAGES[0].save("image.png")
    capsys.readouterr()
    exec(code.replace("user/name", str(folder)), {})
    output = ast.literal_eval(capsys.readouterr().out)
    probabilities = output if isinstance(output, dict) else {row["label"]: row["score"] for row in output}
    calibration = adapted.calibration if to == "adapter" else {}  # others know one temperature, the model's
    monkeypatch.setattr(adapted, "calibration", calibration)
    expected = adapted.classify(IMAGES[0], ["X-ray of the chest", "CT of the head"])
    # CLIPImageProcessor differs from our pixels by a grey level here and there
    assert probabilities == pytest.approx(expected, abs=1e-4 if to == "adapter" else 1e-3)
    for other in others:  # the adapter in PEFT
        names: dict[str, Any] = {}
        exec(other.replace("user/name", str(folder)), names)
        assert any("lora_A" in name for name, _ in names["model"].named_parameters())
