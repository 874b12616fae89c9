"""Export a complete CLIP for transformers, with the adapter merged into its weights."""

from pathlib import Path

import torch
from torch import Tensor

from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.model import Clip, load_clip
from lora import merge

TOLERANCE = 1e-5  # maximum change of a feature by the merge in fp32; features have unit length


def write_merged(clip: Clip, adapter: Path, folder: Path, dtype: torch.dtype) -> list[str]:
    """Merge the adapter in fp32, cast the weights to `dtype` once, save them with tokenizer and image processor.

    The merged and the reloaded model are compared with the unmerged one on phantoms. Raises LoRAError if a layer cannot
    be merged, RuntimeError if the merge changes the features by more than TOLERANCE.
    """
    unmerged = sample_features(clip)
    merge(clip.model)
    merge_error = (sample_features(clip) - unmerged).abs().max().item()
    if not merge_error < TOLERANCE:  # "not <" also refuses NaN
        raise RuntimeError(f"The merge changed features by {merge_error:.1e}, expected less than {TOLERANCE:.0e}.")
    for part in (clip.model.config.text_config, clip.model.config.vision_config):
        # else CLIPTextModelWithProjection would read those of the base, or defaults
        part.dtype, part.projection_dim = str(dtype).removeprefix("torch."), clip.model.config.projection_dim
    clip.model.to(dtype).save_pretrained(folder)
    clip.processor.tokenizer.save_pretrained(folder)
    clip.processor.image_processor.save_pretrained(folder)
    reloaded = sample_features(load_clip(str(folder)))
    cast_error, cosine = (reloaded - unmerged).abs().max().item(), (reloaded * unmerged).sum(dim=1).min().item()
    return [
        f"Merged in fp32, the features differ from those of the unmerged model by at most {merge_error:.1e}.",
        f"Saved as {str(dtype).removeprefix('torch.')} and reloaded, they differ by at most {cast_error:.1e}, "
        f"and the lowest cosine similarity is {cosine:.7f}.",
    ]


def sample_features(clip: Clip, count: int = 16) -> Tensor:
    """Return the features (2 count, D) of `count` phantoms and their captions."""
    phantoms = [phantom(0, "validation", row) for row in range(count)]
    return torch.cat(
        [clip.encode_images([p.image for p in phantoms]), clip.encode_texts([p.caption for p in phantoms])]
    )
