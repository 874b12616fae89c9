"""A CLIP and what turns pictures and sentences into its inputs: images and texts -> unit-length fp32 features."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from clip_medical.data.images import decode, resize_and_crop
from clip_medical.errors import UserError
from clip_medical.provenance import weights_fingerprint
from clip_medical.towers import image_tower, text_tower

TINY = Path(__file__).parent / "assets" / "tiny-clip"


class Clip:
    """CLIPModel, its tokenizer and its picture format, as one thing.

    image_features and text_features take tensors and carry gradients: training uses them. encode_images and
    encode_texts take pictures and sentences, work in batches and carry none. All four return (N, D) fp32 rows of unit
    length, so that a product of two rows is their cosine. classify and search put such products to use.

    fingerprint and revision say which weights these are: a hash of the base, and its commit where it is from the Hub.
    """

    def __init__(
        self,
        model: CLIPModel,
        tokenizer: CLIPTokenizer,
        picture: CLIPImageProcessor,
        name: str,
        fingerprint: str = "",
        revision: str | None = None,
    ) -> None:
        self.model = model.eval()
        self.checkpointing = False  # in training, compute activations twice instead of keeping them
        self.tokenizer = tokenizer
        self.image_processor = picture  # kept for export; the arithmetic below is our own
        self.name = name
        self.fingerprint = fingerprint
        self.revision = revision
        config: Any = model.config
        self.image_size: int = config.vision_config.image_size
        self.context_length: int = config.text_config.max_position_embeddings
        mean_std = (picture.image_mean, picture.image_std)  # of values 0..1; pixels are 0..255
        self.mean, self.std = (torch.tensor(v, device=self.device).view(3, 1, 1) * 255 for v in mean_std)

    @property
    def device(self) -> torch.device:
        return self.model.logit_scale.device

    @property
    def dtype(self) -> torch.dtype:
        """Of the frozen weights. Not model.dtype, which is that of the first parameter: logit_scale, always fp32."""
        return self.model.vision_model.embeddings.class_embedding.dtype

    def picture(self, image: Image.Image) -> np.ndarray:
        """One picture as the model sees it, (3, S, S) uint8: shortest side to S, bicubic, then the centre of that."""
        square = resize_and_crop(image, self.image_size)
        return np.broadcast_to(square.reshape(*square.shape[:2], -1), (*square.shape[:2], 3)).transpose(2, 0, 1)

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Token ids (N, L) and their lengths (N,). Longer ones than the context are cut, keeping the end token."""
        limits: dict[str, Any] = dict(padding=True, truncation=True, max_length=self.context_length)
        encoded = self.tokenizer(list(texts), return_tensors="pt", **limits)
        return encoded["input_ids"], encoded["attention_mask"].sum(dim=1)

    def image_features(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, D). Normalised on the device: a byte a value is all that has to travel there."""
        inputs = (pixels.to(self.device).float() - self.mean) / self.std
        pooled = image_tower(self.model.vision_model, inputs.to(self.dtype), self.checkpointing)
        # our own projection: what get_image_features returns differs between versions of transformers
        return F.normalize(self.model.visual_projection(pooled).float(), dim=-1)

    def text_features(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """(N, L) and (N,) -> (N, D). The padding is left out: CLIP's text is causal, so that what follows the end token
        changes nothing."""
        pooled = text_tower(self.model.text_model, ids, lengths, self.checkpointing)
        return F.normalize(self.model.text_projection(pooled).float(), dim=-1)

    @torch.no_grad()
    def encode_images(self, images: Sequence[Image.Image], batch_size: int = 64) -> Tensor:
        """PIL images of any mode and size -> (N, D) on the CPU."""
        features = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            pixels = np.stack([self.picture(decode(image, f"image {start + i}")) for i, image in enumerate(batch)])
            features.append(self.image_features(torch.from_numpy(pixels)).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def encode_texts(self, texts: Sequence[str], batch_size: int = 256) -> Tensor:
        """Sentences -> (N, D) on the CPU."""
        ids, lengths = self.tokens(texts)
        parts = zip(ids.split(batch_size), lengths.split(batch_size), strict=True)
        return torch.cat([self.text_features(*part).cpu() for part in parts])

    @torch.no_grad()
    def classify(self, image: Image.Image, labels: Sequence[str]) -> dict[str, float]:
        """Label -> probability: the softmax, in fp32 at the model's own temperature, over the cosines to the labels.

        A label is a sentence that the model reads as it stands: "X-ray of the chest" tells it more than "chest". The
        probabilities share out 1 among these labels; that none of them fits is not among the answers.
        """
        if not labels or isinstance(labels, str) or len(set(labels)) < len(labels):
            raise UserError(f"labels are {labels!r}: give a list of sentences, each of them once.")
        cosines = (self.encode_images([image]) @ self.encode_texts(labels).T)[0]
        probabilities = (self.model.logit_scale.detach().float().exp().cpu() * cosines).softmax(dim=0)
        return dict(zip(labels, probabilities.tolist(), strict=True))

    def search(self, text: str, features: Tensor, k: int = 5) -> list[tuple[int, float]]:
        """The k images nearest to `text`, best first, as (row of `features`, cosine).

        features  (N, D) as encode_images gives them: encoded once, searched as often as you like
        """
        if not text or features.ndim != 2 or k < 1:
            raise UserError("search needs a sentence, the (N, D) features of encode_images and a k of 1 or more.")
        best = (features @ self.encode_texts([text])[0]).topk(min(k, len(features)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def place(model: CLIPModel, device: torch.device | str, dtype: torch.dtype) -> None:
    """Move the weights and cast them, all but the temperature: bf16 would make a scale of 100 one of 98.9."""
    scale = model.logit_scale.detach().float()
    cast(torch.nn.Module, model).to(device=device, dtype=dtype)  # transformers' wrapper of `to` hides its types
    model.logit_scale.data = scale.to(device)


def load_clip(
    name: str = "tiny-clip",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
) -> Clip:
    """Load a CLIP in eval mode, its weights in `dtype`, its temperature in fp32.

    name      "tiny-clip" (the one in this repository), a folder in Hugging Face's layout, or a name on the Hub such as
              "openai/clip-vit-base-patch32". All three go through the same from_pretrained.
    revision  commit, tag or branch on the Hub; default: its newest

    Raises UserError if it is none of these, cannot be reached, or is not a CLIP.
    """
    source = str(TINY) if name == "tiny-clip" else name
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(
            f"{folder} holds no config.json: --model needs a Hugging Face CLIP folder or a name on the Hub."
        )
    transformers_logging.disable_progress_bar()
    try:
        kinds: list[Any] = [CLIPModel, CLIPTokenizer, CLIPImageProcessor]
        parts: list[Any] = [kind.from_pretrained(source, revision=revision or "main") for kind in kinds]
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"cannot load a CLIP from {name!r} ({reason}): give a name on the Hugging Face Hub that can be reached, "
            "a local folder with config.json, model.safetensors and the tokenizer, or tiny-clip."
        ) from error
    model, tokenizer, picture = parts
    fingerprint = weights_fingerprint(model)  # of the weights as published, before they are cast to `dtype`
    place(model, device, dtype)
    return Clip(model, tokenizer, picture, name, fingerprint, getattr(model.config, "_commit_hash", None))
