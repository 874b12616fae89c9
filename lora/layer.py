"""LoRA, the layer: a frozen matrix W and a trainable low-rank correction B A beside it.

Fine-tuning turns a pretrained weight W into W + dW. Hu et al. (2021, arXiv 2106.09685, section 4.1) train dW alone
and force it to be thin, as the product of two small matrices with an inner width r, the rank:

                      y  (..., out)
                      |
                     (+)-------------- * scaling
                      |                    |
            +---------+---------+      +---+---+
            |                   |      |   B   |  (out, r)   starts at zero
            |         W         |      +---+---+
            |     (out, in)     |          |      (..., r)   only r numbers pass here
            |      frozen       |   +------+------+
            |                   |   |      A      |  (r, in)   starts random
            +---------+---------+   +------+------+
                      |                    |
                      |                 dropout
                      +----------+---------+
                                 |
                                 x  (..., in)

    y = W x + dW x = W x + (alpha / r) B A x         W: (out, in)   B: (out, r)   A: (r, in)   r << min(out, in)

For a 768 x 768 projection and r = 8, B and A hold 12,288 numbers where W holds 589,824: 2.1 %. Gradients and the two
moments of Adam exist for those only. The branch is computed as B (A x), never as (B A) x: r (in + out) multiplications
a vector instead of in * out. Six questions a reader asks:

Why is B zero?  So that B A = 0 and step 0 *is* the pretrained model, not a damaged one that training has to repair.
Why is A not zero as well?  With g = dL/dy, dL/dB = scaling * g (A x)^T and dL/dA = scaling * B^T g x^T. With both at
    zero both gradients vanish and nothing ever learns. With B = 0 alone, B moves at the first step and A at the second.
Why alpha / r?  It keeps the correction's size comparable across ranks, so that a new r asks less for a new learning
    rate. Kalajdzievski (2023, arXiv 2312.03732) shows that 1 / r overshoots: activations and gradients keep their size
    as r grows only under alpha / sqrt(r), here `rslora=True`.
Why kaiming with a = sqrt(5)?  The bound is sqrt(2 / (1 + a^2)) * sqrt(3 / fan_in) = 1 / sqrt(fan_in), as in nn.Linear
    and loralib (the paper says Gaussian). fan_in is read off the second dimension: were A stored as (in, r), its
    entries would be sqrt(in / r) times too large, here ten times.
Why fp32 for A and B, whatever the base's dtype?  Entries of A near 0.04 lie 2.4e-4 apart in bf16, so that a step of
    1e-4 is rounded away; and GradScaler refuses fp16 gradients. The matrices are tiny: precision is cheap here.
Why does inference cost nothing extra?  W + scaling * B A has the shape of W; see `merged`.
"""

import copy
import math
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRAError(ValueError):
    """A mistake of the caller, told in one sentence: what was found, what was expected, what to do."""


class LoRALinear(nn.Module):
    """An nn.Linear, frozen, with a trainable low-rank branch: y = base(x) + strength * scaling * B(A dropout(x)).

    Args:
        base: the pretrained layer, weight (out, in). It is kept as `.base`, frozen, and otherwise never written to.
        rank, alpha: r, 1 or more, and the numerator of the scaling, finite and above 0.
        dropout: probability, in [0, 1), of dropping an input of the branch. The base sees all of x, as in pretraining.
        rslora: scaling = alpha / sqrt(r) instead of alpha / r.

    Attributes: lora_A (r, in) and lora_B (out, r), the only trainable parameters; `strength`, a dial on the finished
        adapter, 1.0 as trained and 0.0 for exactly the base model, neither trained nor saved.
    Shapes: x (..., in) -> y (..., out), in the dtype that the base returns.
    Raises: LoRAError for a base that is not a floating-point nn.Linear, or a setting out of range.

    To extend: subclass, override `forward`, and give the class to `inject(model, layer=...)`. Parameters that it adds
    are trained, counted and kept in checkpoints by themselves. At strength 0 it has to be its base. `merged` needs a
    `delta_weight` that matches; `save_adapter`, and so train.py, needs `peft_fields`, and `peft_tensors` for new ones.
    """

    # How PEFT's files hold this layer: the tensor of each parameter, and the fields of adapter_config.json that say so.
    peft_tensors: ClassVar[dict[str, str]] = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}
    peft_fields: ClassVar[dict[str, object]] = {"peft_type": "LORA"}

    def __init__(
        self, base: nn.Linear, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, rslora: bool = False
    ) -> None:
        super().__init__()
        check_layer(base, rank, alpha, dropout, rslora)  # before the freeze: a refused base is left as it was
        self.base = base.requires_grad_(False)
        self.rank, self.alpha, self.dropout, self.rslora = rank, float(alpha), float(dropout), rslora
        self.scaling = self.alpha / (math.sqrt(rank) if rslora else rank)
        self.in_features, self.out_features = base.in_features, base.out_features
        self.strength = 1.0
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        self.train(base.training)  # a new module is in train mode: in a model in eval mode its dropout would be live

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.base(x)
        if self.strength == 0:
            return y  # skipped, not multiplied by 0: 0 * NaN is NaN, and "off" has to be the base bit for bit
        # Copies are cast; autograd brings the gradient back to fp32. B is scaled, not the result with its many numbers.
        A, B = self.lora_A.to(x.dtype), (self.strength * self.scaling * self.lora_B).to(x.dtype)
        branch = F.linear(F.linear(F.dropout(x, self.dropout, self.training), A), B)
        return y + branch.to(y.dtype)

    def delta_weight(self) -> Tensor:
        """strength * scaling * B A, the whole correction as one matrix, (out, in) in fp32 (fp64 after `.double()`)."""
        if self.strength == 0:
            return torch.zeros_like(wide(self.base.weight))
        # Under autocast even an fp32 matmul is done in half precision, which is not what a merge should be made of.
        with torch.autocast(self.lora_A.device.type, enabled=False):
            return self.strength * self.scaling * (wide(self.lora_B) @ wide(self.lora_A))

    def __getattr__(self, name: str) -> Any:  # called for what is not there
        if name in ("weight", "bias"):  # some modules of torch take them and never call the layer
            raise AttributeError(f"{type(self).__name__} has no {name}, which skips the adapter: merge, or read .base")
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        return f"rank={self.rank}, scaling={self.scaling}, dropout={self.dropout}, strength={self.strength}"


def wide(x: Tensor) -> Tensor:
    """The tensor in fp32, or in fp64 if it is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


@torch.no_grad()
def merged(layer: LoRALinear) -> nn.Linear:
    """One plain nn.Linear that computes what `layer` computes (in eval mode): weight W + strength * scaling * B A.

    A pure function: no "merged" flag to go stale, no merging twice, no checkpoint saved while merged. Implementations
    that merge in place, or as a side effect of eval(), must subtract B A again to go on training, and in floating point
    W + D - D is not W. The sum is taken in fp32 and cast once to the base's dtype. That rounding is all that differs
    from the unmerged layer, but bf16 keeps 8 significant bits of W + B A: what is finer than W / 256 is lost.

    Returns: a frozen nn.Linear (in -> out) with its own copies, on the base's device, in its dtype and training mode.
    Raises: LoRAError if the merged weight is not finite, as after diverged training or an overflow of fp16; and if the
        layer's forward is not affine with W + delta_weight(), as in a subclass or after an edit.
    """
    exact = copy.deepcopy(layer).to(wide(layer.base.weight).dtype).eval()
    new = copy.deepcopy(exact.base)
    x = torch.randn(16, new.in_features, generator=torch.Generator().manual_seed(0)).to(new.weight)
    with torch.autocast(x.device.type, enabled=False):
        new.weight += exact.delta_weight()
        if new.bias is not None:
            new.bias.copy_(exact(torch.zeros_like(x[0])))  # what is left at x = 0: a subclass can train it too
        found = new(x)
        difference = (exact(x) - found).norm() / found.norm().clamp(min=1e-30)
    if not all(p.isfinite().all() for p in new.to(layer.base.weight.dtype).parameters()):
        raise LoRAError(f"found NaN or inf in the merged {new.weight.dtype}: use an earlier adapter, or a float32 base")
    if not difference < 1e-4:
        what = f"a {type(layer).__name__} whose forward differs from W x + b + delta_weight() x by {difference:.1e}"
        raise LoRAError(f"found {what} of its norm: override delta_weight to match it, or leave this layer unmerged")
    return new.requires_grad_(False).train(layer.training)


def check_layer(base: nn.Module, rank: int = 1, alpha: float = 1, dropout: float = 0, rslora: bool = False) -> None:
    """Refuse what LoRALinear cannot be built from, without building it (injection asks first and acts later)."""
    # A subclass may compute something else, and that inside nn.MultiheadAttention is read but never called.
    if type(base) is not nn.Linear:
        kind = type(base).__name__ if type(base).__name__ != "Linear" else f"{type(base).__module__}.Linear"
        raise LoRAError(f"found {kind}, expected nn.Linear and no subclass: choose a layer that is one")
    if not base.weight.is_floating_point():
        raise LoRAError(f"found a quantised weight ({base.weight.dtype}), expected a float: load the base unquantised")
    if type(rank) is not int or rank < 1:
        raise LoRAError(f"rank is {rank!r}, expected a whole number of 1 or more: 8 is a usual choice")
    if not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
        raise LoRAError(f"alpha is {alpha!r}, expected a finite number above 0: a usual choice is 2 * rank")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise LoRAError(f"dropout is {dropout!r}, expected a probability in [0, 1): give 0 to switch it off")
    if not isinstance(rslora, bool):
        raise LoRAError(f"rslora is {rslora!r}, expected True or False: True scales by alpha / sqrt(rank)")
