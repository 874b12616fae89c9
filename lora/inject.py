"""LoRA, the surgery: putting LoRALinear layers into a model, and taking them out again.

Injection is a transaction in three movements:

    plan     which layers, by dotted name          {"text_model...q_proj": Linear(...), ...}
    refuse   anything wrong with that plan, before a single module or flag has been touched
    apply    freeze the model, swap each planned layer for a LoRALinear that holds it

The middle one is why this file is longer than a loop with setattr. Half-injected models, names that match too much
(as a substring, in the wrong tower) or nothing at all are the common ways to lose a day with LoRA, and most of them
raise no error: the model trains, and behaves like its base.

Which matrices? Hu et al. (2021) adapt only attention weights (section 4.2), find that W_q and W_v together do better
than the same budget of parameters spent on one matrix (7.1; hence the default targets), and that very small ranks
suffice (7.2). These are findings on language models: where to start, not where to stop.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from .layer import LoRAError, LoRALinear, check_layer, merged

Settings = tuple[int, float, float, bool]  # rank, alpha, dropout, rslora: one of each for a whole adapter


def inject(
    model: nn.Module,
    targets: str | Sequence[str] = ("q_proj", "v_proj"),
    rank: int = 8,
    alpha: float = 16.0,
    dropout: float = 0.0,
    rslora: bool = False,
    within: str | Sequence[str] | None = None,
    layer: type[LoRALinear] = LoRALinear,
) -> list[str]:
    """Adapt every nn.Linear whose name is in `targets`, and freeze all other parameters of the model, in place.

    Args:
        targets: compared, whole, with the last part of the dotted name. "q_proj" means "...self_attn.q_proj" and
            neither "...q_proj_norm" nor "...mq_proj": a substring match would take them all.
        rank, alpha, dropout, rslora: as in LoRALinear, the same for every layer.
        within: keep to these dotted prefixes. "vision_model" holds "vision_model.x" but not "vision_model2.x".
        layer: LoRALinear or a subclass, called as layer(base, rank, alpha, dropout, rslora).

    Returns: the dotted names of the adapted layers, in module order. Read them: they say what will be trained.
    Raises: LoRAError, with the model untouched, if a target or prefix matches nothing, a match is not an nn.Linear,
        a setting is out of range, or the model already holds LoRA.

    Convert the base (`model.half()`) before this call, or the adapters go along; build the optimizer after it, from
    `adapter_parameters(model)`: one built before holds the wrong parameters.
    """
    plan, settings = _plan(model, targets, within), (rank, alpha, dropout, rslora)
    check_plan(model, plan, settings)
    return apply_plan(model, plan, settings, layer)


def _plan(model: nn.Module, targets: str | Sequence[str], within: str | Sequence[str] | None) -> dict[str, nn.Module]:
    """What `targets` and `within` pick out, in module order; each of their entries must pick something."""
    # A lone string stands for a list of one: taken as a sequence it would be a list of letters.
    wanted = [targets] if isinstance(targets, str) else list(targets)
    prefixes = [within] if isinstance(within, str) else list(within or ())
    plan: dict[str, nn.Module] = {}
    idle = {*wanted, *prefixes}  # what is still in here at the end has matched nothing
    for name, module in model.named_modules():
        target = name.rpartition(".")[2]
        inside = [prefix for prefix in prefixes if f"{name}.".startswith(f"{prefix}.")]
        if target in wanted and (inside or within is None):
            plan[name] = module
            idle -= {target, *inside}
    if idle or not plan:
        what = f"{sorted(idle)} (targets {wanted}, within {within!r})"
        raise LoRAError(f"nothing in {type(model).__name__} matches {what}: look into model.named_modules()")
    return plan


def check_plan(model: nn.Module, plan: Mapping[str, nn.Module], settings: Settings) -> None:
    """Raise LoRAError if the plan cannot be carried out to its end. Reads the model, changes nothing."""
    if present := lora_layers(model):
        raise LoRAError(f"the model already holds {len(present)} LoRA layers, expected none: remove or merge them")
    _build(model, plan, lambda base: check_layer(base, *settings))


def apply_plan(
    model: nn.Module, plan: Mapping[str, nn.Module], settings: Settings, layer: type[LoRALinear] = LoRALinear
) -> list[str]:
    """Carry out a plan that has been checked. Returns the names."""
    new = _build(model, plan, lambda base: layer(base, *settings))
    model.requires_grad_(False)  # embeddings, norms, temperature and all; the adapters come after and are trainable
    return _place(model, plan, new)


def _build(model: nn.Module, layers: Mapping[str, Any], make: Callable[[Any], Any]) -> dict[nn.Module, Any]:
    """Return layer -> make(layer), with the layer's name before errors. Nothing is placed yet."""
    if model in layers.values():
        raise LoRAError("the model is itself the layer: use LoRALinear(layer), layer.base or merged(layer)")
    new = {}
    for name, layer in layers.items():
        try:
            new[layer] = make(layer)
        except LoRAError as error:
            raise LoRAError(f"{name}: {error}") from None
    return new


def _place(model: nn.Module, layers: Mapping[str, Any], new: Mapping[nn.Module, nn.Module]) -> list[str]:
    """Put new[layer] in the place of each layer. Returns the names."""
    # Under all its names: a layer with two is one weight, used twice, and replaced under one it would become two.
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in new:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, new[module])
    return list(layers)


def lora_layers(model: nn.Module, required: bool = False) -> dict[str, LoRALinear]:
    """The LoRALinear layers of a model by dotted name, in module order, each once.

    required: raise LoRAError if there are none. Empty, a second merge would do nothing and be believed.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if required and not layers:
        raise LoRAError(
            f"{type(model).__name__} holds no LoRA layers: call inject(model) or load_adapter(model, folder)"
        )
    return layers


def remove(model: nn.Module) -> list[str]:
    """Put the original layers back, the same objects, never written to; the model stays frozen. Returns the names."""
    layers = lora_layers(model, required=True)
    return _place(model, layers, _build(model, layers, lambda layer: layer.base))


def merge(model: nn.Module) -> list[str]:
    """Replace each LoRALinear by its `merged` nn.Linear: the adapted model, at the speed and size of the base.

    Returns the names. Raises LoRAError, with the model untouched, if `merged` refuses a layer.
    """
    layers = lora_layers(model, required=True)
    return _place(model, layers, _build(model, layers, merged))


def set_strength(model: nn.Module, strength: float) -> None:
    """Make the model use W + strength * scaling * B A in every adapted layer, without retraining anything.

    Between 0 (the base) and 1 (as trained) this walks the straight line between the two sets of weights; a point on it
    often keeps more of the base's old skill than 1 does. Raises LoRAError for a strength that is not finite.
    """
    if not math.isfinite(strength):
        raise LoRAError(f"strength is {strength!r}, expected a finite number: 0 is the base model, 1 as trained")
    for layer in lora_layers(model, required=True).values():
        layer.strength = float(strength)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the model is exactly its base; after it, also after an exception, as it was before. Nests."""
    before = {layer: layer.strength for layer in lora_layers(model, required=True).values()}
    for layer in before:
        layer.strength = 0.0
    try:
        yield
    finally:
        for layer, strength in before.items():
            layer.strength = strength


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every lora_A (r, in) and lora_B (out, r), each once, in module order: what belongs in the optimizer.

    Of a subclass of LoRALinear also the parameters that it adds.
    """
    return [
        parameter
        for layer in lora_layers(model, required=True).values()
        for parameter in own_parameters(layer).values()
    ]


def own_parameters(layer: LoRALinear) -> dict[str, nn.Parameter]:
    """The parameters of a layer by name, without those of its base."""
    return {name: parameter for name, parameter in layer.named_parameters() if not name.startswith("base.")}


class ParameterCount(NamedTuple):
    """Numbers of parameters."""

    trainable: int  # with requires_grad
    total: int  # of the base model, adapters not included
    percent: float  # 100 * trainable / total


def count_parameters(model: nn.Module) -> ParameterCount:
    """Count parameters, shared ones once; the total is the one that the base model's own paper reports.

    CLIP ViT-B/32 with r = 8 on q_proj and v_proj of both towers: trainable 491,520, total 151,277,313, percent 0.32.
    """
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = sum(p.numel() for layer in lora_layers(model).values() for p in own_parameters(layer).values())
    total = sum(p.numel() for p in model.parameters()) - added
    return ParameterCount(trainable, total, 100 * trainable / max(total, 1))
