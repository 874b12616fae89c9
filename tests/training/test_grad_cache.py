"""The gradient of a batch in chunks equals the gradient of the batch to rounding, whatever makes that hard."""

import pytest
import torch

from clip_medical.training.grad_cache import WHOLE, contrastive_backward, restore
from clip_medical.training.loss import Loss, info_nce, same_rows
from lora import adapter_parameters
from tests.encoders import ENCODERS
from tests.training.tools import (
    one_graph,
    relative_difference,
    sigmoid_loss,
    small_clip,
    take_gradients,
    whole_batch,
)


@pytest.mark.parametrize("chunk_size", [1, 5, 11, WHOLE])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("fragments", [0, 2])
def test_gradients_in_chunks_equal_those_of_one_graph(chunk_size: int, dropout: float, fragments: int) -> None:
    """Catches dropout masks that differ between the passes, a last chunk that is lost, and a gradient that reaches
    another chunk, or the caption instead of its fragment."""
    clip, batch = small_clip(dropout), whole_batch(fragments)
    torch.manual_seed(3)
    expected_loss, expected = one_graph(clip, batch, chunk_size)
    torch.manual_seed(3)
    loss = contrastive_backward(clip, batch, info_nce, chunk_size)
    torch.testing.assert_close(loss, expected_loss)
    gradients = take_gradients(clip)
    assert relative_difference(gradients, expected) < 1e-5
    assert relative_difference(gradients[-1:], expected[-1:]) < 1e-5  # of logit_scale


@pytest.mark.parametrize("chunk_size", [5, WHOLE])
@pytest.mark.parametrize("fragments", [0, 2])
def test_the_loss_that_is_given_is_the_one_that_trains(chunk_size: int, fragments: int) -> None:
    """Catches a step with a loss of its own. Gradients of a pairwise sigmoid loss equal those of the plain step."""
    clip, batch = small_clip(), whole_batch(fragments)
    expected_loss, expected = one_graph(clip, batch, loss=sigmoid_loss)
    loss = contrastive_backward(clip, batch, sigmoid_loss, chunk_size)
    torch.testing.assert_close(loss, expected_loss)
    assert relative_difference(take_gradients(clip), expected) < 1e-5
    assert loss != contrastive_backward(clip, batch, info_nce, chunk_size)


@pytest.mark.parametrize("chunk_size", [5, WHOLE])
def test_each_fragment_adds_a_weighted_loss_of_its_own(chunk_size: int) -> None:
    """Catches a weight that is left out, fragments whose positives are those of another one, a returned loss that is
    not that of the captions, and gradients of one loss that replace those of another."""
    clip, batch = small_clip(), whole_batch(fragments=2)
    parts = []
    for captions in batch.captions:
        images, texts = clip.image_features(batch.pixels), clip.text_features(captions.tokens, captions.lengths)
        (captions.weight * info_nce(images, texts, clip.model.logit_scale, same_rows(*captions.ids))).backward()
        parts.append(take_gradients(clip))
    expected = [a + b + c for a, b, c in zip(*parts, strict=True)]
    loss = contrastive_backward(clip, batch, info_nce, chunk_size)
    torch.testing.assert_close(loss, one_graph(small_clip(), whole_batch())[0])
    assert relative_difference(take_gradients(clip), expected) < 1e-5


def test_it_is_not_gradient_accumulation() -> None:
    """Catches the mean of the losses of the chunks, each with fewer negatives. It differs visibly."""
    clip, whole = small_clip(), whole_batch()
    contrastive_backward(clip, whole)
    expected = take_gradients(clip)
    for rank in (0, 1):  # the halves, as batches of their own
        half = whole_batch(rank=rank, world_size=2)
        half.captions[0].ids[:] = [ids.tensor_split(2)[rank] for ids in half.captions[0].ids]
        contrastive_backward(clip, half, scale=lambda loss: loss / 2)
    assert relative_difference(take_gradients(clip), expected) > 0.05


def test_the_random_state_afterwards_is_that_of_one_pass() -> None:
    """Catches a replay that leaves the generator rewound, so that the next step draws the same masks again."""
    clip, batch, states = small_clip(dropout=0.3), whole_batch(), []
    for step in (lambda: one_graph(clip, batch, 5), lambda: contrastive_backward(clip, batch, info_nce, 5)):
        torch.manual_seed(3)
        step()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


@pytest.mark.parametrize("chunk_size", [5, WHOLE])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_gradients_are_the_same_with_checkpointing(chunk_size: int, dropout: float) -> None:
    """Catches adapters that checkpointing cuts off from the graph, in the plain step and in chunks, with either
    encoder (dropout needs the reference), and other dropout masks in the second computation."""
    clip, batch = small_clip(dropout, attention_dropout=dropout), whole_batch(fragments=1)
    results = []
    for on in (False, True):
        clip.set_checkpointing(on)
        torch.manual_seed(3)
        contrastive_backward(clip, batch, info_nce, chunk_size)
        results.append(take_gradients(clip))
    assert relative_difference(results[1], results[0]) < 1e-6


@pytest.mark.parametrize(("dtype", "chunk_size"), [(torch.float16, 5), (torch.bfloat16, WHOLE)])
def test_a_base_in_half_precision_gives_the_gradient_to_its_rounding(dtype: torch.dtype, chunk_size: int) -> None:
    """Catches a branch that does not take the dtype of its base, and fp16 gradients that underflow."""
    clip, batch = small_clip(), whole_batch()
    expected_loss = contrastive_backward(clip, batch, info_nce, chunk_size)
    expected = take_gradients(clip)
    clip = small_clip(dtype=dtype)
    loss = contrastive_backward(clip, batch, info_nce, chunk_size, scale=lambda loss: 1024 * loss)
    gradients = take_gradients(clip)
    assert loss.dtype == torch.float32 and all(g.dtype == torch.float32 for g in gradients)
    rounding = torch.finfo(dtype).eps
    torch.testing.assert_close(loss, expected_loss, rtol=4 * rounding, atol=0)
    assert relative_difference([g / 1024 for g in gradients], expected) < 8 * rounding


def test_the_loss_scale_reaches_every_gradient() -> None:
    """Catches a loss scale that is applied to the features' gradients only, and a returned loss that is scaled."""
    clip, batch = small_clip(), whole_batch(fragments=1)
    plain_loss = contrastive_backward(clip, batch, info_nce, 5)
    plain = take_gradients(clip)
    assert contrastive_backward(clip, batch, info_nce, 5, scale=lambda loss: 1024 * loss) == plain_loss
    assert relative_difference([g / 1024 for g in take_gradients(clip)], plain) < 1e-5


@pytest.mark.parametrize("chunk_size", [5, WHOLE])
@pytest.mark.parametrize("tower", ["text_model", "vision_model"])
def test_the_adapter_may_be_in_one_tower_alone(tower: str, chunk_size: int) -> None:
    """Catches a step that fails where the features of the other tower need no gradient, or changes that of this one."""
    clip, batch = small_clip(), whole_batch()
    own = [p for name, p in clip.model.named_parameters() if tower in name and p.requires_grad]
    contrastive_backward(clip, batch, info_nce, chunk_size)
    both = [p.grad.clone() for p in own if p.grad is not None]
    clip.model.zero_grad(set_to_none=True)
    for parameter in adapter_parameters(clip.model):
        parameter.requires_grad_(any(parameter is p for p in own))
    contrastive_backward(clip, batch, info_nce, chunk_size)
    alone = [p.grad for p in own if p.grad is not None]
    assert len(alone) == 8 and relative_difference(alone, both) < 1e-5
    assert all(p.grad is None for p in adapter_parameters(clip.model) if not p.requires_grad)


@pytest.mark.parametrize("encoder", ENCODERS)
def test_an_exception_in_the_loss_is_not_hidden(encoder: str) -> None:
    """Catches a step that computes another loss instead of the one that fails."""

    def failing_loss(*_: object) -> torch.Tensor:
        raise RuntimeError("raised by the loss")

    loss: Loss = failing_loss
    with pytest.raises(RuntimeError, match="raised by the loss"):
        contrastive_backward(small_clip(encoder=encoder), whole_batch(), loss)


def test_a_random_state_from_a_gpu_is_restored_on_a_cpu() -> None:
    """Catches a run from a GPU that cannot be resumed on a machine without one."""
    state = torch.get_rng_state()
    torch.rand(1)
    restore((state, ([0], [torch.zeros(16, dtype=torch.uint8)])))
    assert torch.equal(torch.get_rng_state(), state)
