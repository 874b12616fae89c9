"""The training loops that experiments/benchmark.py sets against each other, on the same model, pictures and captions.

    ours   this project: LoRA by hand, captions without padding and without fragments, pixels decoded once
    peft   get_peft_model and the usual loop: CLIPProcessor in the collate function, which decodes and resizes each
           picture anew in each epoch and pads each batch to its longest caption; the loss of transformers
    full   the same usual loop, all weights trained

All start from the same weights, ours and peft's from the same A, so that their losses can be compared step by step.
The model has the geometry of ViT-B/32 and random weights: what a step costs does not depend on their values.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from clip_medical.config import Config
from clip_medical.data.batches import Pairs, prepare
from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.data.splits import Split
from clip_medical.model import Clip, load_clip, place
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.optimizer import Learner
from clip_medical.training.memory import keep_freed_memory
from clip_medical.training.logging import timed
from lora import LoRALinear, adapter_parameters, inject

RANK, ALPHA, LR = 8, 16, 1e-4
SIZES = ((657, 442), (512, 512), (600, 480), (800, 640))  # width and height of ROCO pictures
DRAWN = 256  # pictures
Row = tuple[Path, str]  # picture file and caption


def roco_lengths(count: int, seed: int = 0) -> list[int]:
    """Caption lengths in tokens as ROCO's: log-normal, mean 34 and median 28, cut at CLIP's 77."""
    drawn = np.random.default_rng(seed).lognormal(np.log(28), 0.63, count)
    return [int(n) for n in drawn.clip(6, 77)]


def make_rows(folder: Path, count: int, tokenizer: CLIPTokenizer) -> list[Row]:
    """PNG files of ROCO's sizes, phantoms with a little noise, and captions of ROCO's lengths.

    Captions are words in any order: real ones often begin alike, which would spare this project work, and these share
    little but the start token. Of the pictures DRAWN are drawn, the others are further names of theirs: to a decoder
    all are the same work.
    """
    rows, random = [], np.random.default_rng(0)
    words = sorted({word for i in range(DRAWN) for word in phantom(0, "benchmark words", i).caption.split()})
    for i, length in enumerate(roco_lengths(count)):
        file = folder / f"{i}.png"
        if i < DRAWN:
            image = phantom(0, "benchmark", i).image.resize(SIZES[i % len(SIZES)], Image.Resampling.BICUBIC)
            pixels = np.asarray(image, dtype=np.float32)
            noisy = (pixels + random.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(noisy).save(file)
        else:
            os.link(folder / f"{i % DRAWN}.png", file)
        ids = tokenizer(" ".join(random.choice(words, 77)), truncation=True, max_length=length)["input_ids"]
        rows.append((file, str(tokenizer.decode(ids, skip_special_tokens=True))))
    return rows


def made_pairs(clip: Clip, count: int, seed: int) -> Pairs:
    """Random captions of ROCO's lengths. One picture stands for all, and is copied for those that are asked for."""
    draw, number = torch.Generator().manual_seed(seed), torch.arange(count)
    config: Any = clip.model.config.text_config
    lengths = torch.tensor(roco_lengths(count, seed)).clamp(max=clip.context_length)
    tokens = torch.randint(0, config.eos_token_id, (count, clip.context_length), generator=draw)
    tokens[number, lengths - 1] = config.eos_token_id
    picture = torch.randint(0, 256, (1, 3, clip.image_size, clip.image_size), dtype=torch.uint8, generator=draw)
    return Pairs(picture.expand(count, -1, -1, -1), tokens, lengths, number, number)


def vit_b_32(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Random weights, the same at each call. The tokenizer is that of the tiny CLIP: OpenAI's is not in this
    repository, and all that a vocabulary changes is which row of the embedding is looked up."""
    torch.manual_seed(0)
    config: Any = CLIPConfig()
    config.text_config.eos_token_id = tokenizer.eos_token_id  # where the text tower reads its answer
    return CLIPModel(config)


def batches(count: int, size: int) -> Iterator[Tensor]:
    return iter(torch.arange(count).split(size))


class Ours:
    name = "this project"

    def __init__(self, rows: Sequence[Row], batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        keep_freed_memory(device)  # as train.py does; where they share a process, the others gain by it as well
        tokenizer, picture = load_clip().tokenizer, CLIPImageProcessor()
        model: Any = vit_b_32(tokenizer)
        place(model, device, dtype)
        self.clip = Clip(model, tokenizer, picture, "ViT-B/32")
        torch.manual_seed(1)
        inject(model, rank=RANK, alpha=ALPHA)
        model.train()
        files, names = [file for file, _ in rows], [str(file) for file, _ in rows]
        split = Split([caption for _, caption in rows], names, {}, lambda row: Image.open(files[row]), names)
        each = torch.arange(len(rows))  # a pair of its own, as in the rivals' loss
        pairs = replace(prepare(split, self.clip, "benchmark"), caption_ids=each, image_ids=each)
        self.pairs, self.pixels = timed(pairs)
        self.batch_size = batch_size
        self.chunk_size = batch_size
        config, steps = Config(lr=LR, warmup=0), 10**9  # so long a schedule that the rate stays as it is, like theirs
        learned, scaled = adapter_parameters(model), dtype == torch.float16
        self.learner = Learner(learned, model.logit_scale, config, steps, scaled)

    def step(self, rows: Tensor) -> float:
        loss = contrastive_backward(self.clip, self.pairs, rows, self.chunk_size, self.learner.scaler.scale)
        self.learner.step(clip_norm=1.0)
        return loss.item()

    def prepared(self) -> list[Tensor]:
        return list(batches(len(self.pairs), self.batch_size))

    def epoch(self) -> Iterator[Tensor]:
        """Batches as training meets them after the first epoch: from the cache, each read during the one before."""
        ready = self.prepared()
        for rows, following in zip(ready, [*ready[1:], ready[0]], strict=True):
            self.pixels.announce(following)
            yield rows


class UsualLoop:
    """transformers' model and loss, CLIPProcessor in the collate function, autocast over fp32 weights."""

    name = "full fine-tuning"

    def __init__(self, rows: Sequence[Row], batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        tokenizer = load_clip().tokenizer
        self.processor = CLIPProcessor(CLIPImageProcessor(), tokenizer)
        self.device, self.dtype = device, dtype
        # On a CPU the model itself takes all cores, and workers beside it would slow it down. On a GPU `prepared`
        # starts them, outside all that is timed.
        on_gpu = device.type == "cuda"
        workers = min(os.cpu_count() or 1, -(-len(rows) // batch_size)) if on_gpu else 0
        data: Any = rows
        self.loader = DataLoader(data, batch_size, collate_fn=self.collate, num_workers=workers, pin_memory=on_gpu,
                                 persistent_workers=on_gpu)  # fmt: skip
        self.model: nn.Module = self.adapt(vit_b_32(tokenizer)).to(device).train()
        self.learned = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learned, lr=LR, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def adapt(self, model: CLIPModel) -> nn.Module:
        return model

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        images = [Image.open(file).convert("RGB") for file, _ in rows]
        texts = [caption for _, caption in rows]
        options = dict(padding=True, truncation=True, max_length=77)
        return dict(self.processor(images=images, text=texts, return_tensors="pt", **options))

    def step(self, batch: dict[str, Tensor]) -> float:
        on_device = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(**on_device, return_loss=True).loss
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.learned, 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())

    def prepared(self) -> list[dict[str, Tensor]]:
        """All batches, ready in memory: what the training step alone is measured on."""
        return list(self.epoch())

    def epoch(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.loader)


class Peft(UsualLoop):
    name = "peft, usual loop"

    def adapt(self, model: CLIPModel) -> nn.Module:
        from peft import LoraConfig, get_peft_model

        return get_peft_model(model, LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"]))

    def start_from(self, ours: Ours) -> None:
        """The A that ours began with, so that both walk the same way."""
        mine = {name: layer for name, layer in ours.clip.model.named_modules() if isinstance(layer, LoRALinear)}
        with torch.no_grad():
            wrapped: Any = self.model.base_model
            for name, layer in wrapped.model.named_modules():
                if name in mine:
                    layer.lora_A["default"].weight.copy_(mine[name].lora_A)


CONTENDERS: dict[str, type[Ours] | type[UsualLoop]] = {"ours": Ours, "peft": Peft, "full": UsualLoop}
