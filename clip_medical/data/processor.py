"""CLIP's input format: images -> uint8 pixels, texts -> token ids.

Pixels stay 8-bit until they are on the device, where the model normalises them: a quarter of the bytes to store and
move.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPTokenizer

from clip_medical.data.images import resize_and_crop


class Processor:
    """The tokenizer and the image format of one CLIP checkpoint.

    tokenizer, image_processor  transformers' own, kept for saving; the resizing below reproduces CLIPImageProcessor
    image_size       S, side of the square image in pixels
    context_length   longest caption in tokens, start and end token included (77)
    mean, std        (3, 1, 1) each, per channel, on the 0..255 scale of the pixels
    """

    def __init__(self, tokenizer: CLIPTokenizer, image_processor: CLIPImageProcessor, config: CLIPConfig) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        towers: Any = config
        self.image_size: int = towers.vision_config.image_size
        self.context_length: int = towers.text_config.max_position_embeddings
        self.mean, self.std = (
            255 * torch.tensor(value).view(3, 1, 1) for value in (image_processor.image_mean, image_processor.image_std)
        )

    def pixels(self, image: Image.Image) -> np.ndarray:
        """Resize the shortest side to S (bicubic) and crop the centre: "L" or "RGB" -> (3, S, S) uint8."""
        square = resize_and_crop(image, self.image_size)
        channels_last = square.reshape(*square.shape[:2], -1)
        pixels: np.ndarray = np.broadcast_to(channels_last, (*square.shape[:2], 3)).transpose(2, 0, 1)
        return pixels

    def tokens(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Tokenize N texts -> ids (N, L), padded on the right, and lengths (N,).

        A text longer than the context is cut and keeps its end token, from which CLIP reads the text feature.
        """
        options: dict[str, Any] = dict(padding=True, truncation=True, max_length=self.context_length)
        encoded = self.tokenizer(list(texts), return_tensors="pt", **options)
        return encoded["input_ids"], encoded["attention_mask"].sum(dim=1)
