"""What learns: the adapter with its optimizer, schedule and loss scaling, which change together."""

import math
from typing import Any

import torch
from torch import nn

from clip_medical.config import Config


class Learner:
    """Adapter, optimizer, schedule and loss scaling: the four things that change while training, and change together.

    The schedule counts optimizer steps that were taken. A step that the loss scaling skips, because fp16 overflowed,
    moves neither the weights nor the learning rate; `skipped` counts them.
    """

    def __init__(
        self, adapter: list[nn.Parameter], logit_scale: nn.Parameter, config: Config, steps: int, scaled: bool
    ) -> None:
        """adapter: A, B, A, B, ... as `adapter_parameters` gives them; logit_scale: learned too where it requires a
        gradient; steps: length of the schedule; scaled: whether fp16 needs its loss scaled."""
        # LoRA+ (Hayou et al. 2024, arXiv 2402.12354): B starts at zero and has the longer way to go
        matrices_a, matrices_b = (
            {"params": adapter[0::2]},
            {"params": adapter[1::2], "lr": config.lr * config.lora_plus},
        )
        groups: list[dict[str, Any]] = [matrices_a, matrices_b]
        if logit_scale.requires_grad:
            groups += [{"params": [logit_scale], "lr": config.logit_scale_lr, "weight_decay": 0.0}]
        rise = max(1, round(config.warmup * steps))

        def warmup_cosine(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2

        self.parameters: list[nn.Parameter] = [p for group in groups for p in group["params"]]
        self.logit_scale = logit_scale
        self.skipped = 0
        # on a GPU in a kernel or two, where small ones by the dozen are what a step waits for
        fused, decay = adapter[0].is_cuda, config.weight_decay
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr, weight_decay=decay, fused=fused)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_cosine)
        self.scaler = torch.amp.GradScaler(adapter[0].device.type, enabled=scaled)

    @property
    def lr(self) -> float:
        """The learning rate of the next step, that of A."""
        return float(self.schedule.get_last_lr()[0])

    @torch.no_grad()
    def step(self, clip_norm: float) -> float:
        """Unscale, clip, step, in this order; returns the norm of the gradient before clipping.

        Where it is not finite nothing moves: under fp16 the scaling skips the step, otherwise it is for the caller to
        stop, with weights that are still good.
        """
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        if not (norm.isfinite() or self.scaler.is_enabled()):
            self.optimizer.zero_grad(set_to_none=True)
            return norm.item()
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= before:  # the scale falls when, and only when, the step was skipped
            self.schedule.step()
        else:
            self.skipped += 1
        self.logit_scale.clamp_(0, math.log(100))  # as CLIP was trained: beyond it a few pairs would decide all
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def state_dict(self) -> dict[str, Any]:
        """All that a later `load_state_dict` needs to go on to the bit."""
        return {
            "parameters": self.weights(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "skipped": self.skipped,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.put_weights(state["parameters"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        self.skipped = state["skipped"]

    def weights(self) -> list[torch.Tensor]:
        """Copies of what is learned, on the CPU."""
        return [p.detach().cpu().clone() for p in self.parameters]

    @torch.no_grad()
    def put_weights(self, weights: list[torch.Tensor]) -> None:
        for parameter, saved in zip(self.parameters, weights, strict=True):
            parameter.copy_(saved)
