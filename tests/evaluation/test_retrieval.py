"""Recall@K: worked by hand, against brute force, and against the ways in which it can flatter."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from clip_medical import recall_at_k
from clip_medical.evaluation import retrieval
from clip_medical.evaluation.retrieval import (
    Keys,
    bootstrap_interval,
    chance_recall,
    label_precision,
    pair_ranks,
    ranks,
    retrieval_report,
    sampled_pool_report,
)


def brute_force(similarity: np.ndarray, query_ids: list[int], candidate_ids: list[int]) -> list[int]:
    """Ranks by sorting each row, with wrong candidates put before right ones where they tie."""
    result = []
    for row, wanted in zip(similarity, query_ids, strict=True):
        order = sorted(range(len(row)), key=lambda c: (-row[c], candidate_ids[c] == wanted))
        result.append(next(place for place, c in enumerate(order) if candidate_ids[c] == wanted))
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
    """Catches every off-by-one; few levels of similarity make many ties, few ids make many right answers."""
    rng = np.random.default_rng(seed)
    query_ids, candidate_ids = rng.integers(0, images, images), rng.integers(0, images, texts)
    query_ids = query_ids[np.isin(query_ids, candidate_ids)]
    if len(query_ids) == 0:
        return
    similarity = np.round(rng.random((len(query_ids), texts)) * levels) / levels
    keys = (Keys.of(torch.tensor(ids)) for ids in (query_ids, candidate_ids))
    got, right, pool = ranks(torch.tensor(similarity), torch.eye(texts), *keys)
    assert pool == texts and right.tolist() == [(candidate_ids == q).sum() for q in query_ids]
    assert got.tolist() == brute_force(similarity.astype(np.float32), query_ids.tolist(), candidate_ids.tolist())


def test_collapsed_features_score_nothing() -> None:
    """Catches the strict '>' rank, which gives Recall@1 = 100 % to a model that maps everything to one point."""
    one_point = F.normalize(torch.ones(50, 8), dim=-1)
    recall = recall_at_k(one_point, one_point)
    assert recall["image_to_text"][10] == 0 and recall["text_to_image"][10] == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_features_that_are_not_finite_are_refused(bad: float) -> None:
    """Catches the metric that reads NaN as perfect: no comparison with NaN is true, so no rank is ever above 0."""
    features = torch.eye(5)
    features[2, 2] = bad
    with pytest.raises(ValueError, match="NaN or infinity"):
        recall_at_k(features, torch.eye(5))


def test_half_precision_features_are_compared_in_fp32() -> None:
    """Catches similarities computed in bf16, whose 8 bits tie what fp32 tells apart."""
    images = F.normalize(torch.randn(300, 64, generator=torch.Generator().manual_seed(0)), dim=-1).bfloat16()
    texts = F.normalize(images.float() + 0.2 * torch.randn(300, 64, generator=torch.Generator().manual_seed(1)), dim=-1)
    exact = recall_at_k(images.float(), texts.bfloat16().float())
    assert recall_at_k(images, texts.bfloat16()) == exact


def test_blocks_and_row_order_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a last block cut off, and ranks that depend on where in the pool a pair stands."""
    generator = torch.Generator().manual_seed(0)
    images = F.normalize(torch.randn(45, 8, generator=generator), dim=-1)
    texts = F.normalize(images + torch.randn(45, 8, generator=generator), dim=-1)
    ids = torch.arange(45) // 2
    keys = Keys.of(ids)
    whole = ranks(images, texts, keys, keys).rank
    order = torch.randperm(45, generator=generator)
    moved = Keys.of(ids[order])
    assert ranks(images[order], texts[order], moved, moved).rank.tolist() == whole[order].tolist()
    assert ranks(images, texts, Keys(*(part[order] for part in keys)), keys).rank.tolist() == whole.tolist()
    for block in (1, 7 * 45, 8 * 45 + 1):
        monkeypatch.setattr(retrieval, "BLOCK", block)
        assert ranks(images, texts, keys, keys).rank.tolist() == whole.tolist()


def test_same_caption_counts_as_right() -> None:
    """Catches a pool in which three images share a caption and two of them are called wrong."""
    texts = torch.eye(4)[[0, 0, 0, 1]]
    images = torch.eye(4)[[0, 0, 0, 1]]
    report = retrieval_report(images, texts, torch.tensor([0, 0, 0, 1]), torch.arange(4), ks=(1,))
    assert report["pool"] == 4
    assert report["image_to_text"]["recall@1"]["value"] == 1 and report["image_to_text"]["mrr"]["value"] == 1
    assert recall_at_k(images, texts, ks=(1,))["image_to_text"][1] == 0.25  # told apart, the ties count against


def test_median_rank_and_mrr_by_hand() -> None:
    """Catches ranks counted from 0 in a report that says rank."""
    texts = torch.tensor([[1.0, 0, 0], [0.9, 0.5, 0], [0.3, 0.2, 0.1]])  # image i is axis i: text ranks 1, 2, 3
    report = retrieval_report(torch.eye(3), texts, torch.arange(3), torch.arange(3), ks=(1,))["text_to_image"]
    assert report["median_rank"]["value"] == 2 and report["mrr"]["value"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    assert report["median_rank"]["chance"] == 2 and report["mrr"]["chance"] == pytest.approx((1 + 1 / 2 + 1 / 3) / 3)
    two = retrieval_report(torch.eye(2), torch.tensor([[1.0, 0], [1, 0]]), torch.arange(2), torch.arange(2), ks=())
    assert two["text_to_image"]["median_rank"]["value"] == 1.5  # ranks 1 and 2: the lower of the two would flatter


def test_a_query_without_answer_is_refused() -> None:
    """Catches a silent rank 0 for an image whose caption is not in the pool."""
    with pytest.raises(ValueError, match="no right candidate"):
        recall_at_k(torch.eye(3), torch.eye(3), text_to_image=[0, 1, 1])


def test_chance_level_is_the_recall_of_random_orders() -> None:
    """Catches k / n used where captions repeat. The formula against 4,000 random orders."""
    ids = torch.tensor([0] * 5 + [1] * 2 + list(range(2, 15)))
    rng = np.random.default_rng(0)
    hits = []
    for _ in range(4000):
        order = ids[torch.from_numpy(rng.permutation(len(ids)))][:3]
        hits.append((ids[:, None] == order[None, :]).any(dim=1).double().mean().item())
    right = (ids[:, None] == ids[None, :]).sum(dim=1)
    assert chance_recall(right, len(ids))[2] == pytest.approx(np.mean(hits), abs=0.005)
    assert chance_recall(torch.ones(100), 100)[[0, 4, 99]].tolist() == pytest.approx([0.01, 0.05, 1])


def test_interval_is_the_binomial_one_for_large_samples() -> None:
    """Catches the standard deviation used for the standard error, and one-sided percentiles."""
    hits = torch.tensor([1.0] * 120 + [0.0] * 280)
    low, high = bootstrap_interval(hits)
    width = 1.96 * math.sqrt(0.3 * 0.7 / 400)
    assert low == pytest.approx(0.3 - width, abs=0.006) and high == pytest.approx(0.3 + width, abs=0.006)
    assert bootstrap_interval(hits) == (low, high)  # the same seed, the same interval


def test_no_hit_at_all_does_not_give_an_interval_of_no_width() -> None:
    """Catches [0.0, 0.0]: 0 of 100 is compatible with 3.6 % (as exact binomial tables have it), 0 of 10 with 31 %."""
    assert bootstrap_interval(torch.zeros(100)) == pytest.approx((0, 0.0362), abs=1e-4)
    assert bootstrap_interval(torch.ones(10)) == pytest.approx((0.6915, 1), abs=1e-4)


def test_the_captions_of_one_image_are_drawn_together() -> None:
    """Catches five captions of an image taken for five independent findings: the interval would be too narrow."""
    hits = (torch.arange(100) % 2).double().repeat_interleave(5)
    images = torch.arange(100).repeat_interleave(5)
    narrow, wide = bootstrap_interval(hits), bootstrap_interval(hits, images)
    assert wide[1] - wide[0] == pytest.approx(5**0.5 * (narrow[1] - narrow[0]), rel=0.1)


def test_the_same_picture_twice_is_right_under_both_captions() -> None:
    """Catches a picture whose second caption is called wrong because it stands in another row."""
    images, texts = torch.eye(4)[[0, 0, 1]], torch.eye(4)[[2, 0, 1]]
    report = retrieval_report(images, texts, torch.arange(3), torch.tensor([0, 0, 1]), ks=(1,))
    assert report["image_to_text"]["recall@1"]["value"] == 1


def test_pictures_with_several_captions_are_in_the_pool_once() -> None:
    """Catches a wrong picture counted once for each of its captions, and right answers counted twice.

    Against a table of all pairs, with few captions and few pictures, so that both repeat and cross.
    """
    generator = torch.Generator().manual_seed(3)
    captions, pictures = (torch.randint(0, 12, (40,), generator=generator) for _ in range(2))
    seen, said = torch.randn(12, 4, generator=generator), torch.randn(12, 4, generator=generator)
    got = pair_ranks(seen[pictures], said[captions], captions, pictures)
    there = pictures.unique()
    right = ((pictures == there[:, None]).float() @ (captions[:, None] == captions).float()) > 0  # (I, N)
    similarity = seen[there] @ said[captions].T
    for way, table, answers in (("image_to_text", similarity, right), ("text_to_image", similarity.T, right.T)):
        best = table.masked_fill(~answers, -torch.inf).amax(dim=1, keepdim=True)
        assert got[way].right.tolist() == answers.sum(dim=1).tolist()
        assert got[way].rank.tolist() == ((table >= best) & ~answers).sum(dim=1).tolist()
        assert got[way].pool == answers.shape[1]


def test_five_captions_a_picture_are_the_game_of_published_tables() -> None:
    """Catches Recall@5 of 20 pictures with 5 captions each played among 100, and an image that asks five times."""
    generator = torch.Generator().manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(20, 8, generator=generator), dim=-1),
        torch.randn(100, 8, generator=generator),
    )
    of = torch.arange(20).repeat_interleave(5)
    texts = F.normalize(images[of] + texts, dim=-1)
    report = retrieval_report(images[of], texts, torch.arange(100), of)
    for way, recall in recall_at_k(images, texts, of).items():
        assert {k: report[way][f"recall@{k}"]["value"] for k in recall} == pytest.approx(recall)
    assert (report["image_to_text"]["queries"], report["image_to_text"]["pool"]) == (20, 100)
    assert (report["text_to_image"]["queries"], report["text_to_image"]["pool"]) == (100, 20)
    assert report["text_to_image"]["recall@5"]["chance"] == pytest.approx(5 / 20)
    draws = sampled_pool_report(images[of], texts, torch.arange(100), of, ks=(5,), size=50)["text_to_image"]["recall@5"]
    assert report["text_to_image"]["recall@5"]["value"] <= draws["value"] and draws["chance"] > 5 / 20


def test_the_interval_is_that_of_scipy() -> None:
    """Catches a percentile interval of something other than the mean, or of too few draws."""
    bootstrap = pytest.importorskip("scipy.stats").bootstrap
    scores = torch.rand(150, generator=torch.Generator().manual_seed(0)).double()
    theirs = bootstrap((scores.numpy(),), np.mean, method="percentile", n_resamples=4000, rng=0).confidence_interval
    assert bootstrap_interval(scores) == pytest.approx((theirs.low, theirs.high), abs=0.005)


def test_a_sampled_pool_of_everything_is_the_whole_pool() -> None:
    """Catches rows of one draw compared with candidates of another, and draws with replacement."""
    images = F.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts = F.normalize(images + torch.randn(60, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    ids = torch.arange(60)
    whole = retrieval_report(images, texts, ids, ids, ks=(1, 5))
    sampled = sampled_pool_report(images, texts, ids, ids, ks=(1, 5), size=60, draws=3)
    for way in ("image_to_text", "text_to_image"):
        for k in ("recall@1", "recall@5"):
            assert sampled[way][k]["value"] == pytest.approx(whole[way][k]["value"])
            assert sampled[way][k]["chance"] == pytest.approx(whole[way][k]["chance"])
            # the same picture drawn three times is no more evidence than once
            width = whole[way][k]["high"] - whole[way][k]["low"]
            assert sampled[way][k]["high"] - sampled[way][k]["low"] == pytest.approx(width, rel=0.15)


def test_a_smaller_pool_is_an_easier_game() -> None:
    """Catches a sampled pool whose candidates are still the whole pool."""
    images = F.normalize(torch.randn(200, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    texts = F.normalize(images + 0.5 * torch.randn(200, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    ids = torch.arange(200)
    whole = retrieval_report(images, texts, ids, ids, ks=(1,))["text_to_image"]["recall@1"]
    small = sampled_pool_report(images, texts, ids, ids, ks=(1,), size=20)
    assert small["pool"] == 20 and small["text_to_image"]["recall@1"]["chance"] == pytest.approx(0.05)
    assert small["text_to_image"]["recall@1"]["value"] > whole["value"] + 0.1
    with pytest.raises(ValueError, match="cannot be drawn"):
        sampled_pool_report(images, texts, ids, ids, size=201)


def test_label_precision_by_hand() -> None:
    """Catches shares of all of a label's rows (recall) where shares of the first k are meant, and unknown labels."""
    queries = torch.tensor([[0.9, 0.5, 0.4, 0.1, 1.0], [0.1, 0.2, 0.3, 0.4, 1.0], [0.5, 0.6, 0.1, 0.2, 1.0]])
    queries = torch.cat([queries, torch.tensor([[0.0, 0.0, 0.0, 0.9, 1.0], [1.0, 1.0, 1.0, 1.0, 1.0]])])
    labels = ["a", "b", "a", "a", ""]  # the last, most similar to all, is not known: neither asked nor answered
    report = label_precision(queries, torch.eye(5), labels, torch.arange(5), ks=(1, 2))
    # first two of row 0 (a): a b; of row 1 (b): a a; of row 2 (a): b a; of row 3 (a): a, then a tie of a b a: b first
    assert report["n"] == 4 and report["precision@1"]["value"] == pytest.approx((1 + 0 + 0 + 1) / 4)
    assert report["precision@2"]["value"] == pytest.approx((1 / 2 + 0 + 1 / 2 + 1 / 2) / 4)
    assert report["precision@1"]["chance"] == pytest.approx((3 * 3 / 4 + 1 / 4) / 4)


def test_collapsed_features_have_no_label_precision() -> None:
    """Catches ties broken by the order of the rows: sorted by label, they would make collapsed features look good."""
    one_point = F.normalize(torch.ones(40, 8), dim=-1)
    report = label_precision(one_point, one_point, ["CT"] * 20 + ["MRI"] * 20, torch.arange(40), ks=(1, 10))
    assert report["precision@1"]["value"] == 0 and report["precision@10"]["value"] == 0
    with pytest.raises(ValueError, match="NaN"):
        label_precision(one_point * math.nan, one_point, ["CT"] * 40, torch.arange(40))


def test_the_benchmark_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a benchmark that no longer fits the code it measures, and numbers without their command and machine."""
    from experiments import benchmark_retrieval as benchmark

    monkeypatch.setattr(benchmark, "RESULT", tmp_path / "results" / "benchmark.json")
    monkeypatch.setattr(benchmark, "fresh_process", lambda function, *arguments: function(*arguments))
    monkeypatch.setattr("sys.argv", ["benchmark", "--pairs", "30", "--large", "40", "--pictures", "50"])
    assert benchmark.main() == 0
    found = json.loads((tmp_path / "results" / "benchmark.json").read_text())
    assert found["command"].endswith("--pictures 50") and found["environment"]["torch"] and found["seed"] == 0
    assert (found["whole"]["pairs"], found["large"]["pairs"], found["search"]["pictures"]) == (30, 40, 50)
