"""Export the LoRA matrices for Hugging Face PEFT, as the run saved them."""

import shutil
from pathlib import Path

import torch

from clip_medical.model import Clip
from clip_medical.run_folder import ADAPTER_FILES


def write_adapter(clip: Clip, adapter: Path, folder: Path, dtype: torch.dtype) -> list[str]:
    """Copy the files of `adapter` into `folder`. Loading `clip` from them has validated them, so no check follows."""
    for file in adapter.iterdir():
        if file.name in ADAPTER_FILES:
            shutil.copyfile(file, folder / file.name)
    return []
