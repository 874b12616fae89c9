"""Retrieval before and after adaptation: `python -m experiments.recall --run runs/x`.

Recall@K, median rank and MRR over the whole pool of validation pairs, in both directions; and precision by label ("CT
of the head"), where the data have labels. Most published tables use pools of 2,000, which is an easier task than a
larger pool: `--limit 2000` draws one.
"""

import sys

from clip_medical.data.batches import Pairs
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.report import WAYS
from clip_medical.evaluation.retrieval import label_precision, retrieval_report
from clip_medical.model import Clip
from experiments.common import Experiment, Reports, main


class Recall(Experiment):
    """Retrieval among the validation pairs, in both directions, before and after adaptation."""

    name = "recall"

    def measure(self, clip: Clip, pairs: Pairs) -> Reports:
        images, texts = encode(clip, pairs)
        features = {"image_to_text": (images, texts), "text_to_image": (texts, images)}
        retrieval = retrieval_report(images, texts, pairs.caption_ids, pairs.image_ids)
        facets = [pairs.split.labels[facet] for facet in ("modality", "anatomy") if facet in pairs.split.labels]
        labels = [" of the ".join(names) if all(names) else "" for names in zip(*facets, strict=True)]
        reports: Reports = {}
        for way, arrow in WAYS.items():
            reports[arrow] = retrieval[way] | {"n": retrieval[way]["pool"]}
            if any(labels):
                reports[f"{arrow}, same label"] = label_precision(*features[way], labels, pairs.image_ids)
        return reports


if __name__ == "__main__":
    sys.exit(main(Recall))
