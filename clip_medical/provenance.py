"""Fingerprints: short names for weights and data by which anyone can tell later whether they have the same ones."""

import hashlib
import json

from torch import nn

from clip_medical.data.sources import Data


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over name, shape and fp32 value of every parameter, as hexadecimal digits.

    Taken in fp32, so that half-precision weights and their exact copies in fp32 have the same one.
    """
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name} {tuple(parameter.shape)} ".encode())
        digest.update(parameter.detach().float().cpu().contiguous().numpy().data)
    return digest.hexdigest()


def data_fingerprint(data: Data) -> str:
    """SHA-256 over row name and caption of every training and held-out pair, in order; the pixels are not in it."""
    rows = [[split.ids, split.captions] for split in (data.train, data.validation)]
    return hashlib.sha256(json.dumps(rows).encode()).hexdigest()
