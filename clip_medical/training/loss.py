"""The contrastive loss of CLIP, with several positives a row.

Another loss is a function with the signature of `info_nce`; train.py names the one that is used.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Loss = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]  # image_features, text_features, logit_scale, positives

BLOCK = 2**20  # similarities held at a time, 4 MiB: memory does not grow with the square of the batch


def info_nce(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, positives: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3; van den Oord et al. 2018, section 2.3).

    With S = exp(logit_scale) * image_features @ text_features.T and the softmax taken along each row,

        loss of image i = -log( sum of softmax(S)[i, j] over the positives j of i )

    and the loss is the mean over images and, with S transposed, over captions, averaged. Where each image has just its
    own caption this is CLIP's loss to the letter. Two pairs of a batch that carry the same caption or the same image
    are positives of each other: as negatives they would punish the model for being right. The sum stands inside the
    logarithm (MIL-NCE, Miech et al. 2020, section 3.1), so that a perfect model still reaches a loss of 0.

    image_features, text_features  (N, D), unit length, fp32
    logit_scale                    the logarithm of the scale, as CLIP stores it: ln(100) = 4.6 in OpenAI's checkpoints
    positives                      (N, N) bool, [i, j] true where caption j is right for image i; default: the diagonal

    Returns a scalar. Equal similarities give ln N, the chance level. Raises ValueError for other shapes.
    """
    n = len(image_features)
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        raise ValueError(
            f"found image features {tuple(image_features.shape)} and text features {tuple(text_features.shape)}, "
            "expected two matrices of the same shape (N, D)"
        )
    if positives is None:
        positives = torch.eye(n, dtype=torch.bool, device=image_features.device)
    if positives.shape != (n, n):
        raise ValueError(f"found positives {tuple(positives.shape)}, expected {(n, n)}, one row an image")
    scale = torch.as_tensor(logit_scale, device=image_features.device).exp()
    image_to_text = (scale * image_features, text_features, positives)
    text_to_image = (scale * text_features, image_features, positives.T)
    rows = max(1, BLOCK // n)
    if rows >= n:
        return (_nll(*image_to_text) + _nll(*text_to_image)) / (2 * n)
    total = torch.zeros((), device=image_features.device)
    for queries, candidates, matches in (image_to_text, text_to_image):
        for q, p in zip(queries.split(rows), matches.split(rows), strict=True):  # computed again in backward
            total = total + checkpoint(_nll, q, candidates, p, use_reentrant=False)
    return total / (2 * n)


def _nll(queries: Tensor, candidates: Tensor, positives: Tensor) -> Tensor:
    """Sum over the queries of -log softmax(queries @ candidates.T), summed over the positives in the softmax."""
    logits = queries @ candidates.T
    of_positives = logits.masked_fill(~positives, -torch.inf)
    return (logits.logsumexp(dim=1) - of_positives.logsumexp(dim=1)).sum()


def same_rows(*ids: Tensor) -> Tensor:
    """Return the positives (N, N) of N pairs: true where two of them agree in any of the id vectors (N,)."""
    return torch.stack([i[:, None] == i[None, :] for i in ids]).any(dim=0)
