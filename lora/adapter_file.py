"""LoRA, the file: an adapter on disk, in the layout of Hugging Face PEFT, so that either side reads the other's.

    folder/
        adapter_config.json         r, lora_alpha, target_modules, use_rslora, ...
        adapter_model.safetensors   base_model.model.<dotted name>.lora_A.weight  (r, in)
                                    base_model.model.<dotted name>.lora_B.weight  (out, r)

A few megabytes that mean nothing without their base model, and that go wrong in silence if loaded leniently: when the
names do not match, a non-strict load leaves every B at zero and the "adapted" model is the base. So loading is strict.
Every field that changes the mathematics is understood or refused by name, every tensor is accounted for, all of it
before the model is touched. And nothing is unpickled: a pickle can run code, a safetensors file only holds numbers.
"""

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from .inject import Settings, apply_plan, check_plan, lora_layers, require_layers, require_unadapted
from .layer import LoRAError, LoRALinear

CONFIG_FILE, WEIGHTS_FILE, KEY_PREFIX = "adapter_config.json", "adapter_model.safetensors", "base_model.model."
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

# The fields of PEFT's LoraConfig that are implemented here, with the types that they may have in the file.
UNDERSTOOD: dict[str, tuple[type, ...]] = {
    "r": (int,),
    "lora_alpha": (int, float),
    "target_modules": (list, str),
    "lora_dropout": (int, float),
    "use_rslora": (bool,),
    "rank_pattern": (dict, type(None)),
    "alpha_pattern": (dict, type(None)),
}
# Values accepted in other fields, and fields that are mere notes. How A and B were initialised no longer matters once
# they are trained, except for schemes (PiSSA, OLoRA, ...) that alter W too; those are not in the list. A field named
# nowhere here is refused unless it is empty, so that a feature invented tomorrow cannot be overlooked.
ACCEPTED: dict[str, tuple[object, ...]] = {
    "peft_type": ("LORA",),
    "bias": ("none",),
    "init_lora_weights": (True, False, "gaussian", "orthogonal", "eva"),
}
NOTES = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
NOTES |= {"megatron_core", "qalora_group_size", "eva_config"}  # acted on by PEFT only if other fields ask for it
EMPTY: tuple[object, ...] = (None, False, "", [], {})


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], base_model: str | None = None) -> None:
    """Write the adapters of `model` into `folder`, which is made if need be; other files in it are left alone.

    Args:
        base_model: what the adapter belongs to, for instance "openai/clip-vit-base-patch32"; a note for the reader.

    Writes: A (r, in) and B (out, r) of every adapted layer in fp32, under names relative to `model` (hence no wrapper
        of it is accepted), and a config with the commonest rank and alpha plus patterns for the layers that differ.
    Raises: LoRAError if there is no LoRA, the model is wrapped, a tensor is not finite, a strength is not 1, or dropout
        or rslora differ between layers (the format has one of each).
    """
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        raise LoRAError(f"found a {type(model).__name__}, expected the model inside: pass its ._orig_mod or .module")
    layers = require_layers(model)
    config = json.dumps(_config(model, layers, base_model), indent=2, sort_keys=True)
    tensors = {key: t.detach().float().cpu().contiguous() for key, t in _tensors(layers).items()}
    _refuse_non_finite(tensors)
    Path(folder).mkdir(parents=True, exist_ok=True)
    _write_whole(Path(folder), {WEIGHTS_FILE: to_safetensors(tensors, {"format": "pt"}), CONFIG_FILE: config.encode()})


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Inject as the config in `folder` says, then fill every A and B from its tensors; freezes the rest of the model.

    fp16 and bf16 tensors are read into fp32 parameters. The adapters are trainable afterwards, with the file's dropout.

    Returns: the dotted names of the adapted layers, in module order.
    Raises: LoRAError, with the model untouched, if a file is missing, damaged or a pickle; if the config asks for
        something not implemented here; if the model already holds LoRA, or is another model than the adapter's; and for
        any tensor that is missing, unexpected, misshapen, of a non-float type or not finite.
    """
    require_unadapted(model)
    config = _read_config(Path(folder))
    tensors = _read_tensors(Path(folder))
    modules = dict(model.named_modules())
    paths = dict.fromkeys(re.sub(r"\.lora_[^.]*(\.weight)?$", "", key.removeprefix(KEY_PREFIX)) for key in tensors)
    if foreign := [path for path in paths if path not in modules]:
        raise LoRAError(f"the adapter is for another model: {type(model).__name__} has no module {_some(foreign)}")
    plan = _plan(model, config)
    check_plan(model, plan)
    expected: dict[str, tuple[int, ...]] = {}
    for name, settings in plan.items():
        out_features, in_features = modules[name].weight.shape
        expected[_key(name, "A")] = (settings.rank, in_features)
        expected[_key(name, "B")] = (out_features, settings.rank)
    _check_tensors(tensors, expected)
    names = apply_plan(model, plan)
    with torch.no_grad():
        for key, parameter in _tensors(lora_layers(model)).items():
            parameter.copy_(tensors[key])
    return names


def _key(name: str, matrix: str) -> str:
    """The tensor's name in the file. PEFT's two wrappers, base_model and model, are in it although we have none."""
    return f"{KEY_PREFIX}{name}.lora_{matrix}.weight"


def _tensors(layers: Mapping[str, LoRALinear]) -> dict[str, Tensor]:
    """Every A (r, in) and B (out, r) under its name in the file."""
    pairs = ({_key(name, "A"): layer.lora_A, _key(name, "B"): layer.lora_B} for name, layer in layers.items())
    return {key: tensor for pair in pairs for key, tensor in pair.items()}


def _config(model: nn.Module, layers: Mapping[str, LoRALinear], base_model: str | None) -> dict[str, Any]:
    """The config that describes these layers, as PEFT would write it."""
    if faint := [name for name, layer in layers.items() if layer.strength != 1]:
        raise LoRAError(f"strength is not 1 in {_some(faint)} and the file cannot hold it: call set_strength(model, 1)")
    common = {(layer.dropout, layer.rslora) for layer in layers.values()}
    if len(common) > 1:
        raise LoRAError(f"(dropout, rslora) differ between layers, {sorted(common)}: the file holds one pair, use one")
    ((dropout, rslora),) = common
    rank = Counter(layer.rank for layer in layers.values()).most_common(1)[0][0]
    alpha = Counter(layer.alpha for layer in layers.values()).most_common(1)[0][0]
    return {
        "peft_type": "LORA",
        "task_type": None,  # a task would wrap the model in a class with another forward signature
        "base_model_name_or_path": base_model,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        "target_modules": _targets(model, layers),
        # Keys are regular expressions that PEFT may match after any prefix: hence the anchor and the escapes.
        "rank_pattern": {f"^{re.escape(n)}": layer.rank for n, layer in layers.items() if layer.rank != rank},
        "alpha_pattern": {f"^{re.escape(n)}": layer.alpha for n, layer in layers.items() if layer.alpha != alpha},
        "bias": "none",
        "modules_to_save": None,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def _targets(model: nn.Module, layers: Mapping[str, LoRALinear]) -> list[str] | str:
    """The shortest `target_modules` that selects these layers and no other module: leaf names, paths, or a regex."""
    inner = {layer.base for layer in layers.values()}  # "...q_proj.base", which a model without LoRA does not have
    candidates = [name for name, module in model.named_modules() if module not in inner]
    leaves, paths = sorted({name.rpartition(".")[2] for name in layers}), list(layers)
    for targets in (leaves, paths):
        if [name for name in candidates if _is_target(name, targets)] == paths:
            return targets
    return "|".join(re.escape(path) for path in paths)


def _is_target(name: str, targets: list[str] | str) -> bool:
    """PEFT's rule: a string is a regex for the whole name; a list holds names or dotted endings of names."""
    if isinstance(targets, str):
        return re.fullmatch(targets, name) is not None
    return any(name == target or name.endswith(f".{target}") for target in targets)


def _plan(model: nn.Module, config: Mapping[str, Any]) -> dict[str, Settings]:
    """The settings of each site that the config selects, in module order."""
    ranks, alphas = config.get("rank_pattern") or {}, config.get("alpha_pattern") or {}
    dropout, rslora = config.get("lora_dropout", 0.0), config.get("use_rslora", False)

    def pick(patterns: Mapping[str, Any], name: str, default: Any) -> Any:
        return next((value for key, value in patterns.items() if re.match(rf"(.*\.)?({key})$", name)), default)

    try:
        sites = [name for name, _ in model.named_modules() if _is_target(name, config["target_modules"])]
        plan = {
            name: Settings(pick(ranks, name, config["r"]), pick(alphas, name, config["lora_alpha"]), dropout, rslora)
            for name in sites
        }
    except re.error as error:
        raise LoRAError(f"{CONFIG_FILE} holds a pattern that is not a regular expression: {error}") from None
    if not plan:
        raise LoRAError(f"target_modules {config['target_modules']!r} match no module of {type(model).__name__}")
    return plan


def _read_config(folder: Path) -> dict[str, Any]:
    """The parsed config, with every field either understood or known not to matter."""
    path = folder / CONFIG_FILE
    if not path.is_file():
        what = f"has no {CONFIG_FILE}" if folder.is_dir() else "is not a folder"
        raise LoRAError(f"{folder} {what}: expected a folder written by save_adapter or by PEFT's save_pretrained")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise LoRAError(f"{path} is not JSON ({error}): save the adapter again") from None
    if not isinstance(config, dict):
        raise LoRAError(f"{path} holds a JSON {type(config).__name__}, expected an object: save the adapter again")
    for field, value in ({"peft_type": None} | config).items():  # its type first: it explains all the rest
        if field not in UNDERSTOOD and field not in NOTES and value not in ACCEPTED.get(field, EMPTY):
            raise LoRAError(f"{path} asks for {field} = {value!r}, which is not implemented here: load it with PEFT")
    for field, types in UNDERSTOOD.items():
        if (field in config or field in ("r", "lora_alpha", "target_modules")) and type(config.get(field)) not in types:
            expected = " or ".join(t.__name__ for t in types)
            raise LoRAError(f"{path}: {field} is {config.get(field)!r}, expected {expected}: save the adapter again")
    return config


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    """The tensors of the safetensors file, on the CPU; there is no second format to fall back on."""
    path = folder / WEIGHTS_FILE
    if not path.is_file():
        pickles = sorted(p.name for p in folder.iterdir() if p.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        hint = f"only {pickles[0]}, a pickle, which can run code and is never opened" if pickles else "no weights"
        raise LoRAError(f"{folder} has {hint}; expected {WEIGHTS_FILE}: save the adapter in the safetensors format")
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise LoRAError(f"{path} is damaged ({error}): copy or save it again") from None


def _check_tensors(tensors: Mapping[str, Tensor], expected: Mapping[str, tuple[int, ...]]) -> None:
    """Refuse unless the file holds exactly these tensors, of these shapes, all finite floats."""
    if missing := [key for key in expected if key not in tensors]:
        raise LoRAError(f"the adapter lacks tensors that its config calls for: {_some(missing)}")
    if unexpected := [key for key in tensors if key not in expected]:
        raise LoRAError(f"the adapter holds tensors that its config does not call for: {_some(unexpected)}")
    if crooked := [f"{k} {tuple(t.shape)} not {expected[k]}" for k, t in tensors.items() if t.shape != expected[k]]:
        raise LoRAError(f"shapes differ, so the adapter is for another model or rank: {_some(crooked)}")
    if odd := [f"{key} {tensor.dtype}" for key, tensor in tensors.items() if tensor.dtype not in FLOATS]:
        raise LoRAError(f"expected floating-point tensors of 16, 32 or 64 bits, found {_some(odd)}")
    _refuse_non_finite(tensors)


def _refuse_non_finite(tensors: Mapping[str, Tensor]) -> None:
    if bad := [key for key, tensor in tensors.items() if not torch.isfinite(tensor).all()]:
        raise LoRAError(f"found NaN or inf in {_some(bad)}, expected finite numbers: go back to an earlier adapter")


def _some(names: Iterable[str]) -> str:
    """The first few of many names, for a sentence that a person reads."""
    first, rest = list(names)[:4], len(list(names)) - 4
    return ", ".join(first) + (f" and {rest} more" if rest > 0 else "")


def _write_whole(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all beside their final names and only then move each into place, in the order given.

    A save cut short (disk full, session lost) leaves the previous adapter as it was. Two files cannot be moved as one,
    so the order matters: weights first, config last. In a new folder the config is then the sign of a complete save.
    In an old one the instant between holds new weights under the old config, which is the same text throughout one
    training run; where the ranks differ, strict loading refuses the pair.
    """
    temporary = {name: folder / f"{name}.{os.getpid()}.tmp" for name in files}
    try:
        for name, content in files.items():
            with open(temporary[name], "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # without it, a power cut can leave the new name on an empty file
        for name in files:
            os.replace(temporary[name], folder / name)
    finally:
        for path in temporary.values():
            path.unlink(missing_ok=True)
