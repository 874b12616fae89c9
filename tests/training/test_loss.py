"""InfoNCE: what it must equal, and the mistakes that would pass unseen in a falling loss curve."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_medical import info_nce
from clip_medical.training.loss import same_rows


def features(seed: int, n: int = 8, d: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    make = lambda: F.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64), dim=-1)  # noqa: E731
    return make(), make()


@pytest.mark.parametrize("n", [2, 7, 64])
def test_equal_logits_cost_ln_n(n: int) -> None:
    """Catches a sum where the mean belongs, and only one of the two directions counted."""
    same = F.normalize(torch.ones(n, 5), dim=-1)
    assert info_nce(same, same, 4.6).item() == pytest.approx(math.log(n), rel=1e-5)


@given(seed=st.integers(0, 10_000), n=st.integers(2, 12))
@settings(max_examples=25, deadline=None)
def test_swapping_images_and_texts_changes_nothing(seed: int, n: int) -> None:
    """Catches a one-way loss (image to text alone), as in few-shot CLIP code."""
    images, texts = features(seed, n)
    assert info_nce(images, texts, 3.0).item() == pytest.approx(info_nce(texts, images, 3.0).item(), abs=1e-12)


@given(seed=st.integers(0, 10_000), n=st.integers(2, 12))
@settings(max_examples=25, deadline=None)
def test_the_order_of_the_pairs_does_not_matter(seed: int, n: int) -> None:
    """Catches targets that are tied to row numbers other than the pair's own."""
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


def test_goes_to_zero_as_aligned_features_sharpen() -> None:
    """Catches a scale that divides, and a loss with a floor."""
    aligned = torch.eye(6)
    losses = [info_nce(aligned, aligned, math.log(scale)).item() for scale in (1, 10, 100)]
    assert losses[0] > losses[1] > losses[2] and losses[2] < 1e-6


def test_a_repeated_caption_is_right_for_both_its_images() -> None:
    """Catches duplicates punished as negatives: with them a perfect model could never reach 0."""
    images = torch.eye(4)[[0, 0, 1, 2]]  # rows 0 and 1 show and say the same
    positives = same_rows(torch.tensor([5, 5, 6, 7]))
    assert info_nce(images, images, math.log(100)).item() == pytest.approx(math.log(2) / 2, rel=1e-5)
    assert info_nce(images, images, math.log(100), positives).item() < 1e-6


def test_multi_positives_by_hand() -> None:
    """Catches a mean outside the logarithm where the sum belongs inside it. Two images, both right for caption 0."""
    images, texts = torch.eye(2), torch.eye(2)
    positives = torch.tensor([[True, False], [True, True]])
    e = math.e
    rows = [-math.log(e / (e + 1)), -math.log((1 + e) / (1 + e))]
    columns = [-math.log((e + 1) / (e + 1)), -math.log(e / (e + 1))]
    expected = (sum(rows) / 2 + sum(columns) / 2) / 2
    assert info_nce(images, texts, 0.0, positives).item() == pytest.approx(expected, rel=1e-6)


def test_the_diagonal_as_positives_is_the_plain_loss() -> None:
    """Catches two code paths that drift apart."""
    images, texts = features(1)
    plain = info_nce(images, texts, 3.0)
    assert info_nce(images, texts, 3.0, torch.eye(8, dtype=torch.bool)).item() == pytest.approx(plain.item(), rel=1e-12)


def test_gradient_is_right() -> None:
    """Catches a detach or an in-place change on the way."""
    images, texts = (f[:4].requires_grad_(True) for f in features(2))
    scale = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    positives = same_rows(torch.tensor([0, 1, 1, 2]))
    assert torch.autograd.gradcheck(lambda i, t, s: info_nce(i, t, s, positives), (images, texts, scale))


def test_rows_agree_by_caption_or_by_picture() -> None:
    """Catches 'and' for 'or': the same picture under two captions is a positive as well."""
    same = same_rows(torch.tensor([0, 0, 1]), torch.tensor([4, 5, 5]))
    assert same.tolist() == [[True, True, False], [True, True, True], [False, True, True]]


def test_shapes_that_do_not_fit_are_named() -> None:
    """Catches silent broadcasting of a batch of images against one caption."""
    with pytest.raises(ValueError, match=r"\(8, 16\).*\(1, 16\)"):
        info_nce(features(0)[0], features(0, n=1)[0], 1.0)
    with pytest.raises(ValueError, match="positives"):
        info_nce(*features(0), 1.0, torch.eye(3, dtype=torch.bool))
