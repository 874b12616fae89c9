"""Two more layers that PEFT's files hold: LoRA with a trained bias, and a whole weight, trained without LoRA:

    BiasLoRALinear    y = W x + b + scaling * B A x + (b' - b)      PEFT's bias="lora_only"
    FullLinear        y = W x + b +      (W' - W) x + (b' - b)      PEFT's modules_to_save

W' and b' start as copies of W and b, and are trained. W and b stay as they are and the difference is added, so that the
adapter can be scaled, switched off, removed and merged as LoRA can. A whole layer costs in * out numbers and a second
product, which suits small ones, such as the two projections of CLIP: 0.43 % of ViT-B/32.
"""

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from .layer import LoRALinear, wide


class BiasLoRALinear(LoRALinear):
    """A LoRALinear that trains the bias too, where its base has one. Arguments, shapes and errors are those of LoRA."""

    peft_fields = {"peft_type": "LORA", "bias": "lora_only"}
    peft_tensors = LoRALinear.peft_tensors | {"trained_bias": "base_layer.bias"}

    def __init__(self, base: nn.Linear, *settings: Any, **named: Any) -> None:
        super().__init__(base, *settings, **named)
        self.trained_bias = None if base.bias is None else nn.Parameter(wide(base.bias.detach()).clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.plus_bias(super().forward(x))

    def plus_bias(self, y: Tensor) -> Tensor:
        if self.strength == 0 or self.trained_bias is None:
            return y
        return y + (self.strength * (self.trained_bias - wide(self.base.bias))).to(y.dtype)


class FullLinear(BiasLoRALinear):
    """An nn.Linear that is trained whole, in fp32. A LoRALinear for whatever looks for those, but without A and B."""

    peft_tensors = {"trained_weight": "weight", "trained_bias": "bias"}

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base, rank=1)  # checks and freezes the base; W' takes the place of A and B
        del self.lora_A, self.lora_B
        self.trained_weight = nn.Parameter(wide(base.weight.detach()).clone())

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.strength == 0:
            return y
        return self.plus_bias(y + F.linear(x, self.delta_weight().to(x.dtype)).to(y.dtype))

    def delta_weight(self) -> Tensor:
        """strength * (W' - W), (out, in)."""
        return self.strength * (self.trained_weight - wide(self.base.weight))
