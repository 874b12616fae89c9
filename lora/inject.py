"""LoRA, the surgery: putting LoRALinear layers into a model, and taking them out again.

    plan     which layers, by dotted name          {"text_model...q_proj": Linear(...), ...}
    refuse   anything wrong with that plan, before a single module or flag has been touched
    apply    freeze the model, swap each planned layer for a LoRALinear that holds it

The second is why this file is longer than a loop with setattr. Half-injected models, and names that match too much or
nothing at all, are common ways to lose a day with LoRA, and raise no error: the model trains, and stays its base.

Which matrices? Hu et al. (2021) adapt attention weights (section 4.2), find W_q and W_v together better than one matrix
with as many parameters (7.1), and very small ranks sufficient (7.2): on language models, so a start and not the end.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from .full import FullLinear
from .layer import LoRAError, LoRALinear, check_layer, merged

Names = str | Sequence[str]
Settings = tuple[int, float, float, bool]  # rank, alpha, dropout, rslora
Plan = dict[str, tuple[Any, Any, Settings | tuple[()]]]  # name -> the layer there, class of the new one, its settings


def inject(
    model: nn.Module, targets: Names = ("q_proj", "v_proj"), rank: int = 8, alpha: float = 16.0, dropout: float = 0.0,
    rslora: bool = False, within: Names | None = None, layer: type[LoRALinear] = LoRALinear, exclude: Names = (),
    rank_pattern: Mapping[str, int] | None = None, alpha_pattern: Mapping[str, float] | None = None,
    modules_to_save: Names = (),
) -> list[str]:  # fmt: skip
    """Adapt every nn.Linear whose name is in `targets`, and freeze all other parameters of the model, in place.

    Args:
        targets, exclude: endings of dotted names, compared from dot to dot. "q_proj" means "...self_attn.q_proj" and
            neither "...q_proj_norm" nor "...mq_proj": a substring match would take them all. A string alone is a
            regular expression for such an ending; the target "all-linear" is every nn.Linear.
        rank, alpha, dropout, rslora: as in LoRALinear.
        within: keep to these dotted prefixes. "vision_model" holds "vision_model.x" but not "vision_model2.x".
        layer: LoRALinear or a subclass, called as layer(base, rank, alpha, dropout, rslora).
        rank_pattern, alpha_pattern: regex for the ending of a name -> another rank or alpha; the first that fits.
        modules_to_save: layers to train whole, as FullLinear, instead of adapting them; `within` is not asked.

    Returns: the dotted names of the adapted layers, in module order. Read them: they say what will be trained.
    Raises: LoRAError, with the model untouched, if a name matches nothing, a match is not an nn.Linear, a setting is
        out of range, or the model already holds LoRA.
    Convert the base (`model.half()`) before this call, or the adapters go along, and build the optimizer after it.
    """
    settings, ranks, alphas = (rank, alpha, dropout, rslora), rank_pattern or {}, alpha_pattern or {}
    prefixes = tuple(f"{prefix}." for prefix in ([within] if isinstance(within, str) else within or ()))
    plan = make_plan(model, layer, targets, settings, exclude, ranks, alphas, modules_to_save)
    plan = {n: s for n, s in plan.items() if s[1] is FullLinear or within is None or f"{n}.".startswith(prefixes)}
    # Each entry must pick something: one that does not is a slip of the pen, and would pass unseen.
    named, excluded, saved = ([x] if isinstance(x, str) else x for x in (targets, exclude, modules_to_save))
    whole = [name for name, site in plan.items() if site[1] is FullLinear]
    low_rank = [name for name in plan if name not in whole]
    entries = [*ranks, *alphas, *(() if targets == "all-linear" else named)]
    every = make_plan(model, layer, targets, settings, (), ranks, alphas, ())
    places = [(entries, low_rank), (saved, whole), (excluded, every)]
    idle = [entry for entries, names in places for entry in entries if not any(picks(entry, name) for name in names)]
    idle += [prefix[:-1] for prefix in prefixes if not any(f"{name}.".startswith(prefix) for name in low_rank)]
    if idle or not low_rank:
        what = f"{sorted(idle)} (targets {targets!r}, within {within!r}, whole {modules_to_save!r})"
        raise LoRAError(f"nothing in {type(model).__name__} matches {what}: look into model.named_modules()")
    check_plan(model, plan)
    for name, (base, _, numbers) in plan.items():
        if numbers and numbers[0] > (widest := min(base.weight.shape)):  # a valid layer, and one that buys nothing
            raise LoRAError(f"{name}: rank is {numbers[0]}, expected 1 to {widest}, the smaller width of the layer")
    return apply_plan(model, plan)


def picks(entry: Names, name: str) -> bool:
    """Whether a regular expression, or one of a list of names, is the ending of a dotted name, from dot to dot."""
    endings = entry if isinstance(entry, str) else "|".join(map(re.escape, entry))
    try:
        return bool(endings) and re.fullmatch(rf"(.*\.)?({endings})", name) is not None
    except re.error as error:
        raise LoRAError(f"found {entry!r}, expected a list of names or a regex ({error})") from None


def make_plan(
    model: nn.Module, layer: Any, targets: Any, settings: Settings, exclude: Any, ranks: Any, alphas: Any, saved: Any
) -> Plan:
    """What `targets` and `saved`, which comes first, pick out, in module order. Arguments as in `inject`."""
    plan: Plan = {}
    rank, alpha, dropout, rslora = settings
    for name, module in model.named_modules():
        picked = isinstance(module, nn.Linear) if targets == "all-linear" else picks(targets, name)
        if picks(saved, name):
            plan[name] = (module, FullLinear, ())
        elif picked and not picks(exclude, name):
            r = next((value for pattern, value in ranks.items() if picks(pattern, name)), rank)
            a = next((value for pattern, value in alphas.items() if picks(pattern, name)), alpha)
            plan[name] = (module, layer, (r, a, dropout, rslora))
    return plan


def check_plan(model: nn.Module, plan: Plan) -> None:
    """Raise LoRAError if the plan cannot be carried out to its end. Reads the model, changes nothing."""
    if present := lora_layers(model):
        raise LoRAError(f"the model already holds {len(present)} LoRA layers, expected none: remove or merge them")
    _build(model, plan, lambda site: check_layer(site[0], *site[2]))


def apply_plan(model: nn.Module, plan: Plan) -> list[str]:
    """Carry out a plan that has been checked. Returns the names."""
    new = _build(model, plan, lambda site: site[1](site[0], *site[2]))
    model.requires_grad_(False)  # embeddings, norms, temperature and all; the adapters come after and are trainable
    return _place(model, new)


def _build(model: nn.Module, sites: Mapping[str, Any], make: Callable[[Any], Any]) -> dict[str, Any]:
    """Return name -> make(site), with the name before errors. Nothing is placed yet."""
    if "" in sites:
        raise LoRAError("the model is itself the layer: use LoRALinear(layer), layer.base or merged(layer)")
    new = {}
    for name, site in sites.items():
        try:
            new[name] = make(site)
        except LoRAError as error:
            raise LoRAError(f"{name}: {error}") from None
    return new


def _place(model: nn.Module, new: Mapping[str, nn.Module]) -> list[str]:
    """Put each new layer in the place of the one of that name. Returns the names."""
    # Under all its names: a layer with two is one weight, used twice, and replaced under one it would become two.
    instead = {model.get_submodule(name): layer for name, layer in new.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if module in instead:
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, instead[module])
    return list(new)


def lora_layers(model: nn.Module, required: bool = False) -> dict[str, LoRALinear]:
    """The LoRALinear layers by dotted name, in module order, each once. required: raise LoRAError if there are none."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALinear)}
    if required and not layers:
        raise LoRAError(f"{type(model).__name__} holds no LoRA layers: call inject or load_adapter first")
    return layers


def remove(model: nn.Module) -> list[str]:
    """Put the original layers back, the same objects, never written to; the model stays frozen. Returns the names."""
    return _place(model, _build(model, lora_layers(model, required=True), lambda layer: layer.base))


def merge(model: nn.Module) -> list[str]:
    """Replace each LoRALinear by its `merged` nn.Linear, or none if `merged` refuses one. Returns the names."""
    return _place(model, _build(model, lora_layers(model, required=True), merged))


def set_strength(model: nn.Module, strength: float) -> None:
    """Make the model use W + strength * scaling * B A in every adapted layer, without retraining anything."""
    if not math.isfinite(strength):
        raise LoRAError(f"strength is {strength!r}, expected a finite number: 0 is the base model, 1 as trained")
    for layer in lora_layers(model, required=True).values():
        layer.strength = float(strength)


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Inside the `with`, the model is exactly its base; after it, also after an exception, as it was before. Nests."""
    before = {layer: layer.strength for layer in lora_layers(model, required=True).values()}
    set_strength(model, 0.0)
    try:
        yield
    finally:
        for layer, strength in before.items():
            layer.strength = strength


def adapter_parameters(model: nn.Module) -> list[nn.Parameter]:
    """Every lora_A and lora_B, and what a subclass adds, each once, in module order: for the optimizer."""
    return [p for layer in lora_layers(model, required=True).values() for p in own_parameters(layer).values()]


def own_parameters(layer: LoRALinear) -> dict[str, nn.Parameter]:
    """The parameters of a layer by name, without those of its base."""
    return {name: parameter for name, parameter in layer.named_parameters() if not name.startswith("base.")}


class ParameterCount(NamedTuple):
    """Numbers of parameters, shared ones counted once."""

    trainable: int  # with requires_grad
    total: int  # of the base model, adapters not included
    percent: float  # 100 * trainable / total


def count_parameters(model: nn.Module) -> ParameterCount:
    """CLIP ViT-B/32, r = 8 on q_proj and v_proj of both towers: trainable 491,520, total 151,277,313, percent 0.32."""
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    added = sum(p.numel() for layer in lora_layers(model).values() for p in own_parameters(layer).values())
    total = sum(p.numel() for p in model.parameters()) - added
    return ParameterCount(trainable, total, 100 * trainable / max(total, 1))
