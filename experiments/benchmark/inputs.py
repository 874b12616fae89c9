"""Inputs that resemble ROCOv2's: images of its sizes, captions of its lengths."""

import os
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import CLIPTokenizer

from clip_medical.data.synthetic.phantoms import phantom

Row = tuple[Path, str]  # PNG file, caption
DRAWN = 256  # distinct images; further files are links to them, which cost a decoder the same


def radiology_image(index: int, seed: int) -> Image.Image:
    """Draw a phantom in the size of a ROCOv2 image, one in ten in colour, as Doppler ultrasound is."""
    rng = np.random.default_rng((seed, index))
    size = rng.normal((640, 560), (120, 110)).clip(250, 1200).astype(int).tolist()  # width, height
    smooth = np.asarray(phantom(seed, "benchmark", index).image.resize(size, Image.Resampling.BICUBIC), np.float32)
    grain = rng.normal(0, 4, smooth.shape)  # without it a PNG would have a tenth of the 225 to 260 kB of ROCOv2's
    image = Image.fromarray((smooth + grain).clip(0, 255).astype(np.uint8))
    if rng.random() < 0.1:
        return Image.merge("RGB", (image, image, image.point(lambda value: 255 - value)))
    return image


def caption_lengths(count: int, seed: int) -> np.ndarray:
    """Draw caption lengths (count,) in tokens as ROCO has them: log-normal, mean 34, median 28, at most CLIP's 77."""
    lengths: np.ndarray = np.random.default_rng(seed).lognormal(np.log(28), 0.63, count).clip(6, 77).astype(np.int64)
    return lengths


def write_rows(folder: Path, count: int, tokenizer: CLIPTokenizer, seed: int) -> list[Row]:
    """Write `count` PNG files and draw a caption for each.

    Captions are words in random order. Real captions often start alike, which would save this project work, because its
    fast encoder computes a common prefix once. These share little but the start token.
    """
    rng, rows = np.random.default_rng(seed), []
    words = [token.removesuffix("</w>") for token in tokenizer.get_vocab() if token.endswith("</w>")]
    words = sorted(word for word in words if word.isascii() and word.isalpha())
    for index, length in enumerate(caption_lengths(count, seed)):
        file = folder / f"{index}.png"
        if index < DRAWN:
            radiology_image(index, seed).save(file)
        else:
            os.link(folder / f"{index % DRAWN}.png", file)
        ids = tokenizer(" ".join(rng.choice(words, 77)), truncation=True, max_length=int(length))["input_ids"]
        rows.append((file, str(tokenizer.decode(ids, skip_special_tokens=True))))
    return rows
