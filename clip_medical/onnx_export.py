"""The two encoders as ONNX files, for serving without PyTorch; compared with PyTorch before anyone gets to see them.

image_encoder.onnx   pixel_values (N, 3, S, S) fp32, normalised           -> image_features (N, D) fp32, unit length
text_encoder.onnx    input_ids (N, L) int64, attention_mask (N, L) int64  -> text_features  (N, D) fp32, unit length

N is free, and so is L up to the context length.
"""

import importlib.util
import logging
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_medical.errors import UserError
from clip_medical.model import Clip
from lora import merge

TOLERANCE = 1e-4  # largest difference of a feature; unit-length rows, so entries are at most 1
BATCHES = (1, 3, 17)


class ImageEncoder(nn.Module):
    """Normalised pixels (N, 3, S, S) -> features (N, D), unit length."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.tower, self.projection = clip.model.vision_model, clip.model.visual_projection

    def forward(self, pixel_values: Tensor) -> Tensor:
        return F.normalize(self.projection(self.tower(pixel_values=pixel_values).pooler_output), dim=-1)


class TextEncoder(nn.Module):
    """Token ids (N, L) and their mask (N, L) -> features (N, D), unit length."""

    def __init__(self, clip: Clip) -> None:
        super().__init__()
        self.tower, self.projection = clip.model.text_model, clip.model.text_projection

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        pooled = self.tower(input_ids=input_ids, attention_mask=attention_mask).pooler_output
        return F.normalize(self.projection(pooled), dim=-1)


def require_onnx() -> None:
    """Raises UserError where the optional packages are missing."""
    needed = ("onnx", "onnxscript", "onnxruntime")
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise UserError(f"--to onnx needs {', '.join(missing)}, not installed here: pip install {' '.join(needed)}")


def write_onnx(clip: Clip, folder: Path, pixels: Tensor, texts: Sequence[str]) -> dict[str, float]:
    """Merge the adapter, write both encoders, and run them on real inputs beside the model as it was before the merge.

    pixels (N, 3, S, S) uint8 and texts: what to run them on; at least 17 of each.
    Returns the largest difference of a feature, by encoder. Raises RuntimeError if one exceeds TOLERANCE.
    """
    lengths = sorted({5, 16, clip.context_length // 2, clip.context_length})
    cases = {"image": list(image_cases(clip, pixels)), "text": list(text_cases(clip, texts, lengths))}
    merge(clip.model)
    _write(ImageEncoder(clip), cases["image"][1][0], folder / "image_encoder.onnx", "image_features")
    _write(TextEncoder(clip), cases["text"][1][0], folder / "text_encoder.onnx", "text_features")
    differences = {name: compare(folder / f"{name}_encoder.onnx", cases[name]) for name in cases}
    if not max(differences.values()) < TOLERANCE:
        raise RuntimeError(f"the ONNX encoders differ from PyTorch by {differences}, so they were not kept")
    return differences


Case = tuple[dict[str, Tensor], Tensor]  # inputs of an encoder, and the features that Clip itself makes of them


@torch.no_grad()
def image_cases(clip: Clip, pixels: Tensor) -> Iterator[Case]:
    """Batches of several sizes, of pixels (N, 3, S, S) uint8."""
    for n in BATCHES:
        normalised = (pixels[:n].float() - clip.mean) / clip.std
        yield {"pixel_values": normalised}, clip.image_features(pixels[:n])


@torch.no_grad()
def text_cases(clip: Clip, texts: Sequence[str], lengths: Sequence[int]) -> Iterator[Case]:
    """Batches of exactly each of `lengths` tokens: texts strung together and cut, the rows after the first shorter."""
    together = [" ".join([*texts[i:], *texts[:i]]) for i in range(max(BATCHES))]
    ids, full = clip.tokens(together)  # (17, L); the end token last, as none is shorter than the context
    if full.min() < max(lengths):
        raise ValueError(f"the texts together have {full.min()} tokens, too few for lengths up to {max(lengths)}")
    for length in lengths:
        for n in BATCHES:
            rows = torch.arange(n)
            ends = length - 1 - rows % 3
            cut, mask = ids[:n, :length].clone(), torch.arange(length) <= ends[:, None]
            cut[~mask] = clip.tokenizer.pad_token_id
            cut[rows, ends] = ids[:n, -1]
            yield {"input_ids": cut, "attention_mask": mask.long()}, clip.text_features(cut, ends + 1)


def _write(encoder: nn.Module, inputs: dict[str, Tensor], file: Path, output: str) -> None:
    """Trace with torch.export; one file, with the weights inside."""
    free = {"input_ids": ("batch", "length"), "attention_mask": ("batch", "length"), "pixel_values": ("batch",)}
    shapes = {name: dict(enumerate(map(torch.export.Dim, free[name]))) for name in inputs}
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own innards
        program: Any = torch.onnx.export(
            encoder.eval(), kwargs=inputs, dynamo=True, dynamic_shapes=shapes, output_names=[output], verbose=False
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of the tracing, with the folders of this machine in them
    program.save(file, external_data=False)


def compare(file: Path, cases: Sequence[Case]) -> float:
    """The largest difference between the features that onnxruntime computes and the expected ones."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    off = 0.0
    for inputs, expected in cases:
        (features,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        off = max(off, (torch.from_numpy(features) - expected).abs().max().item())
    return off
