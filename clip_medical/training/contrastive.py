"""The gradient of one contrastive batch, exact, in the memory of one chunk of it.

Each pair of a batch is a negative for every other, so the loss of 4,096 pairs is not the mean of the losses of 16 times
256: plain gradient accumulation makes a batch cheaper by making it another, easier one. Gao et al. (2021, GradCache,
arXiv 2101.06983) give the large batch its exact gradient in two passes:

    1. encode chunk after chunk without keeping activations; the features of the whole batch are small
    2. loss on all features at once -> dL/d(feature) for each of them
    3. encode chunk after chunk again, now with a graph, and send each chunk's dL/d(feature) back through it

The second encoding must repeat the first to the bit, dropout masks included, so the random state of each chunk is kept
and put back. The price is one more forward pass; what it buys is that memory no longer depends on the batch.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from clip_medical.data.batches import Pairs
from clip_medical.model import Clip
from clip_medical.training.losses import info_nce, same_rows

Encode = Callable[[], Tensor]  # encodes one chunk, (n, D)


def contrastive_backward(
    clip: Clip, pairs: Pairs, rows: Tensor, chunk_size: int, scale: Callable[[Tensor], Tensor] = lambda loss: loss
) -> Tensor:
    """Add the gradient of the InfoNCE of the pairs `rows` (N,) to the parameters; returns the loss, detached.

    Pairs with the same caption or the same picture are right for each other. chunk_size: pairs encoded at a time; N or
    more is the plain step. scale: multiplies the loss before the backward pass (GradScaler.scale under fp16).
    """
    # Captions are encoded in order of length and padded to the longest of their own chunk. The loss does not know: it
    # sees the features in the order of the batch. Radiology captions fill less than half of their 77 tokens on average.
    by_length = pairs.lengths[rows].argsort(stable=True)
    images: list[Encode] = [_image_chunk(clip, pairs, r) for r in rows.split(chunk_size)]
    text_chunk = min(chunk_size, -(-len(rows) // TEXT_CHUNKS))
    texts: list[Encode] = [_text_chunk(clip, pairs, r) for r in rows[by_length].split(text_chunk)]
    in_order = by_length.argsort()
    positives = same_rows(pairs.caption_ids[rows], pairs.image_ids[rows]).to(clip.device)

    def loss_of(image_features: Sequence[Tensor], text_features: Sequence[Tensor]) -> Tensor:
        sorted_texts = torch.cat(list(text_features))
        return info_nce(torch.cat(list(image_features)), sorted_texts[in_order], clip.model.logit_scale, positives)

    if len(images) == 1:
        loss = loss_of([encode() for encode in images], [encode() for encode in texts])
        scale(loss).backward()
        return loss.detach()

    before, features = [], []
    with torch.no_grad():
        for encode in [*images, *texts]:
            before.append(_random_state(clip.device))
            features.append(encode().requires_grad_(True))
    after = _random_state(clip.device)
    loss = loss_of(features[: len(images)], features[len(images) :])
    scale(loss).backward()
    for encode, state, feature in zip([*images, *texts], before, features, strict=True):
        _restore(state)
        encode().backward(feature.grad)
    _restore(after)
    return loss.detach()


TEXT_CHUNKS = 4  # into how many lengths the captions of a plain step are sorted


def _image_chunk(clip: Clip, pairs: Pairs, rows: Tensor) -> Encode:
    return lambda: clip.image_features(pairs.pixels[rows])


def _text_chunk(clip: Clip, pairs: Pairs, rows: Tensor) -> Encode:
    return lambda: clip.text_features(pairs.tokens[rows], pairs.lengths[rows])


RandomState = tuple[Tensor, tuple[list[int], list[Tensor]] | None]


def _random_state(device: torch.device) -> RandomState:
    """What dropout will draw next: on the CPU, and on the device where that is another."""
    on_device = None if device.type == "cpu" else get_device_states(torch.empty(0, device=device))
    return torch.get_rng_state(), on_device


def _restore(state: RandomState) -> None:
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        set_device_states(*on_device)
