"""Retrieval on held-out pairs, the adapted model beside the unadapted: `python -m experiments.recall --run runs/x`.

Recall@K, median rank and MRR over the whole held-out pool, both ways; the same in pools of 2,000, since most published
tables are made with such pools and a smaller pool is an easier game; and precision by label, where there are labels.
"""

import sys
from typing import Any

from clip_medical.data.batches import Pairs, prepare
from clip_medical.data.sources import Split
from clip_medical.evaluation import plots
from clip_medical.evaluation.report import as_text, encode
from clip_medical.evaluation.retrieval import label_precision, retrieval_report, sampled_pool_report
from clip_medical.model import Clip
from experiments import common
from experiments.common import line

POOL = 2000  # of published tables, such as those of PMC-CLIP and M3AE
WAYS = {"image_to_text": "image -> text", "text_to_image": "text -> image"}
LABELS = (("modality",), ("anatomy",), ("modality", "anatomy"))


class Recall(common.Common):
    """Recall@K over the held-out pool, both ways, before and after adaptation."""


def measure(clip: Clip, pairs: Pairs, split: Split, seed: int) -> dict[str, Any]:
    """Everything about one model: {"whole", "sampled" (None where the pool is too small), "precision"}."""
    images, texts = encode(clip, pairs)
    ids = (pairs.caption_ids, pairs.image_ids)
    sampled = sampled_pool_report(images, texts, *ids, size=POOL, seed=seed) if len(pairs) > POOL else None
    precision: dict[str, Any] = {}
    for facets in LABELS:
        if all(facet in split.labels for facet in facets):
            both = zip(*(split.labels[facet] for facet in facets), strict=True)
            labels = [" of the ".join(names) if all(names) else "" for names in both]
            for way, (queries, candidates) in {
                "image_to_text": (images, texts),
                "text_to_image": (texts, images),
            }.items():
                found = label_precision(queries, candidates, labels, pairs.image_ids)
                precision.setdefault(" and ".join(facets), {})[way] = found
    return {"whole": retrieval_report(images, texts, *ids), "sampled": sampled, "precision": precision}


def table(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of text, heading first; every row says how large its pool was. results: model -> what `measure` gives."""
    rows = [["", *results, "chance", "pool"]]
    last = list(results.values())[-1]
    for part in ("whole", "sampled"):
        if last[part] is None:
            continue
        for way, arrow in WAYS.items():
            pool = (
                f"{last[part]['pool']:,}, mean of {last[part]['draws']} draws"
                if part == "sampled"
                else f"{last[part][way]['pool']:,}"
            )
            found = {model: result[part][way] for model, result in results.items()}
            for key in (k for k in last[part][way] if k.startswith("recall")):
                name = f"{arrow}, {key.replace('recall', 'Recall')}"
                rows.append(line(name, {model: row[key] for model, row in found.items()}, n=pool))
            if part == "whole":
                medians = (f"{row['median_rank']['value']:g}" for row in found.values())
                rows.append([f"{arrow}, median rank", *medians, f"{last[part][way]['median_rank']['chance']}", pool])
                means = ("{value:.3f} [{low:.3f}, {high:.3f}]".format(**row["mrr"]) for row in found.values())
                rows.append([f"{arrow}, MRR", *means, f"{last[part][way]['mrr']['chance']:.3f}", pool])
    for label, ways in last["precision"].items():
        for way, arrow in WAYS.items():
            for key in (k for k in ways[way] if k.startswith("precision")):
                of_models = {model: result["precision"][label][way][key] for model, result in results.items()}
                name = f"{arrow}, same {label}, {key.replace('precision', 'Precision')}"
                rows.append(line(name, of_models, n=ways[way]["n"]))
    return rows


def run(options: Recall) -> int:
    setup = common.load_models("recall", options)
    split = common.load_evidence(setup, options).validation
    pairs = prepare(split, setup.best, "held-out")
    results = {model: measure(clip, pairs, split, options.seed) for model, clip in setup.models.items()}
    print(as_text(table(results)))
    if len(pairs) <= POOL:
        print(f"\nPools of {POOL:,} cannot be drawn from {len(pairs):,} pairs: no row for them.")
    common.save(setup, "recall", results)
    plots.recall_bars({model: result["whole"] for model, result in results.items()}, setup.folder / "recall.png")
    common.said(setup, "recall.json", "recall.png")
    return 0


if __name__ == "__main__":
    sys.exit(common.main("recall", Recall, run))
