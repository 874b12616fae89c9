"""The gradient of a large batch in chunks equals the gradient of the batch, to rounding, whatever makes that hard."""

from dataclasses import replace

import pytest
import torch
from torch import Tensor
from transformers import CLIPConfig, CLIPModel

from clip_medical.data.batches import Pairs
from clip_medical.model import Clip
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.loss import info_nce, same_rows
from lora import adapter_parameters, inject

N = 22


class Picture:
    image_mean = image_std = (0.5, 0.5, 0.5)


def small_clip(dropout: float = 0.0, attention_dropout: float = 0.0) -> Clip:
    torch.manual_seed(0)
    tower = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, projection_dim=16)
    tower["attention_dropout"] = attention_dropout
    text = tower | dict(vocab_size=50, max_position_embeddings=20, eos_token_id=49, bos_token_id=48, pad_token_id=49)
    config = CLIPConfig(text_config=text, vision_config=tower | dict(image_size=16, patch_size=8), projection_dim=16)
    clip = Clip(CLIPModel(config), None, Picture(), "small")  # type: ignore[arg-type]
    inject(clip.model, rank=4, dropout=dropout)
    for parameter in adapter_parameters(clip.model):
        torch.nn.init.normal_(parameter, std=0.1)  # away from B = 0, where A would have no gradient to compare
    clip.model.logit_scale.requires_grad_(True)
    clip.model.train()
    return clip


def pairs() -> Pairs:
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(3, 20, (N,), generator=generator)
    tokens = torch.randint(0, 48, (N, 20), generator=generator)
    for row, length in zip(tokens, lengths, strict=True):
        row[length - 1 :] = 49
    pixels = torch.randint(0, 256, (N, 3, 16, 16), dtype=torch.uint8, generator=generator)
    caption_ids = torch.arange(N)
    caption_ids[7] = caption_ids[2]  # two pairs with the same caption: multi-positives
    tokens[7], lengths[7] = tokens[2], lengths[2]
    return Pairs(pixels, tokens, lengths, caption_ids, torch.arange(N))


def gradients(clip: Clip) -> list[Tensor]:
    taken = [p.grad.clone() for p in [*adapter_parameters(clip.model), clip.model.logit_scale] if p.grad is not None]
    clip.model.zero_grad(set_to_none=True)
    return taken


def one_graph(clip: Clip, data: Pairs, chunk_size: int) -> tuple[Tensor, list[Tensor]]:
    """The definition: all features in one graph, encoded in the same chunks so that dropout draws the same masks."""
    chunks = torch.arange(N).split(chunk_size)
    images = torch.cat([clip.image_features(data.pixels[r]) for r in chunks])
    readings, of_chunks = [data, *data.fragments], []
    for r in chunks:
        tokens, lengths = (torch.cat([getattr(each, key)[r] for each in readings]) for key in ("tokens", "lengths"))
        of_chunks.append(clip.text_features(tokens, lengths).view(len(readings), len(r), -1))
    losses = [
        each.weight * info_nce(images, texts, clip.model.logit_scale, same_rows(*each.ids))
        for each, texts in zip(readings, torch.cat(of_chunks, dim=1), strict=True)
    ]
    torch.stack(losses).sum().backward()
    return losses[0].detach(), gradients(clip)


def with_fragments(data: Pairs) -> Pairs:
    """Each caption and, weighted by 0.3 and 0.2, its first word and its second."""
    cuts = []
    for word, weight in ((1, 0.3), (2, 0.2)):
        words = torch.full_like(data.tokens, 49)
        words[:, :2] = data.tokens[:, [0, word]]
        ids = words.unique(dim=0, return_inverse=True)[1]
        cuts.append(replace(data, tokens=words, lengths=torch.full((N,), 3), text_ids=ids, weight=weight))
    return replace(data, fragments=tuple(cuts))


def relative(a: list[Tensor], b: list[Tensor]) -> float:
    flat = [torch.cat([g.flatten() for g in one]) for one in (a, b)]
    return ((flat[0] - flat[1]).norm() / flat[1].norm()).item()


@pytest.mark.parametrize("chunk_size", [1, 5, 8, 11, N, 1000])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("cut", [False, True])
def test_chunked_gradients_equal_one_graph(chunk_size: int, dropout: float, cut: bool) -> None:
    """Catches masks that differ between the passes, a last chunk that is lost, a gradient sent to another chunk, or
    that of a fragment to a caption."""
    clip, data = small_clip(dropout), with_fragments(pairs()) if cut else pairs()
    torch.manual_seed(3)
    expected_loss, expected = one_graph(clip, data, chunk_size)
    torch.manual_seed(3)
    loss = contrastive_backward(clip, data, torch.arange(N), chunk_size)
    torch.testing.assert_close(loss, expected_loss)
    assert relative(gradients(clip), expected) < 1e-5


@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_fragments_add_a_weighted_loss_of_their_own(chunk_size: int) -> None:
    """Catches a weight that is left out, words that are right for one picture and wrong for another, a returned loss
    that is not that of the captions, and gradients of one loss that are lost to the other."""
    clip, data = small_clip(), with_fragments(pairs())
    caption_loss, expected = one_graph(clip, pairs(), N)
    for cut in data.fragments:
        images, texts = clip.image_features(data.pixels), clip.text_features(cut.tokens, cut.lengths)
        (cut.weight * info_nce(images, texts, clip.model.logit_scale, same_rows(*cut.ids))).backward()
        expected = [a + b for a, b in zip(expected, gradients(clip), strict=True)]
    loss = contrastive_backward(clip, data, torch.arange(N), chunk_size)
    torch.testing.assert_close(loss, caption_loss)
    assert relative(gradients(clip), expected) < 1e-5


def test_it_is_not_gradient_accumulation() -> None:
    """Catches the mean of the chunks' own losses, which has fewer negatives: it must differ, and visibly."""
    clip, data = small_clip(), pairs()
    contrastive_backward(clip, data, torch.arange(N), 1000)
    whole = gradients(clip)
    for rows in torch.arange(N).split(N // 2):
        contrastive_backward(clip, data, rows, 1000, scale=lambda loss: loss / 2)
    assert relative(gradients(clip), whole) > 0.05


def test_the_random_state_afterwards_is_that_of_one_pass() -> None:
    """Catches a replay that leaves the generator rewound, so that the next step draws the same masks again."""
    clip, data = small_clip(dropout=0.3), pairs()
    states = []
    for step in (lambda: one_graph(clip, data, 5), lambda: contrastive_backward(clip, data, torch.arange(N), 5)):
        torch.manual_seed(3)
        step()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_gradients_are_the_same_with_checkpointing(chunk_size: int) -> None:
    """Catches adapters that checkpointing cuts off, in the plain step and in the chunked one; other masks in the
    second computation."""
    clip, data = small_clip(dropout=0.2, attention_dropout=0.2), pairs()
    results = []
    for on in (False, True):
        clip.checkpointing = on
        torch.manual_seed(3)
        contrastive_backward(clip, data, torch.arange(N), chunk_size)
        results.append(gradients(clip))
    assert relative(*results) < 1e-6


@pytest.mark.parametrize(("dtype", "chunk_size"), [(torch.float16, 5), (torch.bfloat16, 1000)])
def test_a_base_in_half_precision_gives_the_gradient_to_its_rounding(dtype: torch.dtype, chunk_size: int) -> None:
    """Catches a branch that does not take the format of its base, and gradients that are lost in its range."""
    clip, data = small_clip(), pairs()
    expected_loss = contrastive_backward(clip, data, torch.arange(N), chunk_size)
    expected = gradients(clip)
    for parameter in clip.model.parameters():
        if not parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    loss = contrastive_backward(clip, data, torch.arange(N), chunk_size, scale=lambda loss: 1024 * loss)
    found = gradients(clip)
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in found)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected_loss, rtol=4 * rounding, atol=0)
    assert relative([g / 1024 for g in found], expected) < 8 * rounding


def test_scaling_reaches_every_gradient() -> None:
    """Catches a loss scale that is applied on the features' side only."""
    clip, data = small_clip(), pairs()
    contrastive_backward(clip, data, torch.arange(N), 5)
    plain = gradients(clip)
    contrastive_backward(clip, data, torch.arange(N), 5, scale=lambda loss: 1024 * loss)
    assert relative([g / 1024 for g in gradients(clip)], plain) < 1e-5


@pytest.mark.parametrize("chunk_size", [5, 1000])
def test_one_tower_may_have_the_adapter_alone(chunk_size: int) -> None:
    """Catches a step that stops where the features of the other tower have no gradient to take."""
    clip, data = small_clip(), pairs()
    contrastive_backward(clip, data, torch.arange(N), chunk_size)
    both = [p.grad.clone() for n, p in clip.model.named_parameters() if "vision" in n and p.grad is not None]
    clip.model.zero_grad(set_to_none=True)
    clip.model.text_model.requires_grad_(False)
    contrastive_backward(clip, data, torch.arange(N), chunk_size)
    alone = [p.grad for n, p in clip.model.named_parameters() if "vision" in n and p.grad is not None]
    assert len(alone) == 8 and relative(alone, both) < 1e-5
    assert all(p.grad is None for p in clip.model.text_model.parameters())
