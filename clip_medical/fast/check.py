"""Verify at the start of a run that the fast encoder computes what transformers and LoRALinear compute.

Two kinds of reasons lead back to the reference encoder. The model holds something that the fast encoder does not run in
the same way (a hook, a layer of yours, dropout, another architecture); or the numbers differ. Features, loss and
gradients of the adapter are compared on a copy of the model with a random adapter at full strength: B = 0, as at the
start of training, would hide the branch.
"""

import copy
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import CLIPModel

from clip_medical.fast.packed import PackedEncoder
from lora import LoRAError, merged
from lora.inject import lora_layers, own_parameters

FEATURES, GRADIENTS = 1e-5, 1e-4  # largest differences allowed in fp32, relative to the norm; loss as features
HALF = 1.5  # in half precision: error against fp32, as a multiple of the reference's own


def verify(model: CLIPModel, reference: Any, sample: Any) -> tuple[PackedEncoder | None, str]:
    """Compare the fast encoder with `reference` on `sample` -> (encoder, how well it matches) or (None, why not).

    Works on a copy: weights, gradients, random state and mode of the model stay as they are.
    """
    if reason := unsupported(model):
        return None, reason
    trial, generator = copy.deepcopy(model), torch.Generator().manual_seed(0)
    try:
        for layer in lora_layers(trial).values():
            layer.strength = 1.0
            for p in own_parameters(layer).values():
                p.data += 0.05 * torch.randn(p.shape, generator=generator).to(p)
            merged(layer)  # compares its forward with W x + b + delta_weight() x on random input
    except LoRAError as edit:
        return None, f"LoRALinear was edited: {edit}"
    expected, exact = measure(trial, reference, sample), None
    if next(model.vision_model.parameters()).dtype.itemsize == 2:
        exact = measure(copy.deepcopy(trial).float(), reference, sample)
    found, largest = measure(trial, PackedEncoder(trial), sample), 0.0
    for name, values in found.items():
        truth = (exact or expected)[name]
        error, own = (((v - truth).norm() / truth.norm()).item() for v in (values, expected[name]))
        limit = HALF * own + 1e-3 if exact else GRADIENTS if name == "gradients" else FEATURES
        if not error <= limit:  # NaN too
            return None, f"{name} differ by {error:.1e}"
        largest = max(largest, error)
    return PackedEncoder(model), f"matches transformers + LoRALinear to {largest:.0e}"


# where the layers that both encoders compute alike are defined
OURS = ("torch.nn.modules.", "transformers.", "lora.", "clip_medical.fast.packed")


def unsupported(model: CLIPModel) -> str:
    """Return why the fast encoder cannot stand in for the reference on this model, "" if nothing speaks against it."""
    for name, module in model.named_modules():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            return f"a hook is registered on {name or 'the model'}"
        if "forward" in vars(module):
            return f"forward of {name or 'the model'} was replaced"
        if getattr(module, "dropout", 0):
            return f"dropout is on in {name}, and captions that share a token would share its mask"
        if not type(module).__module__.startswith(OURS):
            return f"{name} is a {type(module).__name__}, a layer that CLIP does not have"
    return ""


def measure(model: CLIPModel, encoder: Any, sample: Any) -> dict[str, Tensor]:
    """Features, loss (InfoNCE at a scale of 10, for good conditioning) and gradients of the adapter, in fp32."""
    dtype = next(model.vision_model.parameters()).dtype
    matrices = [p for layer in lora_layers(model).values() for p in layer.parameters() if p.requires_grad]
    with torch.set_grad_enabled(bool(matrices)):
        images = F.normalize(encoder.image(model, sample.pixel_values.to(dtype)).float(), dim=-1)
        texts = F.normalize(encoder.text(model, sample.ids, sample.lengths).float(), dim=-1)
        logits = 10 * images @ texts.T
        loss = F.cross_entropy(logits, torch.arange(len(logits), device=logits.device) % logits.shape[1])
        # scaled, so that fp16 gradients do not underflow; only ratios of gradients are compared
        gradients = torch.autograd.grad(1024 * loss, matrices, materialize_grads=True) if matrices else ()
    found = {"features": torch.cat([images.flatten(), texts.flatten()]).detach(), "loss": loss.detach()[None]}
    if gradients:
        found["gradients"] = torch.cat([gradient.flatten() for gradient in gradients])
    return found
