"""The script behind the demo's base still trains one, with the towers and the loss that train.py uses."""

import argparse

import torch

from clip_medical import load_clip
from clip_medical.model import Clip
from clip_medical.training.losses import info_nce
from experiments.train_tiny_clip import make_data, make_model, train


def test_a_few_pairs_are_learned_by_heart_and_text_stays_causal() -> None:
    """Catches frozen weights, and an attention that no longer hides what follows a caption's end."""
    asset = load_clip()
    torch.manual_seed(0)
    clip = Clip(make_model(asset.tokenizer), asset.tokenizer, asset.image_processor, "new")
    pixels, captions = make_data(scenes=12, phantoms=4, seed=0)
    train(clip, pixels, captions, argparse.Namespace(steps=40, batch_size=16, seed=0))

    ids, lengths = clip.tokens(captions)
    with torch.no_grad():
        texts = clip.text_features(ids, lengths)
        loss = info_nce(clip.image_features(pixels), texts, clip.model.logit_scale)
        shortest = lengths.argmin()
        alone = clip.text_features(ids[shortest, None, : lengths[shortest]], lengths[shortest, None])
    assert loss < 1  # 2.77 at the start
    torch.testing.assert_close(alone[0], texts[shortest])
