"""Export both encoders to ONNX, to serve them without PyTorch.

image_encoder.onnx   pixel_values (N, 3, S, S) fp32, normalised           -> image_features (N, D) fp32, unit length
text_encoder.onnx    input_ids (N, L) int64, attention_mask (N, L) int64  -> text_features  (N, D) fp32, unit length

N is free, and so is L up to the context length. The files are traced from transformers' modules, whichever encoder the
run was trained with, and ONNX Runtime must reproduce the features of `Clip` before the export is kept.
"""

import importlib.util
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.run_folder import SCALE, write_text
from lora import merge

PACKAGES = ("onnx", "onnxscript", "onnxruntime")
TOLERANCE = 1e-4  # maximum difference of a feature; features have unit length
BATCH_SIZES = (3, 1, 17)  # 3 comes first and is traced: torch.export treats a traced size of 1 as a constant

Case = tuple[dict[str, Tensor], Tensor]  # inputs of an encoder and the features to expect


class ProjectedEncoder(nn.Module):
    """One encoder of CLIP and its projection: inputs in the order of `names` -> unit-length features (N, D)."""

    def __init__(self, encoder: nn.Module, projection: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.encoder, self.projection, self.names = encoder, projection, names

    def forward(self, *inputs: Tensor) -> Tensor:
        pooled = self.encoder(**dict(zip(self.names, inputs, strict=True))).pooler_output
        return F.normalize(self.projection(pooled), dim=-1)


def write_onnx(clip: Clip, adapter: Path, folder: Path, dtype: torch.dtype) -> list[str]:
    """Merge the adapter and write both encoders, the tokenizer, the image processor and logit_scale.json.

    Raises UserError if an optional package is missing, LoRAError if a layer cannot be merged, RuntimeError if a feature
    differs between ONNX Runtime and the unmerged model by more than TOLERANCE.
    """
    if missing := [name for name in PACKAGES if importlib.util.find_spec(name) is None]:
        raise UserError(f"--to onnx needs {', '.join(missing)}. Install with: pip install {' '.join(PACKAGES)}")
    model, checks = clip.model, []
    cases = reference_cases(clip)  # before the merge, which they also verify
    merge(model)
    image, text = (model.vision_model, model.visual_projection), (model.text_model, model.text_projection)
    for name, (encoder, projection) in (("image", image), ("text", text)):
        file, inputs = folder / f"{name}_encoder.onnx", cases[name][0][0]
        trace(ProjectedEncoder(encoder, projection, tuple(inputs)), inputs, file, f"{name}_features")
        difference = max_difference(file, cases[name])
        if not difference < TOLERANCE:  # "not <" also refuses NaN
            raise RuntimeError(f"The {name} features of ONNX Runtime and PyTorch differ by {difference:.1e}.")
        checks.append(f"The {name} features of ONNX Runtime and PyTorch differ by at most {difference:.1e}.")
    clip.processor.tokenizer.save_pretrained(folder)
    clip.processor.image_processor.save_pretrained(folder)
    write_text(folder / SCALE, json.dumps({"logit_scale": model.logit_scale.item()}) + "\n")
    return checks


@torch.no_grad()
def reference_cases(clip: Clip) -> dict[str, list[Case]]:
    """Return phantoms and captions in batches of every size of BATCH_SIZES, with the features of `clip`."""
    processor = clip.processor
    phantoms = [phantom(0, "validation", row) for row in range(max(BATCH_SIZES))]
    pixels = torch.from_numpy(np.stack([processor.pixels(p.image) for p in phantoms]))
    captions = [p.caption for p in phantoms]
    texts = [" ".join(captions), "CT", *captions[2:]]  # the first fills every length, the second is always padded
    cases: dict[str, list[Case]] = {"image": [], "text": []}
    for n in BATCH_SIZES:
        cases["image"].append(({"pixel_values": clip.normalised(pixels[:n])}, clip.image_features(pixels[:n])))
        for length in (5, processor.context_length // 2, processor.context_length):
            options: Any = dict(padding="max_length", truncation=True, max_length=length, return_tensors="pt")
            tokens = processor.tokenizer(texts[:n], **options)
            features = clip.text_features(tokens["input_ids"], tokens["attention_mask"].sum(dim=1))
            cases["text"].append((dict(tokens), features))
    return cases


def trace(encoder: nn.Module, inputs: dict[str, Tensor], file: Path, output: str) -> None:
    """Write `encoder` as one ONNX file that includes its weights."""
    names = ("batch", "length") if "input_ids" in inputs else ("batch",)
    axes = {axis: torch.export.Dim(name) for axis, name in enumerate(names)}
    options: Any = dict(input_names=list(inputs), output_names=[output], dynamic_shapes=((axes,) * len(inputs),))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about internals of the ONNX exporter
        program: Any = torch.onnx.export(encoder.eval(), tuple(inputs.values()), dynamo=True, verbose=False, **options)
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces of the export, which name folders on this machine
    program.save(file, external_data=False)


def max_difference(file: Path, cases: list[Case]) -> float:
    """Return the largest difference between the features of ONNX Runtime and the expected ones, NaN if one is NaN."""
    import onnxruntime

    session: Any = onnxruntime.InferenceSession(file, providers=["CPUExecutionProvider"])
    differences = []
    for inputs, features in cases:
        (actual,) = session.run(None, {name: tensor.numpy() for name, tensor in inputs.items()})
        differences.append(np.abs(actual - features.numpy()).max())
    return float(np.max(differences))
