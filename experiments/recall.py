"""Retrieval before and after adaptation: `python -m experiments.recall --run runs/x`.

Recall@K, median rank and MRR over the whole pool of validation pairs, in both directions. Most published tables use
pools of 2,000, which is an easier task than a larger pool: `--limit 2000` draws one.
"""

import sys

from clip_medical.data.batches import Pairs
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.report import WAYS
from clip_medical.evaluation.retrieval import retrieval_report
from clip_medical.model import Clip
from experiments.common import Experiment, Reports, main


class Recall(Experiment):
    """Retrieval among the validation pairs, in both directions, before and after adaptation."""

    name = "recall"

    def measure(self, clip: Clip, pairs: Pairs) -> Reports:
        retrieval = retrieval_report(*encode(clip, pairs), pairs.caption_ids, pairs.image_ids)
        return {arrow: retrieval[way] | {"n": retrieval[way]["pool"]} for way, arrow in WAYS.items()}


if __name__ == "__main__":
    sys.exit(main(Recall))
