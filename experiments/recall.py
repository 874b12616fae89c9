"""Retrieval before and after adaptation: `python -m experiments.recall --run runs/x`.

Recall@K, median rank and MRR over the whole pool of validation pairs, in both directions; the same in pools of 2,000,
because most published tables use such pools and a smaller pool is an easier task; and precision by label, where the
data have labels.
"""

import sys
from typing import Any

from clip_medical.data.batches import Pairs
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.report import WAYS
from clip_medical.evaluation.retrieval import label_precision, retrieval_report
from clip_medical.evaluation.table import Row, metric_rows
from clip_medical.model import Clip
from experiments.common import Experiment, Results, main, pick

POOL = 2000  # as in the tables of PMC-CLIP and M3AE, among others


class Recall(Experiment):
    """Retrieval among the validation pairs, in both directions, before and after adaptation."""

    name = "recall"

    def measure(self, clip: Clip, pairs: Pairs) -> dict[str, Any]:
        """Return {"whole", "sampled" (None if there are too few pairs), "precision": label -> direction -> ...}."""
        images, texts = encode(clip, pairs)
        directions = {"image_to_text": (images, texts), "text_to_image": (texts, images)}
        pool = (images, texts, pairs.caption_ids, pairs.image_ids)
        labels = {facet: values for facet, values in pairs.split.labels.items() if facet in ("modality", "anatomy")}
        if len(labels) == 2:
            both = zip(labels["modality"], labels["anatomy"], strict=True)
            labels["modality and anatomy"] = [f"{m} of the {a}" if m and a else "" for m, a in both]
        return {
            "whole": retrieval_report(*pool),
            "sampled": retrieval_report(*pool, size=POOL, seed=self.seed) if len(pairs) > POOL else None,
            "precision": {
                name: {way: label_precision(*pair, values, pairs.image_ids) for way, pair in directions.items()}
                for name, values in labels.items()
            },
        }

    def figure_rows(self, results: Results) -> list[Row]:
        pools = {way: report["pool"] for way, report in results["unadapted"]["whole"].items() if way in WAYS}
        return [row for way in WAYS for row in metric_rows(WAYS[way], pick(results, "whole", way), pools[way])]

    def rows(self, results: Results) -> list[Row]:
        rows, first = self.figure_rows(results), results["unadapted"]
        for way, direction in WAYS.items():
            if first["sampled"]:
                n = f"{POOL:,}, mean of {first['sampled']['draws']}"
                rows += metric_rows(direction, pick(results, "sampled", way), n)
            for label, report in first["precision"].items():
                precisions = pick(results, "precision", label, way)
                rows += metric_rows(f"{direction}, same {label}", precisions, report[way]["n"])
        return rows


if __name__ == "__main__":
    sys.exit(main(Recall))
