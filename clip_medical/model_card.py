"""The model card, README.md of an export: what it is, what it was trained on, what was measured, what it is not for."""

from typing import Any

from huggingface_hub import ModelCardData

from clip_medical.evaluation.report import as_markdown, table

NAME = "user/name"  # stands for the repository until `--push` knows it

SNIPPETS = {
    "merged": f"""\
from transformers import pipeline

classify = pipeline("zero-shot-image-classification", model="{NAME}")  # or the path of this folder
classify("image.png", candidate_labels=["X-ray of the chest", "CT of the head"], hypothesis_template="{{}}")
""",
    "adapter": f"""\
from clip_medical import load_run

clip = load_run("{NAME}")  # or the path of this folder
clip.classify(Image.open("image.png"), ["X-ray of the chest", "CT of the head"])
""",
    "onnx": """\
encoder = onnxruntime.InferenceSession("text_encoder.onnx")
encoder.run(None, dict(CLIPTokenizer.from_pretrained(".")(["X-ray of the chest"], return_tensors="np")))
""",
}

WHAT = {
    "merged": "A whole CLIP, with the adapter merged into its weights: an ordinary model of `transformers`.",
    "adapter": """\
A LoRA adapter in the layout of Hugging Face PEFT: a few matrices that mean nothing without their base model. PEFT loads
it with `PeftModel.from_pretrained(CLIPModel.from_pretrained(base), folder)`. It does not read `logit_scale.json`, which
is there if the temperature was trained; it matters for probabilities, not for rankings.""",
    "onnx": """\
The two encoders of the adapted CLIP as ONNX, with tokenizer and preprocessor. They return features of unit length, so
a product of two is their cosine. Probabilities over labels are the softmax of exp(logit_scale) times the cosines, with
the number in `logit_scale.json`.""",
}

PHANTOMS = """\
Radiology phantoms drawn by a program: no patient appears in them, and nothing measured on them speaks of patients."""
ROCO = """\
ROCOv2 (Rückert et al. 2024), images and captions of open-access articles, under CC BY-NC-SA 4.0: these weights are for
**non-commercial** use only, and must be shared under the same licence."""
UNKNOWN = """\
The user's own data. **Licence, origin and consent are unknown to the program that wrote this card: fill them in here,
and `license` above, before you share these weights.**"""

LIMITS = """\
## Intended use

Research and teaching: searching and sorting radiology images by English sentences, and studying adaptation.

## Limits

- **Not a medical device.** Not for diagnosis, triage, or any decision about a patient.
- The figures above hold for their held-out pool alone: recall falls as the pool grows, so figures from pools of
  another size cannot be compared. Other scanners, hospitals, languages and findings were not measured.
- Probabilities share out 1 among the labels given; a model that knows none of them still names one.
- Bias in the base model and in the captions is passed on; none was measured."""


def model_card(to: str, report: dict[str, Any], checked: list[str]) -> str:
    """README.md for an export `to` "adapter", "merged" or "onnx".

    report: the run's report.json; checked: sentences on how the export was compared with the trained model.
    """
    model, data, run = report["model"], report["data"], report["run"]
    told, licence = _data(data["source"], model["base"])
    base = model["base"] + (f" at commit `{model['revision']}`" if model.get("revision") else "")
    facts = [
        f"Base model: {base}, whose own licence applies too",
        f"Adapter: rank {model['rank']}, {model['trainable parameters']:,} trained parameters",
        f"Training: {report['training']['steps']} steps of {report['training']['batch size']} pairs, "
        f"seed {run['seed']}: `{run['command']}`",
        "Fingerprints of base and data, hardware and versions: `provenance.json`",
    ]
    return "\n".join(
        [
            f"---\n{_front_matter(to, model, data['source'], licence)}\n---\n",
            "# CLIP adapted to radiology with LoRA\n",
            f"{WHAT[to]}\n",
            f"```python\n{SNIPPETS[to]}```\n",
            "## Measured\n",
            as_markdown(table(report["unadapted"], report["adapted"])),
            "\nWith 95 % bootstrap intervals. Recall is over the whole held-out pool of n pairs; rows with the same",
            "caption count as right for each other, ties count against the model.\n",
            *(f"- {sentence}" for sentence in checked),
            "\n## Data\n",
            f"{data['source']}: {data['training pairs']:,} training pairs, {data['held-out pairs']:,} held out.",
            f"{told}\n",
            "## Training\n",
            *(f"- {fact}" for fact in facts),
            f"\n{LIMITS}\n",
        ]
    )


def _data(source: str, base: str) -> tuple[str, str | None]:
    """What is known of the training data, and the licence of the weights where it is known."""
    if "rocov2" in source.lower():
        return ROCO, "cc-by-nc-sa-4.0"
    if source.startswith("phantoms,"):
        return PHANTOMS, "mit" if base == "tiny-clip" else None  # both come with this repository, under its licence
    return UNKNOWN, None


def _front_matter(to: str, model: dict[str, Any], source: str, licence: str | None) -> str:
    """YAML as the Hub reads it. Only what is known goes in: a base that is not on the Hub has no name there."""
    on_hub = bool(model.get("revision"))
    card = ModelCardData(
        library_name={"adapter": "peft", "merged": "transformers", "onnx": "onnx"}[to],
        pipeline_tag="zero-shot-image-classification",
        base_model=model["base"] if on_hub else None,
        base_model_relation={"adapter": "adapter", "merged": "finetune"}.get(to) if on_hub else None,
        datasets=["eltorio/ROCOv2-radiology"] if "eltorio/ROCOv2-radiology" in source else None,
        tags=["clip", "lora", "medical", "radiology"],
        license=licence,
        language="en",
    )
    return card.to_yaml()
