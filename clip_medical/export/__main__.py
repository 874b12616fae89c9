"""Export a finished run: `python -m clip_medical.export --run runs/x --to adapter|merged|onnx`.

An export is a folder with the files that one exporter writes, their provenance, and a model card. It is written under
a temporary name, compared with the adapted model, and renamed at the end: a folder under its final name is complete.
"""

import hashlib
import json
import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

import torch
from huggingface_hub import HfApi

from clip_medical import cli
from clip_medical.errors import UserError
from clip_medical.export.card import REPOSITORY, model_card
from clip_medical.export.merged import write_merged
from clip_medical.export.onnx import write_onnx
from clip_medical.model import TINY, Clip
from clip_medical.run_folder import ADAPTER_FILES, HUB_ID, PROVENANCE, load_run, make_folder, read_json, write_text
from lora.peft_format import CONFIG_FILE, WEIGHTS_FILE


def copy_adapter(clip: Clip, adapter: Path, folder: Path, dtype: torch.dtype) -> list[str]:
    """Copy the PEFT files of `adapter` into `folder`. Loading `clip` from them has validated them: no check follows."""
    for file in adapter.iterdir():
        if file.name in ADAPTER_FILES:
            shutil.copyfile(file, folder / file.name)
    if clip.name == "tiny-clip":  # which PEFT does not know
        config = read_json(folder / CONFIG_FILE) | {"base_model_name_or_path": str(TINY.resolve())}
        write_text(folder / CONFIG_FILE, json.dumps(config, indent=2) + "\n")
    return []


# An exporter takes the adapted model in fp32, which it may modify, the adapter's folder, the folder to write, and the
# dtype of the weights. It returns one sentence for each comparison of the export with the adapted model.
EXPORTERS = {"adapter": copy_adapter, "merged": write_merged, "onnx": write_onnx}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16}


@dataclass(frozen=True)
class Export:
    """Export a finished run as a PEFT adapter, a merged transformers model or ONNX encoders, and publish it."""

    # Run folder, for example runs/demo.
    run: str
    # adapter: LoRA matrices for PEFT. merged: a complete model for transformers. onnx: both encoders.
    to: Literal["adapter", "merged", "onnx"]
    # Folder to write. Default: RUN/export/TO.
    output: str | None = None
    # Dtype of a merged model. The merge is computed in fp32 and cast once.
    dtype: Literal["fp32", "fp16"] = "fp32"
    # Hugging Face Hub repository, owner/name. Lists the files to upload; an existing export is reused, with your
    # edits to its README.md.
    push: str | None = None
    # Upload the files to --push. A new repository is created as private.
    yes: bool = False

    def __post_init__(self) -> None:
        if self.dtype != "fp32" and self.to != "merged":
            raise UserError(f"--dtype {self.dtype} only applies to --to merged, not to --to {self.to}. Leave it out.")
        if self.push is not None and not HUB_ID.fullmatch(self.push):
            raise UserError(f"--push {self.push} is not a Hub repository name. Expected owner/name.")
        if self.yes and self.push is None:
            raise UserError("--yes confirms an upload, but no repository is given. Add --push owner/name.")


def run(options: Export) -> int:
    """Export one run and return the exit code: read the run, write a new folder with its card, publish it."""
    report, provenance = read_run(options)
    base = report["model"]["base"]
    if options.push and options.to == "adapter" and (not HUB_ID.fullmatch(base) or Path(base).is_dir()):
        raise UserError(f"The base model {base} is not on the Hub: nobody could load this adapter. Push --to merged.")
    folder = Path(options.output or f"{options.run}/export/{options.to}{'-fp16' * (options.dtype == 'fp16')}")
    if not folder.exists():
        clip = load_run(options.run, encoder="reference")  # the fast one would alter the modules to be exported
        with TemporaryDirectory(dir=make_folder(folder.parent), prefix=f".{folder.name}.") as temporary:
            part = Path(temporary, folder.name)  # a subfolder: the temporary one is readable by its owner only
            part.mkdir()
            checks = EXPORTERS[options.to](clip, Path(options.run, "adapter"), part, DTYPES[options.dtype])
            write_text(part / PROVENANCE, json.dumps(provenance, indent=2) + "\n")
            model_card(options.to, report, checks).save(part / "README.md")
            os.rename(part, folder)
        print("\n".join([*checks, f"Saved {folder}. Its README.md is the model card."]))
    elif options.push is None or read_json(folder / PROVENANCE) != provenance:
        raise UserError(f"{folder} exists and will not be overwritten. Remove it, or choose another --output.")
    if options.push is not None:
        push(folder, options.push, options.yes)
    return 0


def read_run(options: Export) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return report.json of the run and the provenance of its export. Raises UserError if the run is not complete."""
    folder = Path(options.run)
    weights = folder / "adapter" / WEIGHTS_FILE
    report = read_json(folder / "report.json")
    if "validation pairs" not in report.get("data", {}) or not weights.is_file():
        raise UserError(
            f"{folder} is not a complete run: its adapter or report.json is missing or outdated. "
            f"Choose a run folder of train.py, or complete the run with train.py --output {folder} --resume."
        )
    facts = {section: report[section] for section in ("run", "data", "model", "environment")}
    # The hash ties the export to these weights: after more training, an outdated export is not pushed by mistake.
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    return report, facts | {"export": {"to": options.to, "dtype": options.dtype, "adapter": digest}}


def push(folder: Path, repository: str, confirmed: bool) -> None:
    """List the files of an export, and upload them to the Hub if `confirmed`. Raises UserError if the upload fails."""
    files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
    for file in files:
        print(f"{file.stat().st_size:>15,} bytes  {file.relative_to(folder).as_posix()}")
    if not confirmed:
        print(f"Nothing was uploaded. Add --yes to upload these {len(files)} files to {repository}.")
        return
    card = folder / "README.md"
    write_text(card, card.read_text(encoding="utf-8").replace(f'"{REPOSITORY}"', f'"{repository}"'))
    try:
        hub = HfApi()
        hub.create_repo(repository, private=True, exist_ok=True)
        hub.upload_folder(repo_id=repository, folder_path=folder, commit_message="Upload from clip-medical-lora")
    except Exception as error:  # errors of the Hub, the network and the storage have no common base class
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"Upload to {repository} failed ({reason}). Check the name, the network and `hf auth login`."
        ) from error
    print(f"Uploaded to {hub.endpoint}/{repository}. A new repository is private until you publish it in its settings.")


def main() -> int:
    """Run the command line and return its exit code."""
    command = cli.console or "python -m clip_medical.export"
    return cli.exit_code("export", lambda: run(cli.parse(Export, sys.argv[1:], command)))


if __name__ == "__main__":
    sys.exit(main())
