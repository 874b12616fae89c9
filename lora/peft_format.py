"""LoRA, the file format: an adapter on disk, in the layout of Hugging Face PEFT, so that either side reads the other's.

    folder/
        adapter_config.json         r, lora_alpha, target_modules, use_rslora, ...
        adapter_model.safetensors   base_model.model.<dotted name>.lora_A.weight  (r, in)
                                    base_model.model.<dotted name>.lora_B.weight  (out, r)

Loaded leniently it goes wrong in silence: where names differ, each B stays zero and the "adapted" model is the base. So
loading is strict: the file must hold exactly the tensors that config and model call for; a field that changes the
mathematics is understood or refused by name; all before the model is touched. And nothing is unpickled: a pickle can
run code, a safetensors file only holds numbers.
"""

import copy
import json
import os
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .full import FullLinear
from .inject import Plan, apply_plan, check_plan, lora_layers, make_plan, own_parameters
from .layer import LoRAError, LoRALinear

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# The fields of PEFT's LoraConfig that are acted on here, with their values where absent; those that are mere notes (the
# last three PEFT reads only if others ask for it); and harmless values of some more: how A and B began does not matter,
# but for schemes (PiSSA, OLoRA, ...) that alter W too. Anything else is refused unless empty, tomorrow's fields too.
USED: dict[str, Any] = {"r": None, "lora_alpha": None, "lora_dropout": 0.0, "use_rslora": False}
USED |= dict.fromkeys("target_modules exclude_modules modules_to_save rank_pattern alpha_pattern".split())
USED |= dict.fromkeys(["layers_to_transform", "layers_pattern"])
NOTES = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
NOTES |= {"megatron_core", "qalora_group_size", "eva_config"}
INITS = (True, False, "gaussian", "orthogonal", "eva")
HARMLESS: dict[str, tuple[object, ...]] = {"peft_type": (), "bias": ("none",), "init_lora_weights": INITS}
EMPTY: tuple[object, ...] = (None, False, "", [], {})


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], base_model: str | None = None) -> None:
    """Write the adapters of `model` into `folder`, which is made if need be; other files in it are left alone.

    Writes: what each adapted layer has trained, in fp32; the settings, with a pattern for each layer whose rank or
        alpha is not the most frequent one; and the name of the base model, such as "openai/clip-vit-base-patch32".
    Raises: LoRAError if there is no LoRA, the model is wrapped (its names would be the wrapper's), a tensor is not
        finite, a strength is not 1, layers differ in class, dropout or rslora, or PEFT's format cannot hold them.
    """
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        raise LoRAError(f"found a {type(model).__name__}, expected the model inside: pass its ._orig_mod or .module")
    every = lora_layers(model, required=True)
    layers = {name: layer for name, layer in every.items() if type(layer) is not FullLinear}
    found = {(type(layer), layer.dropout, layer.rslora) for layer in layers.values()}
    if len(found) != 1 or any(layer.strength != 1 for layer in every.values()):
        sets = sorted({(type(x).__name__, x.dropout, x.rslora, x.strength) for x in every.values()})
        raise LoRAError(f"found (class, dropout, rslora, strength) = {sets}, expected one set for LoRA, strength 1")
    kind, dropout, rslora = found.pop()
    own = {name for layer in layers.values() for name in own_parameters(layer)}
    if "peft_fields" not in vars(kind) or not own <= kind.peft_tensors.keys():  # PEFT would take it for plain LoRA
        what = f"{kind.__name__}, a subclass of LoRALinear, with the parameters {sorted(own)}"
        raise LoRAError(f"found {what}, expected `peft_fields` of its own, and `peft_tensors` that name them all")
    whole = [name for name in every if name not in layers]
    if [name for name, _ in model.named_modules() if name.endswith(tuple(whole))] != whole:
        raise LoRAError(f"found {whole} trained whole, but PEFT would select every layer whose name ends like that")
    rank, alpha = (Counter(getattr(x, n) for x in layers.values()).most_common(1)[0][0] for n in ("rank", "alpha"))
    # Last names, if they select these layers and no other; else a regex of the full names, which always does.
    leaves = sorted({name.rpartition(".")[2] for name in layers})
    by_leaf = list(_plan(model, USED | {"target_modules": leaves})) == list(layers)
    config = kind.peft_fields | {
        "base_model_name_or_path": base_model,
        "auto_mapping": {"base_model_class": type(model).__name__, "parent_library": type(model).__module__},
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": leaves if by_leaf else _exactly(*layers),
        "rank_pattern": {_exactly(name): x.rank for name, x in layers.items() if x.rank != rank},
        "alpha_pattern": {_exactly(name): x.alpha for name, x in layers.items() if x.alpha != alpha},
        "modules_to_save": whole or None,
    }
    parameters = _tensors(every)
    tensors = {key: parameter.detach().float().cpu().contiguous() for key, parameter in parameters.items()}
    _check_tensors(tensors, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    # Written aside, then moved: a save cut short leaves the old files. Config last, the sign of a whole one.
    files = {WEIGHTS_FILE: save(tensors, {"format": "pt"}), CONFIG_FILE: json.dumps(config, indent=2).encode()}
    Path(folder).mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".saving-", dir=folder) as part:
        for name, content in files.items():
            with open(Path(part, name), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # without it, a power cut can leave the new name on an empty file
        for name in files:
            os.replace(Path(part, name), Path(folder, name))


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Inject as the config in `folder` says, then fill the adapter, in fp32, from its tensors; freezes all else.

    Returns: the dotted names of the adapted layers, in module order.
    Raises: LoRAError, with the model untouched, if a file is missing, damaged or a pickle; the config asks for what is
        not implemented here; the model holds LoRA already; or a tensor is missing, unexpected, misshapen or not finite.
    """
    config, tensors, kind = _read(Path(folder))
    plan = _plan(model, config, kind)
    check_plan(model, plan)
    # Layers without memory (device "meta") tell which tensors the file must hold before the model is touched.
    blank = {name: copy.deepcopy(base).to("meta") for name, (base, *_) in plan.items()}
    expected = _tensors({name: new(blank[name], *settings) for name, (_, new, settings) in plan.items()})
    _check_tensors(tensors, {key: tuple(parameter.shape) for key, parameter in expected.items()})
    names = apply_plan(model, plan)
    with torch.no_grad():
        for key, parameter in _tensors(lora_layers(model, required=True)).items():
            parameter.copy_(tensors[key])
    return names


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], type[LoRALinear]]:
    """Config, tensors and layer class, with every field of the config either used or known not to matter."""
    inside = sorted(file.parent.name for file in folder.glob(f"*/{CONFIG_FILE}"))
    if inside and not (folder / CONFIG_FILE).is_file():
        raise LoRAError(f"{folder} holds no adapter, but its folders {', '.join(inside)} do: name one of them")
    try:
        config = {"peft_type": None} | USED | json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:  # TypeError: JSON, but no object
        expected = f"{CONFIG_FILE} and {WEIGHTS_FILE}, whole; pickles (.bin, .pt) can run code and are never opened"
        raise LoRAError(f"cannot read the adapter in {folder} ({error}): expected {expected}") from None
    kinds = [LoRALinear]
    for kind in kinds:  # grows while it is walked, so that it holds subclasses of subclasses too
        kinds += kind.__subclasses__()
    fitting = [kind for kind in kinds if "peft_fields" in vars(kind) and kind.peft_fields.items() <= config.items()]
    # The one with the most fields; of two that have the same, such as a notebook's cell run twice, the later.
    kind = max(reversed(fitting), key=lambda kind: len(kind.peft_fields), default=LoRALinear)
    for field, value in config.items():  # peft_type comes first: it explains all the rest
        known = (field, value) in kind.peft_fields.items() or field in USED or field in NOTES
        if not known and value not in HARMLESS.get(field, EMPTY):
            raise LoRAError(f"{folder} asks for {field} = {value!r}: load it by PEFT, or import a class for it first")
    return config, tensors, kind


def _plan(model: nn.Module, config: Mapping[str, Any], kind: type[LoRALinear] = LoRALinear) -> Plan:
    """The layers that a config of PEFT selects, with their settings; LoRAError where a field cannot be understood."""
    settings = (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"])
    targets, numbers = config["target_modules"], config["layers_to_transform"]
    try:
        if not targets:
            raise TypeError("it selects nothing")
        patterns = (config["rank_pattern"] or {}, config["alpha_pattern"] or {})
        whole = "|".join(f".*{re.escape(name)}" for name in config["modules_to_save"] or ())  # the end of any name
        plan = make_plan(model, kind, targets, settings, config["exclude_modules"] or (), *patterns, whole)
        if numbers is None or numbers == []:
            return plan
        names, wanted = config["layers_pattern"] or r"[^.]*", [numbers] if isinstance(numbers, int) else list(numbers)
        before = names if isinstance(names, str) else "|".join(names)  # the number of the layer; in PEFT's default any
        found = {name: re.match(rf".*\.(?:{before})\.(\d+)\.", name) for name in plan}
        chosen = {name for name, match in found.items() if match and int(match.groups()[-1]) in wanted}
        return {name: site for name, site in plan.items() if name in chosen or site[1] is FullLinear}
    except (re.error, TypeError, AttributeError) as error:
        fields = {field: config[field] for field in USED if config[field] not in EMPTY}
        raise LoRAError(f"found {fields}, expected target_modules, all as PEFT writes them ({error})") from None


def _exactly(*names: str) -> str:
    """A regular expression for these dotted names, and for no longer ones that end like them."""
    return "|".join("^" + re.escape(name) for name in names)


def _tensors(layers: Mapping[str, LoRALinear]) -> dict[str, nn.Parameter]:
    """Name in the file -> parameter. "base_model.model" is PEFT's wrapper, in its names although there is none here."""
    return {
        f"base_model.model.{name}.{layer.peft_tensors[own]}": parameter
        for name, layer in layers.items()
        for own, parameter in own_parameters(layer).items()
    }


def _check_tensors(tensors: Mapping[str, Tensor], shapes: Mapping[str, object]) -> None:
    """Refuse unless these are exactly the tensors that there must be, of these shapes, all finite floats."""
    found: dict[str, object] = {key: tuple(tensor.shape) for key, tensor in tensors.items()}
    for key, tensor in tensors.items():
        if not tensor.is_floating_point() or not tensor.float().isfinite().all():
            found[key] = f"NaN, inf or no floats ({tensor.dtype})"
    wrong = [key for key in {**shapes, **found} if found.get(key) != shapes.get(key)]
    if wrong or not shapes:
        first = "; ".join(f"{k} found {found.get(k, 'none')}, expected {shapes.get(k, 'none')}" for k in wrong[:3])
        what = f"{len(wrong)} tensors are not those that config and model call for ({first})"
        raise LoRAError(f"{what}: the adapter is for another model or rank, or damaged, or has diverged in training")
