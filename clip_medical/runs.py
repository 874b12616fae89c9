"""The run folder, the contract between training and everything that comes after it.

config.json      the Config of the run, with its preset      adapter/      the adapter, in PEFT's layout, and beside it
metrics.jsonl    one object a step                                         what PEFT has no place for and does not read
report.json, report.md, figures/*.png                        checkpoint/   what --resume goes on from
"""

import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from huggingface_hub import snapshot_download

from clip_medical.config import RESUME_MAY_CHANGE, Config
from clip_medical.errors import UserError
from clip_medical.model import Clip, load_clip
from lora import load_adapter, save_adapter
from lora.adapter_file import CONFIG_FILE, WEIGHTS_FILE

STATE = Path("checkpoint", "state.pt")
SCALE = "logit_scale.json"  # in adapter/, where the temperature was trained
PROVENANCE = "provenance.json"  # in adapter/: command, seed, versions, fingerprints of the base and of the data
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, SCALE, PROVENANCE)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def choose_folder(preset: str, config: Config) -> Path:
    """The folder that a run may write, which may not exist yet; for --resume, the one that it goes on in.

    Raises UserError if the folder holds something already, or if what it holds is not the run to resume.
    """
    if config.output is None:
        if config.resume:
            raise UserError("--resume needs --output with the run to continue, such as --output runs/demo.")
        names = (f"runs/{preset}-{n}" if n > 1 else f"runs/{preset}" for n in range(1, 2**62))
        return next(Path(name) for name in names if not Path(name).exists())
    folder = Path(config.output)
    if config.resume:
        _refuse_another_run(folder, config)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already holds a run or other files: continue that run with --resume, or choose another --output."
        )
    return folder


def _refuse_another_run(folder: Path, config: Config) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no run to resume: leave out --resume to start a new one there.")
    if (folder / "report.md").is_file():  # the last file to be written
        raise UserError(f"the run in {folder} is complete, see its report.md: choose another --output for a new run.")
    stored = read_json(folder / "config.json")
    for name, value in json.loads(json.dumps(asdict(config))).items():
        if name not in RESUME_MAY_CHANGE and name in stored and stored[name] != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"the run in {folder} has {flag} {stored[name]}, not {value}: "
                f"resume it with {flag} {stored[name]}, or start a new run."
            )


def make_folder(folder: Path, flag: str = "--output") -> Path:
    """Make it where it is not there; asked before long work, whose results are to go there.

    Raises UserError if it cannot be made or written to; flag: what names another one.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}): choose another {flag}.") from error
    return folder


def write_text(file: Path, text: str) -> None:
    """Write beside and swap names, so that `file` is never seen half-written."""
    beside = file.with_name(file.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def save_run(clip: Clip, folder: Path, config: Config, facts: dict[str, Any]) -> None:
    """Write the adapter of a run; beside it the temperature, where that was learned, and `facts`, its provenance."""
    adapter = folder / "adapter"
    save_adapter(clip.model, adapter, base_model=config.model)
    if config.train_logit_scale:
        write_text(adapter / SCALE, json.dumps({"logit_scale": clip.model.logit_scale.item()}) + "\n")
    write_text(adapter / PROVENANCE, json.dumps(facts, indent=2) + "\n")


def load_run(run: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Clip:
    """The adapted model of a run: its base with the adapter and, where it was trained, its temperature; in eval mode.

    run  a run folder, an exported adapter or any other folder with an adapter of PEFT for CLIP, or the name
         "owner/name" of such an adapter on the Hugging Face Hub

    Raises UserError if there is no adapter, or if the weights of its base are no longer those that it was trained on;
    LoRAError if it does not fit the base.
    """
    adapter = _find_adapter(run)
    model = read_json(adapter / PROVENANCE).get("model", {})
    base = read_json(adapter / CONFIG_FILE).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter / CONFIG_FILE} names no base model: write its name there, base_model_name_or_path.")
    clip = load_clip(base, device, dtype, model.get("revision"))
    expected = model.get("fingerprint", clip.fingerprint)  # an adapter of PEFT's own making brings none
    if expected != clip.fingerprint:
        raise UserError(
            f"the adapter in {adapter} was trained on other weights than {base} holds now (fingerprint "
            f"{expected[:12]}, found {clip.fingerprint[:12]}): bring back that version of the base, or train again."
        )
    load_adapter(clip.model, adapter)
    scale = read_json(adapter / SCALE).get("logit_scale")
    if scale is not None:
        clip.model.logit_scale.data.fill_(scale)
    clip.model.eval()
    return clip


def _find_adapter(run: str | Path) -> Path:
    """The folder with the adapter, on this machine: the one given, adapter/ in it, or a copy of what the Hub has."""
    folder = Path(run)
    for adapter in (folder, folder / "adapter"):
        if (adapter / CONFIG_FILE).is_file():
            return adapter
    if folder.is_dir() or folder.parent != Path() and folder.parent.is_dir() or not HUB_ID.fullmatch(str(run)):
        raise UserError(
            f"{folder} holds no adapter: give a run of train.py that has saved one, an exported adapter, or the name "
            "of one on the Hub; a merged model is loaded with load_clip."
        )
    try:
        adapter = Path(snapshot_download(str(run), allow_patterns=list(ADAPTER_FILES)))
    except (OSError, ValueError) as error:  # HfHubHTTPError and no network are OSErrors, a bad name is a ValueError
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{run} is neither a folder here nor an adapter on the Hub that can be read ({reason}): "
            "check the name, the network and, for a private one, `hf auth login`."
        ) from error
    if not (adapter / CONFIG_FILE).is_file():
        raise UserError(f"{run} on the Hub holds no adapter: a whole model is loaded with load_clip.")
    return adapter


def read_json(file: Path) -> dict[str, Any]:
    """The object in `file`; {} where there is no such file."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise UserError(f"{file} is not JSON ({error}): copy it again from where it came, or train again.") from error
    if not isinstance(found, dict):
        raise UserError(f"{file} holds a JSON {type(found).__name__}, expected an object: copy or train it again.")
    return found
