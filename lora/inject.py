"""LoRA, the surgery: putting LoRALinear layers into a model, and taking them out again.

Injection is a transaction in three movements:

    plan     which modules, by dotted name, get which settings     {"text_model...q_proj": Settings(rank=8, ...), ...}
    refuse   anything wrong with that plan, before a single module or flag has been touched
    apply    freeze the model, swap each planned nn.Linear for a LoRALinear that holds it

The middle one is why this file is longer than a loop with setattr. Half-injected models, names that match too much
(as a substring, in the wrong tower) or nothing at all are the common ways to lose a day with LoRA, and most of them
raise no error: the model trains, and behaves like its base.

Which matrices? Section 4.2 of Hu et al. (2021) adapts only attention weights and freezes the MLPs. Section 7.1
compares W_q, W_k, W_v, W_o under one parameter budget and finds that W_q and W_v together do well, better than the
whole budget spent on a single matrix; hence the default targets here. Section 7.2 finds that very small ranks already
suffice on its tasks. Both are findings on language models: treat them as where to start, not where to stop.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

from torch import nn

from .layer import LoRAError, LoRALinear, check_settings, merged


class Settings(NamedTuple):
    """What one LoRALinear is built with; a plan maps dotted names to these, so that layers may differ."""

    rank: int
    alpha: float
    dropout: float
    rslora: bool


class ParameterCount(NamedTuple):
    """`trainable`: numbers with requires_grad. `total`: numbers in the base model, adapters left out."""

    trainable: int
    total: int

    @property
    def percent(self) -> float:
        """100 * trainable / total: what is trained, measured against the model that would otherwise be."""
        return 100 * self.trainable / max(self.total, 1)


def inject(
    model: nn.Module,
    targets: str | Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    within: str | Sequence[str] | None = None,
) -> list[str]:
    """Adapt every nn.Linear whose name is in `targets`, and freeze all other parameters of the model, in place.

    Args:
        targets: compared, whole, with the last part of the dotted name. "q_proj" means "...self_attn.q_proj" and
            neither "...q_proj_norm" nor "...mq_proj": a substring match would take them all.
        rank, alpha, dropout, rslora: as in LoRALinear, the same for every layer.
        within: keep to these dotted prefixes. "vision_model" holds "vision_model.x" but not "vision_model2.x".

    Returns: the dotted names of the adapted layers, in module order. Read them: they say what will be trained.
    Raises: LoRAError, with the model untouched, if a target or prefix matches nothing, a match is not an nn.Linear,
        the rank exceeds a layer's width, or the model already holds LoRA.

    Build the optimizer after this call, from `adapter_parameters(model)`: one built before holds the wrong parameters.
    Convert the base (`model.half()`) before it: afterwards, the conversion would take the fp32 adapters along.
    """
    require_unadapted(model)
    sites = _select(model, targets, within)
    return apply_plan(model, dict.fromkeys(sites, Settings(rank, alpha, dropout, rslora)))


def _select(model: nn.Module, targets: str | Sequence[str], within: str | Sequence[str] | None) -> list[str]:
    """The names that `targets` and `within` pick out, in module order; each of their entries must pick something."""
    # A lone string stands for a list of one: taken as a sequence it would be a list of letters.
    wanted = (targets,) if isinstance(targets, str) else tuple(targets)
    prefixes = (within,) if isinstance(within, str) else (("",) if within is None else tuple(within))

    sites: list[str] = []
    idle = set(wanted) | set(prefixes)  # what is still in here at the end has matched nothing
    for names in all_names(model).values():
        for name in names:
            target = name.rpartition(".")[2]
            inside = [p for p in prefixes if p == "" or name == p or name.startswith(f"{p}.")]
            if target in wanted and inside:
                idle -= {target, *inside}
                sites.append(names[0])
    if idle or not sites:
        idle.discard("")
        raise LoRAError(
            f"nothing in {type(model).__name__} matches {sorted(idle)} (targets {list(wanted)}, within {within!r}): "
            "a target is the last part of a module's dotted name, `within` its beginning; see model.named_modules()"
        )
    return sites


def all_names(model: nn.Module) -> dict[nn.Module, list[str]]:
    """Each module with every dotted name that leads to it, in module order; the first is the one used to report it.

    A layer reachable by two names is one weight, used twice. It gets one LoRALinear under both names: adapted under one
    of them alone it would become two different layers.
    """
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def require_unadapted(model: nn.Module) -> None:
    """Refuse a model that has no inside to put layers into, or that has LoRA in it already."""
    if isinstance(model, (nn.Linear, LoRALinear)):
        raise LoRAError(
            f"the model is itself a {type(model).__name__}, expected a model that contains nn.Linear layers: "
            "for a single layer use LoRALinear(layer) directly"
        )
    if present := lora_layers(model):
        raise LoRAError(
            f"the model already holds {len(present)} LoRA layers (first: {next(iter(present))}), expected none: "
            "call remove(model) to drop them or merge(model) to keep their effect, then go on"
        )


def check_plan(model: nn.Module, plan: Mapping[str, Settings]) -> None:
    """Raise LoRAError if any planned site cannot be adapted as planned. Reads the model, changes nothing."""
    for name, settings in plan.items():
        if isinstance(model.get_submodule(name.rpartition(".")[0]), nn.MultiheadAttention):
            raise LoRAError(
                f"{name} belongs to an nn.MultiheadAttention, which reads its weight and never calls it, so that an "
                "adapter would be skipped: use a model with separate q, k, v and out projections"
            )
        try:
            check_settings(model.get_submodule(name), settings.rank, settings.alpha, settings.dropout)
        except LoRAError as error:
            raise LoRAError(f"{name}: {error}") from None


def apply_plan(model: nn.Module, plan: Mapping[str, Settings]) -> list[str]:
    """Check the plan, then carry it out: after the check, nothing that can be refused is left. Returns the names."""
    check_plan(model, plan)
    model.requires_grad_(False)  # embeddings, norms, temperature and all; the adapters come after and are trainable
    bases = {name: model.get_submodule(name) for name in plan}
    _swap(model, {base: LoRALinear(base, *plan[name]) for name, base in bases.items()})  # type: ignore[arg-type]
    return list(plan)


def _swap(model: nn.Module, replacements: Mapping[nn.Module, nn.Module]) -> None:
    """Put each replacement wherever the module that it replaces is found, under all of that module's names."""
    if model in replacements:
        raise LoRAError("the model is itself a LoRALinear: use its .base, or merged(layer), directly")
    for module, names in all_names(model).items():
        for name in names if module in replacements else ():
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, replacements[module])


def lora_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """The LoRALinear layers of a model by dotted name, in module order, each once; empty if there are none."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}


def require_layers(model: nn.Module) -> dict[str, LoRALinear]:
    """lora_layers(model), or LoRAError: an empty answer would let the caller do nothing and believe it was done."""
    if layers := lora_layers(model):
        return layers
    raise LoRAError(f"{type(model).__name__} holds no LoRA layers: call inject(model) or load_adapter(model, folder)")


def remove(model: nn.Module) -> list[str]:
    """Put the original layers back: the same objects, never written to, hence a bit-identical state dict.

    The adapters are dropped, and the model stays frozen. Returns the names. Raises LoRAError if there is no LoRA.
    """
    layers = require_layers(model)
    _swap(model, {layer: layer.base for layer in layers.values()})
    return list(layers)


def merge(model: nn.Module) -> list[str]:
    """Replace each LoRALinear by its `merged` nn.Linear: the adapted model, at the speed and size of the base.

    All are computed before the first is put in, so that a refusal leaves the model as it was. Returns the names.
    Raises: LoRAError if there is no LoRA, so also on a second call, or if a merged weight is not finite.
    """
    layers = require_layers(model)
    plain: dict[nn.Module, nn.Module] = {}
    for name, layer in layers.items():
        try:
            plain[layer] = merged(layer)
        except LoRAError as error:
            raise LoRAError(f"{name}: {error}") from None
    _swap(model, plain)
    return list(layers)


def set_strength(model: nn.Module, strength: float) -> None:
    """Make the model use W + strength * scaling * B A in every adapted layer, without retraining anything.

    Between 0 (the base) and 1 (as trained) this walks the straight line between the two sets of weights; a point on it
    often keeps more of the base's old skill than 1 does. Raises LoRAError for a strength that is not finite.
    """
    if not math.isfinite(strength):
        raise LoRAError(f"strength is {strength!r}, expected a finite number: 0 is the base model, 1 as trained")
    for layer in require_layers(model).values():
        layer.strength = float(strength)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the model is exactly its base; after it, also after an exception, as it was before. Nests."""
    before = {layer: layer.strength for layer in require_layers(model).values()}
    set_strength(model, 0.0)
    try:
        yield
    finally:
        for layer, strength in before.items():
            layer.strength = strength


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every lora_A (r, in) and lora_B (out, r), each once, in module order: what belongs in the optimizer."""
    return [matrix for layer in require_layers(model).values() for matrix in (layer.lora_A, layer.lora_B)]


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count numbers, shared ones once: (trainable, total, and percent of the one in the other).

    The total leaves the adapters out, so that it is the number printed in the base model's own paper. CLIP ViT-B/32
    with r = 8 on q_proj and v_proj of both towers: trainable 491,520, total 151,277,313, percent 0.32.
    """
    adapters = {matrix for layer in lora_layers(model).values() for matrix in (layer.lora_A, layer.lora_B)}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return ParameterCount(trainable, sum(p.numel() for p in model.parameters() if p not in adapters))
