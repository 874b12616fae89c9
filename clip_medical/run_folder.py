"""The run folder: the contract between training and everything that reads a run.

config.json      the Config of the run, with its preset    adapter/     the adapter in PEFT's layout, logit_scale.json
metrics.jsonl    one object a step                                      calibration.json and provenance.json, which
                                                                        PEFT ignores
report.json, report.md, figures/*.png                      checkpoint/  the state that --resume continues from
training_images.txt  a hash of the pixels of each image that was trained on
"""

import json
import os
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import torch
from huggingface_hub import snapshot_download

from clip_medical.config import RESUME_MAY_CHANGE, RESUME_MAY_EXTEND, Config
from clip_medical.errors import UserError
from clip_medical.model import Clip, load_clip
from lora import load_adapter, save_adapter
from lora.peft_format import CONFIG_FILE, WEIGHTS_FILE

TRAINED = "training_images.txt"
STATE = Path("checkpoint", "state.pt")
SCALE = "logit_scale.json"  # in adapter/, where logit_scale was trained
PROVENANCE = "provenance.json"  # in adapter/: command, seed, versions, fingerprints of base and data
CALIBRATION = "calibration.json"  # in adapter/: of both models, see evaluation/calibration.py
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE, SCALE, PROVENANCE, CALIBRATION)
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


def choose_folder(preset: str, config: Config) -> Path:
    """Return the folder of a new run, which need not exist yet, or with --resume that of the run to continue.

    Raises UserError if the folder already holds something, or holds another run than the one to resume.
    """
    if config.output is None:
        if config.resume:
            raise UserError("--resume needs --output, the run to continue, such as --output runs/demo.")
        names = (f"runs/{preset}-{n}" if n > 1 else f"runs/{preset}" for n in range(1, 2**62))
        return next(Path(name) for name in names if not Path(name).exists())
    folder = Path(config.output)
    if config.resume:
        _refuse_another_run(folder, config)
    elif folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(
            f"{folder} already holds a run or other files. Continue that run with --resume, or choose another --output."
        )
    return folder


def _refuse_another_run(folder: Path, config: Config) -> None:
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} holds no run to resume. Leave out --resume to start a new one there.")
    # a setting that the run does not name did not exist then: it was as its default is now
    stored = json.loads(json.dumps(asdict(Config()))) | read_json(folder / "config.json")
    named = {argument.split("=")[0].removeprefix("--").replace("-", "_") for argument in sys.argv}
    now = json.loads(json.dumps(asdict(config)))
    changes = {name: x for name, x in now.items() if stored[name] != x and name not in RESUME_MAY_CHANGE}
    extended = [f"--{name} {stored[name]} -> {changes[name]}" for name in changes.keys() & RESUME_MAY_EXTEND & named]
    if extended:
        print(f"Changed  {', '.join(sorted(extended))}: the learning rate follows the new schedule from here on")
    elif (folder / "report.md").is_file():  # the last file to be written
        raise UserError(
            f"The run in {folder} is complete, see its report.md. Train it longer with more --steps, or choose another "
            "--output for a new run."
        )
    for name, value in changes.items():
        if name not in RESUME_MAY_EXTEND & named:
            old = stored[name]
            flag = ("--no-" if old is False else "--") + name.replace("_", "-")
            given = "" if isinstance(old, bool) else " " + (" ".join(old) if isinstance(old, list) else str(old))
            way = f"without {flag}" if old in ([], None) else f"with {flag}{given}"
            raise UserError(
                f"The run in {folder} was started {way}, found {value}. Resume it {way}, or start a new run."
            )


def run_root(run: str | Path) -> Path:
    """Return the run folder, also where its adapter/ is given."""
    folder = Path(run)
    return folder.parent if folder.name == "adapter" and (folder.parent / "config.json").is_file() else folder


def trained_on(run: str | Path | None) -> list[str]:
    """Hashes of the images that a run was trained on; [] where they are not known."""
    file = run_root(run) / TRAINED if run else Path()
    return file.read_text(encoding="utf-8").split() if file.is_file() else []


def make_folder(folder: Path, flag: str = "--output") -> Path:
    """Create the folder if need be, and check before long work that results can be written to it.

    Raises UserError, naming `flag`, if it cannot be created or written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        TemporaryFile(dir=folder).close()
    except OSError as error:
        raise UserError(f"{folder} cannot be written to ({error.strerror}). Choose another {flag}.") from error
    return folder


def write_text(file: Path, text: str) -> None:
    """Write to a temporary file and rename it, so that `file` is never half-written."""
    part = file.with_name(file.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, file)


def save_run(clip: Clip, folder: Path, config: Config, facts: dict[str, Any], digests: Sequence[str]) -> None:
    """Write the adapter of a run, beside it logit_scale where it was trained, and `facts`, the provenance.

    digests: hashes of the images that it was trained on.
    """
    adapter = folder / "adapter"
    save_adapter(clip.model, adapter, base_model=config.model)
    if config.train_logit_scale or config.from_adapter:  # the adapter that it went on from may have trained it
        write_text(adapter / SCALE, json.dumps({"logit_scale": clip.model.logit_scale.item()}) + "\n")
    write_text(adapter / PROVENANCE, json.dumps(facts, indent=2) + "\n")
    write_text(folder / TRAINED, "\n".join([*digests, *trained_on(config.from_adapter)]) + "\n")
    (adapter / CALIBRATION).unlink(missing_ok=True)  # of the weights before these


def load_run(
    run: str | Path,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    encoder: str = "auto",
    base: str | None = None,
) -> Clip:
    """Load the adapted model of a run, in eval mode: its base, the adapter and, where it was trained, logit_scale.

    run      a run folder, an exported adapter, any other folder with a PEFT adapter for CLIP, or the name "owner/name"
             of such an adapter on the Hugging Face Hub
    encoder  "auto", "reference" or "fast", see encoder.py
    base     the base model, where it lies elsewhere than the adapter says

    Raises UserError if there is no adapter, or if its base has other weights than those it was trained on; LoRAError
    if the adapter does not fit the base.
    """
    adapter = _find_adapter(run)
    model = read_json(adapter / PROVENANCE).get("model", {})
    revision = None if base else model.get("revision")
    named = model if model.get("base") == "tiny-clip" else {}  # an exported adapter names its folder instead, for PEFT
    base = base or named.get("base") or read_json(adapter / CONFIG_FILE).get("base_model_name_or_path")
    if not base:
        raise UserError(f"{adapter / CONFIG_FILE} names no base model. Name it by --base.")
    clip = load_clip(base, device, dtype, revision, encoder)
    expected = model.get("fingerprint", clip.fingerprint)  # an adapter that PEFT saved has none
    if expected != clip.fingerprint:
        raise UserError(
            f"The adapter in {adapter} was trained on other weights than {base} holds now (expected fingerprint "
            f"{expected[:12]}, found {clip.fingerprint[:12]}). Name the right base, or restore it, or train again."
        )
    load_adapter(clip.model, adapter)
    scale = read_json(adapter / SCALE).get("logit_scale")
    if scale is not None:
        clip.model.logit_scale.data.fill_(scale)
    clip.calibration = read_json(adapter / CALIBRATION).get("adapted", {})
    clip.model.eval()
    return clip


def load_base(adapted: Clip, run: str | Path) -> Clip:
    """Load the unadapted model beside an adapted one of `load_run`: the same base, device, dtype and encoder.

    Not made by disabling the adapter: a trained temperature would remain in it.
    """
    base = load_clip(adapted.name, adapted.device, adapted.dtype, adapted.revision, adapted.requested_encoder)
    base.calibration = read_json(_find_adapter(run) / CALIBRATION).get("unadapted", {})
    return base


def _find_adapter(run: str | Path) -> Path:
    """Return the local folder with the adapter: the one given, adapter/ in it, or a download from the Hub."""
    folder = Path(run)
    for adapter in (folder, folder / "adapter"):
        if (adapter / CONFIG_FILE).is_file():
            return adapter
    if folder.is_dir() or folder.parent != Path() and folder.parent.is_dir() or not HUB_ID.fullmatch(str(run)):
        raise UserError(
            f"{folder} holds no adapter. Give a run of train.py that has saved one, an exported adapter, or the name "
            "of one on the Hub. A merged model is loaded with load_clip."
        )
    try:
        adapter = Path(snapshot_download(str(run), allow_patterns=list(ADAPTER_FILES)))
    except Exception as error:  # of the Hub, the network, a proxy: they have no base class in common
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{run} is neither a local folder nor a readable adapter on the Hub ({reason}). Check the name, the "
            "network and, for a private one, `hf auth login`."
        ) from error
    if not (adapter / CONFIG_FILE).is_file():
        raise UserError(f"{run} on the Hub holds no adapter. A whole model is loaded with load_clip.")
    return adapter


def read_json(file: Path) -> dict[str, Any]:
    """Return the JSON object in `file`, {} if there is no such file."""
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # bad JSON and bad UTF-8 alike
        raise UserError(f"{file} is not JSON ({error}). Copy it again from its source, or retrain.") from error
    if not isinstance(content, dict):
        raise UserError(f"{file} holds a JSON {type(content).__name__}, expected an object. Copy it again, or retrain.")
    return content
