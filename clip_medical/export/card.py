"""Facts for the model card, which is rendered from card.md: results, origin of the data, and licence."""

from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

from clip_medical.evaluation.report import FOOTNOTE, result_rows
from clip_medical.evaluation.table import as_markdown, comparison

TEMPLATE = Path(__file__).with_name("card.md")
REPOSITORY = "user/name"  # placeholder in the snippets until --push gives the name of the repository
ROCO = "eltorio/ROCOv2-radiology"


def model_card(to: str, report: dict[str, Any], checks: list[str]) -> ModelCard:
    """Return the model card of an export.

    to      "adapter", "merged" or "onnx"
    report  report.json of the run
    checks  sentences that compare the export with the adapted model

    The licence and the base model are named only where they are certain: a licence follows from the data, and only
    a base model with a revision is on the Hub.
    """
    base, revision, source = report["model"]["base"], report["model"].get("revision"), report["data"]["source"]
    data, licence = "user data", None
    if "rocov2" in source.lower():
        data, licence = "ROCOv2", "cc-by-nc-sa-4.0"
    elif source.startswith("phantoms,"):
        data, licence = "phantoms", "mit" if base == "tiny-clip" else None  # both are part of this MIT repository
    metadata = ModelCardData(
        library_name={"adapter": "peft", "merged": "transformers", "onnx": "onnx"}[to],
        pipeline_tag="zero-shot-image-classification",
        base_model=base if revision else None,
        base_model_relation={"adapter": "adapter", "merged": "finetune"}.get(to) if revision else None,
        datasets=[ROCO] if ROCO in source else None,
        tags=["clip", "lora", "medical", "radiology"],
        license=licence,
        language="en",
    )
    results = as_markdown(comparison(result_rows(report["unadapted"], report["adapted"])))
    facts: Any = dict(to=to, data=data, report=report, checks=checks, repository=REPOSITORY, footnote=FOOTNOTE)
    card: ModelCard = ModelCard.from_template(metadata, template_path=str(TEMPLATE), results=results, **facts)
    return card
