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

    h = W x + dW x = W x + (alpha / r) B A x         W: (out, in)   B: (out, r)   A: (r, in)   r << min(out, in)

For a 768 x 768 projection and r = 8, B and A hold 12,288 numbers where W holds 589,824: 2.1 %. Gradients and the two
moments of Adam exist for those numbers only. The branch is computed as B (A x), never as (B A) x, so that it costs
r (in + out) multiplications a vector instead of in * out. Five questions a reader asks:

Why is B zero?  So that B A = 0 and step 0 *is* the pretrained model. Were B random, training would start from a
    damaged model and would first have to repair it.
Why is A not zero as well?  With g = dL/dy, dL/dB = scaling * g (A x)^T and dL/dA = scaling * B^T g x^T. With both at
    zero both gradients vanish and nothing ever learns. With B = 0 alone, B moves at the first step; the gradient of
    A is exactly zero at that step, and A joins at the second.
Why alpha / r?  It makes the size of the correction comparable across ranks, so that changing r does not oblige a new
    search for the learning rate; section 4.1 fixes alpha at the first r tried and leaves it there. Kalajdzievski (2023,
    arXiv 2312.03732) shows that 1 / r overshoots: activations and gradients keep their size as r grows only under
    alpha / sqrt(r), "rank-stabilised" LoRA. Here that is `rslora=True`; the two agree at r = 1.
Why kaiming with a = sqrt(5)?  The bound of kaiming_uniform_ is sqrt(2 / (1 + a^2)) * sqrt(3 / fan_in), which for
    a^2 = 5 is 1 / sqrt(fan_in): the way nn.Linear initialises itself, and loralib with it (the paper's text says
    Gaussian). fan_in is read off the second dimension, so A must be stored (r, in): transposed, its entries would be
    sqrt(in / r) times too large, ten times for in = 768 and r = 8.
Why does inference cost nothing extra?  W + scaling * B A has the shape of W; see `merged`.
"""

import math
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LoRAError(ValueError):
    """A mistake of the caller, told in one sentence: what was found, what was expected, what to do."""


class LoRALinear(nn.Module):
    """An nn.Linear, frozen, with a trainable low-rank branch: y = base(x) + strength * scaling * B(A dropout(x)).

    Args:
        base: the pretrained layer, weight (out, in). It is kept as `.base`, frozen, and otherwise never written to.
        rank: r, the inner width; 1 <= r <= min(in, out).
        alpha: numerator of the scaling, finite and positive.
        dropout: probability, in [0, 1), of dropping an input of the branch. The base path sees x undisturbed:
            dropping there would change the pretrained function itself.
        rslora: scaling = alpha / sqrt(r) instead of alpha / r.

    Attributes: lora_A (r, in) and lora_B (out, r), the only trainable parameters; `strength`, a dial on the finished
    adapter, 1.0 as trained and 0.0 for exactly the base model. It is neither trained nor saved.

    Shapes: x (..., in) -> y (..., out), in the dtype that the base returns.
    Raises: LoRAError for a base that is not a floating-point nn.Linear, or a rank, alpha or dropout out of range.
    Source: Hu et al. 2021, section 4.1, equation 3.

    There is deliberately no `.weight`. Code that reads a weight and multiplies by itself would skip the adapter
    without a word; this way it stops with an AttributeError.
    """

    def __init__(
        self, base: nn.Linear, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0, rslora: bool = False
    ) -> None:
        super().__init__()
        check_settings(base, rank, alpha, dropout)  # before the freeze: a refused base is left as it was
        self.base = base.requires_grad_(False)
        self.rank = rank
        self.alpha = float(alpha)
        self.dropout = float(dropout)
        self.rslora = rslora
        self.strength = 1.0
        # fp32 even over an fp16 or bf16 base. Entries of A near 0.04 lie 2.4e-4 apart in bf16, so a step of 1e-4 would
        # be rounded away; and GradScaler refuses fp16 gradients. These matrices are tiny: precision is cheap here.
        device = base.weight.device
        self.lora_A = nn.Parameter(torch.empty(rank, base.in_features, device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(base.out_features, rank, device=device, dtype=torch.float32))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))
        # A new module is born in train mode; inside a model in eval mode its dropout would be live.
        self.train(base.training)

    @property
    def scaling(self) -> float:
        """alpha / r, or alpha / sqrt(r) with rslora."""
        return self.alpha / (math.sqrt(self.rank) if self.rslora else self.rank)

    def forward(self, x: Tensor) -> Tensor:
        y = self.base(x)
        if self.strength == 0:
            return y  # skipped, not multiplied by 0: 0 * NaN is NaN, and "off" has to be the base bit for bit
        # The casts happen here, to copies: a half-precision product, while autograd brings the gradient back to fp32.
        A, B = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        branch = F.linear(F.linear(F.dropout(x, self.dropout, self.training), A), B)
        return y + (self.strength * self.scaling * branch).to(y.dtype)

    def delta_weight(self) -> Tensor:
        """strength * scaling * B A, the whole correction as one matrix, (out, in) in fp32 (fp64 after `.double()`)."""
        dtype = torch.promote_types(self.lora_A.dtype, torch.float32)
        if self.strength == 0:
            return torch.zeros(self.base.weight.shape, dtype=dtype, device=self.lora_A.device)
        # Under autocast even an fp32 matmul is done in half precision, which is not what a merge should be made of.
        device_type = self.lora_A.device.type
        can_autocast = torch.amp.is_autocast_available(device_type)
        with torch.autocast(device_type, enabled=False) if can_autocast else nullcontext():
            return self.strength * self.scaling * (self.lora_B.to(dtype) @ self.lora_A.to(dtype))

    def extra_repr(self) -> str:
        form = "alpha/sqrt(r)" if self.rslora else "alpha/r"
        return (
            f"rank={self.rank}, alpha={self.alpha:g}, scaling={self.scaling:g} ({form}), "
            f"dropout={self.dropout:g}, strength={self.strength:g}"
        )


@torch.no_grad()
def merged(layer: LoRALinear) -> nn.Linear:
    """One plain nn.Linear that computes what `layer` computes (in eval mode): weight W + strength * scaling * B A.

    A pure function. Nothing is mutated, so there is no "merged" flag to go stale, no merging twice, no checkpoint saved
    while merged. Implementations that merge in place, or as a side effect of eval(), must subtract B A again to go on
    training, and in floating point W + D - D is not W. Whoever wants the base back keeps the LoRALinear.

    The sum is taken in fp32 and cast once to the base's dtype. That single rounding is the whole difference from the
    unmerged layer, but in half precision it is not small beside a small correction: bf16 keeps 8 significant bits of
    W + B A, so what is finer than W / 256 is lost. To export without loss, convert the base to fp32 first.

    Returns: a frozen nn.Linear (in -> out) with its own copies, on the base's device, in its dtype and training mode.
    Raises: LoRAError if the merged weight is not finite, as after diverged training or an overflow of fp16.
    Source: Hu et al. 2021, section 4.1, "No Additional Inference Latency".
    """
    base, weight = layer.base, layer.base.weight
    delta = layer.delta_weight()
    total = (weight.to(delta.dtype) + delta).to(weight.dtype)
    if not total.is_meta and not torch.isfinite(total).all():
        raise LoRAError(
            f"merging gives NaN or inf in {weight.dtype}, where finite weights were expected: "
            "use an adapter from before training diverged, or convert the base to float32 before merging"
        )
    # skip_init leaves out the random initialisation of nn.Linear: a merge must not move the global random state.
    like = {"bias": base.bias is not None, "device": weight.device, "dtype": weight.dtype}
    new = nn.utils.skip_init(nn.Linear, base.in_features, base.out_features, **like)
    new.weight.copy_(total)
    if base.bias is not None:
        new.bias.copy_(base.bias)
    return new.requires_grad_(False).train(layer.training)


def check_settings(base: nn.Module, rank: int, alpha: float, dropout: float) -> None:
    """Refuse what LoRALinear cannot be built from, without building it (injection asks first and acts later)."""
    if not isinstance(base, nn.Linear):
        raise LoRAError(f"found {type(base).__name__}, expected an nn.Linear: choose a layer that is one")
    if not base.weight.is_floating_point():
        raise LoRAError(f"found a quantised weight ({base.weight.dtype}), expected a float: load the base unquantised")
    widest = min(base.in_features, base.out_features)
    if not isinstance(rank, int) or isinstance(rank, bool) or not 1 <= rank <= widest:
        raise LoRAError(
            f"rank {rank!r} does not fit a Linear of {base.in_features} -> {base.out_features}: "
            f"give a whole number from 1 to {widest}"
        )
    if not isinstance(alpha, (int, float)) or not (math.isfinite(alpha) and alpha > 0):
        raise LoRAError(f"alpha is {alpha!r}, expected a finite number above 0: a usual choice is 2 * rank")
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise LoRAError(f"dropout is {dropout!r}, expected a probability in [0, 1): give 0 to switch it off")
