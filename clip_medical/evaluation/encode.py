"""Features of whole splits, and the one number that training selects its best adapter by."""

import torch
from torch import Tensor

from clip_medical.data.batches import Pairs
from clip_medical.evaluation.retrieval import pair_ranks
from clip_medical.model import Clip


@torch.no_grad()
def encode(clip: Clip, pairs: Pairs, batch_size: int = 64) -> tuple[Tensor, Tensor]:
    """Encode all images and all captions of `pairs`, without dropout.

    Returns (images, texts), each (N, D), fp32, unit length, on the CPU.
    """
    training = clip.model.training
    clip.model.eval()
    batches = torch.arange(len(pairs)).split(batch_size)
    images = [clip.image_features(pairs.pixels[rows]).cpu() for rows in batches]
    texts = [clip.text_features(pairs.tokens[rows], pairs.lengths[rows]).cpu() for rows in batches]
    clip.model.train(training)
    return torch.cat(images), torch.cat(texts)


def validation_recall(clip: Clip, pairs: Pairs) -> float:
    """Return the mean of Recall@1, @5 and @10 in both directions over the whole pool of `pairs`, from 0 to 1."""
    ranked = pair_ranks(*encode(clip, pairs), pairs.caption_ids, pairs.image_ids).values()
    return sum((way.rank < k).double().mean().item() for way in ranked for k in (1, 5, 10)) / 6
