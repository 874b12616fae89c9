"""What learns: the adapter with its optimizer, schedule and loss scaling, saved and restored as one."""

import math
import os
from pathlib import Path

import torch
from torch import nn

from clip_medical.config import Config
from clip_medical.errors import UserError


class Learner:
    """Adapter, optimizer, schedule and loss scaling: the four things that change while training, and change together.

    The schedule counts optimizer steps that were taken. A step that the loss scaling skips, because fp16 overflowed,
    moves neither the weights nor the learning rate.
    """

    def __init__(self, parameters: list[nn.Parameter], config: Config, steps: int, scaled: bool) -> None:
        """parameters: what to learn; steps: length of the schedule; scaled: whether fp16 needs its loss scaled."""
        matrices = {"params": [p for p in parameters if p.ndim > 1], "weight_decay": config.weight_decay}
        temperature = {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0.0}
        groups = [group for group in (matrices, temperature) if group["params"]]
        rise = max(1, round(config.warmup * steps))

        def warmup_cosine(step: int) -> float:
            if step < rise:
                return (step + 1) / rise
            return (1 + math.cos(math.pi * (step - rise) / max(1, steps - rise))) / 2

        self.parameters = parameters
        self.optimizer = torch.optim.AdamW(groups, lr=config.lr)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, warmup_cosine)
        self.scaler = torch.amp.GradScaler(parameters[0].device.type, enabled=scaled)

    @property
    def lr(self) -> float:
        """The learning rate of the next step."""
        return float(self.schedule.get_last_lr()[0])

    def step(self, clip_norm: float) -> float:
        """Unscale, clip, step, in this order; returns the norm of the gradient before clipping."""
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, clip_norm)
        before = self.scaler.get_scale()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.scaler.get_scale() >= before:  # the scale falls when, and only when, the step was skipped
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm.item()

    def save(self, file: Path, step: int) -> None:
        """Write beside, flush to disk, swap names: whoever reads `file` finds the old one or the new one, whole."""
        state = {
            "step": step,
            "parameters": [p.detach().cpu() for p in self.parameters],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict(),
            "random": torch.get_rng_state(),
            "random_cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        beside = file.with_suffix(".part")
        with open(beside, "wb") as handle:
            torch.save(state, handle)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(beside, file)

    def load(self, file: Path) -> int:
        """Put everything back as `save` found it; returns the step at which that was."""
        try:
            state = torch.load(file, weights_only=True, map_location="cpu")
        except Exception as error:
            raise UserError(f"{file} cannot be read ({error}): the run cannot be resumed; start a new one.") from error
        with torch.no_grad():
            for parameter, saved in zip(self.parameters, state["parameters"], strict=True):
                parameter.copy_(saved)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.scaler.load_state_dict(state["scaler"])
        torch.set_rng_state(state["random"])
        if state["random_cuda"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random_cuda"])
        return int(state["step"])
