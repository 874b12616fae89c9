"""LoRA, the file: an adapter on disk, in the layout of Hugging Face PEFT, so that either side reads the other's.

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

from .inject import adapter_parameters, apply_plan, check_plan, require_layers
from .layer import LoRAError

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"

# The fields of PEFT's LoraConfig that are acted on here, with their values where absent; those that are mere notes (the
# last three PEFT reads only if others ask for it); and harmless values of some more. How A and B began does not matter
# once they are trained, but for schemes (PiSSA, OLoRA, ...) that alter W too. Anything else is refused unless empty: no
# feature invented tomorrow can be overlooked.
USED = {"r": None, "lora_alpha": None, "target_modules": None, "lora_dropout": 0.0, "use_rslora": False}
NOTES = {"task_type", "inference_mode", "base_model_name_or_path", "revision", "auto_mapping", "peft_version"}
NOTES |= {"megatron_core", "qalora_group_size", "eva_config"}
INITS = (True, False, "gaussian", "orthogonal", "eva")
HARMLESS: dict[str, tuple[object, ...]] = {"peft_type": ("LORA",), "bias": ("none",), "init_lora_weights": INITS}
EMPTY: tuple[object, ...] = (None, False, "", [], {})


def save_adapter(model: nn.Module, folder: str | os.PathLike[str], base_model: str | None = None) -> None:
    """Write the adapters of `model` into `folder`, which is made if need be; other files in it are left alone.

    Writes: A (r, in) and B (out, r) of every adapted layer in fp32, the settings that all layers share, and the name of
        the base model, for instance "openai/clip-vit-base-patch32", as a note.
    Raises: LoRAError if there is no LoRA, the model is wrapped (its names would be the wrapper's), a tensor is not
        finite, a strength is not 1, or layers built by hand differ in rank, alpha, dropout or rslora.
    """
    if hasattr(model, "_orig_mod") or isinstance(model, nn.parallel.DistributedDataParallel):
        raise LoRAError(f"found a {type(model).__name__}, expected the model inside: pass its ._orig_mod or .module")
    layers = require_layers(model)
    found = sorted({(x.rank, x.alpha, x.dropout, x.rslora, x.strength) for x in layers.values()})
    rank, alpha, dropout, rslora, strength = found[0]
    if len(found) > 1 or strength != 1:
        what = f"(rank, alpha, dropout, rslora, strength) = {found}"
        raise LoRAError(f"found {what}, expected one set for all layers, with strength 1: the file holds no more")
    names, leaves = list(layers), sorted({name.rpartition(".")[2] for name in layers})
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": base_model,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": dropout,
        "use_rslora": rslora,
        # Last names, if they select these layers and no other; else a regex of the full names, which always does.
        "target_modules": leaves if list(_select(model, leaves)) == names else "|".join(map(re.escape, names)),
    }
    shapes = _shapes({name: layer.base for name, layer in layers.items()}, rank)
    matrices = [matrix.detach().float().cpu().contiguous() for matrix in adapter_parameters(model)]
    tensors = dict(zip(shapes, matrices, strict=True))
    _check_tensors(tensors, shapes)
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
    config, tensors = _read(Path(folder))
    settings = (config["r"], config["lora_alpha"], config["lora_dropout"], config["use_rslora"])
    plan = _select(model, config["target_modules"])
    check_plan(model, plan, settings)
    shapes = _shapes(plan, config["r"])
    _check_tensors(tensors, shapes)
    names = apply_plan(model, plan, settings)
    with torch.no_grad():
        for key, matrix in zip(shapes, adapter_parameters(model), strict=True):
            matrix.copy_(tensors[key])
    return names


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Config and tensors, with every field of the config either understood or known not to matter."""
    try:
        config = {"peft_type": None} | USED | json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (OSError, ValueError, TypeError, SafetensorError) as error:  # TypeError: JSON, but no object
        raise LoRAError(
            f"cannot read the adapter in {folder} ({error}): expected {CONFIG_FILE} and {WEIGHTS_FILE}, whole, as "
            "save_adapter or PEFT's save_pretrained write them; pickles (.bin, .pt) can run code and are never opened"
        ) from None
    for field, value in config.items():  # peft_type comes first: it explains all the rest
        if field not in USED and field not in NOTES and value not in HARMLESS.get(field, EMPTY):
            raise LoRAError(f"{folder} asks for {field} = {value!r}, which is not implemented here: load it with PEFT")
    return config, tensors


def _select(model: nn.Module, targets: Any) -> dict[str, nn.Module]:
    """What `target_modules` mean to PEFT: a string is a regex for whole names, a list holds dotted endings of names."""
    try:
        regex = targets if isinstance(targets, str) else "|".join(rf"(.*\.)?{re.escape(end)}" for end in targets)
        return {name: module for name, module in model.named_modules() if re.fullmatch(regex, name)}
    except (re.error, TypeError) as error:
        raise LoRAError(f"target_modules is {targets!r}, expected a list of names or a regex ({error})") from None


def _shapes(layers: Mapping[str, nn.Module], rank: int) -> dict[str, object]:
    """The tensors that belong to these Linears: name in the file -> shape, in the order of adapter_parameters."""
    shapes: dict[str, object] = {}
    for name, base in layers.items():  # base_model and model are PEFT's wrappers, in the name although we have none
        shapes[f"base_model.model.{name}.lora_A.weight"] = (rank, base.in_features)
        shapes[f"base_model.model.{name}.lora_B.weight"] = (base.out_features, rank)
    return shapes


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
