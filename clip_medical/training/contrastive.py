"""The gradient of one contrastive batch, exact, in the memory of one chunk of it, on one process or several.

Each pair of a batch is a negative for every other, so the loss of 4,096 pairs is not the mean of the losses of 16 times
256: plain gradient accumulation makes a batch cheaper by making it another, easier one. Gao et al. (2021, GradCache,
arXiv 2101.06983) give the large batch its exact gradient in two passes:

    1. encode chunk after chunk without keeping activations; the features of the whole batch are small
    2. loss on all features at once -> dL/d(feature) for each of them
    3. encode chunk after chunk again, now with a graph, and send each chunk's dL/d(feature) back through it

The second encoding must repeat the first to the bit, dropout masks included, so the random state of each chunk is kept
and put back. The price is one more forward pass; what it buys is that memory no longer depends on the batch. Where one
chunk is all, its graph is kept and step 3 needs no encoding: that is the plain step. Several processes differ in step 2
alone, where each gathers the features of all, takes the loss of its own rows, and adds up the gradients.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from clip_medical.data.batches import Pairs
from clip_medical.model import Clip
from clip_medical.training import distributed
from clip_medical.training.losses import same_rows, surprise

Encode = Callable[[], Tensor]  # encodes one chunk, (n, D)
Scale = Callable[[Tensor], Tensor]


def contrastive_backward(
    clip: Clip, pairs: Pairs, rows: Tensor, chunk_size: int, scale: Scale = lambda loss: loss
) -> Tensor:
    """Add the gradient of the InfoNCE of the pairs `rows` (N,) to the parameters; returns the loss, detached.

    Pairs with the same caption or the same picture are right for each other. chunk_size: pairs encoded at a time; N or
    more is the plain step. scale: multiplies the loss before the backward pass (GradScaler.scale under fp16).

    On several processes all call it with the same rows, a multiple of their number, and with gradients empty: each
    encodes its share, and all end with the gradient and the loss of the whole batch.
    """
    own = rows[distributed.share(rows)]
    # Captions are encoded in order of length and padded to the longest of their own chunk. The loss does not know: it
    # sees the features in the order of the batch. Radiology captions fill less than half of their 77 tokens on average.
    by_length = pairs.lengths[own].argsort(stable=True)
    images: list[Encode] = [_image_chunk(clip, pairs, r) for r in own.split(chunk_size)]
    text_chunk = min(chunk_size, -(-len(own) // TEXT_CHUNKS))
    texts: list[Encode] = [_text_chunk(clip, pairs, r) for r in own[by_length].split(text_chunk)]
    one_chunk = len(images) == 1

    before, features = [], []
    with torch.set_grad_enabled(one_chunk):
        for encode in [*images, *texts]:
            before.append(random_state(clip.device))
            features.append(encode())
    after = random_state(clip.device)

    image_features, sorted_texts = torch.cat(features[: len(images)]), torch.cat(features[len(images) :])
    ids = [i[rows].to(clip.device) for i in (pairs.caption_ids, pairs.image_ids)]
    text_features = sorted_texts[by_length.argsort()]
    loss, to_images, to_texts = _from_loss(image_features, text_features, clip.model.logit_scale, ids, scale)
    gradients = [*to_images.split(chunk_size), *to_texts[by_length].split(text_chunk)]

    if one_chunk:
        torch.autograd.backward(features, gradients)
    else:
        for encode, state, gradient in zip([*images, *texts], before, gradients, strict=True):
            restore(state)
            encode().backward(gradient)
        restore(after)
    distributed.add_up_gradients(p for p in clip.model.parameters() if p.requires_grad)
    return loss


LOGITS = 2**22  # held at a time, 16 MiB of them: memory does not grow with the square of the batch


def _from_loss(
    images: Tensor, texts: Tensor, logit_scale: Tensor, ids: Sequence[Tensor], scale: Scale
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss of the batch and its gradient with respect to the features (n, D) of this process.

    ids: caption and picture of all N pairs. logit_scale gets its own gradient here, from the rows of this process.
    """
    all_images, all_texts = (distributed.gather(own).requires_grad_(True) for own in (images, texts))
    total, share = torch.zeros((), device=images.device), distributed.share(all_images)
    block = max(1, LOGITS // len(all_images))
    for start in range(share.start, share.stop, block):
        rows = slice(start, min(start + block, share.stop))
        positives = same_rows(*ids, rows=rows)  # symmetric: the same for images and for texts
        part = surprise(all_images[rows], all_texts, logit_scale, positives)
        part = (part + surprise(all_texts[rows], all_images, logit_scale, positives)) / (2 * len(all_images))
        scale(part).backward()
        total += part.detach()
    to_images, to_texts = all_images.grad, all_texts.grad
    assert to_images is not None and to_texts is not None
    distributed.add_up(total, to_images, to_texts)
    return total, to_images[share], to_texts[share]


TEXT_CHUNKS = 4  # into how many lengths the captions of a plain step are sorted


def _image_chunk(clip: Clip, pairs: Pairs, rows: Tensor) -> Encode:
    return lambda: clip.image_features(pairs.pixels[rows])


def _text_chunk(clip: Clip, pairs: Pairs, rows: Tensor) -> Encode:
    return lambda: clip.text_features(pairs.tokens[rows], pairs.lengths[rows])


RandomState = tuple[Tensor, tuple[list[int], list[Tensor]] | None]


def random_state(device: torch.device) -> RandomState:
    """What dropout will draw next: on the CPU, and on the device where that is another."""
    on_device = None if device.type == "cpu" else get_device_states(torch.empty(0, device=device))
    return torch.get_rng_state(), on_device


def restore(state: RandomState) -> None:
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        set_device_states(*on_device)
