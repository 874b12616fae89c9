"""The training loops that are compared, on the same model, images and captions.

    this project, fast encoder       train.py's loop: pixels decoded once, packed captions, LoRALinear
    this project, reference encoder  the same, through transformers' forward pass
    peft, usual loop                 get_peft_model and the loop of most scripts: CLIPProcessor in the collate function,
                                     which decodes and resizes every image again in every epoch; transformers' loss
    full fine-tuning                 the usual loop, all weights trained

All start from the same weights, those with an adapter from the same A, and meet the same batches in the same order, so
that their losses can be compared step by step. The weights are random, because they do not change the cost of a step.
"""

import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

from clip_medical.config import Config
from clip_medical.data.batches import Batch, batches, prepare, row_batches
from clip_medical.data.processor import Processor
from clip_medical.data.splits import Split
from clip_medical.model import Clip, load_clip, place
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.memory import keep_freed_memory
from clip_medical.training.optimizer import Optimizer
from experiments.benchmark.inputs import Row
from lora import inject

RANK, ALPHA, LR, MAX_GRAD_NORM = 8, 16, 1e-4, 1.0


def vit_b_32(tokenizer: CLIPTokenizer) -> CLIPModel:
    """Return a CLIP with ViT-B/32's geometry and random weights, the same at each call.

    tokenizer: of the tiny CLIP, because OpenAI's is not in this repository. Its smaller vocabulary only changes which
    rows of the embedding are looked up.
    """
    torch.manual_seed(0)
    config: Any = CLIPConfig()
    config.text_config.eos_token_id = tokenizer.eos_token_id  # the token at which CLIP reads the text feature
    return CLIPModel(config)


@torch.no_grad()
def draw_a(model: nn.Module) -> None:
    """Draw every A again, layer by layer, so that it is the same in LoRALinear and in peft."""
    generator = torch.Generator().manual_seed(1)
    for name, a in model.named_parameters():
        if "lora_A" in name:
            a.copy_(torch.empty(a.shape).uniform_(-1, 1, generator=generator) / a.shape[1] ** 0.5)


class Contender(ABC):
    """A CLIP and a way to train it. rows: N pairs, of which each epoch uses as many as fill whole batches."""

    def __init__(self, rows: Sequence[Row], batch_size: int, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.tokenizer = load_clip().processor.tokenizer
        self.model: Any = vit_b_32(self.tokenizer)
        self.order = list(islice(row_batches(len(rows), batch_size, seed=0), len(rows) // batch_size))

    @abstractmethod
    def epoch(self) -> Iterator[Any]:
        """Load the batches of an epoch, as the second and later epochs do."""

    @abstractmethod
    def step(self, batch: Any) -> float:
        """Train on a batch; returns its loss."""


class Ours(Contender):
    """This project's training loop, with the encoder "fast" or "reference"."""

    def __init__(
        self, rows: Sequence[Row], batch_size: int, device: torch.device, dtype: torch.dtype, encoder: str
    ) -> None:
        super().__init__(rows, batch_size, device, dtype)
        keep_freed_memory(device)  # as train.py does; in a shared process the other contenders profit as well
        place(self.model, device, dtype)
        inject(self.model, rank=RANK, alpha=ALPHA)
        draw_a(self.model)
        processor = Processor(self.tokenizer, CLIPImageProcessor(), self.model.config)
        self.clip = Clip(self.model, processor, "ViT-B/32", requested_encoder=encoder)
        self.model.train()
        files, captions = [file for file, _ in rows], [caption for _, caption in rows]
        names, alone = [str(file) for file in files], torch.arange(len(rows))
        split = Split(captions, names, {}, lambda row: Image.open(files[row]), names)
        # Each pair is the only positive of itself, as in transformers' loss.
        self.pairs = replace(prepare(split, processor, "benchmark"), caption_ids=alone, image_ids=alone)
        self.config = Config(batch_size=batch_size, fragments=0, lr=LR, warmup=0)
        # So long a schedule that the learning rate stays constant, as in the usual loop.
        self.optimizer = Optimizer(self.model, self.config, steps=10**9, scaled=dtype == torch.float16)

    def epoch(self) -> Iterator[Batch]:
        return islice(batches(self.pairs, self.config), len(self.order))

    def step(self, batch: Batch) -> float:
        loss = contrastive_backward(self.clip, batch, scale=self.optimizer.scaler.scale)
        self.optimizer.step(MAX_GRAD_NORM)
        return loss.item()


class UsualLoop(Contender):
    """transformers' CLIP and loss, with a peft adapter or without, under autocast over fp32 weights."""

    def __init__(
        self, rows: Sequence[Row], batch_size: int, device: torch.device, dtype: torch.dtype, adapter: bool
    ) -> None:
        super().__init__(rows, batch_size, device, dtype)
        if adapter:
            from peft import LoraConfig, get_peft_model  # a development dependency

            lora = LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["q_proj", "v_proj"])
            self.model = get_peft_model(self.model, lora)
            draw_a(self.model)
        self.model.to(device).train()
        self.processor = CLIPProcessor(CLIPImageProcessor(), self.tokenizer)
        # On a CPU the model occupies all cores, and loader processes would slow it down.
        on_gpu, data = device.type == "cuda", list(rows)
        workers = min(os.cpu_count() or 1, len(self.order)) if on_gpu else 0
        self.loader: DataLoader[Any] = DataLoader(
            data, batch_sampler=[batch.tolist() for batch in self.order], collate_fn=self.collate,  # type: ignore[arg-type]
            num_workers=workers, pin_memory=on_gpu, persistent_workers=on_gpu,
        )  # fmt: skip
        self.trainable = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trainable, lr=LR, fused=True)
        self.scaler = torch.amp.GradScaler(device.type, enabled=dtype == torch.float16)

    def collate(self, rows: Sequence[Row]) -> dict[str, Tensor]:
        """Decode and resize the images, tokenize the captions and pad them to the longest of the batch."""
        images, captions = [Image.open(file).convert("RGB") for file, _ in rows], [caption for _, caption in rows]
        options: dict[str, Any] = dict(padding=True, truncation=True, max_length=77, return_tensors="pt")
        return dict(self.processor(images=images, text=captions, **options))

    def epoch(self) -> Iterator[dict[str, Tensor]]:
        return iter(self.loader)

    def step(self, batch: dict[str, Tensor]) -> float:
        on_device = {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            loss = self.model(**on_device, return_loss=True).loss
        self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.trainable, MAX_GRAD_NORM)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        return float(loss.item())


FAST, PEFT, FULL = "this project, fast encoder", "peft, usual loop", "full fine-tuning"
CONTENDERS: dict[str, Callable[..., Contender]] = {
    FAST: partial(Ours, encoder="fast"),
    "this project, reference encoder": partial(Ours, encoder="reference"),
    PEFT: partial(UsualLoop, adapter=True),
    FULL: partial(UsualLoop, adapter=False),
}
