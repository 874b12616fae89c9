"""The CLIP encoder: transformers' forward pass, with the LoRALinear layers that `inject` put into it.

The ReferenceEncoder below is the definition. `clip_medical/fast` computes the same features sooner and is optional:
`choose_encoder` takes it only after it has matched the reference on the model at hand. Delete that folder and
everything still works.
"""

from typing import NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import CLIPModel

from clip_medical.errors import UserError


class Encoder(Protocol):
    """What an encoder provides. Both methods return projected features (N, D), not yet normalised, with gradients."""

    name: str

    def image(self, model: CLIPModel, pixel_values: Tensor) -> Tensor:
        """Encode normalised pixels (N, 3, S, S)."""

    def text(self, model: CLIPModel, ids: Tensor, lengths: Tensor) -> Tensor:
        """Encode token ids (N, L), padded on the right, of `lengths` (N,) tokens each."""


class ReferenceEncoder:
    """CLIP as published: every token of every padded sequence, through transformers' own forward."""

    name = "reference"

    def image(self, model: CLIPModel, pixel_values: Tensor) -> Tensor:
        pooled = model.vision_model(pixel_values=pixel_values).pooler_output
        features: Tensor = model.visual_projection(pooled)
        return features

    def text(self, model: CLIPModel, ids: Tensor, lengths: Tensor) -> Tensor:
        device = model.logit_scale.device
        ids, lengths = ids[:, : int(lengths.max())].to(device), lengths.to(device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        pooled = model.text_model(input_ids=ids, attention_mask=mask.long()).pooler_output
        features: Tensor = model.text_projection(pooled)
        return features


class Sample(NamedTuple):
    """A few inputs on which encoders are compared."""

    pixel_values: Tensor  # (n, 3, S, S), normalised, on the model's device
    ids: Tensor  # (m, L)
    lengths: Tensor  # (m,)


class Choice(NamedTuple):
    """An encoder and the reason for it, a phrase for the log."""

    encoder: Encoder
    reason: str


def choose_encoder(model: CLIPModel, requested: str, sample: Sample) -> Choice:
    """Choose the fast encoder where it matches the reference on `sample`, else the reference.

    requested: "auto", "reference", or "fast", which raises UserError where auto would take the reference.
    """
    reference = ReferenceEncoder()
    if requested == "reference":
        return Choice(reference, "as requested")
    try:
        from clip_medical.fast.check import verify  # optional, hence not at the top
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("clip_medical.fast"):
            raise
        fast, reason = None, "clip_medical/fast is not installed"
    else:
        fast, reason = verify(model, reference, sample)
    if fast is None and requested == "fast":
        raise UserError(f"--encoder fast is not possible: {reason}. Use --encoder auto or reference.")
    return Choice(fast or reference, reason)
