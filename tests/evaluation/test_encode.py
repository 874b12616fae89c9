"""Encoding of a split: batches, evaluation mode, and the recall that training validates by."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from clip_medical.evaluation.encode import encode, validation_recall


class FakeClip:
    """Encodes rows (N, 4) as themselves, through a dropout that only evaluation mode switches off."""

    def __init__(self) -> None:
        self.model = nn.Dropout(0.5).train()

    def image_features(self, pixels: Tensor) -> Tensor:
        return nn.functional.normalize(self.model(pixels.requires_grad_()), dim=-1)

    def text_features(self, tokens: Tensor, lengths: Tensor) -> Tensor:
        assert len(tokens) == len(lengths)
        return self.image_features(tokens)


class FakePairs(SimpleNamespace):
    def __len__(self) -> int:
        return len(self.pixels)


def pairs(captions: Tensor) -> Any:
    rows = torch.arange(len(captions))
    return FakePairs(pixels=torch.eye(4), tokens=captions, lengths=rows, caption_ids=rows, image_ids=rows)


def test_features_are_those_of_evaluation_mode() -> None:
    """Catches dropout left on during evaluation, features that hold a graph, and a last batch left out."""
    clip: Any = FakeClip()
    images, texts = encode(clip, pairs(torch.eye(4).flip(0)), batch_size=3)
    assert images.tolist() == torch.eye(4).tolist() and texts.tolist() == torch.eye(4).flip(0).tolist()
    assert not images.requires_grad and not texts.requires_grad


def test_previous_mode_is_restored() -> None:
    """Catches a run that goes on without dropout after its first validation."""
    clip: Any = FakeClip()
    encode(clip, pairs(torch.eye(4)))
    assert clip.model.training and torch.is_grad_enabled()
    clip.model.eval()
    encode(clip, pairs(torch.eye(4)))
    assert not clip.model.training


def test_validation_recall_by_hand() -> None:
    """Catches recalls of one direction only, and a sum where the mean is meant."""
    clip: Any = FakeClip()
    captions = torch.eye(4)
    captions[3] = torch.tensor([0.9, 0, 0, 0.1])  # its image is second among images; image 3 still finds it first
    # text to image: Recall@1 3/4, @5 and @10 1; image to text: image 0 finds text 0 (1.0) before text 3, so all 1
    assert validation_recall(clip, pairs(captions)) == pytest.approx((3 / 4 + 5) / 6)
