"""Recall on the held-out pairs while the run is under way, and the adapter that had the best of it."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from clip_medical.data.batches import Pairs
from clip_medical.evaluation.retrieval import pair_ranks
from clip_medical.model import Clip


@dataclass
class Best:
    """The weights of the best step so far; step 0 means that none was measured."""

    step: int = 0
    recall: float = -1.0
    weights: list[Tensor] = field(default_factory=list)
    measured: int = 0  # how many steps it is the best of

    def consider(self, step: int, recall: float, weights: list[Tensor]) -> None:
        """Keep `weights` if they beat what there is; of equals the earlier stays, which has been trained less."""
        self.measured += 1
        if recall > self.recall:
            self.step, self.recall, self.weights = step, recall, weights


@torch.no_grad()
def validation_recall(clip: Clip, pairs: Pairs, batch_size: int = 64) -> float:
    """Mean of Recall@1, @5 and @10, both ways, over the whole pool of `pairs`: one number to choose by, 0 to 1."""
    mode = clip.model.training
    clip.model.eval()
    rows = torch.arange(len(pairs)).split(batch_size)
    images = torch.cat([clip.image_features(pairs.pixels[r]).cpu() for r in rows])
    texts = torch.cat([clip.text_features(pairs.tokens[r], pairs.lengths[r]).cpu() for r in rows])
    clip.model.train(mode)
    both = pair_ranks(images, texts, pairs.caption_ids, pairs.image_ids).values()
    return sum((way.rank < k).double().mean().item() for way in both for k in (1, 5, 10)) / 6
