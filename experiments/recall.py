"""Retrieval before and after adaptation: `python -m experiments.recall --run runs/x`.

Recall@K, median rank and MRR over the whole pool of validation pairs, in both directions; the same in pools of 2,000,
because most published tables use such pools and a smaller pool is an easier task; and precision by label ("CT of the
head"), where the data have labels.
"""

import sys

from clip_medical.data.batches import Pairs
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.report import WAYS
from clip_medical.evaluation.retrieval import label_precision, retrieval_report
from clip_medical.model import Clip
from experiments.common import Experiment, Reports, main

POOL = 2000  # as in the tables of PMC-CLIP and M3AE, among others


class Recall(Experiment):
    """Retrieval among the validation pairs, in both directions, before and after adaptation."""

    name = "recall"

    def measure(self, clip: Clip, pairs: Pairs) -> Reports:
        images, texts = encode(clip, pairs)
        features = {"image_to_text": (images, texts), "text_to_image": (texts, images)}
        pool = (images, texts, pairs.caption_ids, pairs.image_ids)
        retrieval = {"": retrieval_report(*pool)}
        if len(pairs) > POOL:
            sampled = retrieval_report(*pool, size=POOL, seed=self.seed)
            retrieval[f", mean of {sampled['draws']} pools of {POOL:,}"] = sampled
        facets = [pairs.split.labels[facet] for facet in ("modality", "anatomy") if facet in pairs.split.labels]
        labels = [" of the ".join(names) if all(names) else "" for names in zip(*facets, strict=True)]
        reports: Reports = {}
        for way, arrow in WAYS.items():
            reports |= {arrow + pools: report[way] | {"n": report[way]["pool"]} for pools, report in retrieval.items()}
            if any(labels):
                reports[f"{arrow}, same label"] = label_precision(*features[way], labels, pairs.image_ids)
        return reports


if __name__ == "__main__":
    sys.exit(main(Recall))
