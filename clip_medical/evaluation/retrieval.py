"""Image-text retrieval over a whole pool: Recall@K, median rank, MRR, precision by label, intervals, chance levels.

Four traps that make a recall look better than it is are closed here: similarities are fp32, NaN is refused, a wrong
candidate that ties with the right one counts as ranked above it, and the pool is the whole held-out set, whose size is
part of the result. Recall within training batches of 32 is an easier game and has another name: a training curve.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

BLOCK = 2**22  # similarities held at a time, 16 MiB of them: memory does not grow with the square of the pool
Ids = tuple[Tensor, Tensor]  # of the queries (Q,) and of the candidates (C,)


class Ranks(NamedTuple):
    """For each query: how many wrong candidates stand above its best right one, and how many are right at all."""

    rank: Tensor  # (Q,) int64, 0 is the best
    right: Tensor  # (Q,) int64, 1 or more


def ranks(queries: Tensor, candidates: Tensor, *ids: Ids) -> Ranks:
    """Compare every query with every candidate, in fp32 and in blocks.

    queries (Q, D), candidates (C, D)   unit-length features
    ids   pairs of (Q,) and (C,): a candidate is right for a query where the two agree in any pair, having the same
          caption, say, or the same picture

    A wrong candidate of equal similarity counts as above (pessimistic on ties), so features that have all collapsed to
    one point score 0, not 100 %. Raises ValueError on features that are not finite and on a query without an answer.
    """
    queries, candidates = _checked(queries, candidates)
    tables = [_Lookup(*pair) for pair in ids]
    rank, counts = [], []
    for rows in torch.arange(len(queries)).split(max(1, BLOCK // len(candidates))):
        similarity = queries[rows] @ candidates.T
        # The right ones are few: a list of their places costs less than a mask over the block. Places are numbered
        # through the block, so that one found by two pairs of ids is listed once.
        places = torch.cat([table.places(rows) for table in tables]).unique()
        query, values = places // len(candidates), similarity.view(-1)[places]
        best = torch.full((len(rows),), -torch.inf).scatter_reduce_(0, query, values, "amax")
        # everything at least as similar as the best right one, less the right ones among it
        above = np.count_nonzero(similarity.numpy() >= best[:, None].numpy(), axis=1)  # torch's sum is 5 times slower
        rank.append(torch.from_numpy(above) - query[values >= best[query]].bincount(minlength=len(rows)))
        counts.append(query.bincount(minlength=len(rows)))
    result = Ranks(torch.cat(rank), torch.cat(counts))
    if not result.right.all():
        raise ValueError("a query has no right candidate in the pool: its id is missing among the candidates")
    return result


def _checked(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp32; ValueError if they are not finite."""
    queries, candidates = queries.float(), candidates.float()
    if not (queries.isfinite().all() and candidates.isfinite().all()):
        raise ValueError("the features contain NaN or infinity: what is measured on them would mean nothing")
    return queries, candidates


class _Lookup:
    """Finds the candidates that share the id of a query, without comparing every query with every candidate."""

    def __init__(self, of_queries: Tensor, of_candidates: Tensor) -> None:
        self.of_queries = of_queries
        self.sorted, self.order = of_candidates.sort()

    def places(self, rows: Tensor) -> Tensor:
        """Where in the block (rows, candidates), read row by row, the right candidates of queries `rows` stand."""
        wanted = self.of_queries[rows].contiguous()
        first = torch.searchsorted(self.sorted, wanted)
        count = torch.searchsorted(self.sorted, wanted, right=True) - first
        query = torch.arange(len(rows)).repeat_interleave(count)
        nth = torch.arange(len(query)) - (count.cumsum(0) - count)[query]  # 0, 1, ... within each query's own
        return query * len(self.order) + self.order[first[query] + nth]


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
        "image_to_text": ranks(images, texts, (image_ids, text_ids)).rank,
        "text_to_image": ranks(texts, images, (text_ids, image_ids)).rank,
    }
    return {way: {k: (rank < k).double().mean().item() for k in ks} for way, rank in both.items()}


def chance_recall(right: Tensor, pool: int, k: int) -> float:
    """Recall@k of a random order: the mean over queries of 1 - C(P - g, k) / C(P, k), g = right (Q,) of P = pool."""
    miss = torch.ones(len(right), dtype=torch.double)
    for drawn in range(min(k, pool)):
        miss *= ((pool - drawn - right.double()) / (pool - drawn)).clamp(min=0)
    return (1 - miss).mean().item()


def bootstrap_interval(
    scores: Tensor, groups: Tensor | None = None, draws: int = 2000, seed: int = 0
) -> tuple[float, float]:
    """95 % percentile interval of the mean of `scores` (N,), by resampling (Efron 1979).

    groups (N,)  rows with the same number are drawn together: the captions of one image are not independent of each
                 other, and an interval that took them so would be too narrow. Default: each row by itself

    Resampling nothing but misses gives nothing but misses, as if 0 of 10 were as sure as 0 of 10,000. There, and where
    all are hits, the other end is the exact binomial bound (Clopper and Pearson 1934): the rate that still has a chance
    of 2.5 % to show this.
    """
    values = scores.double().numpy()
    group = np.arange(len(values)) if groups is None else np.unique(groups.numpy(), return_inverse=True)[1]
    sums, sizes = np.bincount(group, values), np.bincount(group)
    if (values == values[0]).all() and values[0] in (0, 1):
        bound = 0.025 ** (1 / len(sums))
        return (0.0, 1 - bound) if values[0] == 0 else (bound, 1.0)
    rng = np.random.default_rng(seed)
    means = []
    for _ in range(draws):
        drawn = rng.integers(len(sums), size=len(sums))
        means.append(sums[drawn].sum() / sizes[drawn].sum())
    low, high = np.percentile(means, (2.5, 97.5))
    return float(low), float(high)


def retrieval_report(
    images: Tensor, texts: Tensor, caption_ids: Tensor, image_ids: Tensor, ks: Sequence[int] = (1, 5, 10, 50)
) -> dict[str, Any]:
    """All of retrieval for N pairs; those with the same caption or the same picture are right for each other.

    images, texts (N, D) unit length; caption_ids, image_ids (N,). Returns {"pool": N, "image_to_text": {"recall@1":
    {"value", "low", "high" (95 %, by image), "chance"}, ..., "median_rank", "mrr"}, "text_to_image": {...}}; a first
    place has rank 1.
    """
    report: dict[str, Any] = {"pool": len(images)}
    for way, (queries, candidates) in {"image_to_text": (images, texts), "text_to_image": (texts, images)}.items():
        rank, right = ranks(queries, candidates, (caption_ids, caption_ids), (image_ids, image_ids))
        report[way] = {"median_rank": rank.median().item() + 1, "mrr": (1 / (rank + 1.0)).mean().item()}
        for k in (k for k in ks if k < len(images)):
            hits = (rank < k).double()
            low, high = bootstrap_interval(hits, image_ids)
            chance = chance_recall(right, len(images), k)
            report[way][f"recall@{k}"] = {"value": hits.mean().item(), "low": low, "high": high, "chance": chance}
    return report


def sampled_pool_report(
    images: Tensor,
    texts: Tensor,
    caption_ids: Tensor,
    image_ids: Tensor,
    ks: Sequence[int] = (1, 5, 10, 50),
    size: int = 2000,
    draws: int = 5,
    seed: int = 0,
) -> dict[str, Any]:
    """Recall in pools of `size` pairs, the mean over `draws` of them: to stand beside tables made with such pools.

    As in `retrieval_report`, but for {"pool": size, "draws": draws} and without ranks. A picture that was drawn into
    several pools counts, for the interval, as the one picture that it is. Raises ValueError if there are fewer pairs.
    """
    if len(images) < size:
        raise ValueError(f"a pool of {size} cannot be drawn from {len(images)} pairs")
    rng = np.random.default_rng(seed)
    rows = [torch.from_numpy(rng.permutation(len(images))[:size]) for _ in range(draws)]
    report: dict[str, Any] = {"pool": size, "draws": draws}
    for way, (queries, candidates) in {"image_to_text": (images, texts), "text_to_image": (texts, images)}.items():
        found = [
            ranks(queries[r], candidates[r], *[(ids[r], ids[r]) for ids in (caption_ids, image_ids)]) for r in rows
        ]
        rank, right = (torch.cat(parts) for parts in zip(*found, strict=True))
        report[way] = {}
        for k in (k for k in ks if k < size):
            hits = (rank < k).double()
            low, high = bootstrap_interval(hits, image_ids[torch.cat(rows)])
            chance = chance_recall(right, size, k)
            report[way][f"recall@{k}"] = {"value": hits.mean().item(), "low": low, "high": high, "chance": chance}
    return report


def label_precision(
    queries: Tensor, candidates: Tensor, labels: Sequence[str], image_ids: Tensor, ks: Sequence[int] = (1, 5, 10)
) -> dict[str, Any]:
    """Precision@k by label: the share of the first k candidates that have the query's label ("CT of the head", say).

    It asks less than recall, which wants the very picture that a caption was written about, and suits captions that
    would fit many. queries, candidates (N, D) unit length; labels: of the N pairs, "" where unknown, and these sit out.
    Candidates that tie for the last places count with the wrong ones first.

    Returns {"precision@1": {"value", "low", "high" (95 %, by image), "chance"}, ..., "n"}.
    """
    names = {name: number for number, name in enumerate(sorted(set(labels)))}
    numbers = torch.tensor([names[name] for name in labels])
    known = torch.tensor([name != "" for name in labels])
    queries, candidates = _checked(queries[known], candidates[known])
    numbers = numbers[known]
    share = numbers.bincount()[numbers] / len(numbers)
    shares: dict[int, list[Tensor]] = {k: [] for k in ks if k < len(numbers)}
    for rows in torch.arange(len(numbers)).split(max(1, BLOCK // max(1, len(numbers)))):
        similarity = queries[rows] @ candidates.T
        same = numbers[rows, None] == numbers[None, :]
        for k, parts in shares.items():
            last = similarity.topk(k).values[:, -1:]
            above, tied = similarity > last, similarity == last
            places = k - above.sum(dim=1) - (tied & ~same).sum(dim=1)  # what the wrong ones leave of the last places
            parts.append(((above & same).sum(dim=1) + places.clamp(min=0)) / k)
    report: dict[str, Any] = {"n": len(numbers)}
    for k, parts in shares.items():
        values = torch.cat(parts)
        low, high = bootstrap_interval(values, image_ids[known])
        row = {"value": values.double().mean().item(), "low": low, "high": high, "chance": share.mean().item()}
        report[f"precision@{k}"] = row
    return report
