"""The pretraining script of the tiny CLIP."""

import json
import sys
from pathlib import Path

import pytest
import torch

from clip_medical import load_clip
from clip_medical.data.processor import Processor
from clip_medical.data.synthetic.phantoms import describe
from clip_medical.data.synthetic.shapes import scene
from clip_medical.model import TINY, Clip
from clip_medical.training.loss import info_nce
from experiments.train_tiny_clip import Options, make_data, make_model, make_tokenizer, run, train


@pytest.mark.slow
def test_training_overfits_a_few_pairs_and_text_stays_causal() -> None:
    """Catches frozen weights, and attention from a caption to the padding after its end token."""
    processor = load_clip().processor
    torch.manual_seed(0)
    model = make_model(processor.tokenizer)
    clip = Clip(model, Processor(processor.tokenizer, processor.image_processor, model.config), "new")
    pixels, captions = make_data(scenes=12, phantoms=4, radiological=0.08, seed=0)
    train(clip, pixels, captions, Options(steps=80, batch_size=16))

    ids, lengths = clip.processor.tokens(captions)
    with torch.no_grad():
        texts = clip.text_features(ids, lengths)
        loss = info_nce(clip.image_features(pixels), texts, clip.model.logit_scale)
        shortest = lengths.argmin()
        alone = clip.text_features(ids[shortest, None, : lengths[shortest]], lengths[shortest, None])
    assert loss < 1  # ln 16 = 2.77 at the start
    torch.testing.assert_close(alone[0], texts[shortest])


def test_the_tokenizer_has_a_token_for_every_text() -> None:
    """Catches text that is lost as unknown tokens, split frequent words, and an end token other than the largest id."""
    captions = [describe(0, "pretrain", i)[0] for i in range(300)] + [
        scene(0, "pretrain", i).caption for i in range(20)
    ]
    tokenizer = make_tokenizer(captions)
    assert tokenizer.eos_token_id == len(tokenizer) - 1
    for text in ("ct of the chest", "3 § µ° ñandú", "胸部 X線, à q#"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.eos_token_id) == 1
        assert str(tokenizer.decode(ids[1:-1])).replace(" ", "") == text.lower().replace(" ", "")
    assert len(tokenizer("pneumothorax on ct of the chest")["input_ids"]) == 6 + 2


@pytest.mark.slow
def test_the_script_writes_a_model_that_load_clip_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a model without its command and loss, and a continued training that begins anew."""
    flags = "--scenes 40 --phantoms 8 --steps 4 --batch-size 8 --output".split()
    monkeypatch.setattr(sys, "argv", ["train_tiny_clip", *flags, str(tmp_path / "first")])
    assert run() == 0
    record = json.loads((tmp_path / "first" / "training.json").read_text())
    assert record["command"].startswith("python -m experiments.train_tiny_clip --scenes 40")
    assert 0 < record["mean_loss_of_last_50_steps"] < 4
    monkeypatch.setattr(
        sys, "argv", ["train_tiny_clip", *flags, str(tmp_path / "more"), "--start", str(tmp_path / "first")]
    )
    assert run() == 0
    first, more, bundled = (load_clip(str(x)).model.state_dict() for x in (tmp_path / "first", tmp_path / "more", TINY))
    name = "vision_model.embeddings.position_embedding.weight"
    assert (more[name] - first[name]).abs().max() < (bundled[name] - first[name]).abs().max()
