"""AdamW with warmup, cosine decay and loss scaling, as one object: they change together."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR

from clip_medical.config import Config

WHOLE = 0.1
"""Learning rate of whole weights and biases, as a multiple of that of A (Biderman et al. 2024, arXiv 2405.09673)."""


class Optimizer:
    """Optimizer, learning-rate schedule and loss scaling for all trainable parameters of a model.

    The schedule counts optimizer steps that were taken. A step that the loss scaling skips, because fp16 overflowed,
    changes neither the weights nor the learning rate; `skipped` counts them.
    """

    def __init__(self, model: nn.Module, config: Config, steps: int, scaled: bool = False) -> None:
        """model: a CLIPModel; steps: length of the schedule; scaled: whether to scale the loss, as fp16 needs."""
        self.logit_scale: nn.Parameter = model.logit_scale  # type: ignore[assignment]
        parts: dict[tuple[bool, bool, bool], dict[str, Any]] = {}
        for name, p in model.named_parameters():
            if p.requires_grad and p is not self.logit_scale:
                is_b, whole = name.endswith("lora_B"), ".trained_" in name
                vision = config.vision_lr != 1 and name.startswith("vision_model.")
                # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B starts at zero and has further to go
                rate = config.lr * (config.lora_plus if is_b else 1) * (config.vision_lr if vision else 1)
                # no weight decay: it would pull W' to zero, not to W
                options = {"lr": WHOLE * rate, "weight_decay": 0.0} if whole else {"lr": rate}
                parts.setdefault((is_b, vision, whole), {"params": [], **options})["params"].append(p)
        groups = [parts[key] for key in sorted(parts)]
        if self.logit_scale.requires_grad:
            groups.append({"params": [self.logit_scale], "lr": config.logit_scale_lr, "weight_decay": 0.0})
        warmup = max(1, round(config.warmup * steps))
        decay = max(1, steps - warmup)
        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.skipped = 0
        on_gpu = self.parameters[0].is_cuda
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, weight_decay=config.weight_decay, fused=on_gpu)
        # the smaller of a line that rises to 1 and of a cosine that falls from 1 to 0
        self.schedule = LambdaLR(
            self.adamw, lambda n: min((n + 1) / warmup, (1 + math.cos(math.pi * max(0, n - warmup) / decay)) / 2)
        )
        self.scaler = torch.amp.GradScaler(self.parameters[0].device.type, enabled=scaled)

    @torch.no_grad()
    def step(self, max_grad_norm: float) -> float:
        """Unscale, clip, step, in this order; returns the gradient norm before clipping.

        Where the norm is not finite no weight changes: under fp16 the scaler skips the step; otherwise the caller is
        expected to stop.
        """
        self.scaler.unscale_(self.adamw)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, max_grad_norm)
        if norm.isfinite() or self.scaler.is_enabled():
            before = self.scaler.get_scale()
            self.scaler.step(self.adamw)
            self.scaler.update()
            if self.scaler.get_scale() >= before:  # the scale falls when, and only when, the step was skipped
                self.schedule.step()
            else:
                self.skipped += 1
            self.logit_scale.clamp_(0, math.log(100))  # as in CLIP's training: beyond it a few pairs decide the loss
        self.adamw.zero_grad(set_to_none=True)
        return norm.item()

    def state_dict(self) -> dict[str, Any]:
        """Everything that `load_state_dict` needs to continue to the bit."""
        return {
            "parameters": self.weights(),
            "adamw": self.adamw.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue where `state_dict` was taken, with the peak learning rates of this object, not of the state."""
        peaks = self.schedule.base_lrs
        self.load_weights(state["parameters"])
        self.adamw.load_state_dict(state["adamw"])
        self.schedule.load_state_dict(state["schedule"])
        self.schedule.base_lrs = peaks
        factor = self.schedule.lr_lambdas[0](self.schedule.last_epoch)
        for group, peak in zip(self.adamw.param_groups, peaks, strict=True):
            group["initial_lr"], group["lr"] = peak, peak * factor
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]

    def weights(self) -> list[Tensor]:
        """Copies of the trainable parameters, on the CPU."""
        return [p.detach().cpu().clone() for p in self.parameters]

    @torch.no_grad()
    def load_weights(self, weights: list[Tensor]) -> None:
        """Put copies of `weights` into the trainable parameters."""
        for parameter, saved in zip(self.parameters, weights, strict=True):
            parameter.copy_(saved)
