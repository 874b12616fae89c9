"""Recall@K: worked by hand, against brute force, and on the inputs that make a recall look better than it is."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from torch import Tensor

from clip_medical import recall_at_k
from clip_medical.evaluation import retrieval
from clip_medical.evaluation.retrieval import (
    chance_recall,
    pair_ranks,
    ranks,
    retrieval_report,
    share,
)


def keys(ids: Tensor, count: int = 50) -> csr_array:
    """One key for each row: (N, count), true at [row, id]."""
    return csr_array((np.ones(len(ids), bool), (np.arange(len(ids)), ids.numpy())), shape=(len(ids), count))


def noisy_pairs(n: int, noise: float = 1.0, width: int = 8) -> tuple[Tensor, Tensor]:
    """Features of n images, and of n texts that resemble them."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(n, width, generator=generator), dim=-1)
    return images, F.normalize(images + noise * torch.randn(n, width, generator=generator), dim=-1)


def brute_force(similarity: np.ndarray, query_ids: list[int], candidate_ids: list[int]) -> list[int]:
    """Ranks by sorting each row, with negatives before positives where they tie."""
    result = []
    for row, positive_id in zip(similarity, query_ids, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], candidate_ids[c] == positive_id))
        result.append(next(place for place, c in enumerate(order) if candidate_ids[c] == positive_id))
    return result


# Images are the four axes, so that row t of TEXTS holds the similarities of text t with images 0..3.
TEXTS = torch.tensor(
    [
        [0.9, 0.1, 0.2, 0.0],  # texts 0 and 1 belong to image 0: first and second
        [0.5, 0.8, 0.1, 0.3],
        [0.2, 0.7, 0.6, 0.1],  # texts 2 and 3 belong to image 1: first and last
        [0.6, 0.1, 0.3, 0.2],
        [0.4, 0.3, 0.2, 0.1],  # texts 4 and 5 belong to image 2: third and first
        [0.0, 0.1, 0.9, 0.2],
        [0.7, 0.6, 0.5, 0.4],  # texts 6 and 7 belong to image 3: last and first
        [0.1, 0.2, 0.3, 0.95],
    ]
)


def test_four_images_eight_texts_by_hand() -> None:
    """Catches swapped directions and several captions of an image counted as several misses."""
    recall = recall_at_k(torch.eye(4), TEXTS, text_to_image=[0, 0, 1, 1, 2, 2, 3, 3], ks=(1, 2, 3))
    # text ranks, from 0: 0, 1, 0, 3, 2, 0, 3, 0
    assert recall["text_to_image"] == {1: 4 / 8, 2: 5 / 8, 3: 6 / 8}
    # image 0: its text 0 (0.9) leads its column; image 1: text 2 (0.7) comes after text 1 (0.8); image 2: text 5 leads;
    # image 3: text 7 leads
    assert recall["image_to_text"] == {1: 3 / 4, 2: 1.0, 3: 1.0}


@given(
    seed=st.integers(0, 10_000),
    images=st.integers(1, 9),
    texts=st.integers(1, 14),
    levels=st.sampled_from([2, 5, 1000]),
)
@settings(max_examples=60, deadline=None)
def test_ranks_equal_brute_force(seed: int, images: int, texts: int, levels: int) -> None:
    """Catches every off-by-one; few levels of similarity make many ties, few ids make many positives."""
    rng = np.random.default_rng(seed)
    query_ids, candidate_ids = rng.integers(0, images, images), rng.integers(0, images, texts)
    query_ids = query_ids[np.isin(query_ids, candidate_ids)]
    if len(query_ids) == 0:
        return
    similarity = np.round(rng.random((len(query_ids), texts)) * levels) / levels
    both_keys = (keys(torch.tensor(ids)) for ids in (query_ids, candidate_ids))
    rank, positives, pool = ranks(torch.tensor(similarity), torch.eye(texts), *both_keys)
    assert pool == texts and positives.tolist() == [(candidate_ids == q).sum() for q in query_ids]
    assert rank.tolist() == brute_force(similarity.astype(np.float32), query_ids.tolist(), candidate_ids.tolist())


def test_collapsed_features_score_nothing() -> None:
    """Catches the strict '>' rank, which gives Recall@1 = 100 % to a model that maps everything to one point."""
    one_point = F.normalize(torch.ones(50, 8), dim=-1)
    recall = recall_at_k(one_point, one_point)
    assert recall["image_to_text"][10] == 0 and recall["text_to_image"][10] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    """Catches a metric that takes NaN for perfect: every comparison with NaN is false, so no rank is above 0."""
    features = torch.eye(5)
    features[2, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        recall_at_k(features, torch.eye(5))


def test_half_precision_features_are_compared_in_fp32() -> None:
    """Catches similarities computed in bf16, whose 8 bits make different values tie."""
    images, texts = (features.bfloat16() for features in noisy_pairs(300, noise=0.2, width=64))
    assert recall_at_k(images, texts) == recall_at_k(images.float(), texts.float())


def test_blocks_and_row_order_do_not_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a last block cut off, and ranks that depend on the position of a pair in the pool."""
    images, texts = noisy_pairs(45)
    ids = torch.arange(45) // 2
    whole = ranks(images, texts, keys(ids), keys(ids)).rank
    order = torch.randperm(45, generator=torch.Generator().manual_seed(0))
    shuffled = keys(ids[order])
    assert ranks(images[order], texts[order], shuffled, shuffled).rank.tolist() == whole[order].tolist()
    for block in (1, 7 * 45, 8 * 45 + 1):
        monkeypatch.setattr(retrieval, "BLOCK", block)
        assert ranks(images, texts, keys(ids), keys(ids)).rank.tolist() == whole.tolist()


def test_same_caption_is_a_positive() -> None:
    """Catches a pool in which three images share a caption and two of them count as negatives."""
    texts = torch.eye(4)[[0, 0, 0, 1]]
    images = torch.eye(4)[[0, 0, 0, 1]]
    report = retrieval_report(images, texts, torch.tensor([0, 0, 0, 1]), torch.arange(4), ks=(1,))
    assert report["image_to_text"]["pool"] == 4
    assert report["image_to_text"]["recall@1"]["value"] == 1 and report["image_to_text"]["mrr"]["value"] == 1
    assert recall_at_k(images, texts, ks=(1,))["image_to_text"][1] == 0.25  # as four captions: the ties are negatives


def test_median_rank_and_mrr_by_hand() -> None:
    """Catches ranks counted from 0 where they are reported."""
    texts = torch.tensor([[1.0, 0, 0], [0.9, 0.5, 0], [0.3, 0.2, 0.1]])  # image i is axis i: text ranks 1, 2, 3
    report = retrieval_report(torch.eye(3), texts, torch.arange(3), torch.arange(3), ks=(1,))["text_to_image"]
    assert report["median_rank"]["value"] == 2 and report["mrr"]["value"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert report["median_rank"]["chance"] == 2 and report["mrr"]["chance"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    two = retrieval_report(torch.eye(2), torch.tensor([[1.0, 0], [1, 0]]), torch.arange(2), torch.arange(2), ks=())
    assert two["text_to_image"]["median_rank"]["value"] == 1.5  # ranks 1 and 2: the lower of them would flatter


def test_query_without_positive_is_refused() -> None:
    """Catches a silent rank 0 for an image whose caption is not in the pool, and images paired by position."""
    with pytest.raises(ValueError, match="no positive"):
        ranks(torch.eye(3), torch.eye(3), keys(torch.arange(3)), keys(torch.tensor([0, 1, 1])))
    with pytest.raises(ValueError, match="3 images and 3 texts"):
        recall_at_k(torch.eye(3), torch.eye(3), text_to_image=[0, 1, 1])
    with pytest.raises(ValueError, match="pass text_to_image"):
        recall_at_k(torch.eye(3), torch.eye(3)[:2])


def test_chance_level_is_the_recall_of_random_orders() -> None:
    """Catches k / n used where captions repeat. The formula is compared with 4,000 random orders."""
    ids = torch.tensor([0] * 5 + [1] * 2 + list(range(2, 15)))
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(4000):
        order = ids[torch.from_numpy(rng.permutation(len(ids)))][:3]
        hits.append((ids[:, None] == order[None, :]).any(dim=1).double().mean().item())
    positives = (ids[:, None] == ids[None, :]).sum(dim=1)
    assert chance_recall(positives, len(ids))[2] == pytest.approx(np.mean(hits), abs=0.005)
    assert chance_recall(torch.ones(100), 100)[[0, 4, 99]].tolist() == pytest.approx([0.01, 0.05, 1])
    report = retrieval_report(*noisy_pairs(len(ids)), ids, torch.arange(len(ids)), ks=(3,))
    assert report["text_to_image"]["recall@3"]["chance"] == pytest.approx(np.mean(hits), abs=0.005)


def test_interval_is_binomial_for_large_samples() -> None:
    """Catches the standard deviation used for the standard error, and one-sided percentiles."""
    hits = torch.tensor([1.0] * 120 + [0.0] * 280)
    _, low, high = share(hits).values()
    width = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - width, abs=0.006) and high == pytest.approx(0.3 + width, abs=0.006)
    assert share(hits) == {
        "value": pytest.approx(0.3),
        "low": low,
        "high": high,
    }


def test_no_hits_do_not_give_an_empty_interval() -> None:
    """Catches [0.0, 0.0]: 0 of 100 is compatible with 3.6 % (from tables of exact intervals), 0 of 10 with 31 %."""
    assert [*share(torch.zeros(100)).values()] == pytest.approx([0, 0, 0.0362], abs=1e-4)
    assert [*share(torch.ones(10)).values()] == pytest.approx([1, 0.6915, 1], abs=1e-4)


def test_captions_of_one_image_are_resampled_together() -> None:
    """Catches five captions of an image taken for five independent queries: the interval would be too narrow."""
    hits = (torch.arange(100) % 2).double().repeat_interleave(5)
    images = torch.arange(100).repeat_interleave(5)
    narrow, wide = share(hits), share(hits, images)
    assert wide["high"] - wide["low"] == pytest.approx(5**0.5 * (narrow["high"] - narrow["low"]), rel=0.1)
    features, texts = noisy_pairs(100)
    pairs = (features[images], texts[images], torch.arange(500), images)
    recall = retrieval_report(*pairs)["text_to_image"]["recall@1"]
    expected = share(pair_ranks(*pairs)["text_to_image"].rank < 1, images)
    assert recall.items() >= expected.items()


def test_interval_agrees_with_scipy() -> None:
    """Catches a percentile interval of something other than the mean, or of too few draws."""
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    scores = torch.rand(150, generator=torch.Generator().manual_seed(0)).double()
    expected = bootstrap((scores.numpy(),), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert [*share(scores).values()][1:] == pytest.approx([expected.low, expected.high], abs=0.005)


def test_repeated_image_is_a_positive_of_all_its_captions() -> None:
    """Catches an image whose second caption counts as a negative because it is in another row."""
    images, texts = torch.eye(4)[[0, 0, 1]], torch.eye(4)[[2, 0, 1]]
    report = retrieval_report(images, texts, torch.arange(3), torch.tensor([0, 0, 1]), ks=(1,))
    assert report["image_to_text"]["recall@1"]["value"] == 1


def test_images_with_several_captions_are_in_the_pool_once() -> None:
    """Catches a negative image counted once for each of its captions, and positives counted twice.

    The expected ranks come from a dense table of few captions and few images, so that both repeat and cross.
    """
    generator = torch.Generator().manual_seed(3)
    captions, images = (torch.randint(0, 12, (40,), generator=generator) for _ in range(2))
    image_features, text_features = (torch.randn(12, 4, generator=generator) for _ in range(2))
    result = pair_ranks(image_features[images], text_features[captions], captions, images)
    distinct = images.unique()
    match = ((images == distinct[:, None]).float() @ (captions[:, None] == captions).float()) > 0  # (I, N)
    similarity = image_features[distinct] @ text_features[captions].T
    for way, table, positive in (("image_to_text", similarity, match), ("text_to_image", similarity.T, match.T)):
        best = table.masked_fill(~positive, -torch.inf).amax(dim=1, keepdim=True)
        assert result[way].positives.tolist() == positive.sum(dim=1).tolist()
        assert result[way].rank.tolist() == ((table >= best) & ~positive).sum(dim=1).tolist()
        assert result[way].pool == positive.shape[1]


def test_five_captions_per_image_as_in_published_tables() -> None:
    """Catches Recall@5 of 20 images with 5 captions each in a pool of 100, and an image that counts as five queries."""
    generator = torch.Generator().manual_seed(0)
    images, noise = (torch.randn(n, 8, generator=generator) for n in (20, 100))
    images, image_of_text = F.normalize(images, dim=-1), torch.arange(20).repeat_interleave(5)
    texts = F.normalize(images[image_of_text] + noise, dim=-1)
    pairs = (images[image_of_text], texts, torch.arange(100), image_of_text)
    report = retrieval_report(*pairs)
    for way, recall in recall_at_k(images, texts, image_of_text).items():
        assert {k: report[way][f"recall@{k}"]["value"] for k in recall} == pytest.approx(recall)
    assert (report["image_to_text"]["queries"], report["image_to_text"]["pool"]) == (20, 100)
    assert (report["text_to_image"]["queries"], report["text_to_image"]["pool"]) == (100, 20)
    assert report["text_to_image"]["recall@5"]["chance"] == pytest.approx(5 / 20)
