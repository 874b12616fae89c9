"""The variants of the ablation, and how one is trained: LoRA of several ranks and places, a linear map, all weights.

All are trained as by train.py, with the same loss, batches, number of steps and schedule. They differ in the trainable
parameters, and in the learning rate, which is selected for each of them in the same way.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from clip_medical.config import Config
from clip_medical.data.batches import Pairs, batches
from clip_medical.evaluation.encode import encode
from clip_medical.model import Clip
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.loss import info_nce, same_rows
from clip_medical.training.optimizer import Optimizer
from lora import inject

QV, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LINEAR, FULL = "linear map on frozen features", "full fine-tuning"
MAX_RATES = 6  # learning rates tried for one variant


class Variant(NamedTuple):
    """One row of the ablation: what is trained, and with which learning rates to begin."""

    name: str
    rates: tuple[float, ...]
    adapter: dict[str, Any] | None = None  # arguments of `inject`; else
    weights: str = ""  # a regular expression that the names of the trained weights match


class Bench(NamedTuple):
    """What all variants have in common."""

    config: Config  # `steps` is set
    base: Callable[[], Clip]  # loads the unadapted model
    train: Pairs
    validation: Pairs
    shapes: Pairs  # coloured shapes, to measure forgetting


def reference(config: Config) -> str:
    """Return the name of the variant that the others are compared with: LoRA with the rank of the run."""
    return f"LoRA r = {config.rank}, q and v"


def variants(config: Config, ranks: tuple[int, ...]) -> list[Variant]:
    """Return all variants, with LoRA on q and v in each of `ranks` and in the rank of the run."""

    def lora(place: str, rank: int, targets: tuple[str, ...] = QV, within: str | None = None) -> Variant:
        adapter = dict(targets=targets, rank=rank, within=within, dropout=config.dropout, rslora=config.rslora)
        adapter["alpha"] = config.alpha * rank / config.rank  # the same scaling alpha / r for all ranks
        return Variant(f"LoRA r = {rank}, {place}", (config.lr / 3, config.lr, 3 * config.lr), adapter)

    return [
        *(lora("q and v", rank) for rank in sorted({config.rank, *ranks})),
        lora("all projections", config.rank, ALL),
        *(lora(f"{tower} tower only", config.rank, within=f"{tower}_model") for tower in ("vision", "text")),
        Variant(LINEAR, (3e-3, 1e-2, 3e-2), weights="visual_projection|text_projection"),
        Variant(FULL, (1e-4, 3e-4, 1e-3), weights="(?!logit_scale)"),  # no variant trains the temperature
    ]


def make_trainable(model: nn.Module, variant: Variant) -> None:
    """Freeze an unadapted model except for what the variant trains."""
    if variant.adapter:
        inject(model, **variant.adapter)
    else:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(re.match(variant.weights, name) is not None)


def fit(bench: Bench, variant: Variant, lr: float, rows: Tensor) -> Clip:
    """Train the unadapted model on `rows` of the training pairs, as train.py does."""
    torch.manual_seed(bench.config.seed)
    clip = bench.base()
    config = replace(bench.config, lr=lr)
    make_trainable(clip.model, variant)
    steps = config.steps or 0
    optimizer = Optimizer(clip.model, config, steps)
    clip.model.train()
    first = islice(batches(bench.train, config, rows=rows), steps)
    for batch in tqdm(first, total=steps, desc=f"{variant.name}, lr {lr:g}", unit="step", leave=False):
        loss = contrastive_backward(clip, batch, info_nce, config.batch_size)
        if not loss.isfinite():
            break  # the learning rate is too high, and the loss measured next shows it
        optimizer.step(config.max_grad_norm)
    clip.model.eval()
    return clip


def choose_lr(bench: Bench, variant: Variant) -> dict[str, Any]:
    """Train with several learning rates on nine tenths of the training pairs, and choose by the loss on the last tenth.

    While the best rate is the lowest or the highest, the next one beyond it is tried too, a third or three times as
    high. Returns {"lr": the best rate, "at the edge": whether it is the lowest or the highest of all, "losses": rate ->
    loss, by ascending rate}.
    """
    order = torch.randperm(len(bench.train), generator=torch.Generator().manual_seed(bench.config.seed))
    held_back, train = order.tensor_split([len(order) // 10])
    losses: dict[float, float] = {}
    untried = list(variant.rates)
    while untried:
        for lr in untried:
            loss = loss_on(bench.train, held_back, fit(bench, variant, lr, train))
            losses[lr] = math.inf if math.isnan(loss) else loss
        best = min(losses, key=lambda lr: (losses[lr], lr))
        beyond = {min(losses): best / 3, max(losses): 3 * best}
        untried = [beyond[best]] if best in beyond and len(losses) < MAX_RATES else []
    return {"lr": best, "at the edge": best in beyond, "losses": {f"{lr:.2g}": losses[lr] for lr in sorted(losses)}}


def loss_on(pairs: Pairs, rows: Tensor, clip: Clip) -> float:
    """Return the InfoNCE loss of `rows` of the pairs as one batch."""
    columns: tuple[Any, ...] = (pairs.pixels, pairs.tokens, pairs.lengths, pairs.caption_ids, pairs.image_ids)
    batch = Pairs(*(column[rows] for column in columns))
    positives = same_rows(batch.caption_ids, batch.image_ids)
    return info_nce(*encode(clip, batch), clip.model.logit_scale.detach().cpu(), positives).item()
