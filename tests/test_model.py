"""Clip: features that equal those of transformers, whatever the batch, the padding and the dtype of the weights."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPImageProcessor, CLIPModel

from clip_medical import load_clip, load_run
from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.data.synthetic.shapes import SHAPES, scene
from clip_medical.errors import UserError
from clip_medical.model import TINY, Clip, weights_fingerprint
from tests.encoders import ENCODERS

CAPTIONS = ["knee", "A large cyst on the left side on axial CT of the chest, lung window.", "an MRI", "x " * 200]


@pytest.fixture(scope="module", params=ENCODERS)
def clip(request: pytest.FixtureRequest) -> Clip:
    return load_clip(encoder=request.param)


@pytest.fixture(scope="module")
def images() -> list[Image.Image]:
    return [phantom(0, "test", i).image for i in range(3)] + [Image.new("RGB", (200, 90), "red")]


def test_features_equal_those_of_transformers(clip: Clip, images: list[Image.Image]) -> None:
    """Catches a wrong mean, a wrong pooling, or a missing projection: all of them give features, only worse ones."""
    reference = CLIPModel.from_pretrained(TINY).float().eval()
    inputs = CLIPImageProcessor.from_pretrained(TINY)([image.convert("RGB") for image in images], return_tensors="pt")
    tokens = clip.processor.tokenizer(CAPTIONS, padding=True, truncation=True, max_length=77, return_tensors="pt")
    with torch.no_grad():
        outputs = reference(**inputs, **tokens)
    features = clip.encode_images(images)
    torch.testing.assert_close(features, outputs.image_embeds, atol=2e-3, rtol=0)  # pixels are rounded to bytes
    torch.testing.assert_close(clip.encode_texts(CAPTIONS), outputs.text_embeds, atol=1e-5, rtol=0)


def test_features_have_unit_length_and_fp32(clip: Clip, images: list[Image.Image]) -> None:
    """Catches a missing normalisation, half-precision features of half-precision weights, and a logit_scale that was
    rounded with the weights."""
    half = load_clip(dtype=torch.bfloat16, encoder=clip.requested_encoder)
    for each in (clip, half):
        for features in (each.encode_images(images), each.encode_texts(CAPTIONS)):
            assert features.dtype == torch.float32
            torch.testing.assert_close(features.norm(dim=1), torch.ones(4))
    assert half.dtype == torch.bfloat16 and half.model.logit_scale.dtype == torch.float32
    assert half.model.logit_scale.item() == clip.model.logit_scale.item()


def test_neighbours_in_the_batch_change_nothing(clip: Clip, images: list[Image.Image]) -> None:
    """Catches padding that leaks into a caption's feature, and captions that are returned in another order."""
    alone = torch.cat([clip.encode_texts([caption]) for caption in CAPTIONS])
    expected = clip.encode_images(images)
    for batch_size in (1, 2, 4):
        torch.testing.assert_close(clip.encode_texts(CAPTIONS, batch_size), alone, atol=1e-5, rtol=0)
        torch.testing.assert_close(clip.encode_images(images, batch_size), expected, atol=1e-5, rtol=0)


def test_a_long_caption_keeps_its_end_token(clip: Clip) -> None:
    """Catches a cut at 77 tokens that removes the end token, from which CLIP reads the text feature."""
    ids, lengths = clip.processor.tokens(CAPTIONS)
    assert ids.shape == (4, 77) and lengths.tolist()[3] == 77
    for row, length in zip(ids, lengths, strict=True):
        assert row[length - 1] == clip.processor.tokenizer.eos_token_id


def test_training_features_carry_gradients(clip: Clip, images: list[Image.Image]) -> None:
    """Catches a no_grad on the path that training takes, and a graph on the path that encodes whole archives."""
    pixels = torch.from_numpy(np.stack([clip.processor.pixels(image.convert("RGB")) for image in images]))
    features = clip.image_features(pixels), clip.text_features(*clip.processor.tokens(CAPTIONS))
    assert all(each.requires_grad for each in features)
    assert not clip.encode_images(images).requires_grad and not clip.encode_texts(CAPTIONS).requires_grad


def test_the_fingerprint_is_that_of_the_published_weights() -> None:
    """Catches a fingerprint that changes with the dtype, and one that misses a change of a weight."""
    clip, half = load_clip(), load_clip(dtype=torch.bfloat16)
    assert clip.fingerprint == half.fingerprint == weights_fingerprint(clip.model)
    clip.model.visual_projection.weight.data[0, 0] += 1e-3
    assert weights_fingerprint(clip.model) != clip.fingerprint


def test_the_tiny_clip_recognizes_shapes() -> None:
    """Catches an asset that was not trained, or a tokenizer that does not belong to it."""
    clip, scenes = load_clip(), [scene(0, "held out", i) for i in range(60)]
    image_features = clip.encode_images([scene.image for scene in scenes])
    text_features = clip.encode_texts([scene.caption for scene in scenes])
    assert ((image_features @ text_features.T).argmax(dim=1) == torch.arange(60)).float().mean() > 0.5
    assert len({scene.labels["shape"] for scene in scenes}) == len(SHAPES)


def test_the_asset_is_small_and_documents_its_origin() -> None:
    """Catches an asset that is too large for a repository, or of unknown origin."""
    assert sum(f.stat().st_size for f in TINY.iterdir()) <= 12_000_000
    assert '"command": "python -m experiments.train_tiny_clip' in (TINY / "training.json").read_text()


def test_a_model_that_is_no_clip_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a traceback from transformers."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="has no config.json"):
        load_clip(str(tmp_path))
    with pytest.raises(UserError, match="nobody/nothing"):
        load_clip("nobody/nothing")
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    with pytest.raises(UserError, match="Cannot load a CLIP"):
        load_clip(str(tmp_path))
    with pytest.raises(UserError, match="holds no adapter"):
        load_run(tmp_path / "nowhere")


def test_weights_that_are_missing_or_foreign_are_refused(tmp_path: Path) -> None:
    """Catches training on weights drawn at random: transformers only warns of them."""
    for name in ("partial", "foreign"):
        shutil.copytree(TINY, tmp_path / name)
    weights = load_file(TINY / "model.safetensors")
    some = {name: tensor for name, tensor in weights.items() if "text_model.encoder.layers.0" not in name}
    save_file(some, tmp_path / "partial" / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match="weights are missing, such as text_model.encoder.layers.0"):
        load_clip(str(tmp_path / "partial"))
    config = json.loads((TINY / "config.json").read_text())
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config | {"model_type": "chinese_clip"}))
    with pytest.raises(UserError, match="type 'chinese_clip', expected 'clip'"):
        load_clip(str(tmp_path / "foreign"))


def test_one_text_and_one_image_are_one_row(clip: Clip, images: list[Image.Image], tmp_path: Path) -> None:
    """Catches a feature for each letter of a lone string, without a word."""
    assert torch.equal(clip.encode_texts("CT of the head"), clip.encode_texts(["CT of the head"]))
    assert torch.equal(clip.encode_images(images[0]), clip.encode_images(images[:1]))
    images[0].save(tmp_path / "a.png")
    for path in (tmp_path / "a.png", str(tmp_path / "a.png"), [str(tmp_path / "a.png")]):
        assert torch.equal(clip.encode_images(path), clip.encode_images(images[:1]))
    assert clip.classify(str(tmp_path / "a.png"), ["a", "b"]) == clip.classify(images[0], ["a", "b"])
    with pytest.raises(UserError, match="gone.png"):
        clip.encode_images("gone.png")


def test_nothing_to_encode_is_told_in_a_sentence(clip: Clip) -> None:
    """Catches an error from inside torch for an empty list, such as that of a folder without images."""
    for encode in (clip.encode_images, clip.encode_texts):
        with pytest.raises(UserError, match="expected one or more"):
            encode([])


def test_one_grey_channel_gives_the_features_of_three() -> None:
    """Catches a grey image normalised with the mean of one channel for all three."""
    clip = load_clip()
    grey = torch.randint(0, 256, (3, 1, clip.processor.image_size, clip.processor.image_size), dtype=torch.uint8)
    one, three = clip.normalised(grey.expand(-1, 3, -1, -1)), clip.normalised(grey.repeat(1, 3, 1, 1))
    assert torch.equal(one, three)
