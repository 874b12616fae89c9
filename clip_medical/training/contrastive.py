"""The gradient of one contrastive batch, exact, in the memory of one chunk of it, on one process or several.

Each pair of a batch is a negative for every other, so the loss of 4,096 pairs is not the mean of the losses of 16 times
256: plain gradient accumulation makes a batch cheaper by making it another, easier one. Gao et al. (2021, GradCache,
arXiv 2101.06983) give the large batch its exact gradient in two passes:

    1. encode chunk after chunk without keeping activations; the features of the whole batch are small
    2. loss on all features at once -> dL/d(feature) for each of them
    3. encode chunk after chunk again, now with a graph, and send each chunk's dL/d(feature) back through it

The second encoding must repeat the first to the bit, dropout masks included, so the random state of each chunk is kept
and put back; augmentation is drawn by row and epoch and repeats by itself. The price is one more forward pass; what it
buys is that memory hardly depends on the batch. Where one chunk is all, its graph is kept and step 3 needs no
encoding: that is the plain step. Several processes differ in step 2 alone, where each gathers the features of all,
takes the loss of its own rows, and adds up the gradients.
"""

from collections.abc import Callable, Sequence
from functools import partial

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

    Pairs with the same caption or the same picture are right for each other. Where the pairs come with fragments of
    their captions, the gradient is that of the sum of the losses, over captions and, weighted, over fragments, for one
    encoding of the pictures; the loss returned is that of the captions. chunk_size: pairs encoded at a time; N or more
    is the plain step. scale: multiplies the loss before the backward pass (GradScaler.scale under fp16).

    On several processes all call it with the same rows, a multiple of their number, and with gradients empty: each
    encodes its share, and all end with the gradient and the loss of the whole batch.
    """
    own = rows[distributed.share(rows)]
    chunks, readings = own.split(chunk_size), [pairs, *pairs.fragments]
    one_chunk = len(chunks) == 1
    encoders: list[Encode] = [_image_chunk(clip, pairs, r) for r in chunks]
    encoders += [_text_chunk(clip, readings, r) for r in chunks]

    before, features = [], []
    with torch.set_grad_enabled(one_chunk):
        for encode in encoders:
            before.append(random_state(clip.device))
            features.append(encode())
    after = random_state(clip.device)

    images = torch.cat(features[: len(chunks)])
    texts = torch.cat([each.unflatten(0, (len(readings), -1)) for each in features[len(chunks) :]], dim=1)  # (R, N, D)
    to_images, to_texts, losses = torch.zeros_like(images), [], []
    for read, read_texts in zip(readings, texts, strict=True):
        ids = [i[rows].to(clip.device) for i in read.ids]
        weighted = partial(_weighted, scale, read.weight)
        part = _from_loss(images, read_texts, clip.model.logit_scale, ids, weighted)
        losses.append(part[0])
        to_images += part[1]
        to_texts.append(part[2])
    of_chunks = torch.stack(to_texts).split(chunk_size, dim=1)
    gradients = [*to_images.split(chunk_size), *(each.flatten(0, 1) for each in of_chunks)]

    for encode, state, feature, gradient in zip(encoders, before, features, gradients, strict=True):
        if not one_chunk:
            restore(state)
            feature = encode()
        if feature.requires_grad:  # not where only the other tower has an adapter
            feature.backward(gradient)
    restore(after)
    distributed.add_up_gradients(p for p in clip.model.parameters() if p.requires_grad)
    return losses[0]


LOGITS = 2**20  # held at a time, 4 MiB of them: memory does not grow with the square of the batch


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


def _weighted(scale: Scale, weight: float, loss: Tensor) -> Tensor:
    return scale(weight * loss)


def _image_chunk(clip: Clip, pairs: Pairs, rows: Tensor) -> Encode:
    return lambda: clip.image_features(pairs.pictures(rows, clip.device))


def _text_chunk(clip: Clip, readings: Sequence[Pairs], rows: Tensor) -> Encode:
    """Captions and their fragments at once, reading after reading: to the text tower all are captions."""
    tokens, lengths = torch.cat([r.tokens[rows] for r in readings]), torch.cat([r.lengths[rows] for r in readings])
    return lambda: clip.text_features(tokens, lengths)


RandomState = tuple[Tensor, tuple[list[int], list[Tensor]] | None]


def random_state(device: torch.device) -> RandomState:
    """What dropout will draw next: on the CPU, and on the device where that is another."""
    on_device = None if device.type == "cpu" else get_device_states(torch.empty(0, device=device))
    return torch.get_rng_state(), on_device


def restore(state: RandomState) -> None:
    """Put back what `random_state` took."""
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None:
        set_device_states(*on_device)
