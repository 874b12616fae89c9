"""Image-text retrieval over a whole pool: Recall@K, median rank, MRR, with interval and chance level.

Four traps that make a recall look better than it is are closed here: similarities are fp32, NaN is refused, a wrong
candidate that ties with the right one counts as ranked above it, and the pool is the whole held-out set, whose size is
part of the result. Recall within training batches of 32 is an easier game and has another name: a training curve.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 1024  # queries compared with all candidates at a time: memory is BLOCK * candidates floats


def ranks(queries: Tensor, candidates: Tensor, query_ids: Tensor, candidate_ids: Tensor) -> Tensor:
    """How many wrong candidates stand above the best right one, for each query.

    queries (Q, D), candidates (C, D)   unit-length features
    query_ids (Q,), candidate_ids (C,)  a candidate is right for a query where the two ids are equal

    Returns (Q,) int64, 0 being the best. A wrong candidate of equal similarity counts as above (pessimistic on ties),
    so features that have all collapsed to one point score 0, not 100 %. Raises ValueError on features that are not
    finite and on a query that no candidate answers.
    """
    queries, candidates = queries.float(), candidates.float()
    if not (queries.isfinite().all() and candidates.isfinite().all()):
        raise ValueError("the features contain NaN or infinity: a recall computed on them would mean nothing")
    result = []
    for rows, ids in zip(queries.split(BLOCK), query_ids.split(BLOCK), strict=True):
        similarity = rows @ candidates.T
        right = ids[:, None] == candidate_ids[None, :]
        if not right.any(dim=1).all():
            raise ValueError("a query has no right candidate in the pool: its id is missing among the candidates")
        best = similarity.masked_fill(~right, float("-inf")).amax(dim=1, keepdim=True)
        result.append(((similarity >= best) & ~right).sum(dim=1))
    return torch.cat(result)


def recall_at_k(
    image_features: Tensor,
    text_features: Tensor,
    text_to_image: Sequence[int] | Tensor | None = None,
    ks: Sequence[int] = (1, 5, 10),
) -> dict[str, dict[int, float]]:
    """Share of queries with a right answer among the first k of the whole pool, both ways.

    image_features (I, D), text_features (T, D)   unit length
    text_to_image  (T,) the image each text belongs to; several texts may share one. Default: text i belongs to image i

    Returns {"image_to_text": {k: recall, ...}, "text_to_image": {...}}, recalls from 0 to 1.
    """
    if text_to_image is None and len(image_features) != len(text_features):
        raise ValueError(
            f"{len(image_features)} images and {len(text_features)} texts: without text_to_image they must be as many"
        )
    image_ids = torch.arange(len(image_features))
    text_ids = torch.arange(len(text_features)) if text_to_image is None else torch.as_tensor(text_to_image).cpu()
    images, texts = image_features.detach().cpu(), text_features.detach().cpu()
    both = {
        "image_to_text": ranks(images, texts, image_ids, text_ids),
        "text_to_image": ranks(texts, images, text_ids, image_ids),
    }
    return {way: {k: (rank < k).double().mean().item() for k in ks} for way, rank in both.items()}


def chance_recall(query_ids: Tensor, candidate_ids: Tensor, k: int) -> float:
    """Recall@k of a random order: the mean over queries of 1 - C(C - g, k) / C(C, k) with g right of C candidates."""
    pool = len(candidate_ids)
    ids, counts = candidate_ids.unique(return_counts=True)
    right = counts[torch.searchsorted(ids, query_ids)].double()
    miss = torch.ones(len(query_ids), dtype=torch.double)
    for drawn in range(min(k, pool)):
        miss *= ((pool - drawn - right) / (pool - drawn)).clamp(min=0)
    return (1 - miss).mean().item()


def bootstrap_interval(scores: Tensor, draws: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile interval of the mean of `scores` (N,), by resampling the N rows (Efron 1979).

    Resampling nothing but misses gives nothing but misses, as if 0 of 10 were as sure as 0 of 10,000. There, and where
    all are hits, the other end is the exact binomial bound (Clopper and Pearson 1934): the rate that still has a chance
    of 2.5 % to show this.
    """
    values = scores.double().numpy()
    if (values == values[0]).all() and values[0] in (0, 1):
        bound = 0.025 ** (1 / len(values))
        return (0.0, 1 - bound) if values[0] == 0 else (bound, 1.0)
    rng = np.random.default_rng(seed)
    means = [values[rng.integers(len(values), size=len(values))].mean() for _ in range(draws)]
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def retrieval_report(images: Tensor, texts: Tensor, ids: Tensor, ks: Sequence[int] = (1, 5, 10)) -> dict[str, Any]:
    """All of retrieval for N pairs, of which those with the same id are right for each other.

    images, texts (N, D) unit length; ids (N,). Returns {"pool": N, "image_to_text": {"recall@1": {"value", "low",
    "high", "chance"}, ..., "median_rank", "mrr"}, "text_to_image": {...}}; the rank of a first place is 1.
    """
    report: dict[str, Any] = {"pool": len(ids)}
    for way, (queries, candidates) in {"image_to_text": (images, texts), "text_to_image": (texts, images)}.items():
        rank = ranks(queries, candidates, ids, ids)
        report[way] = {"median_rank": rank.median().item() + 1, "mrr": (1 / (rank + 1.0)).mean().item()}
        for k in ks:
            hits = (rank < k).double()
            low, high = bootstrap_interval(hits)
            row = {"value": hits.mean().item(), "low": low, "high": high, "chance": chance_recall(ids, ids, k)}
            report[way][f"recall@{k}"] = row
    return report
