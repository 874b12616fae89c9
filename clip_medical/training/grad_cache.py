"""The exact gradient of one contrastive batch in the memory of one chunk of it, on one process or several.

Each pair of a batch is a negative for every other, so the loss of 4,096 pairs is not the mean of the losses of 16 times
256: plain gradient accumulation makes a batch cheaper by making it another, easier one. Gao et al. (2021, GradCache,
arXiv 2101.06983) give the large batch its exact gradient in two passes:

    1. encode chunk after chunk without keeping activations; the features of the whole batch are small
    2. loss on all features at once -> dL/d(feature) for each of them
    3. encode chunk after chunk again, now with a graph, and backpropagate each chunk's dL/d(feature) through it

The second encoding must repeat the first to the bit, dropout masks included, so the random state of each chunk is kept
and put back. The price is one more forward pass; in return memory hardly depends on the batch. Where one chunk is all,
its graph is kept and step 3 needs no encoding: that is the plain step. Several processes differ in step 2: each gathers
the features of all, computes the same loss, and backpropagates the gradients of its own features.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor
from torch.utils.checkpoint import get_device_states, set_device_states

from clip_medical.data.batches import Batch
from clip_medical.model import Clip
from clip_medical.training import distributed
from clip_medical.training.loss import Loss, info_nce, same_rows

WHOLE = 2**31  # a chunk size that no batch exceeds


def contrastive_backward(
    clip: Clip,
    batch: Batch,
    loss: Loss = info_nce,
    chunk_size: int = WHOLE,
    scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Tensor:
    """Add the gradient of the loss of a batch to the parameters; returns the loss of the captions, detached.

    Where the batch holds fragments, the gradient is that of the weighted sum of the losses over captions and fragments,
    for one encoding of the images. chunk_size: pairs encoded at a time. scale: multiplies the loss before the backward
    pass (GradScaler.scale under fp16).

    On several processes all call it with the same rows, and with gradients empty; all end with the gradient and the
    loss of the whole batch.
    """
    # a function for each chunk of images -> (n, D), then for each chunk of texts -> (readings * n, D), as captions and
    # fragments are one text batch
    images: list[Callable[[], Tensor]] = [partial(clip.image_features, px) for px in batch.pixels.split(chunk_size)]
    tokens = zip(*(captions.tokens.split(chunk_size) for captions in batch.captions), strict=True)
    lengths = zip(*(captions.lengths.split(chunk_size) for captions in batch.captions), strict=True)
    encoders = images + [
        partial(clip.text_features, torch.cat(t), torch.cat(n)) for t, n in zip(tokens, lengths, strict=True)
    ]
    one_chunk = len(encoders) == 2
    states, features = [], []
    with torch.set_grad_enabled(one_chunk):
        for encode in encoders:
            states.append(random_state(clip.device))
            features.append(encode())

    gradients, value = _feature_gradients(clip, batch, loss, scale, features)
    for encode, state, feature, gradient in zip(encoders, states, features, gradients, strict=True):
        if not one_chunk:
            restore(state)
            feature = encode()
        if feature.requires_grad:  # False where only the other tower has an adapter
            feature.backward(gradient)
    if distributed.world_size() > 1:
        # logit_scale has no part in encoding: its gradient is that of the whole batch on every process already
        distributed.sum_gradients(p for p in clip.model.parameters() if p is not clip.model.logit_scale)
    return value


def _feature_gradients(
    clip: Clip, batch: Batch, loss: Loss, scale: Callable[[Tensor], Tensor], features: list[Tensor]
) -> tuple[list[Tensor], Tensor]:
    """dL/d(feature) of each chunk, and the loss of the captions; logit_scale gets its gradient here."""
    half, readings = len(features) // 2, len(batch.captions)
    images = torch.cat(features[:half])
    texts = torch.cat([chunk.unflatten(0, (readings, -1)) for chunk in features[half:]], dim=1)  # (readings, n, D)
    # leaves of a graph of their own, so that the loss is backpropagated to the features and no further
    gather = distributed.gather if distributed.world_size() > 1 else Tensor.detach
    all_images = gather(images).requires_grad_(True)
    all_texts = [gather(each).requires_grad_(True) for each in texts]
    losses = []
    for captions, text_features in zip(batch.captions, all_texts, strict=True):
        positives = same_rows(*(ids.to(clip.device) for ids in captions.ids))
        losses.append(captions.weight * loss(all_images, text_features, clip.model.logit_scale, positives))
    scale(torch.stack(losses).sum()).backward()
    own = slice(distributed.rank() * len(images), (distributed.rank() + 1) * len(images))
    sizes = [len(chunk) for chunk in features[:half]]
    grads = [each.grad[own] for each in (all_images, *all_texts) if each.grad is not None]
    of_texts = torch.stack(grads[1:]).split(sizes, dim=1)
    value = losses[0].detach() / batch.captions[0].weight
    return [*grads[0].split(sizes), *(chunk.flatten(0, 1) for chunk in of_texts)], value


RandomState = tuple[Tensor, tuple[list[int], list[Tensor]] | None]


def random_state(device: torch.device) -> RandomState:
    """The state of the generators that dropout draws from: the CPU's, and the device's where that is another."""
    on_device = None if device.type == "cpu" else get_device_states(torch.empty(0, device=device))
    return torch.get_rng_state(), on_device


def restore(state: RandomState) -> None:
    """Put back what `random_state` returned."""
    on_cpu, on_device = state
    torch.set_rng_state(on_cpu)
    if on_device is not None and torch.cuda.is_available():  # False: a run from a GPU is resumed on a CPU
        set_device_states(*on_device)
