"""A small CLIP with adapters, random pairs, and the definition of a contrastive gradient, for the tests of training."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from clip_medical.config import Config
from clip_medical.data.batches import Batch, Epoch, Pairs
from clip_medical.data.processor import Processor
from clip_medical.data.splits import Split
from clip_medical.model import Clip, place
from clip_medical.training.loss import Loss, info_nce, same_rows
from clip_medical.training.trainer import Trainer
from lora import LoRALinear, adapter_parameters, inject

N = 22  # pairs
END = 49  # id of the end token


def small_clip(
    dropout: float = 0.0,
    attention_dropout: float = 0.0,
    encoder: str = "auto",
    layer: type[LoRALinear] = LoRALinear,
    dtype: torch.dtype = torch.float32,
) -> Clip:
    """A CLIP of two layers a tower, 16 features, adapters with random A and B, trainable logit_scale, in train mode."""
    torch.manual_seed(0)
    tower: dict[str, Any] = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, projection_dim=16,
        attention_dropout=attention_dropout,
    )  # fmt: skip
    text = tower | dict(vocab_size=50, max_position_embeddings=20, eos_token_id=END, bos_token_id=48, pad_token_id=END)
    config = CLIPConfig(text_config=text, vision_config=tower | dict(image_size=16, patch_size=8), projection_dim=16)
    tokenizer: Any = SimpleNamespace(eos_token_id=END)
    image_processor: Any = SimpleNamespace(image_mean=[0.5] * 3, image_std=[0.5] * 3)
    processor = Processor(tokenizer, image_processor, config)
    clip = Clip(CLIPModel(config), processor, "small", requested_encoder=encoder)
    place(clip.model, "cpu", dtype)
    inject(clip.model, rank=4, dropout=dropout, layer=layer)
    for parameter in adapter_parameters(clip.model):
        torch.nn.init.normal_(parameter, std=0.1)  # with B = 0, A would have no gradient to compare
    clip.model.logit_scale.requires_grad_(True)
    clip.model.train()
    return clip


def random_pairs(count: int = N) -> Pairs:
    """Pairs of random pixels and tokens. Rows 2 and 7 have the same caption, rows 3 and 15 the same image."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 20, (count,), generator=generator)
    tokens = torch.randint(0, 48, (count, 20), generator=generator)
    pixels = torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens[7], lengths[7], pixels[15] = tokens[2], lengths[2], pixels[3]
    tokens = tokens.where(torch.arange(20) < lengths[:, None] - 1, END)
    caption_ids, image_ids = torch.arange(count), torch.arange(count)
    caption_ids[7], image_ids[15] = 2, 3
    names = [f"image {row}" for row in range(count)]
    return Pairs(pixels, tokens, lengths, caption_ids, image_ids, Split(names, names, {}, no_image, names))


def no_image(row: int) -> Any:
    raise AssertionError("training opens no image of the source")


def whole_batch(fragments: int = 0, rank: int = 0, world_size: int = 1) -> Batch:
    """All random pairs as one batch. Captions have the weight 1, fragments 0.3, 0.2, ..."""
    epoch = Epoch(random_pairs(), Config(batch_size=N, fragments=fragments), 0)
    batch = epoch.batch(torch.arange(N), rank, world_size)
    weights = [1.0, 0.3, 0.2, 0.1]
    captions = [replace(each, weight=weight) for each, weight in zip(batch.captions, weights, strict=False)]
    return replace(batch, captions=captions)


def one_graph(clip: Clip, batch: Batch, chunk_size: int = N, loss: Loss = info_nce) -> tuple[Tensor, list[Tensor]]:
    """The definition: all features in one graph, encoded in the same chunks so that dropout draws the same masks.

    Returns the loss of the captions, and the gradients of the weighted sum of all losses.
    """
    chunks, count = torch.arange(len(batch.rows)).split(chunk_size), len(batch.captions)
    images = torch.cat([clip.image_features(batch.pixels[rows]) for rows in chunks])
    chunks_of_texts = []
    for rows in chunks:
        tokens = torch.cat([captions.tokens[rows] for captions in batch.captions])
        lengths = torch.cat([captions.lengths[rows] for captions in batch.captions])
        chunks_of_texts.append(clip.text_features(tokens, lengths).unflatten(0, (count, -1)))
    losses = [
        loss(images, texts, clip.model.logit_scale, same_rows(*captions.ids))
        for captions, texts in zip(batch.captions, torch.cat(chunks_of_texts, dim=1), strict=True)
    ]
    sum(captions.weight * each for captions, each in zip(batch.captions, losses, strict=True)).backward()  # type: ignore[union-attr]
    return losses[0].detach(), take_gradients(clip)


def take_gradients(clip: Clip) -> list[Tensor]:
    """The gradients of A and B of all layers and, last, of logit_scale; the model's own are dropped."""
    parameters = [*adapter_parameters(clip.model), clip.model.logit_scale]
    gradients = [p.grad.clone() for p in parameters if p.grad is not None]
    clip.model.zero_grad(set_to_none=True)
    return gradients


def relative_difference(a: list[Tensor], b: list[Tensor]) -> float:
    """Norm of a - b relative to that of b, over all tensors together."""
    flat_a, flat_b = (torch.cat([each.flatten() for each in tensors]) for tensors in (a, b))
    return float((flat_a - flat_b).norm() / flat_b.norm())


def sigmoid_loss(images: Tensor, texts: Tensor, logit_scale: Tensor, positives: Tensor) -> Tensor:
    """The loss of SigLIP (Zhai et al. 2023, arXiv 2303.15343), as an example of another loss than InfoNCE."""
    logits = logit_scale.exp() * images @ texts.T - 2
    return -F.logsigmoid(torch.where(positives, logits, -logits)).sum() / len(images)


def small_trainer(folder: Path, config: Config, clip: Clip | None = None, loss: Loss = info_nce) -> Trainer:
    """A trainer of the small CLIP on the random pairs, which are its validation pairs too."""
    clip = clip or small_clip(config.dropout, encoder=config.encoder)
    torch.manual_seed(config.seed)
    return Trainer(clip, random_pairs(), random_pairs(), config, folder, loss)
