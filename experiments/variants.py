"""What the ablation trains: LoRA of several ranks and places, a linear map on frozen features, full fine-tuning.

All of them go through the same loss, order of pairs, number of steps and schedule; what differs is what may learn, and
the learning rate, which is chosen for each of them in the same way.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clip_medical.config import Config
from clip_medical.data.batches import Pairs, epochs
from clip_medical.model import Clip
from clip_medical.training.contrastive import contrastive_backward
from clip_medical.training.learner import Learner
from clip_medical.training.losses import info_nce, same_rows
from lora import adapter_parameters, inject

QV, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LINEAR, FULL = "linear map on frozen features", "full fine-tuning"


class Variant(NamedTuple):
    """One row of the table."""

    name: str
    make: Callable[[Clip], list[nn.Parameter]]  # makes a fresh model trainable; returns what is to be learned
    rates: tuple[float, ...]  # the learning rates to try first, rising


class Bench(NamedTuple):
    """What every variant is trained and measured with."""

    config: Config
    steps: int
    base: Callable[[], Clip]  # a fresh unadapted model
    train: Pairs
    held_out: Pairs
    labels: dict[str, list[str]]  # of the held-out pairs
    shapes: Pairs


def lora(config: Config, rank: int, targets: tuple[str, ...], within: str | None, clip: Clip) -> list[nn.Parameter]:
    alpha = config.alpha * rank / config.rank
    inject(clip.model, targets, rank, alpha, config.dropout, config.rslora, within)
    return adapter_parameters(clip.model)


def linear(clip: Clip) -> list[nn.Parameter]:
    clip.model.requires_grad_(False)
    return [p.weight.requires_grad_(True) for p in (clip.model.visual_projection, clip.model.text_projection)]


def full(clip: Clip) -> list[nn.Parameter]:
    clip.model.requires_grad_(True)
    clip.model.logit_scale.requires_grad_(False)
    return [p for p in clip.model.parameters() if p.requires_grad]


def reference(config: Config) -> str:
    return f"LoRA r = {config.rank}, q and v"


def variants(config: Config, tried: tuple[int, ...]) -> list[Variant]:
    """All rows that are trained."""
    r, rates = config.rank, (config.lr / 3, config.lr, 3 * config.lr)
    found = [
        Variant(f"LoRA r = {rank}, q and v", partial(lora, config, rank, QV, None), rates)
        for rank in sorted({r, *tried})
    ]
    found.append(Variant(f"LoRA r = {r}, all projections", partial(lora, config, r, ALL, None), rates))
    for tower in ("vision", "text"):
        made = partial(lora, config, r, QV, f"{tower}_model")
        found.append(Variant(f"LoRA r = {r}, {tower} tower only", made, rates))
    return [*found, Variant(LINEAR, linear, (3e-3, 1e-2, 3e-2)), Variant(FULL, full, (1e-4, 3e-4, 1e-3))]


def fit(bench: Bench, variant: Variant, lr: float, rows: Tensor, steps: int) -> Clip:
    """A fresh model, trained on `rows` of the training pairs with the loss, order and schedule of train.py."""
    torch.manual_seed(bench.config.seed)
    clip = bench.base()
    config = replace(bench.config, lr=lr, lora_plus=1.0)  # one rate for all: not every variant has an A and a B
    learner = Learner(variant.make(clip), clip.model.logit_scale, config, steps, scaled=False)
    clip.model.train()
    batches = islice(epochs(bench.train, rows, config, 0), steps)
    for read, batch in tqdm(batches, total=steps, desc=f"{variant.name}, lr {lr:g}", unit="step", leave=False):
        loss = contrastive_backward(clip, read, batch, config.batch_size)
        if not loss.isfinite():
            break  # this learning rate is too high; the loss that is measured next says so
        learner.step(config.clip_norm)
    clip.model.eval()
    return clip


BEYOND = 3  # further rates to try


def choose_lr(bench: Bench, variant: Variant) -> dict[str, Any]:
    """{"lr": the best, "losses": rate -> loss on the tenth of the training pairs that was kept from it}.

    As long as the best is the lowest or the highest so far, one beyond it is tried as well, a third or three times it.
    """
    order = torch.randperm(len(bench.train), generator=torch.Generator().manual_seed(bench.config.seed))
    kept, tenth = order[len(order) // 10 :], order[: len(order) // 10]
    losses: dict[float, float] = {}
    following = list(variant.rates)
    while following:
        for lr in following:
            losses[lr] = kept_back_loss(bench, fit(bench, variant, lr, kept, bench.steps), tenth)
        best = min(losses, key=lambda lr: (math.inf if math.isnan(losses[lr]) else losses[lr], lr))
        beyond = {min(losses): best / 3, max(losses): 3 * best}
        following = [beyond[best]] if best in beyond and len(losses) < len(variant.rates) + BEYOND else []
    return {"lr": best, "losses": {f"{lr:.2g}": losses[lr] for lr in sorted(losses)}}


@torch.no_grad()
def kept_back_loss(bench: Bench, clip: Clip, rows: Tensor) -> float:
    """InfoNCE of these training pairs as one batch."""
    pairs = bench.train
    images = torch.cat([clip.image_features(pairs.pixels[r]) for r in rows.split(64)])
    texts = torch.cat([clip.text_features(pairs.tokens[r], pairs.lengths[r]) for r in rows.split(64)])
    right = same_rows(pairs.caption_ids[rows], pairs.image_ids[rows]).to(images.device)
    return info_nce(images, texts, clip.model.logit_scale, right).item()
