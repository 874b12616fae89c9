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

BLOCK = 2**23  # similarities held at a time, 32 MiB of them: memory does not grow with the square of the pool


class Keys(NamedTuple):
    """Which keys each row has, one or several: a query and a candidate that share one are right for each other."""

    row: Tensor  # (E,) int64
    key: Tensor  # (E,) int64

    @classmethod
    def of(cls, ids: Tensor) -> "Keys":
        """One key a row: ids (N,)."""
        return cls(torch.arange(len(ids)), ids)


class Ranks(NamedTuple):
    """Of each query: how many wrong candidates stand above its best right one, and how many are right at all."""

    rank: Tensor  # (Q,) int64, 0 is the best
    right: Tensor  # (Q,) int64, 1 or more
    pool: int  # candidates


def ranks(queries: Tensor, candidates: Tensor, query_keys: Keys, candidate_keys: Keys) -> Ranks:
    """Compare every query with every candidate, in fp32 and in blocks.

    queries (Q, D), candidates (C, D)   unit-length features; right for each other where they share a key

    A wrong candidate of equal similarity counts as above (pessimistic on ties), so features that have all collapsed to
    one point score 0, not 100 %. Raises ValueError on features that are not finite and on a query without an answer.
    """
    queries, candidates = _checked(queries, candidates)
    answers = _Answers(query_keys, candidate_keys)
    rank, counts = [], []
    rows = max(1, BLOCK // len(candidates))
    for first in range(0, len(queries), rows):
        similarity = queries[first : first + rows] @ candidates.T
        count = len(similarity)
        # The right ones are few: a list of their places costs less than a mask over the block. Places are numbered
        # through the block, so that one that shares two keys is listed once.
        query, candidate = answers.of(first, first + count)
        places = (query * len(candidates) + candidate).unique()
        query, values = places // len(candidates), similarity.view(-1)[places]
        best = torch.full((count,), -torch.inf).scatter_reduce_(0, query, values, "amax")
        # everything at least as similar as the best right one, less the right ones among it
        above = np.count_nonzero(similarity.numpy() >= best[:, None].numpy(), axis=1)  # torch's sum is 5 times slower
        rank.append(torch.from_numpy(above) - query[values >= best[query]].bincount(minlength=count))
        counts.append(query.bincount(minlength=count))
    result = Ranks(torch.cat(rank), torch.cat(counts), len(candidates))
    if not result.right.all():
        raise ValueError("a query has no right candidate in the pool: its key is missing among the candidates")
    return result


def _checked(queries: Tensor, candidates: Tensor) -> tuple[Tensor, Tensor]:
    """Both in fp32; ValueError if they are not finite."""
    queries, candidates = queries.float(), candidates.float()
    for features in (queries, candidates):  # least and most show NaN and infinity; isfinite() would copy all features
        if features.numel() and not torch.stack(features.aminmax()).isfinite().all():
            raise ValueError("the features contain NaN or infinity: what is measured on them would mean nothing")
    return queries, candidates


class _Answers:
    """Finds the candidates that share a key with a query, without comparing every query with every candidate."""

    def __init__(self, of_queries: Keys, of_candidates: Keys) -> None:
        self.query, order = of_queries.row.sort()
        self.wanted = of_queries.key[order]
        self.key, order = of_candidates.key.sort()
        self.candidate = of_candidates.row[order]

    def of(self, first: int, last: int) -> tuple[Tensor, Tensor]:
        """Queries from `first` to before `last`, numbered from 0, each beside one candidate that is right for it."""
        begin, end = torch.searchsorted(self.query, torch.tensor([first, last])).tolist()
        query, wanted = self.query[begin:end] - first, self.wanted[begin:end]
        start = torch.searchsorted(self.key, wanted)
        count = torch.searchsorted(self.key, wanted, right=True) - start
        nth = torch.arange(int(count.sum())) - (count.cumsum(0) - count).repeat_interleave(count)  # 0, 1, ... of each
        return query.repeat_interleave(count), self.candidate[start.repeat_interleave(count) + nth]


def pair_ranks(images: Tensor, texts: Tensor, caption_ids: Tensor, image_ids: Tensor) -> dict[str, Ranks]:
    """Both ways over a pool of N pairs: its I different pictures and its N captions are set against each other.

    images, texts (N, D) unit length; caption_ids, image_ids (N,). A picture that stands in several pairs is in the pool
    once, and right for all its captions. The same caption is right for every picture that has it: nothing in it could
    tell them apart.

    Returns {"image_to_text": Ranks (I,) in the order of `image_ids.unique()`, "text_to_image": Ranks (N,)}.
    """
    _, first, picture = (torch.from_numpy(found) for found in np.unique(image_ids.numpy(), True, True))
    of_pictures, of_texts = Keys(picture, caption_ids), Keys.of(caption_ids)
    return {
        "image_to_text": ranks(images[first], texts, of_pictures, of_texts),
        "text_to_image": ranks(texts, images[first], of_texts, of_pictures),
    }


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
    text_ids = torch.arange(len(text_features)) if text_to_image is None else torch.as_tensor(text_to_image).cpu()
    images, texts = image_features.detach().cpu(), text_features.detach().cpu()
    of_images, of_texts = Keys.of(torch.arange(len(images))), Keys.of(text_ids)
    both = {
        "image_to_text": ranks(images, texts, of_images, of_texts).rank,
        "text_to_image": ranks(texts, images, of_texts, of_images).rank,
    }
    return {way: {k: (rank < k).double().mean().item() for k in ks} for way, rank in both.items()}


def chance_recall(right: Tensor, pool: int) -> Tensor:
    """(P,) Recall@1, @2, ... @P of a random order of the pool of P candidates; right (Q,): how many answer each query.

    The mean over queries of 1 - C(P - g, k) / C(P, k), the chance that the first k hold one of its g answers.
    """
    different, times = right.unique(return_counts=True)
    left = torch.arange(pool, 0, -1, dtype=torch.double)  # candidates before each draw
    miss = ((left - different[:, None]) / left).clamp(min=0).cumprod(dim=1)
    return 1 - (times.double() / len(right)) @ miss


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
    """All of retrieval for N pairs, as `pair_ranks` takes them.

    Returns {"pool": N, "image_to_text": {"queries", "pool" (candidates), "recall@1", ..., "mrr", "median_rank"},
    "text_to_image": {...}}: each measure as {"value", "low", "high" (95 %, by image), "chance"}, the median rank has no
    interval. A first place has rank 1.
    """
    report: dict[str, Any] = {"pool": len(images)}
    for way, (rank, right, pool) in pair_ranks(images, texts, caption_ids, image_ids).items():
        groups = image_ids if way == "text_to_image" else None  # the other way each picture asks once
        chance = chance_recall(right, pool)
        at_each_rank = chance.diff(prepend=torch.zeros(1)) / torch.arange(1, pool + 1)
        report[way] = {"queries": len(rank), "pool": pool} | _recalls(rank, groups, chance, ks)
        report[way]["mrr"] = _mean(1 / (rank + 1.0), groups, at_each_rank.sum())
        report[way]["median_rank"] = {"value": float(np.median(rank)) + 1, "chance": int((chance < 0.5).sum()) + 1}
    return report


def _recalls(rank: Tensor, groups: Tensor | None, chance: Tensor, ks: Sequence[int]) -> dict[str, Any]:
    """Recall@k, for each k smaller than the pool."""
    return {f"recall@{k}": _mean(rank < k, groups, chance[k - 1]) for k in ks if k < len(chance)}


def _mean(scores: Tensor, groups: Tensor | None, chance: Tensor) -> dict[str, float]:
    low, high = bootstrap_interval(scores, groups)
    return {"value": scores.double().mean().item(), "low": low, "high": high, "chance": chance.item()}


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
    found = [pair_ranks(images[r], texts[r], caption_ids[r], image_ids[r]) for r in rows]
    groups = {
        "image_to_text": torch.cat([image_ids[r].unique() for r in rows]),
        "text_to_image": image_ids[torch.cat(rows)],
    }
    report: dict[str, Any] = {"pool": size, "draws": draws}
    for way, group in groups.items():
        drawn = [both[way] for both in found]
        smallest = min(of_draw.pool for of_draw in drawn)  # they differ where pictures repeat
        chance = torch.stack([chance_recall(of_draw.right, of_draw.pool)[:smallest] for of_draw in drawn]).mean(dim=0)
        report[way] = _recalls(torch.cat([of_draw.rank for of_draw in drawn]), group, chance, ks)
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
        report[f"precision@{k}"] = _mean(torch.cat(parts), image_ids[known], share.mean())
    return report
