"""A CLIP model with its processor: images and texts -> unit-length fp32 features."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging as transformers_logging

from clip_medical.data.images import decode
from clip_medical.data.processor import Processor
from clip_medical.encoder import Choice, Encoder, Sample, choose_encoder
from clip_medical.errors import UserError

NONE = "none of these"
CAPTIONS = "captions"  # the calibration for labels in the user's own words
AnImage = Image.Image | str | Path
TINY = Path(__file__).parent / "assets" / "tiny-clip"


@dataclass(eq=False, repr=False)
class Clip:
    """CLIPModel and its processor.

    image_features and text_features take tensors and carry gradients: training uses them. encode_images and
    encode_texts take images and texts, work in batches and carry none. All four return (N, D) fp32 rows of unit length,
    so that the dot product of two rows is their cosine similarity.

    fingerprint, revision   SHA-256 of the base weights, and their commit where they come from the Hub
    requested_encoder       "auto", "reference" or "fast", see encoder.py
    """

    model: Any  # a CLIPModel, whose own types hide its parts
    processor: Processor
    name: str
    fingerprint: str = ""
    revision: str | None = None
    requested_encoder: str = "auto"
    calibration: dict[str, dict[str, Any]] = field(default_factory=dict)  # by facet, see evaluation/calibration.py
    _choice: Choice | None = field(default=None, init=False)
    _chosen_for: list[Any] = field(default_factory=list, init=False)

    def __post_init__(self) -> None:
        self.model.eval()

    @property
    def device(self) -> torch.device:
        device: torch.device = self.model.logit_scale.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the frozen weights; model.dtype is that of logit_scale, the first parameter, always fp32."""
        dtype: torch.dtype = self.model.vision_model.embeddings.class_embedding.dtype
        return dtype

    def scale(self, facet: str) -> float:
        """Factor of the cosines in a softmax over classes: 1 / temperature, calibrated for the facet if possible."""
        fitted: float | None = self.calibration.get(facet, {}).get("scale")
        return fitted or self.model.logit_scale.detach().float().exp().item()

    def set_checkpointing(self, on: bool) -> None:
        """In training, compute the activations of each layer twice instead of keeping them."""
        for module in self.model.modules():
            if isinstance(module, GradientCheckpointingLayer):  # set here, as transformers' method adds a hook as well
                layer: Any = module
                layer.gradient_checkpointing = on
                # The reentrant kind would lose all gradients, as the input of the first layer needs none.
                layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False)

    @property
    def encoder(self) -> Encoder:
        """The encoder in use. It is chosen at the first call, and again when a layer or a hook of the model changed."""
        return self.encoder_choice().encoder

    def encoder_choice(self) -> Choice:
        """The encoder and the reason for it."""
        # what the choice depends on, besides the numbers; the fast encoder itself replaces activation functions
        structure: list[Any] = [self.requested_encoder] + [
            (type(m), len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks),
             len(m._backward_pre_hooks), getattr(m, "dropout", 0), "forward" in vars(m))
            for name, m in self.model.named_modules()
            if not name.endswith("activation_fn")
        ]  # fmt: skip
        if self._choice is not None and structure == self._chosen_for:
            return self._choice
        # noise images and random captions of all lengths, two of them equal; all share a start, some of them more
        generator, p = torch.Generator().manual_seed(0), self.processor
        size, context, end = p.image_size, p.context_length, p.tokenizer.eos_token_id
        words = min(cast(Any, self.model.config).text_config.vocab_size, end)
        ids = torch.randint(0, words, (7, context), generator=generator)
        ids[:, 0], ids[4:, : context // 4] = ids[0, 0], ids[4, : context // 4]
        lengths = torch.linspace(2, context, 7).long()
        ids = ids.where(torch.arange(context) < lengths[:, None] - 1, end)
        noise = torch.randn(2, 3, size, size, generator=generator).to(self.device)
        sample = Sample(noise, torch.cat([ids, ids[3:4]]), torch.cat([lengths, lengths[3:4]]))
        self._choice, self._chosen_for = choose_encoder(self.model, self.requested_encoder, sample), structure
        return self._choice

    def normalised(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> the model's input, in its dtype, computed on the device: bytes travel, not floats."""
        mean, std = (each.to(self.device) for each in (self.processor.mean, self.processor.std))
        if pixels.stride(1) == 0:  # grey: one channel travels, and becomes three by subtracting the mean of each
            pixels = pixels[:, :1]
        return ((pixels.to(self.device, non_blocking=True).float() - mean) / std).to(self.dtype)

    def image_features(self, pixels: Tensor) -> Tensor:
        """(N, 3, S, S) uint8 -> (N, D)."""
        # Projected features of our own encoder: what get_image_features returns differs between transformers versions.
        return F.normalize(self.encoder.image(self.model, self.normalised(pixels)).float(), dim=-1)

    def text_features(self, ids: Tensor, lengths: Tensor) -> Tensor:
        """Token ids (N, L), padded on the right, and lengths (N,) -> (N, D)."""
        return F.normalize(self.encoder.text(self.model, ids, lengths).float(), dim=-1)

    @torch.no_grad()
    def encode_images(self, images: AnImage | Sequence[AnImage], batch_size: int = 64) -> Tensor:
        """Encode PIL images of any mode and size, or paths of images; or a single one -> (N, D) on the CPU."""
        images = [images] if isinstance(images, Image.Image | str | Path) else images
        if not len(images):
            raise UserError("encode_images found no image, expected one or more.")
        features = []
        for start in range(0, len(images), batch_size):
            batch = images[start : start + batch_size]
            decoded = [
                decode(image, f"image {i}") if isinstance(image, Image.Image) else decode(Path(image), str(image))
                for i, image in enumerate(batch, start)
            ]
            pixels = np.stack([self.processor.pixels(image) for image in decoded])
            features.append(self.image_features(torch.from_numpy(pixels)).cpu())
        return torch.cat(features)

    @torch.no_grad()
    def encode_texts(self, texts: str | Sequence[str], batch_size: int = 256) -> Tensor:
        """Encode texts -> (N, D) on the CPU; a string is one text."""
        texts = [texts] if isinstance(texts, str) else texts
        if not len(texts):
            raise UserError("encode_texts found no text, expected one or more.")
        ids, lengths = self.processor.tokens(texts)
        parts = zip(ids.split(batch_size), lengths.split(batch_size), strict=True)
        return torch.cat([self.text_features(*part).cpu() for part in parts])

    @torch.no_grad()
    def classify(self, image: AnImage, labels: Sequence[str], or_none: bool = False) -> dict[str, float]:
        """Return label -> probability: the softmax over the labels of scale * cosine similarity.

        Write a label as a caption: "X-ray of the chest" works better than "chest". The probabilities add up to 1 over
        these labels, so one of them is likely even where none fits. or_none adds the label NONE, which is the most
        probable one where no label comes near enough; it needs a run that was calibrated.
        """
        if not labels or isinstance(labels, str) or len(set(labels)) < len(labels):
            raise UserError(f"Found labels {labels!r}, expected a list of distinct texts.")
        cosines = (self.encode_images(image) @ self.encode_texts(labels).T)[0]
        names = list(labels)
        if or_none:
            if CAPTIONS not in self.calibration or NONE in labels:
                found = "that label given" if NONE in labels else "a model that is not calibrated"
                raise UserError(
                    f"Found {found}, expected other labels and a run of train.py, complete and with at least 300 "
                    "training pairs. Leave out or_none."
                )
            names, floor = [*names, NONE], self.calibration[CAPTIONS]["floor"]
            cosines = torch.cat([cosines, torch.tensor([floor])])
        return dict(zip(names, (self.scale(CAPTIONS) * cosines).softmax(dim=0).tolist(), strict=True))

    def search(self, text: str, features: Tensor, k: int = 5) -> list[tuple[int, float]]:
        """Return the k images most similar to `text`, best first, as (row of `features`, cosine similarity).

        features  (N, D), the output of encode_images; encode once, search often
        """
        if not text or features.ndim != 2 or k < 1:
            raise UserError("search expects a text, features (N, D) from encode_images, and k of 1 or more.")
        best = (features @ self.encode_texts([text])[0]).topk(min(k, len(features)))
        return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def place(model: CLIPModel, device: torch.device | str, dtype: torch.dtype) -> None:
    """Move the weights and cast them, except logit_scale: in bf16 a scale of 100 would become 98.9."""
    scale = model.logit_scale.detach().float()
    cast(nn.Module, model).to(device=device, dtype=dtype)  # transformers' own `to` hides its types
    model.logit_scale.data = scale.to(device)


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape and fp32 value of every parameter, as hexadecimal digits.

    In fp32, so that half-precision weights and their exact copies in fp32 have the same fingerprint.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def load_clip(
    name: str = "tiny-clip",
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    revision: str | None = None,
    encoder: str = "auto",
) -> Clip:
    """Load a CLIP in eval mode, its weights in `dtype`, its logit_scale in fp32.

    name      "tiny-clip" (bundled), a folder in Hugging Face's layout, or a name on the Hub such as
              "openai/clip-vit-base-patch32"; all three go through the same from_pretrained
    revision  commit, tag or branch on the Hub; default: its newest commit
    encoder   "auto", "reference" or "fast", see encoder.py

    Raises UserError if it is none of these, cannot be reached, or is not a CLIP.
    """
    source = str(TINY) if name == "tiny-clip" else name
    folder = Path(source)
    if folder.is_dir() and not (folder / "config.json").is_file():
        raise UserError(f"{folder} has no config.json. Give --model a Hugging Face CLIP folder or a name on the Hub.")
    transformers_logging.disable_progress_bar()
    kinds: list[Any] = [CLIPTokenizer, CLIPImageProcessor]
    try:
        config, _ = CLIPConfig.get_config_dict(source, revision=revision or "main")
        if config.get("model_type", "clip") != "clip":  # whose weights would be left out, and drawn at random
            raise ValueError(f"it is a model of type {config['model_type']!r}, expected 'clip'")
        loaded: Any = CLIPModel.from_pretrained(source, revision=revision or "main", output_loading_info=True)
        model, info = loaded
        if missing := sorted(info["missing_keys"]):
            raise ValueError(f"{len(missing)} of its weights are missing, such as {missing[0]}")
        tokenizer, image_processor = (kind.from_pretrained(source, revision=revision or "main") for kind in kinds)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:  # missing, damaged, or of other shapes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise UserError(
            f"Cannot load a CLIP from {name!r}: {reason}. Give a reachable name on the Hugging Face Hub, a local "
            "folder with config.json, model.safetensors and the tokenizer, or tiny-clip."
        ) from error
    fingerprint = weights_fingerprint(model)  # of the weights as published, before they are cast to `dtype`
    place(model, device, dtype)
    processor = Processor(tokenizer, image_processor, model.config)
    return Clip(model, processor, name, fingerprint, getattr(model.config, "_commit_hash", None), encoder)
