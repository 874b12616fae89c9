"""CLIP on radiology: data, model, training and evaluation around the adapter in `lora/`.

from clip_medical import load_clip, load_run, info_nce, recall_at_k
"""

from clip_medical.evaluation.retrieval import recall_at_k
from clip_medical.model import load_clip
from clip_medical.run_folder import load_run
from clip_medical.training.loss import info_nce

__all__ = ["info_nce", "load_clip", "load_run", "recall_at_k"]
