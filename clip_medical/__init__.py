"""CLIP on radiology: data, model, training and evaluation around the adapter in `lora/`.

    from clip_medical import load_clip, load_run, info_nce, recall_at_k

The four names are imported when they are first used: a tool that only draws phantoms need not wait for transformers.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "info_nce": "clip_medical.training.losses",
    "recall_at_k": "clip_medical.evaluation.retrieval",
    "load_clip": "clip_medical.model",
    "load_run": "clip_medical.runs",
}
__all__ = ["info_nce", "load_clip", "load_run", "recall_at_k"]


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(_HOME[name]), name)
    raise AttributeError(f"module 'clip_medical' has no attribute {name!r}")
