"""InfoNCE: what it must equal, and the mistakes that a falling loss curve would not show."""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_medical import info_nce
from clip_medical.training import loss as loss_module
from clip_medical.training.loss import same_rows

ROOT = Path(__file__).resolve().parents[2]


def features(seed: int, n: int = 8, d: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images, texts = F.normalize(torch.randn(2, n, d, generator=generator, dtype=torch.float64), dim=-1)
    return images, texts


@pytest.mark.parametrize("n", [2, 7, 64])
def test_equal_similarities_give_ln_n(n: int) -> None:
    """Catches a sum where a mean belongs, and only one of the two directions counted."""
    same = F.normalize(torch.ones(n, 5), dim=-1)
    assert info_nce(same, same, 4.6).item() == pytest.approx(math.log(n), rel=1e-5)


def test_two_positives_halve_the_chance_level() -> None:
    """Catches ln N for rows with several positives."""
    same, in_twos = F.normalize(torch.ones(8, 5), dim=-1), same_rows(torch.arange(8) // 2)
    assert info_nce(same, same, 2.0, in_twos).item() == pytest.approx(math.log(8 / 2), rel=1e-5)


def test_the_loss_that_contributing_prints() -> None:
    """Catches an example that does not run, or whose formula is not that of the paper."""
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.DOTALL)
    names: dict[str, Any] = {}
    exec(next(block for block in blocks if "def siglip" in block), names)
    same = torch.eye(2)
    value = names["siglip"](same, same, torch.tensor(0.0), torch.eye(2, dtype=torch.bool))
    by_hand = math.log1p(math.exp(9)) + math.log1p(math.exp(-10))  # logits 1 - 10 on the diagonal, 0 - 10 beside it
    assert value.item() == pytest.approx(by_hand, rel=1e-5)


@pytest.mark.parametrize("block", [1, 8, 24, 40, 63])
@pytest.mark.parametrize("ids", [torch.arange(8), torch.tensor([0, 1, 1, 2, 3, 4, 1, 0])])
def test_blocks_of_rows_change_neither_loss_nor_gradient(
    block: int, ids: torch.Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a last block that is lost or weighted like a full one, candidates of one block only, and a gradient of
    features or scale that the recomputation loses."""
    results = []
    for each in (2**20, block):
        monkeypatch.setattr(loss_module, "BLOCK", each)
        images, texts = (f.requires_grad_(True) for f in features(4))
        scale = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
        loss = info_nce(images, texts, scale, same_rows(ids))
        results.append([loss, *torch.autograd.grad(loss, [images, texts, scale])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-12, atol=1e-14)


def test_a_large_batch_keeps_no_similarities(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches memory that grows with the square of the batch: similarities kept for the backward pass."""
    n = 64
    monkeypatch.setattr(loss_module, "BLOCK", n)
    images, texts = (f.requires_grad_(True) for f in features(4, n=n, d=4))
    positives, saved = torch.eye(n, dtype=torch.bool), dict[int, int]()

    def count(tensor: torch.Tensor) -> torch.Tensor:
        saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        info_nce(images, texts, 2.0, positives)
    saved.pop(positives.untyped_storage().data_ptr())
    similarities = 8 * n * n  # bytes, in fp64
    assert 0 < sum(saved.values()) < similarities / 2


@given(seed=st.integers(0, 10_000), n=st.integers(2, 12))
@settings(max_examples=25, deadline=None)
def test_swapping_images_and_texts_changes_nothing(seed: int, n: int) -> None:
    """Catches a loss of one direction only (image to text), as in few-shot CLIP code."""
    images, texts = features(seed, n)
    assert info_nce(images, texts, 3.0).item() == pytest.approx(info_nce(texts, images, 3.0).item(), abs=1e-12)


@given(seed=st.integers(0, 10_000), n=st.integers(2, 12))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_pairs_does_not_matter(seed: int, n: int) -> None:
    """Catches targets at row numbers other than the pair's own."""
    images, texts = features(seed, n)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    assert info_nce(images[order], texts[order], 3.0).item() == pytest.approx(info_nce(images, texts, 3.0).item())


def test_equals_the_loss_of_transformers() -> None:
    """Catches a forgotten exp: CLIP stores the logarithm of the scale, and its forward pass exponentiates."""
    from transformers.models.clip.modeling_clip import image_text_contrastive_loss as reference

    images, texts = features(3)
    scale = torch.tensor(2.6592)
    expected = reference(scale.exp() * texts @ images.T)
    assert info_nce(images, texts, scale).item() == pytest.approx(expected.item(), rel=1e-7)


def test_aligned_features_have_a_loss_near_zero_at_a_high_scale() -> None:
    """Catches a scale that divides instead of multiplying, and a loss that cannot reach 0."""
    aligned = torch.eye(6)
    losses = [info_nce(aligned, aligned, math.log(scale)).item() for scale in (1, 10, 100)]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 1e-6


def test_a_repeated_caption_is_a_positive_for_both_its_images() -> None:
    """Catches duplicates as negatives: a perfect model could never reach a loss of 0."""
    images = torch.eye(4)[[0, 0, 1, 2]]  # rows 0 and 1 have the same image and the same caption
    positives = same_rows(torch.tensor([5, 5, 6, 7]))
    assert info_nce(images, images, math.log(100)).item() == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert info_nce(images, images, math.log(100), positives).item() < 1e-6


def test_multi_positives_by_hand() -> None:
    """Catches a mean outside the logarithm where a sum inside it belongs. Caption 0 is a positive of both images."""
    images, texts = torch.eye(2), torch.eye(2)
    positives = torch.tensor([[True, False], [True, True]])
    e = math.e
    rows = [-math.log(e / (e + 1)), -math.log((1 + e) / (1 + e))]
    columns = [-math.log((e + 1) / (e + 1)), -math.log(e / (e + 1))]
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert info_nce(images, texts, 0.0, positives).item() == pytest.approx(expected, rel=1e-6)


def test_the_diagonal_as_positives_is_the_plain_loss() -> None:
    """Catches a default that is not the diagonal."""
    images, texts = features(1)
    plain = info_nce(images, texts, 3.0)
    assert info_nce(images, texts, 3.0, torch.eye(8, dtype=torch.bool)).item() == pytest.approx(plain.item(), rel=1e-12)


def test_the_gradient_equals_finite_differences() -> None:
    """Catches a detached tensor or an in-place change on the way."""
    images, texts = (f[:4].requires_grad_(True) for f in features(2))
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    positives = same_rows(torch.tensor([0, 1, 1, 2]))
    assert torch.autograd.gradcheck(lambda i, t, s: info_nce(i, t, s, positives), (images, texts, scale))


def test_pairs_with_the_same_caption_or_the_same_image_are_positives() -> None:
    """Catches "and" for "or"."""
    same = same_rows(torch.tensor([0, 0, 1]), torch.tensor([4, 5, 5]))
    assert same.tolist() == [[True, True, False], [True, True, True], [False, True, True]]


def test_shapes_that_do_not_match_are_refused() -> None:
    """Catches silent broadcasting of a batch of images against one caption."""
    with pytest.raises(ValueError, match=r"\(8, 16\).*\(1, 16\)"):
        info_nce(features(0)[0], features(0, n=1)[0], 1.0)
    with pytest.raises(ValueError, match="positives"):
        info_nce(*features(0), 1.0, torch.eye(3, dtype=torch.bool))
