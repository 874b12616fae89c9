"""Clip: features that equal those of transformers, whatever the batch, the padding and the type of the weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import CLIPImageProcessor, CLIPModel

from clip_medical import load_clip, load_run
from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.errors import UserError
from clip_medical.model import TINY, Clip

CAPTIONS = ["knee", "A large cyst on the left side on axial CT of the chest, lung window.", "an MRI", "x " * 200]


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load_clip()


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    return [phantom(0, "test", i).image for i in range(3)] + [Image.new("RGB", (200, 90), "red")]


def test_features_equal_those_of_transformers(clip: Clip, pictures: list[Image.Image]) -> None:
    """Catches a wrong mean, a wrong pooling, a missing projection: all of them give features, only worse ones."""
    reference = CLIPModel.from_pretrained(TINY).float().eval()
    inputs = CLIPImageProcessor.from_pretrained(TINY)([p.convert("RGB") for p in pictures], return_tensors="pt")
    words = clip.tokenizer(CAPTIONS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        outputs = reference(**inputs, **words)
    torch.testing.assert_close(
        clip.encode_images(pictures), outputs.image_embeds, atol=2e-3, rtol=0
    )  # rounding to bytes
    torch.testing.assert_close(clip.encode_texts(CAPTIONS), outputs.text_embeds, atol=1e-5, rtol=0)


def test_features_have_unit_length_and_fp32(clip: Clip, pictures: list[Image.Image]) -> None:
    """Catches the forgotten normalisation, half-precision features over half-precision weights, and a temperature
    that was rounded with them before it was kept in fp32."""
    half = load_clip(dtype=torch.bfloat16)
    for one in (clip, half):
        for features in (one.encode_images(pictures), one.encode_texts(CAPTIONS)):
            assert features.dtype == torch.float32
            torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert half.model.logit_scale.dtype == torch.float32
    assert half.model.logit_scale.item() == clip.model.logit_scale.item()


def test_neighbours_in_the_batch_change_nothing(clip: Clip, pictures: list[Image.Image]) -> None:
    """Catches padding that leaks into a caption's feature, and sorted captions that are not put back in order."""
    alone = torch.cat([clip.encode_texts([caption]) for caption in CAPTIONS])
    for batch_size in (1, 2, 4):
        torch.testing.assert_close(clip.encode_texts(CAPTIONS, batch_size), alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            clip.encode_images(pictures, batch_size), clip.encode_images(pictures), atol=1e-5, rtol=0
        )


def test_a_long_caption_keeps_its_end_token(clip: Clip) -> None:
    """Catches a cut at 77 tokens that takes the end token along: CLIP reads a caption's feature at that token."""
    ids, lengths = clip.tokens(CAPTIONS)
    assert ids.shape == (4, 77) and lengths.tolist()[3] == 77
    for row, length in zip(ids, lengths, strict=True):
        assert row[length - 1] == clip.tokenizer.eos_token_id


def test_a_forward_pass_of_training_carries_gradients(clip: Clip, pictures: list[Image.Image]) -> None:
    """Catches a no_grad on the path that training takes, and none on the path that encodes archives."""
    clip.model.logit_scale.requires_grad_(False)
    pixels = torch.from_numpy(np.stack([clip.picture(p) for p in pictures]))
    assert clip.image_features(pixels).requires_grad and clip.text_features(*clip.tokens(CAPTIONS)).requires_grad
    assert not clip.encode_images(pictures).requires_grad and not clip.encode_texts(CAPTIONS).requires_grad


def test_the_tiny_clip_knows_shapes(clip: Clip) -> None:
    """Catches an asset that was not trained, or a tokenizer that does not belong to it."""
    from clip_medical.data.synthetic.shapes import SHAPES, scene

    made = [scene(0, "held out", i) for i in range(60)]
    images = clip.encode_images([m.image for m in made])
    texts = clip.encode_texts([m.caption for m in made])
    assert ((images @ texts.T).argmax(dim=1) == torch.arange(60)).float().mean() > 0.5
    assert len({m.labels["shape"] for m in made}) == len(SHAPES)


def test_the_asset_is_small_and_says_how_it_was_made() -> None:
    """Catches an asset grown over what a repository should carry, or one of unknown origin."""
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 12_000_000
    assert '"command": "python -m experiments.train_tiny_clip' in (TINY / "training.json").read_text()


def test_what_is_no_clip_is_refused_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches tracebacks from the depths of transformers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="config.json"):
        load_clip(str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing"):
        load_clip("nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError):
        load_clip(str(tmp_path))
    with pytest.raises(UserError, match="holds no adapter"):
        load_run(tmp_path / "nowhere")
