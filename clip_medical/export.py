"""Take a run elsewhere: `python -m clip_medical.export --run runs/x --to merged|onnx|adapter`.

Each export is a folder with a model card and the provenance of its weights. It is written under another name, checked
against the trained model, and only then given its own: a folder under its final name is whole.
"""

import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import numpy as np
import torch
from huggingface_hub import HfApi
from torch import Tensor

from clip_medical import command_line
from clip_medical.data.phantoms import phantom
from clip_medical.errors import UserError
from clip_medical.model import Clip, load_clip
from clip_medical.model_card import NAME, model_card
from clip_medical.onnx_export import require_onnx, write_onnx
from clip_medical.runs import ADAPTER_FILES, HUB_ID, PROVENANCE, SCALE, load_run, make_folder, read_json, write_text
from lora import merge
from lora.adapter_file import WEIGHTS_FILE


@dataclass(frozen=True)
class Export:
    """Write a finished run as a PEFT adapter, a merged Hugging Face model or ONNX encoders; and push it to the Hub."""

    run: str
    """The run folder, such as runs/demo."""
    to: Literal["adapter", "merged", "onnx"]
    """adapter: the trained matrices alone, for PEFT. merged: a whole model, for transformers. onnx: both encoders."""
    output: str | None = None
    """Folder to write; default: RUN/export/TO."""
    dtype: Literal["fp32", "fp16"] = "fp32"
    """Number format of a merged model; its weights are computed in fp32 and cast once."""
    push: str | None = None
    """Repository on the Hugging Face Hub, owner/name: list what would be uploaded to it. An export that stands in the
    output folder already is taken as it is, with your changes to its README.md."""
    yes: bool = False
    """Do upload to --push. A repository that does not exist yet is made, and made private."""

    def __post_init__(self) -> None:
        if self.dtype != "fp32" and self.to != "merged":
            raise UserError(f"--dtype {self.dtype} is for --to merged, not for --to {self.to}: leave it out.")
        if self.push is not None and not HUB_ID.fullmatch(self.push):
            raise UserError(f"--push {self.push} is no name on the Hub: give owner/name.")
        if self.yes and self.push is None:
            raise UserError("--yes confirms an upload: say where with --push owner/name.")

    @property
    def folder(self) -> Path:
        return Path(self.output or Path(self.run, "export", self.to + "-fp16" * (self.dtype == "fp16")))


def run(options: Export) -> int:
    """One export, from the run to the folder, and to the Hub if that was asked for."""
    report, provenance = read_run(options)
    folder = options.folder
    if not folder.exists():
        if options.to == "onnx":
            require_onnx()
        clip = load_run(options.run)
        with new_folder(folder) as part:
            checked = write(clip, part, options)
            write_text(part / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
            write_text(part / "README.md", model_card(options.to, report, checked))
        print("\n".join([*checked, f"Saved {folder}: its README.md is the model card."]))
    elif options.push is None or read_json(folder / PROVENANCE) != provenance:
        raise UserError(f"{folder} exists and is not written over: choose another --output, or remove it.")
    if options.push is not None:
        push(folder, options.push, options.yes)
    return 0


def read_run(options: Export) -> tuple[dict[str, Any], dict[str, Any]]:
    """report.json of the run, and the provenance of its export. Raises UserError if the run is none, or not done."""
    folder = Path(options.run)
    if not (folder / "config.json").is_file():
        raise UserError(f"{folder} is not a run: give the folder that train.py wrote, with config.json in it.")
    weights = folder / "adapter" / WEIGHTS_FILE
    if not (folder / "report.json").is_file() or not weights.is_file():
        raise UserError(
            f"the run in {folder} is not complete, so there is nothing measured to write on its card: "
            f"finish it with `python train.py` and its flags, --output {folder} --resume."
        )
    report = read_json(folder / "report.json")
    facts = {section: report[section] for section in ("run", "data", "model", "environment")}
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return report, facts | {"export": {"to": options.to, "dtype": options.dtype, "adapter": digest}}


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder to write in, which becomes `folder` when the block ends well; else nothing is left of it."""
    with TemporaryDirectory(dir=make_folder(folder.parent), prefix=f".{folder.name}.") as beside:
        part = Path(beside, folder.name)  # inside, as the outer one is closed to other users, which would stay with it
        part.mkdir()
        yield part
        os.rename(part, folder)


def write(clip: Clip, folder: Path, options: Export) -> list[str]:
    """The files of one export but for card and provenance. Returns sentences that say how it was checked."""
    if options.to == "adapter":  # load_run has just read it, strictly: what it takes is good
        for name in ADAPTER_FILES:
            if (file := Path(options.run, "adapter", name)).is_file():
                shutil.copyfile(file, folder / name)
        return []
    pixels, texts = samples(clip)
    clip.tokenizer.save_pretrained(folder)
    clip.image_processor.save_pretrained(folder)
    if options.to == "merged":
        dtype = torch.float16 if options.dtype == "fp16" else torch.float32
        return write_merged(clip, folder, dtype, pixels, texts)
    off = write_onnx(clip, folder, pixels, texts)
    write_text(folder / SCALE, json.dumps({"logit_scale": clip.model.logit_scale.item()}) + "\n")
    return [
        f"onnxruntime and PyTorch: features differ by at most {off['image']:.1e} (image) and {off['text']:.1e} (text)."
    ]


def samples(clip: Clip, count: int = 17) -> tuple[Tensor, list[str]]:
    """Phantoms as real inputs to check an export with: (count, 3, S, S) uint8 pixels and as many captions."""
    drawn = [phantom(0, "validation", row) for row in range(count)]
    return torch.from_numpy(np.stack([clip.picture(p.image) for p in drawn])), [p.caption for p in drawn]


def write_merged(clip: Clip, folder: Path, dtype: torch.dtype, pixels: Tensor, texts: list[str]) -> list[str]:
    """The model with B A added to its weights, in fp32, and cast to `dtype` once; read back and compared."""
    adapted = features(clip, pixels, texts)
    merge(clip.model)
    off = (features(clip, pixels, texts) - adapted).abs().max().item()
    if not off < 1e-5:
        raise RuntimeError(f"merging changed features by {off}, so the merged model was not kept")
    clip.model.to(dtype).save_pretrained(folder)
    saved = features(load_clip(str(folder)), pixels, texts)
    cast, cosine = (saved - adapted).abs().max().item(), (saved * adapted).sum(dim=1).min().item()
    name = str(dtype).removeprefix("torch.")
    return [
        f"Merged in fp32, features differ from those of the adapter by at most {off:.1e}.",
        f"Saved in {name} and read back, by at most {cast:.1e}; the smallest cosine of old and new is {cosine:.7f}.",
    ]


@torch.no_grad()
def features(clip: Clip, pixels: Tensor, texts: list[str]) -> Tensor:
    """(2 N, D): of N images and N texts."""
    return torch.cat([clip.image_features(pixels), clip.encode_texts(texts)])


def push(folder: Path, name: str, confirmed: bool) -> None:
    """List the files of an export, and upload them if that was confirmed. Nothing is sent before."""
    card = folder / "README.md"
    write_text(card, card.read_text(encoding="utf-8").replace(f'"{NAME}"', f'"{name}"'))
    files = {
        file.relative_to(folder).as_posix(): file.stat().st_size for file in sorted(folder.rglob("*")) if file.is_file()
    }
    for file, size in files.items():
        print(f"{size:>15,} bytes  {file}")
    if not confirmed:
        print(f"Nothing was uploaded. To upload these {len(files)} files to {name}, give the same command with --yes.")
        return
    hub = HfApi()
    try:
        hub.create_repo(name, private=True, exist_ok=True)
        done = hub.upload_folder(
            repo_id=name, folder_path=folder, commit_message="Upload an export of clip-medical-lora"
        )
    except Exception as error:  # those of the Hub, of the network and of the storage have no base class in common
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} was not uploaded ({reason}): check the name, the network and `hf auth login`."
        ) from error
    print(f"Uploaded to {done.repo_url}; a new repository is private until you change that in its settings.")


def main() -> int:
    """The command line; returns the exit code."""
    command = "python -m clip_medical.export"
    return command_line.exit_code("export", lambda: run(command_line.parse(Export, sys.argv[1:], command)))


if __name__ == "__main__":
    sys.exit(main())
