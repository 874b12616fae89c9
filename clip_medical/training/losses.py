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
    logits = torch.as_tensor(logit_scale, device=image_features.device).exp() * image_features @ text_features.T
    if positives is None:
        right = logits.diagonal()
        return (_cross_entropy(logits, right) + _cross_entropy(logits.T, right)) / 2
    if positives.shape != logits.shape:
        raise ValueError(
            f"positives are {tuple(positives.shape)}: they must be {tuple(logits.shape)}, one row an image"
        )
    wrong_hidden = logits.masked_fill(~positives, float("-inf"))
    return (
        _cross_entropy(logits, wrong_hidden.logsumexp(dim=1)) + _cross_entropy(logits.T, wrong_hidden.logsumexp(dim=0))
    ) / 2


def _cross_entropy(logits: Tensor, right: Tensor) -> Tensor:
    """Mean over the rows of -log softmax at the right answer, whose (log-summed) logit is `right`."""
    return (logits.logsumexp(dim=1) - right).mean()


def same_rows(*ids: Tensor) -> Tensor:
    """(N, N) bool: true where two rows agree in any of the id vectors (N,). The positives for `info_nce`."""
    matches = [i[:, None] == i[None, :] for i in ids]
    return torch.stack(matches).any(dim=0)
