"""The contrastive loss of CLIP, allowing for more than one right answer in a batch."""

import torch
from torch import Tensor


def info_nce(
    image_features: Tensor, text_features: Tensor, logit_scale: Tensor | float, positives: Tensor | None = None
) -> Tensor:
    """Symmetric InfoNCE (Radford et al. 2021, figure 3; van den Oord et al. 2018, section 2.3).

    With S = exp(logit_scale) * image_features @ text_features.T and the softmax taken along each row,

        loss of image i = -log( sum of softmax(S)[i, j] over the captions j that are right for i )

    and the loss is the mean over images and, with S transposed, over captions, averaged. Where each image has just its
    own caption this is CLIP's loss to the letter. Two rows of a batch that carry the same caption or the same picture
    are right for each other: taking them for negatives would punish the model for being right. The sum stands inside
    the logarithm (MIL-NCE, Miech et al. 2020, section 3.1), so that a perfect model still reaches a loss of 0.

    image_features, text_features  (N, D), unit length, fp32
    logit_scale                    the logarithm of the scale, as CLIP stores it: ln(100) = 4.6 in OpenAI's checkpoints
    positives                      (N, N) bool, [i, j] true where caption j is right for image i; default: the diagonal

    Returns a scalar. Equal similarities give ln N: a loss that stays there has learned nothing.
    """
    if image_features.shape != text_features.shape or image_features.ndim != 2:
        raise ValueError(
            f"image features are {tuple(image_features.shape)} and text features {tuple(text_features.shape)}: "
            "info_nce needs two matrices of the same shape (N, D)"
        )
    if positives is None:
        positives = torch.eye(len(image_features), dtype=torch.bool, device=image_features.device)
    if positives.shape != (len(image_features), len(image_features)):
        n = len(image_features)
        raise ValueError(f"positives are {tuple(positives.shape)}: they must be {(n, n)}, one row an image")
    of_images = surprise(image_features, text_features, logit_scale, positives)
    of_texts = surprise(text_features, image_features, logit_scale, positives.T)
    return (of_images + of_texts) / (2 * len(image_features))


def surprise(queries: Tensor, candidates: Tensor, logit_scale: Tensor | float, right: Tensor) -> Tensor:
    """One direction of InfoNCE, summed over the queries (n, D) against all candidates (N, D), right (n, N) bool.

    The loss is a sum over rows, so it can be taken some rows at a time, or some rows on each of several GPUs: memory
    for n x N logits is enough.
    """
    logits = torch.as_tensor(logit_scale, device=queries.device).exp() * queries @ candidates.T
    # -log softmax, with the (log-summed) logit of the right answers
    return (logits.logsumexp(dim=1) - logits.masked_fill(~right, float("-inf")).logsumexp(dim=1)).sum()


def same_rows(*ids: Tensor, rows: slice = slice(None)) -> Tensor:
    """The positives for `info_nce`, (N, N) bool: true where two rows agree in any of the id vectors (N,).

    rows: makes only these rows of it, (n, N).
    """
    matches = [i[rows, None] == i[None, :] for i in ids]
    return torch.stack(matches).any(dim=0)
