"""The run folder, the contract between training and everything that comes after it.

config.json      the Config of the run, with its preset      adapter/      the adapter, in PEFT's layout
metrics.jsonl    one object a step                           checkpoint/   what --resume goes on from
report.json, report.md, figures/*.png
"""

import json
import os
from dataclasses import asdict
from pathlib import Path

import torch

from clip_medical.config import Config
from clip_medical.errors import UserError
from clip_medical.model import Clip, load_clip
from lora import load_adapter, save_adapter

STATE = Path("checkpoint", "state.pt")
SCALE = Path("adapter", "logit_scale.json")  # where the temperature was trained: PEFT's layout has no place for it


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
    if not (folder / STATE).is_file():
        raise UserError(f"{folder} holds no checkpoint to resume from: leave out --resume to start a new run there.")
    if (folder / "report.json").is_file():
        raise UserError(f"the run in {folder} is complete, see its report.md: choose another --output for a new run.")
    stored = json.loads((folder / "config.json").read_text())
    for name, value in json.loads(json.dumps(asdict(config))).items():
        if name not in ("resume", "output", "checkpoint_every_minutes") and stored.get(name) != value:
            flag = "--" + name.replace("_", "-")
            raise UserError(
                f"the run in {folder} has {flag} {stored.get(name)}, not {value}: "
                f"resume it with {flag} {stored.get(name)}, or start a new run."
            )


def write_text(file: Path, text: str) -> None:
    """Write beside and swap names, so that `file` is never seen half-written."""
    beside = file.with_name(file.name + ".part")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, file)


def save_run(clip: Clip, folder: Path, config: Config) -> None:
    """Write the adapter of a run, and the temperature beside it where that was learned."""
    save_adapter(clip.model, folder / "adapter", base_model=config.model)
    if config.train_logit_scale:
        write_text(folder / SCALE, json.dumps({"logit_scale": clip.model.logit_scale.item()}) + "\n")


def load_run(folder: str | Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32) -> Clip:
    """The adapted model of a run: its base with the adapter that stands in `folder`/adapter, in eval mode.

    Raises UserError if there is no such run, LoRAError if its adapter does not fit the base.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not (folder / "adapter").is_dir():
        raise UserError(f"{folder} is not a run: expected config.json and adapter/ in it, as train.py writes them.")
    clip = load_clip(json.loads((folder / "config.json").read_text())["model"], device, dtype)
    load_adapter(clip.model, folder / "adapter")
    if (folder / SCALE).is_file():
        clip.model.logit_scale.data.fill_(json.loads((folder / SCALE).read_text())["logit_scale"])
    clip.model.eval()
    return clip
