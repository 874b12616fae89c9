"""Synthetic images with captions that are exact by construction: radiology phantoms and scenes of coloured shapes.

Every image is a pure function of (seed, split, index). This file holds what both kinds of images share.
"""

import zlib
from collections.abc import Collection
from typing import NamedTuple, TypeVar

import numpy as np
from PIL import Image

Option = TypeVar("Option")


class Example(NamedTuple):
    """An image with its caption and the labels from which both are made."""

    image: Image.Image
    caption: str
    labels: dict[str, str]


def random_stream(seed: int, split: str, index: int, *purpose: int) -> np.random.Generator:
    """Return an independent random generator for each combination of the arguments, equal on every machine.

    `purpose` separates several streams of one image. Python's `hash` is salted per process, hence crc32 for the split.
    """
    return np.random.default_rng((seed, zlib.crc32(split.encode()), index, *purpose))


def pick(rng: np.random.Generator, options: Collection[Option]) -> Option:
    """Return one option, each with the same probability."""
    return list(options)[int(rng.integers(len(options)))]
