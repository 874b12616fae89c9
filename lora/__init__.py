"""LoRA by hand, for the nn.Linear layers of any PyTorch model, with torch and safetensors alone. Read in this order:

layer.py         the mathematics: y = W x + b + scaling * B A x, its initialisation, its merge
inject.py        putting that layer into a model: plan, refuse, apply; and taking it out again
peft_format.py   saving and strict loading, in the layout of Hugging Face PEFT
dora.py          DoRA as an example of a subclass
full.py          a trained bias beside LoRA, and a whole layer trained
"""

from .dora import DoRALinear
from .full import BiasLoRALinear, FullLinear
from .inject import adapter_parameters, count_parameters, disabled, inject, merge, remove, set_strength
from .layer import LoRAError, LoRALinear, merged
from .peft_format import load_adapter, save_adapter

__all__ = [
    "BiasLoRALinear", "DoRALinear", "FullLinear", "LoRAError", "LoRALinear", "adapter_parameters", "count_parameters",
    "disabled", "inject", "load_adapter", "merge", "merged", "remove", "save_adapter", "set_strength",
]  # fmt: skip
