"""The training loops that are compared, on the same model, images and captions.

    this project, fast encoder       train.py's loop: pixels decoded once, packed captions, LoRALinear
    this project, reference encoder  the same, through transformers' forward pass
    peft, usual loop                 get_peft_model and the loop of most scripts: CLIPProcessor in the collate function,
                                     which decodes and resizes every image again in every epoch; transformers' loss
    full fine-tuning                 the usual loop, all weights trained

All start from the same weights, those with an adapter from the same A, and meet the same batches in the same order, so
that their losses can be compared step by step. The weights are random: their values do not change the cost of a step.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple, cast

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

from clip_medical.config import Config
from clip_medical.data.batches import Batch, batches, prepare, row_batches
from clip_medical.data.processor import Processor
from clip_medical.data.splits import Split
from clip_medical.model import Clip, load_clip, place
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.optimizer import Optimizer
from experiments.benchmark.inputs import Row
from lora import inject

RANK, ALPHA, LR, MAX_GRAD_NORM = 8, 16, 1e-4, 1.0


class Task(NamedTuple):
    """What every contender is given. An epoch uses as many of the rows as fill whole batches."""

    rows: list[Row]
    batch_size: int
    device: torch.device
    dtype: torch.dtype


class Contender(NamedTuple):
    """A CLIP and a way to train it."""

    epoch: Callable[[], Iterator[Any]]  # load the batches of an epoch, as the second and later epochs do
    step: Callable[[Any], float]  # train on a batch; returns its loss


def vit_b_32() -> Any:
    """Return a CLIPModel with ViT-B/32's geometry and random weights, the same at each call."""
    torch.manual_seed(0)
    config: Any = CLIPConfig()
    # The token at which CLIP reads the text feature. The tokenizer is the tiny CLIP's, because OpenAI's is not in this
    # repository. Its smaller vocabulary only changes which rows of the embedding are looked up.
    config.text_config.eos_token_id = load_clip().processor.tokenizer.eos_token_id
    return CLIPModel(config)


@torch.no_grad()
def draw_a(model: nn.Module) -> None:
    """Draw every A again, layer by layer, so that it is the same in LoRALinear and in peft."""
    generator = torch.Generator().manual_seed(1)
    for name, a in model.named_parameters():
        if "lora_A" in name:
            a.copy_(torch.empty(a.shape).uniform_(-1, 1, generator=generator) / a.shape[1] ** 0.5)


def adapted_clip(device: torch.device, dtype: torch.dtype, encoder: str = "auto") -> Clip:
    """Return a ViT-B/32 with an adapter, as train.py makes it."""
    model = vit_b_32()
    place(model, device, dtype)
    inject(model, rank=RANK, alpha=ALPHA)
    draw_a(model)
    processor = Processor(load_clip().processor.tokenizer, CLIPImageProcessor(), model.config)
    return Clip(model, processor, "ViT-B/32", requested_encoder=encoder)


def ours(task: Task, encoder: str) -> Contender:
    """This project's training loop, with the encoder "fast" or "reference"."""
    clip = adapted_clip(task.device, task.dtype, encoder)
    clip.model.train()
    files, captions = [str(file) for file, _ in task.rows], [caption for _, caption in task.rows]
    split = Split(captions, files, {}, lambda row: Image.open(files[row]), files)
    own = torch.arange(len(files))  # each pair is its own only positive, as in transformers' loss
    pairs = replace(prepare(split, clip.processor, "benchmark"), caption_ids=own, image_ids=own)
    config = Config(batch_size=task.batch_size, fragments=0, lr=LR, warmup=0)
    # So long a schedule that the learning rate stays constant, as in the usual loop.
    optimizer = Optimizer(clip.model, config, steps=10**9, scaled=task.dtype == torch.float16)

    def epoch() -> Iterator[Batch]:
        return islice(batches(pairs, config), len(files) // task.batch_size)

    def step(batch: Batch) -> float:
        loss = contrastive_backward(clip, batch, scale=optimizer.scaler.scale)
        optimizer.step(MAX_GRAD_NORM)
        return loss.item()

    return Contender(epoch, step)


def usual_loop(task: Task, adapter: bool) -> Contender:
    """transformers' CLIP and loss, with a peft adapter or without, under autocast over fp32 weights."""
    model = vit_b_32()
    if adapter:
        from peft import LoraConfig, get_peft_model  # a development dependency

        model = get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"]))
        draw_a(model)
    model.to(task.device).train()
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=LR, fused=True)
    scaler = torch.amp.GradScaler(task.device.type, enabled=task.dtype == torch.float16)
    processor = CLIPProcessor(CLIPImageProcessor(), load_clip().processor.tokenizer)
    count, on_gpu, rows = len(task.rows) // task.batch_size, task.device.type == "cuda", cast(Any, task.rows)
    loader = DataLoader[Any](
        rows, collate_fn=lambda rows: usual_batch(processor, [(Image.open(file), caption) for file, caption in rows]),
        batch_sampler=[places.tolist() for places in islice(row_batches(len(rows), task.batch_size, seed=0), count)],
        # On a CPU the model occupies all cores, and loader processes would slow it down.
        num_workers=min(os.cpu_count() or 1, count) if on_gpu else 0, persistent_workers=on_gpu, pin_memory=on_gpu,
    )  # fmt: skip

    def step(batch: dict[str, Tensor]) -> float:
        on_device = {name: value.to(task.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(task.device.type, task.dtype, enabled=task.dtype != torch.float32):
            loss = model(**on_device, return_loss=True).loss
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(trainable, MAX_GRAD_NORM)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    return Contender(lambda: iter(loader), step)


def usual_batch(processor: CLIPProcessor, pairs: list[tuple[Image.Image, str]]) -> dict[str, Tensor]:
    """Resize and normalise the images, tokenize the captions and pad them to the longest of the batch."""
    images, captions = [image.convert("RGB") for image, _ in pairs], [caption for _, caption in pairs]
    options: dict[str, Any] = dict(padding=True, truncation=True, max_length=77, return_tensors="pt")
    return dict(processor(images=images, text=captions, **options))


PEFT, FULL = "peft, usual loop", "full fine-tuning"
CONTENDERS: dict[str, Callable[[Task], Contender]] = {
    "this project, fast encoder": partial(ours, encoder="fast"),
    "this project, reference encoder": partial(ours, encoder="reference"),
    PEFT: partial(usual_loop, adapter=True),
    FULL: partial(usual_loop, adapter=False),
}
