"""The towers that compute one token in their last layer are those of transformers, in values and in gradients."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from clip_medical import load_clip, towers
from clip_medical.towers import image_tower, text_tower
from lora import adapter_parameters, inject

LENGTHS = torch.tensor([7, 3, 9, 2, 5, 8, 5, 7])  # with start and end token; the rest of nine is padding
END = 11


def a_clip(layers: int, targets: tuple[str, ...]) -> CLIPModel:
    """A small CLIP with adapters. No weight is zero: not B, so that a gradient reaches A too, and not the biases."""
    torch.manual_seed(0)
    tower: dict[str, Any] = dict(hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=3)
    text = tower | dict(vocab_size=END + 1, max_position_embeddings=9, eos_token_id=END)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=tower | dict(image_size=64, patch_size=16))).double()
    inject(model, targets, rank=2)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    return model


def token_ids() -> Tensor:
    """Captions of LENGTHS: the first four begin alike, two tokens of the third are in their place in others that do
    not, the seventh is the fifth, and the last is the sixth to one word before its end."""
    ids = torch.randint(1, END, (len(LENGTHS), 9), generator=torch.Generator().manual_seed(0))
    ids[:4, 0] = 0
    ids[:2, 1] = ids[2, 1]
    ids[0, 2:4] = ids[2, 2:4]
    ids[4:6, 2:4] = ids[2, 2:4]
    ids[6] = ids[4]
    ids[7, :5] = ids[5, :5]
    return torch.where(torch.arange(9) < LENGTHS[:, None] - 1, ids, END)


def gradients(model: CLIPModel, features: Tensor) -> list[Tensor]:
    """Of one number that every entry of the features takes part in, with respect to A and B of all layers."""
    weights = torch.randn(features.shape, dtype=features.dtype, generator=torch.Generator().manual_seed(1))
    # those of the other tower get none
    found = torch.autograd.grad((features * weights).sum(), adapter_parameters(model), allow_unused=True)
    return [g for g in found if g is not None]


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("layers", [1, 2, 3])
@pytest.mark.parametrize("targets", [("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")])
def test_both_towers_equal_those_of_transformers(
    layers: int, targets: tuple[str, ...], checkpointing: bool, together: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Mistake: another token's query or residual, keys of the read token alone, text that sees behind its end or into
    the caption before, a position counted from there, captions that meet again taken for one, a patch cut across, a
    norm or an adapter passed over; captions of one group, as on a GPU, or of two, given back in another order; spare
    rows read by a caption."""
    model, ids = a_clip(layers, targets), token_ids()
    monkeypatch.setattr(towers, "spare_rows", lambda *_: 0 if together else 5)
    if together:
        monkeypatch.setattr(towers, "_like_length", lambda lengths, device: [len(lengths)])
    pixels = torch.randn(4, 3, 64, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    mask = (torch.arange(9) < LENGTHS[:, None]).long()
    for ours, theirs in (
        (image_tower(model.vision_model, pixels, checkpointing), model.vision_model(pixel_values=pixels).pooler_output),
        (
            text_tower(model.text_model, ids, LENGTHS, checkpointing),
            model.text_model(ids, attention_mask=mask).pooler_output,
        ),
    ):
        torch.testing.assert_close(ours, theirs)
        own, expected = gradients(model, ours), gradients(model, theirs)
        assert len(own) == len(expected) == 2 * layers * len(targets)
        for a, b in zip(own, expected, strict=True):
            torch.testing.assert_close(a, b)


def test_what_follows_the_end_token_changes_nothing() -> None:
    """Mistake: a text tower that looks at its padding, so that a caption's feature depends on its neighbours."""
    model, ids = a_clip(2, ("q_proj",)), token_ids()
    other = torch.where(torch.arange(9) < LENGTHS[:, None], ids, 0)
    features = [text_tower(model.text_model, i, LENGTHS) for i in (ids, other)]
    assert torch.equal(*features)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(("dtype", "near"), [(torch.float16, 2e-3), (torch.bfloat16, 2e-2)])
def test_half_precision_is_near_to_fp32(dtype: torch.dtype, near: float, training: bool) -> None:
    """Mistake: a format asked of model.dtype, which is that of logit_scale, always fp32; attention in another order."""
    exact, clip = load_clip(), load_clip(dtype=dtype)
    clip.model.train(training)
    ids, lengths = exact.tokens(["axial CT of the chest", "knee"])
    pixels = torch.randint(0, 256, (2, 3, exact.image_size, exact.image_size), dtype=torch.uint8)
    expected = exact.text_features(ids, lengths), exact.image_features(pixels)
    found = clip.text_features(ids, lengths), clip.image_features(pixels)
    torch.testing.assert_close(found, expected, atol=near, rtol=0)


def test_no_token_is_computed_twice_and_no_padding(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: captions padded to the longest for all of a layer, where attention alone needs them side by side; or
    what they begin with, the same in several, computed for each of them; rows that are to be spared, which would make
    all products of a batch those of a shape met before, left out."""
    model, ids, seen = a_clip(2, ("q_proj",)), token_ids(), []
    first = model.text_model.encoder.layers[0]
    for module in (first.layer_norm1, first.layer_norm2):
        module.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    for name in ("projected", "linear_of", "mlp_of"):
        whole = getattr(towers, name)
        monkeypatch.setattr(towers, name, lambda *a, whole=whole: seen.append(a[1].shape) or whole(*a))
    monkeypatch.setattr(towers, "spare_rows", lambda *_: 3)
    text_tower(model.text_model, ids, LENGTHS)
    captions = [tuple(each[:n]) for each, n in zip(ids.tolist(), LENGTHS.tolist(), strict=True)]
    beginnings = {caption[: n + 1] for caption in captions for n in range(len(caption))}
    assert len(beginnings) == 46 - 3 - 2 - 2 - 5 - 5 and len(set(captions)) == 7  # as token_ids says
    every, kept = (len(beginnings) + 3, 24), (7, 24)
    assert seen == [*5 * [every], every, kept, kept]  # of the last layer, keys and values; and what follows


def test_pictures_reach_attention_without_a_copy() -> None:
    """Mistake: a split into one part, whose backward pass copies the gradients of query, key and value."""
    rows, by_token = torch.randn(6, 4, requires_grad=True), torch.randn(2, 3, 2, 2)
    (by_head,) = towers.Sequences([towers.Group(2, 3)], torch.tensor([0, 3])).side_by_side(rows, heads=2)
    assert by_head.data_ptr() == rows.data_ptr()
    (gradient,) = torch.autograd.grad(by_head, rows, by_token.transpose(1, 2))
    assert gradient.data_ptr() == by_token.data_ptr()


def test_attention_pads_captions_to_the_longest_of_like_length(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mistake: all padded to the longest of all, which at ROCO's lengths is more than half of attention's work."""
    model, seen, attend = a_clip(2, ("q_proj",)), [], towers.attend
    monkeypatch.setattr(towers, "attend", lambda *a, **k: seen.append(tuple(a[2].shape[::2])) or attend(*a, **k))
    text_tower(model.text_model, token_ids(), LENGTHS)
    assert seen == 2 * [(2, 3), (5, 9)]  # keys of lengths 2 and 3, and of 5 to 9, in both layers


def test_captions_of_like_length_are_those_with_the_least_padding() -> None:
    """Mistake: two groups where one has no padding; on a GPU, for less than a third of it."""
    cpu, gpu = torch.device("cpu"), torch.device("cuda")
    for lengths, on_cpu, on_gpu in (
        ([5], [1], [1]),
        ([7, 7, 7], [3], [3]),
        ([2, 3, 5, 7, 8, 9], [2, 4], [6]),  # 42 rows for 54
        ([3, 3, 4, 20, 21, 21], [3, 3], [3, 3]),  # 75 for 126
    ):
        assert [towers._like_length(torch.tensor(lengths), device) for device in (cpu, gpu)] == [on_cpu, on_gpu]


def test_the_last_layer_computes_one_token_of_each_sequence() -> None:
    """Mistake: the whole layer computed after all, and all but one token thrown away."""
    model, seen = a_clip(2, ("q_proj",)), []
    for tower in (model.vision_model, model.text_model):
        tower.encoder.layers[-1].layer_norm2.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0].shape))
    image_tower(model.vision_model, torch.zeros(4, 3, 64, 64, dtype=torch.float64))
    text_tower(model.text_model, token_ids(), LENGTHS)
    assert seen == [(4, 24), (7, 24)]  # one caption is there twice
