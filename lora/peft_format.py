"""LoRA, the file format: an adapter on disk, in the layout of Hugging Face PEFT, so that either side reads the other's.

    folder/
        adapter_config.json         r, lora_alpha, target_modules, use_rslora, ...
        adapter_model.safetensors   base_model.model.<dotted name>.lora_A.weight  (r, in)
                                    base_model.model.<dotted name>.lora_B.weight  (out, r)

A few megabytes that mean nothing without their base model, and that go wrong in silence if loaded leniently: when the
names do not match, a non-strict load leaves every B at zero and the "adapted" model is the base. So loading is strict.
Config and model together say which tensors there must be, and the file must hold exactly those; a config field that
changes the mathematics is understood or refused by name; all of it before the model is touched. And nothing is
unpickled: a pickle can run code, a safetensors file only holds numbers.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from .inject import apply_plan, check_plan, lora_layers, own_parameters
from .layer import LoRAError, LoRALinear

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# The fields of PEFT's LoraConfig that are acted on here, with their values where absent; those that are mere notes (the
# last three PEFT reads only if others ask for it); and harmless values of some more. How A and B began does not matter
# once they are trained, but for schemes (PiSSA, OLoRA, ...) that alter W too. Anything else is refused unless empty: no
# feature invented tomorrow can be overlooked.
USED = {"r": None, "lora_alpha": None, "target_modules": None, "lora_dropout": 0.0, "use_rslora": False}
NOTES = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
NOTES |= {"megatron_core", "qalora_group_size", "eva_config"}
INITS = (True, False, "gaussian", "orthogonal", "eva")
HARMLESS: dict[str, tuple[object, ...]] = {"peft_type": (), "bias": ("none",), "init_lora_weights": INITS}
EMPTY: tuple[object, ...] = (None, False, "", [], {})


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], base_model: str | None = None) -> None:
    """Write the adapters of `model` into `folder`, which is made if need be; other files in it are left alone.

    Writes: A (r, in) and B (out, r) of every adapted layer in fp32, the settings that all layers share, and the name of
        the base model, for instance "openai/clip-vit-base-patch32", as a note.
    Raises: LoRAError if there is no LoRA, the model is wrapped (its names would be the wrapper's), a tensor is not
        finite, a strength is not 1, layers built by hand differ in class, rank, alpha, dropout or rslora, or their
        class is a subclass of LoRALinear that does not state how PEFT's file holds it.
    """
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        raise LoRAError(f"found a {type(model).__name__}, expected the model inside: pass its ._orig_mod or .module")
    layers = lora_layers(model, required=True)
    found = sorted({(x.rank, x.alpha, x.dropout, x.rslora, x.strength) for x in layers.values()})
    rank, alpha, dropout, rslora, strength = found[0]
    kind = _check_kind(layers)
    if len(found) > 1 or strength != 1:
        what = f"(rank, alpha, dropout, rslora, strength) = {found}"
        raise LoRAError(f"found {what}, expected one set for all layers, with strength 1: the file holds no more")
    names, leaves = list(layers), sorted({name.rpartition(".")[2] for name in layers})
    config = kind.peft_fields | {
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        # Last names, if they select these layers and no other; else a regex of the full names, which always does.
        "target_modules": leaves if list(_select(model, leaves)) == names else "|".join(map(re.escape, names)),
    }
    parameters = _tensors(layers)
    tensors = {key: parameter.detach().float().cpu().contiguous() for key, parameter in parameters.items()}
    _check_tensors(tensors, {key: tuple(tensor.shape) for key, tensor in tensors.items()})
    files = {WEIGHTS_FILE: save(tensors, {"format": "pt"}), CONFIG_FILE: json.dumps(config, indent=2).encode()}
    _write_whole(Path(folder), files)


def load_adapter(model: nn.Module, folder: str | os.PathLike[str]) -> list[str]:
    """Inject as the config in `folder` says, then fill every A and B from its tensors; freezes the rest of the model.

    fp16 and bf16 tensors are read into fp32 parameters, trainable, with the file's dropout.

    Returns: the dotted names of the adapted layers, in module order.
    Raises: LoRAError, with the model untouched, if a file is missing, damaged or a pickle; if the config asks for
        something not implemented here; if the model holds LoRA already or is not the adapter's; and for any tensor
        that is missing, unexpected, misshapen, of a non-float type or not finite.
    """
    config, tensors, kind = _read(Path(folder))
    settings = (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"])
    plan: dict[str, Any] = _select(model, config["target_modules"])
    check_plan(model, plan, settings)
    # Layers without memory (device "meta") tell which tensors the file must hold before the model is touched.
    blank = {name: nn.Linear(base.in_features, base.out_features, device="meta") for name, base in plan.items()}
    expected = _tensors({name: kind(base, *settings) for name, base in blank.items()})
    _check_tensors(tensors, {key: tuple(parameter.shape) for key, parameter in expected.items()})
    names = apply_plan(model, plan, settings, kind)
    with torch.no_grad():
        for key, parameter in _tensors(lora_layers(model, required=True)).items():
            parameter.copy_(tensors[key])
    return names


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], type[LoRALinear]]:
    """Config, tensors and layer class, with every field of the config either used or known not to matter."""
    try:
        config = {"peft_type": None} | USED | json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:  # TypeError: JSON, but no object
        raise LoRAError(
            f"cannot read the adapter in {folder} ({error}): expected {CONFIG_FILE} and {WEIGHTS_FILE}, whole, as "
            "save_adapter or PEFT's save_pretrained write them; pickles (.bin, .pt) can run code and are never opened"
        ) from None
    # The class whose fields the config has; a subclass, which has more of them, before LoRALinear.
    kinds = [LoRALinear]
    for kind in kinds:  # grows while it is walked, so that it holds subclasses of subclasses too
        kinds += kind.__subclasses__()
    fitting = [kind for kind in kinds if "peft_fields" in vars(kind) and kind.peft_fields.items() <= config.items()]
    # Reversed: of two classes with the same fields, such as a notebook's cell run twice, the later one.
    kind = max(reversed(fitting), key=lambda kind: len(kind.peft_fields), default=LoRALinear)
    for field, value in config.items():  # peft_type comes first: it explains all the rest
        known = (field, value) in kind.peft_fields.items() or field in USED or field in NOTES
        if not known and value not in HARMLESS.get(field, EMPTY):
            raise LoRAError(
                f"{folder} asks for {field} = {value!r}: load it with PEFT, or import its layer class first"
            )
    return config, tensors, kind


def _check_kind(layers: Mapping[str, LoRALinear]) -> type[LoRALinear]:
    """The class of all layers; LoRAError unless it is one, and PEFT's file can hold it."""
    kinds = {type(layer) for layer in layers.values()}
    kind = kinds.pop()
    own = {name for layer in layers.values() for name in own_parameters(layer)}
    if kinds:
        raise LoRAError(f"found layers of the classes {kind.__name__} and {kinds.pop().__name__}, expected one class")
    if "peft_fields" not in vars(kind):
        raise LoRAError(
            f"found {kind.__name__}, a subclass of LoRALinear, expected a class that states `peft_fields`: PEFT would "
            "load its file as plain LoRA. For a method of PEFT state the fields of its config and `peft_tensors`, "
            f"for another one peft_fields = {{'peft_type': '{kind.__name__.upper()}'}}, which PEFT refuses by that name"
        )
    if own != kind.peft_tensors.keys():
        raise LoRAError(
            f"found {kind.__name__} with the parameters {sorted(own)}, expected {sorted(kind.peft_tensors)}: state the "
            "tensor in PEFT's file of each of them in `peft_tensors`"
        )
    return kind


def _select(model: nn.Module, targets: Any) -> dict[str, nn.Module]:
    """What `target_modules` mean to PEFT: a string is a regex for whole names, a list holds dotted endings of names."""
    try:
        regex = targets if isinstance(targets, str) else "|".join(rf"(.*\.)?{re.escape(end)}" for end in targets)
        if not targets:
            raise TypeError("it selects nothing")
        return {name: module for name, module in model.named_modules() if re.fullmatch(regex, name)}
    except (re.error, TypeError) as error:
        raise LoRAError(f"target_modules is {targets!r}, expected a list of names or a regex ({error})") from None


def _tensors(layers: Mapping[str, LoRALinear]) -> dict[str, nn.Parameter]:
    """Name in the file -> parameter. "base_model.model" is PEFT's wrapper, in its names although there is none here."""
    return {
        f"base_model.model.{name}.{tensor}": layer.get_parameter(parameter)
        for name, layer in layers.items()
        for parameter, tensor in type(layer).peft_tensors.items()
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
        raise LoRAError(
            f"{len(wrong)} tensors are not those that config and model call for ({first}): "
            "the adapter is for another model or rank, or damaged, or has diverged in training"
        )


def _write_whole(folder: Path, files: Mapping[str, bytes]) -> None:
    """Write all files beside their places and only then move each into its own, in the order given.

    A save cut short (disk full, machine lost) leaves the old adapter. Two files cannot be moved as one, hence the
    order, config last. In a new folder, the config is then the sign of a complete save; in an old one, the instant
    between holds new weights under the old config, which is the same text throughout one training run.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".saving-", dir=folder) as part:
        for name, content in files.items():
            with open(Path(part, name), "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())  # without it, a power cut can leave the new name on an empty file
        for name in files:
            os.replace(Path(part, name), folder / name)
