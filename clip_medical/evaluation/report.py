"""The before/after report of a run: the same measurements on the unadapted and on the adapted model."""

import json
import os
import platform
import textwrap
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from clip_medical.data.batches import Pairs
from clip_medical.data.sources import Split
from clip_medical.evaluation.retrieval import retrieval_report
from clip_medical.evaluation.zero_shot import zero_shot_report
from clip_medical.model import Clip
from clip_medical.runs import write_text


@dataclass(frozen=True)
class Evaluation:
    """What one model makes of the held-out pairs."""

    results: dict[str, Any]  # {"retrieval": ..., "zero_shot": ...} as retrieval_report and zero_shot_report give them
    images: Tensor  # (N, D) unit-length features, on the CPU
    queries: Tensor  # (Q, D) features of the sentences of `example_queries`


def example_queries(split: Split, count: int = 4) -> list[tuple[str, dict[str, str]]]:
    """Sentences to search the pictures of `split` for, each with the labels that a right answer has.

    The most frequent pairs of modality and anatomy, no modality twice before each has had its turn; where there are no
    such labels, captions of the split, whose right answer is not known by label.
    """
    facets = [split.labels.get(name) for name in ("modality", "anatomy")]
    if not all(facets):
        return [(caption, {}) for caption in list(dict.fromkeys(split.captions))[:count]]
    common = Counter((m, a) for m, a in zip(*facets, strict=True) if m and a).most_common()
    turn: Counter[str] = Counter()
    queue = []
    for (modality, anatomy), _ in common:
        queue.append((turn[modality], modality, anatomy))
        turn[modality] += 1
    chosen = sorted(queue, key=lambda entry: entry[0])[:count]
    return [(f"{m} of the {a}", {"modality": m, "anatomy": a}) for _, m, a in chosen]


@torch.no_grad()
def encode(clip: Clip, pairs: Pairs, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Features of all pictures and of all captions, each (N, D) unit length, on the CPU."""
    clip.model.eval()
    rows = torch.arange(len(pairs)).split(batch_size)
    images = torch.cat([clip.image_features(pairs.pixels[r]).cpu() for r in rows])
    texts = torch.cat([clip.text_features(pairs.tokens[r], pairs.lengths[r]).cpu() for r in rows])
    return images, texts


def evaluate(clip: Clip, pairs: Pairs, split: Split, batch_size: int = 64) -> Evaluation:
    """Retrieval over the whole pool of `pairs`, and zero-shot accuracy for each label facet of their `split`.

    Rows with the same caption are right for each other: nothing in the caption could tell them apart.
    """
    images, texts = encode(clip, pairs, batch_size)
    results = {
        "retrieval": retrieval_report(images, texts, pairs.caption_ids, pairs.image_ids, ks=(1, 5, 10)),
        "zero_shot": zero_shot_report(clip, images, split.labels),
    }
    return Evaluation(results, images, clip.encode_texts([query for query, _ in example_queries(split)]))


def environment() -> dict[str, str]:
    """Hardware and versions, to stand beside every figure."""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    packages = {name: version(name) for name in ("torch", "transformers", "numpy")}
    return (
        {"device": device, "processor": _processor(), "cores": str(os.cpu_count())}
        | packages
        | {"python": platform.python_version()}
    )


def _processor() -> str:
    """The name that the processor gives itself, where the system tells (Linux), else its architecture."""
    try:
        told = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        told = ""
    names = [line.partition(":")[2].strip() for line in told.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def percent(row: dict[str, float], key: str = "value") -> str:
    """A share as the tables show it: "18.4 % [15.2, 21.5]"."""
    return f"{100 * row[key]:.1f} % [{100 * row['low']:.1f}, {100 * row['high']:.1f}]"


def table(before: dict[str, Any], after: dict[str, Any]) -> list[list[str]]:
    """Rows of text, heading first: measure, unadapted, adapted, chance, n; values in per cent with 95 % interval."""
    rows = [["", "unadapted", "adapted", "chance", "n"]]

    for way, arrow in (("image_to_text", "image -> text"), ("text_to_image", "text -> image")):
        old, new = before["retrieval"][way], after["retrieval"][way]
        pool = str(new["pool"])
        for key in (k for k in new if k.startswith("recall")):
            name = f"{arrow}, {key.replace('recall', 'Recall')}"
            rows.append([name, percent(old[key]), percent(new[key]), f"{100 * new[key]['chance']:.1f} %", pool])
        medians = [old["median_rank"]["value"], new["median_rank"]["value"], new["median_rank"]["chance"]]
        rows.append([f"{arrow}, median rank", *(f"{median:g}" for median in medians), pool])
    for facet, new in after["zero_shot"].items():
        old = before["zero_shot"][facet]
        name = f"zero-shot {facet}, {len(new['classes'])} classes"
        rows.append(
            [name, percent(old, "accuracy"), percent(new, "accuracy"), f"{100 * new['chance']:.1f} %", str(new["n"])]
        )
    return rows


def as_text(rows: list[list[str]]) -> str:
    """The table for a terminal, in columns."""
    widths = [max(len(row[c]) for row in rows) for c in range(len(rows[0]))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))])
        for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def as_markdown(rows: list[list[str]]) -> str:
    """The table for report.md."""
    head, *body = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([head, "|---" + "|--:" * (len(rows[0]) - 1) + "|", *body])


def write_report(
    folder: Path, facts: dict[str, Any], before: Evaluation, after: Evaluation, split: Split, losses: Sequence[float]
) -> None:
    """report.json with everything in it, report.md to read, and the figures of both.

    facts: what is to stand beside the results, section -> {name: value}; losses: of the steps, in order.
    """
    from clip_medical.evaluation import plots  # matplotlib takes a second to import, and only a report needs it

    figures = {
        "loss": "Loss",
        "recall": "Retrieval",
        "zero_shot": "Zero-shot classification",
        "search": "Search by text",
    }
    plots.loss_curve(losses, facts["training"]["batch size"], folder / "figures" / "loss.png")
    both = {"unadapted": before.results, "adapted": after.results}
    retrieval, zero_shot = ({model: r[part] for model, r in both.items()} for part in ("retrieval", "zero_shot"))
    plots.recall_bars(retrieval, folder / "figures" / "recall.png")
    if after.results["zero_shot"]:
        plots.zero_shot_bars(zero_shot, folder / "figures" / "zero_shot.png")
    queries = example_queries(split)
    found = [{"unadapted": _found(before, q, wanted, split), "adapted": _found(after, q, wanted, split)}
             for q, (_, wanted) in enumerate(queries)]  # fmt: skip
    plots.search_grid([query for query, _ in queries], found, len(split), folder / "figures" / "search.png")

    everything = facts | {"unadapted": before.results, "adapted": after.results}
    write_text(folder / "report.json", json.dumps(everything, indent=2) + "\n")
    lines = ["# Before and after adaptation", "", as_markdown(table(before.results, after.results)), ""]
    lines += [
        "With 95 % bootstrap intervals. Recall is over the whole held-out pool of n pairs: rows with the same caption"
    ]
    lines += ["count as right for each other, ties count against the model. For research: not a medical device.", ""]
    for name, title in figures.items():
        if (folder / "figures" / f"{name}.png").is_file():
            lines += [f"## {title}", "", f"![{title}](figures/{name}.png)", ""]
    for section, values in facts.items():
        lines += [f"## {section.capitalize()}", "", *(f"- {name}: {value}" for name, value in values.items()), ""]
    write_text(folder / "report.md", "\n".join(lines))


def _found(
    evaluation: Evaluation, query: int, wanted: dict[str, str], split: Split, shown: int = 4
) -> list[tuple[Image.Image, str, bool | None]]:
    """The pictures nearest to a query: each with the words under it and whether its labels are the wanted ones."""
    best = (evaluation.images @ evaluation.queries[query]).topk(min(shown, len(split))).indices.tolist()
    result: list[tuple[Image.Image, str, bool | None]] = []
    for row in best:
        if wanted:
            has = {facet: split.labels[facet][row] for facet in wanted}
            result.append((split.open_image(row), "\n".join(has.values()), has == wanted))
        else:
            result.append((split.open_image(row), textwrap.shorten(split.captions[row], 24), None))
    return result
