"""Image-text retrieval over a whole pool: Recall@K, median rank, MRR, intervals, chance levels.

Four traps that make recall look better than it is are closed here: similarities are fp32, NaN is refused, a negative
that ties with the best positive is ranked above it, and the pool is the whole validation split, whose size is part of
the result. Recall within training batches of 32 is an easier task and has another name: a training curve.

To add a metric, add a line to METRICS.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from scipy.sparse import csr_array
from torch import Tensor

BLOCK = 2**23  # similarities computed at a time (32 MiB), so that memory does not grow with the square of the pool

# A metric maps ranks (Q,), counted from 0, to one value for each query. The report shows its mean over queries with a
# bootstrap interval, and its chance level: the expected value in a random order of the pool.
Metric = Callable[[Tensor], Tensor]
METRICS: dict[str, Metric] = {"mrr": lambda rank: 1 / (rank + 1)}


def recall_metric(k: int) -> Metric:
    """Return the metric Recall@k: 1 where the best positive is among the first k candidates, else 0."""
    return lambda rank: (rank < k).double()


class Ranks(NamedTuple):
    """The result of ranking one pool of candidates for each query."""

    rank: Tensor  # (Q,) int64: how many negatives are ranked above the best positive, so 0 is the best
    positives: Tensor  # (Q,) int64: how many candidates are positives, 1 or more
    pool: int  # number of candidates


def ranks(queries: Tensor, candidates: Tensor, query_keys: csr_array, candidate_keys: csr_array) -> Ranks:
    """Rank all candidates for each query by cosine similarity, in fp32 and in blocks.

    queries (Q, D), candidates (C, D)              unit-length features
    query_keys (Q, K), candidate_keys (C, K) bool  sparse; a candidate is a positive of a query if they share a key

    A negative of equal similarity counts as ranked above (pessimistic on ties), so features that have collapsed to one
    point score 0, not 100 %. Raises ValueError on features that are not finite and on a query without a positive.
    """
    queries, candidates = queries.float(), candidates.float()
    for features in (queries, candidates):
        # minimum and maximum show both; isfinite() would allocate a mask of the size of the features
        if features.numel() and not torch.stack(features.aminmax()).isfinite().all():
            raise ValueError("The features contain NaN or infinity, so no metric can be computed from them.")
    rank, positives = np.empty(len(queries), np.int64), np.empty(len(queries), np.int64)
    rows = max(1, BLOCK // len(candidates))
    for block in (slice(first, first + rows) for first in range(0, len(queries), rows)):
        similarity = (queries[block] @ candidates.T).numpy()
        # Positives are few. A list of their positions costs less than a dense mask over the block, and the sparse
        # product lists a candidate once even if it shares two keys with the query.
        matches = query_keys[block] @ candidate_keys.T
        positives[block] = count = np.diff(matches.indptr)
        if not count.all():
            raise ValueError("A query has no positive in the pool: none of its keys occurs among the candidates.")
        starts = matches.indptr[:-1]
        of_positives = similarity[np.arange(len(count)).repeat(count), matches.indices]
        best = np.maximum.reduceat(of_positives, starts)
        # all candidates at least as similar as the best positive, minus the positives among them
        above = np.count_nonzero(similarity >= best[:, None], axis=1)  # 5 times faster than torch's sum of a mask
        rank[block] = above - np.add.reduceat(of_positives >= best.repeat(count), starts, dtype=np.int64)
    return Ranks(torch.from_numpy(rank), torch.from_numpy(positives), len(candidates))


def pair_ranks(images: Tensor, texts: Tensor, caption_ids: Tensor, image_ids: Tensor) -> dict[str, Ranks]:
    """Rank N pairs in both directions, as a pool of I distinct images and N captions.

    images, texts (N, D) unit length; caption_ids, image_ids (N,). An image that occurs in several pairs is in the pool
    once, and all its captions are positives. Images with the same caption are all positives of it: nothing in the
    caption distinguishes them.

    Returns {"image_to_text": Ranks of I queries in the order of `image_ids.unique()`, "text_to_image": of N queries}.
    """
    _, first, image = np.unique(image_ids.numpy(), return_index=True, return_inverse=True)
    keys, caption = np.unique(caption_ids.numpy(), return_inverse=True)
    entries = np.ones(len(caption), bool)
    image_keys = csr_array((entries, (image, caption)), shape=(len(first), len(keys)))
    text_keys = csr_array((entries, (np.arange(len(caption)), caption)), shape=(len(caption), len(keys)))
    distinct = images[torch.from_numpy(first)]
    return {
        "image_to_text": ranks(distinct, texts, image_keys, text_keys),
        "text_to_image": ranks(texts, distinct, text_keys, image_keys),
    }


def recall_at_k(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Sequence[int] | Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[int, float]]:
    """Compute the share of queries with a positive among the first k of the whole pool, in both directions.

    image_features (I, D), text_features (T, D)   unit length
    text_to_image  (T,) row of the image of each text; several texts may share one. Default: text i belongs to image i

    Returns {"image_to_text": {k: recall, ...}, "text_to_image": {...}}, recalls from 0 to 1. Raises ValueError if an
    image has no text, and on features that are not finite.
    """
    image_of_text = torch.arange(len(text_features)) if text_to_image is None else torch.as_tensor(text_to_image).cpu()
    if image_of_text.unique().tolist() != list(range(len(image_features))):
        raise ValueError(
            f"{len(image_features)} images and {len(text_features)} texts do not match. Each image needs at least one "
            "text; pass text_to_image with the row of the image of each text."
        )
    images, texts = image_features.detach().cpu()[image_of_text], text_features.detach().cpu()
    ranked = pair_ranks(images, texts, torch.arange(len(texts)), image_of_text)
    return {way: {k: recall_metric(k)(r.rank).mean().item() for k in ks} for way, r in ranked.items()}


def chance_recall(positives: Tensor, pool: int) -> Tensor:
    """Compute Recall@1, @2, ... @P of a random order of P candidates; positives (Q,): how many each query has.

    Returns (P,): the mean over queries of 1 - C(P - g, k) / C(P, k), the probability that the first k candidates
    contain one of the g positives.
    """
    distinct, times = positives.unique(return_counts=True)
    remaining = torch.arange(pool, 0, -1, dtype=torch.double)  # candidates before each draw
    miss = ((remaining - distinct[:, None]) / remaining).clamp(min=0).cumprod(dim=1)
    recall: Tensor = 1 - (times.double() / len(positives)) @ miss
    return recall


def bootstrap(
    statistic: Callable[[np.ndarray], float], rows: int, draws: int = 1000, seed: int = 0
) -> dict[str, float]:
    """Compute a statistic of N rows and its 95 % percentile interval by resampling them (Efron 1979).

    statistic: takes the drawn row numbers (rows,), which may repeat. Draws for which it returns NaN are left out.
    Returns {"value", "low", "high"}.
    """
    rng = np.random.default_rng(seed)
    low, high = np.nanpercentile([statistic(rng.integers(rows, size=rows)) for _ in range(draws)], (2.5, 97.5))
    return {"value": float(statistic(np.arange(rows))), "low": float(low), "high": float(high)}


def binomial_interval(hits: int, n: int, method: str = "exact") -> tuple[float, float]:
    """Compute the 95 % interval of a share, `hits` of n: "exact" (Clopper and Pearson 1934) or "wilson" (1927)."""
    from scipy.stats import binomtest  # takes almost a second to import, and only reports need it

    interval = binomtest(hits, n).proportion_ci(method=method)
    return float(interval.low), float(interval.high)


def share(scores: Tensor, groups: Tensor | None = None, seed: int = 0) -> dict[str, float]:
    """Compute the mean of `scores` (N,) and its 95 % bootstrap interval: {"value", "low", "high"}.

    groups (N,)  rows of the same group are drawn together. The captions of one image are not independent, so drawing
                 them one by one would give too narrow an interval. Default: each row is its own group

    If all scores are 0, every resample is 0 as well, as if 0 of 10 were as certain as 0 of 10,000. In that case, and if
    all are 1, the exact binomial interval replaces the bootstrap.
    """
    values = scores.double().numpy()
    group = np.arange(len(values)) if groups is None else np.unique(groups.numpy(), return_inverse=True)[1]
    sums, sizes = np.bincount(group, values), np.bincount(group)
    if (values == 0).all() or (values == 1).all():
        low, high = binomial_interval(int(values[0]) * len(sums), len(sums))
        return {"value": float(values[0]), "low": low, "high": high}
    return bootstrap(lambda drawn: sums[drawn].sum() / sizes[drawn].sum(), len(sums), draws=2000, seed=seed)


def retrieval_report(
    images: Tensor, texts: Tensor, caption_ids: Tensor, image_ids: Tensor, ks: Sequence[int] = (1, 5, 10, 50)
) -> dict[str, Any]:
    """Compute Recall@k for each k below the pool size, METRICS and the median rank of one pool of N pairs.

    images, texts, caption_ids, image_ids   as for `pair_ranks`

    Returns {"image_to_text": {"queries", "pool" (candidates), "recall@1", ..., "mrr", "median_rank"}, "text_to_image":
    {...}}. A metric is {"value", "low", "high" (95 %, resampled by image), "chance"}; the median rank, where the first
    place is 1, has no interval.
    """
    groups = {"image_to_text": image_ids.unique(), "text_to_image": image_ids}
    report: dict[str, Any] = {}
    for way, ranked in pair_ranks(images, texts, caption_ids, image_ids).items():
        rank, chance = ranked.rank.double(), chance_recall(ranked.positives, ranked.pool)
        positions, probability = torch.arange(ranked.pool).double(), chance.diff(prepend=chance.new_zeros(1))
        metrics = {f"recall@{k}": recall_metric(k) for k in ks if k < ranked.pool} | METRICS
        report[way] = {"queries": len(rank), "pool": ranked.pool}
        for name, metric in metrics.items():
            by_chance = (metric(positions).double() @ probability).item()
            report[way][name] = share(metric(rank), groups[way]) | {"chance": by_chance}
        median = float(np.median(rank.numpy())) + 1
        report[way]["median_rank"] = {"value": median, "chance": int((chance < 0.5).sum()) + 1}
    return report
