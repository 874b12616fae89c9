"""The fast encoder computes what the reference encoder computes: features, gradients, in every combination that a run
can ask for. The whole file is skipped where clip_medical/fast was deleted."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from clip_medical import load_clip
from clip_medical.data.batches import Batch, Captions
from clip_medical.data.processor import Processor
from clip_medical.encoder import Encoder, ReferenceEncoder
from clip_medical.model import Clip
from clip_medical.training.grad_cache import contrastive_backward
from lora import LoRALinear, adapter_parameters, inject, set_strength

PackedEncoder = pytest.importorskip("clip_medical.fast.packed").PackedEncoder

WIDTH, CONTEXT = 24, 9
END = load_clip().processor.tokenizer.eos_token_id
TEXTS = {
    "lengths": [7, 3, 9, 2, 5, 8, 5, 7],  # with start and end token
    "equal lengths": [9, 9, 9, 9],
    "one caption": [4],
    "duplicates": [5, 5, 5, 5],
}


def small_clip(layers: int = 2, activation: str = "quick_gelu", targets: tuple[str, ...] = ("q_proj", "v_proj"),
               within: str | None = None, dtype: torch.dtype = torch.float64) -> CLIPModel:  # fmt: skip
    """A small CLIP with adapters. No weight is zero: not B, so that a gradient reaches A too, and not the biases."""
    torch.manual_seed(0)
    tower: dict[str, Any] = dict(
        hidden_size=WIDTH, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=3, hidden_act=activation
    )
    text = tower | dict(vocab_size=END + 1, max_position_embeddings=CONTEXT, eos_token_id=END)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=tower | dict(image_size=64, patch_size=16)))
    inject(model, targets, rank=2, within=within)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter)
    model.to(dtype)  # type: ignore[arg-type]
    return model


def captions(kind: str) -> tuple[Tensor, Tensor]:
    """Token ids and lengths. Some start alike, two of them share tokens in one place and not before it, some are
    equal."""
    lengths = torch.tensor(TEXTS[kind])
    ids = torch.randint(1, END, (len(lengths), CONTEXT), generator=torch.Generator().manual_seed(0))
    ids[:4, 0] = 0
    ids[: len(ids) // 2, 1] = ids[-1, 1]
    ids[1:3, 2:4] = ids[0, 2:4]
    if kind in ("duplicates", "lengths"):
        ids[-2] = ids[len(ids) // 2]
    return torch.where(torch.arange(CONTEXT) < lengths[:, None] - 1, ids, END), lengths


def features_and_gradients(model: CLIPModel, encoder: Encoder, kind: str) -> list[Tensor]:
    """Features of images and texts, and the gradient of one number that depends on all of them for every A and B."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(3, 3, 64, 64, generator=generator).to(next(model.vision_model.parameters()).dtype)
    features = [encoder.image(model, pixels), encoder.text(model, *captions(kind))]
    weights = [torch.randn(each.shape, generator=generator) for each in features]
    number = sum((each * weight.to(each)).sum() for each, weight in zip(features, weights, strict=True))
    trainable = [p for p in adapter_parameters(model) if p.requires_grad]
    gradients = torch.autograd.grad(number, trainable, materialize_grads=True)  # type: ignore[arg-type]
    return [*features, *gradients]


@pytest.mark.parametrize("kind", TEXTS)
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(
    ("layers", "activation", "targets", "within"),
    [
        (1, "quick_gelu", ("q_proj", "v_proj"), None),
        (3, "quick_gelu", ("q_proj", "v_proj"), None),
        (2, "gelu", ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"), None),
        (2, "quick_gelu", ("q_proj", "v_proj"), "text_model"),
        (2, "quick_gelu", ("q_proj", "v_proj"), "vision_model"),
    ],
)
def test_features_and_gradients_equal_the_reference(
    layers: int, activation: str, targets: tuple[str, ...], within: str | None, checkpointing: bool, kind: str
) -> None:
    """Catches, in the last layer, the query, the residual or the keys of another token; text that attends to later
    tokens, to padding or to another caption; wrong positions; captions that share a token but no prefix taken for one;
    captions returned in another order; rows whose gradient is lost or counted twice; an adapter that is bypassed."""
    model = small_clip(layers, activation, targets, within).train()
    expected = features_and_gradients(model, ReferenceEncoder(), kind)
    clip = clip_of(model)
    clip.set_checkpointing(checkpointing)
    torch.testing.assert_close(features_and_gradients(model, PackedEncoder(model), kind), expected)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_is_as_near_to_the_exact_result_as_the_reference(dtype: torch.dtype, training: bool) -> None:
    """Catches an attention of its own for half precision that is less exact than transformers', or not causal."""
    exact = features_and_gradients(small_clip().train(training), ReferenceEncoder(), "lengths")
    model = small_clip().to(dtype).train(training)  # type: ignore[arg-type]
    for layer in model.modules():
        if isinstance(layer, LoRALinear):  # trained in fp32, whatever the base
            layer.lora_A.data, layer.lora_B.data = layer.lora_A.data.float(), layer.lora_B.data.float()
    theirs = features_and_gradients(model, ReferenceEncoder(), "lengths")
    ours = features_and_gradients(model, PackedEncoder(model), "lengths")

    def error(found: list[Tensor]) -> float:
        return float(torch.cat([(f - e).flatten() for f, e in zip(found, exact, strict=True)]).detach().norm())

    assert error(ours) < 1.5 * error(theirs) + 1e-6


@pytest.mark.parametrize("strength", [0.0, 0.5])
def test_strength_acts_in_both_encoders_alike(strength: float) -> None:
    """Catches an adapter that the fast encoder applies at full strength, or at all when it is switched off."""
    model = small_clip()
    set_strength(model, strength)
    with torch.no_grad():
        pixels = torch.randn(2, 3, 64, 64, dtype=torch.float64)
        for name, inputs in (("image", (pixels,)), ("text", captions("lengths"))):
            expected = getattr(ReferenceEncoder(), name)(model, *inputs)
            torch.testing.assert_close(getattr(PackedEncoder(model), name)(model, *inputs), expected)


def clip_of(model: CLIPModel, requested: str = "auto") -> Clip:
    processor = Processor(load_clip().processor.tokenizer, CLIPImageProcessor(), model.config)
    return Clip(model, processor, "small", requested_encoder=requested)


@pytest.mark.parametrize("chunk_size", [3, 8])
def test_a_training_step_is_the_same_with_both_encoders(chunk_size: int) -> None:
    """Catches a difference that only shows in the whole step: uint8 pixels, chunks, two texts a pair, the loss."""
    ids, lengths = captions("lengths")
    rows = torch.arange(len(ids))
    pixels = torch.randint(0, 256, (len(ids), 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    texts = [Captions(ids, lengths, [rows]), Captions(ids.flip(0), lengths.flip(0), [rows], 0.5)]
    found = []
    for encoder in ("reference", "fast"):
        clip = clip_of(small_clip().train(), encoder)
        loss = contrastive_backward(clip, Batch(rows, pixels, texts), chunk_size=chunk_size)
        gradients = [p.grad for p in adapter_parameters(clip.model)]
        assert clip.encoder.name == encoder and all(gradient is not None for gradient in gradients)
        found.append([loss, *gradients])
    for fast, reference in zip(found[1], found[0], strict=True):
        assert fast is not None and reference is not None
        assert (fast - reference).norm() < 1e-6 * reference.norm()


def test_tokens_after_the_end_token_change_nothing() -> None:
    """Catches a text encoder that reads the padding, so that a caption's feature depends on its neighbours."""
    model, (ids, lengths) = small_clip(), captions("lengths")
    other = torch.where(torch.arange(CONTEXT) < lengths[:, None], ids, 0)
    encoder = PackedEncoder(model)
    assert torch.equal(encoder.text(model, ids, lengths), encoder.text(model, other, lengths))


def test_each_adapted_layer_is_called_once_and_sees_no_padding_and_no_prefix_twice() -> None:
    """Catches layers that are bypassed, captions padded to the longest, and shared prefixes computed for each
    caption."""
    model, (ids, lengths) = small_clip(), captions("lengths")
    rows: list[int] = []

    class Counted(LoRALinear):
        def forward(self, x: Tensor) -> Tensor:
            rows.append(x.shape[:-1].numel())
            return super().forward(x)

    for layer in model.text_model.modules():
        if isinstance(layer, LoRALinear):
            layer.__class__ = Counted
    PackedEncoder(model).text(model, ids, lengths)
    texts = [tuple(row[:length]) for row, length in zip(ids.tolist(), lengths.tolist(), strict=True)]
    prefixes = {text[: n + 1] for text in texts for n in range(len(text))}
    assert len(prefixes) < sum(TEXTS["lengths"]) < ids.numel()
    # q and v of the first layer and v of the last see every row; q of the last only the end tokens
    assert sorted(rows) == sorted([len(set(texts)), *3 * [len(prefixes)]])
