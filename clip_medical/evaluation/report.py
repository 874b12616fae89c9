"""The report of a run: the same measurements on the unadapted and on the adapted model, as JSON, tables and figures."""

import json
import os
import platform
import re
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from clip_medical.data.batches import Pairs
from clip_medical.data.splits import Split
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.retrieval import retrieval_report
from clip_medical.evaluation.table import Row, as_markdown, comparison, metric_rows
from clip_medical.evaluation.zero_shot import zero_shot_report
from clip_medical.model import Clip
from clip_medical.run_folder import write_text
from lora.inject import lora_layers

WAYS = {"image_to_text": "image -> text", "text_to_image": "text -> image"}
FOOTNOTE = """Brackets are 95 % bootstrap intervals. Recall is over the whole pool of n validation images or captions.
Rows with the same caption count as positives of each other, and ties count against the model. Zero-shot scores have a
scale and class offsets, chosen on kept-back training pairs with labels, where there are enough.
For research only: not a medical device."""


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one model on the validation pairs."""

    results: dict[str, Any]  # {"retrieval": ..., "zero_shot": ...} as returned by retrieval_report and zero_shot_report
    images: Tensor  # (N, D) unit-length features, on the CPU
    texts: Tensor  # (N, D) likewise, of the captions
    queries: Tensor  # (Q, D) features of the texts of `example_queries`
    layers: dict[str, float]  # adapted layer -> norm of its change / norm of its weight; {} of the unadapted model


def evaluate(clip: Clip, pairs: Pairs) -> Evaluation:
    """Measure retrieval over the whole pool of `pairs`, and zero-shot accuracy for each facet of their `split`."""
    images, texts = encode(clip, pairs)
    results = {
        "retrieval": retrieval_report(images, texts, pairs.caption_ids, pairs.image_ids, ks=(1, 5, 10)),
        "zero_shot": zero_shot_report(clip, images, pairs.split.labels),
    }
    layers = {name: (change.norm() / weight.norm()).item() for name, change, weight in layer_changes(clip.model)}
    return Evaluation(results, images, texts, clip.encode_texts([q for q, _ in example_queries(pairs.split)]), layers)


def layer_changes(model: nn.Module) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Yield a short name of each adapted layer, the change of its weight and the weight, both (out, in), in fp32."""
    for name, layer in lora_layers(model).items():
        yield re.sub(r"_model\.encoder\.layers|self_attn\.", "", name), layer.delta_weight(), layer.base.weight.float()


def example_queries(split: Split, count: int = 4) -> list[tuple[str, dict[str, str]]]:
    """Choose texts to search the images of `split` for, each with the labels of a correct result.

    These are the most frequent pairs of modality and anatomy, one of each modality before the second of any. Without
    such labels, they are captions of the split, and the dictionaries are empty.
    """
    facets = [split.labels.get(name) for name in ("modality", "anatomy")]
    counts = Counter((m, a) for m, a in zip(*facets, strict=True) if m and a) if all(facets) else Counter()
    if not counts:
        return [(caption, {}) for caption in list(dict.fromkeys(split.captions))[:count]]
    pairs = [pair for pair, _ in counts.most_common()]
    turns = {pair: sum(pair[0] == modality for modality, _ in pairs[:i]) for i, pair in enumerate(pairs)}
    chosen = sorted(pairs, key=turns.__getitem__)[:count]
    return [(f"{m} of the {a}", {"modality": m, "anatomy": a}) for m, a in chosen]


def environment() -> dict[str, str]:
    """Return hardware and versions, which are stored beside every measurement."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    cpuinfo = Path("/proc/cpuinfo")  # Linux only; platform.processor() returns just the architecture there
    processor = re.search(r"model name\s*: (.+)", cpuinfo.read_text()) if cpuinfo.is_file() else None
    return {
        "device": device,
        "processor": processor[1] if processor else platform.machine(),
        "cores": str(os.cpu_count()),
        **{name: version(name) for name in ("torch", "transformers", "numpy")},
        "python": platform.python_version(),
    }


def result_rows(before: dict[str, Any], after: dict[str, Any]) -> list[Row]:
    """Make a row of every retrieval metric and every zero-shot accuracy of two evaluations' results."""
    rows: list[Row] = []
    for way, arrow in WAYS.items():
        reports = {"unadapted": before["retrieval"][way], "adapted": after["retrieval"][way]}
        rows += metric_rows(arrow, reports, reports["adapted"]["pool"])
    for facet, report in after["zero_shot"].items():
        reports = {"unadapted": before["zero_shot"][facet], "adapted": report}
        if "labels" in report:  # several labels of an image
            rows += metric_rows(f"zero-shot {facet}, mean of {len(report['classes'])} labels", reports, report["n"])
            continue
        accuracies = {model: report["accuracy"] for model, report in reports.items()}
        rows.append(Row(f"zero-shot {facet}, {len(report['classes'])} classes", accuracies, report["n"]))
    return rows


def write_report(
    folder: Path, facts: dict[str, Any], before: Evaluation, after: Evaluation, split: Split, records: Sequence[Any]
) -> None:
    """Write report.json with all results, report.md and figures/.

    facts: section -> {name: value}, stored beside the results; records: the objects of metrics.jsonl, one per step
    """
    from clip_medical.evaluation import plots  # matplotlib takes a second to import, and only a report needs it

    figures, results = folder / "figures", {"unadapted": before.results, "adapted": after.results}
    rows = result_rows(before.results, after.results)
    zero_shot = [row for row in rows if row.name.startswith("zero-shot")]
    plots.training_curves(records, facts["training"]["chance level"], figures / "training.png")
    plots.share_bars([row for row in rows if row not in zero_shot], "%, with 95 % interval", figures / "recall.png")
    if zero_shot:
        plots.share_bars(zero_shot, "%, with 95 % interval", figures / "zero_shot.png")
    features, unknown = [(e.images, e.texts) for e in (before, after)], [""] * len(split)
    plots.feature_space(features, split.labels.get("modality", unknown), figures / "features.png")
    plots.layer_bars(after.layers, figures / "layers.png")
    queries = example_queries(split)
    hits: dict[str, list[list[plots.Hit]]] = {model: [] for model in results}  # model -> the best 4 of each query
    for model, evaluation in zip(results, (before, after), strict=True):
        for query, (_, expected) in zip(evaluation.queries, queries, strict=True):
            hits[model].append([])
            for row in (evaluation.images @ query).topk(min(4, len(split))).indices.tolist():
                labels = {facet: split.labels[facet][row] for facet in expected}
                text = "\n".join(labels.values()) or textwrap.shorten(split.captions[row], 24)
                hits[model][-1].append((split.open_image(row), text, labels == expected if expected else None))
    plots.search_grid([text for text, _ in queries], hits, len(split), figures / "search.png")

    write_text(folder / "report.json", json.dumps(facts | results, indent=2) + "\n")
    sections = ["# Before and after adaptation", as_markdown(comparison(rows)), FOOTNOTE]
    headings = {"training": "Training", "recall": "Retrieval", "zero_shot": "Zero-shot classification"}
    headings |= {"search": "Text search", "features": "Image and text features", "layers": "Change of each layer"}
    for name, heading in headings.items():
        if (figures / f"{name}.png").is_file():
            sections += [f"## {heading}", f"![{heading}](figures/{name}.png)"]
    for section, values in facts.items():
        sections += [f"## {section.capitalize()}", "\n".join(f"- {name}: {value}" for name, value in values.items())]
    write_text(folder / "report.md", "\n\n".join(sections) + "\n")
