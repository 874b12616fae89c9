"""DoRA, weight-decomposed LoRA (Liu et al. 2024, arXiv 2402.09353): the worked example of a subclass of LoRALinear.

Plain LoRA changes length and direction of the rows of W together. DoRA learns the length of each row by itself, and
leaves the direction to B A (section 4.1, with rows for the paper's columns, as nn.Linear stores W):

        W + scaling * B A   --->   divide each row by its length   --->   times m (out,)   --->   * x + b
            (out, in)                  direction, unit rows               length, trained

    y = m * ((W + D) x) / |W + D| + b          D = scaling * B A,   |.| the length of each row, m starts at |W|

At the start D = 0 and y is the base's. The price: out more numbers per layer, and W + D formed once in each step.
"""

from typing import Any

from torch import Tensor, nn

from .layer import LoRALinear, wide


class DoRALinear(LoRALinear):
    """A LoRALinear with a trained length for each row of the weight. Arguments, shapes and errors are those of LoRA.

    Attributes: magnitude (out,), m above, in fp32; lora_A and lora_B as before. PEFT calls this `use_dora=True`; its
    files are read and written.
    """

    peft_fields = {"peft_type": "LORA", "use_dora": True}
    peft_tensors = LoRALinear.peft_tensors | {"magnitude": "lora_magnitude_vector"}

    def __init__(self, base: nn.Linear, *settings: Any, **named: Any) -> None:
        super().__init__(base, *settings, **named)
        self.magnitude = nn.Parameter(wide(base.weight.detach()).norm(dim=1))

    def rescaling(self) -> Tensor:
        """m / |W + D| (out,): what each output is multiplied by."""
        adapted = wide(self.base.weight) + super().delta_weight()
        # Detached (section 4.3): this saves memory and costs no accuracy. Clamped: a row of zeros stays one.
        length: Tensor = adapted.norm(dim=1).detach().clamp(min=1e-12)
        return self.magnitude / length

    def forward(self, x: Tensor) -> Tensor:
        if self.strength == 0:  # switched off: exactly the base
            return super().forward(x)
        # The bias is not part of the rows. base(x) - bias would round in half precision, hence the sum in fp32.
        bias: Any = 0 if self.base.bias is None else wide(self.base.bias)
        y = super().forward(x)
        rescaled: Tensor = self.rescaling() * (wide(y) - bias) + bias
        return rescaled.to(y.dtype)

    def delta_weight(self) -> Tensor:
        """The whole correction as one matrix (out, in): m * (W + D) / |W + D| - W. `merged` adds it to W."""
        if self.strength == 0:
            return super().delta_weight()  # zeros
        weight = wide(self.base.weight)
        adapted: Tensor = self.rescaling()[:, None] * (weight + super().delta_weight())
        return adapted - weight
