"""Speed and memory of the evaluation: `python -m experiments.benchmark.retrieval`, about 5 minutes on 2 cores.

    whole pool   every image against every caption, in both directions, of 10,000 pairs: the size of ROCOv2's test split
    large pool   the same with 80,000 pairs, all of ROCOv2: a matrix of their similarities would take 26 GB
    search       a query over an index of 100,000 images, once the index is loaded

Features are random, with ViT-B/32's 512 dimensions. Memory is the peak beyond the features, in a fresh process.
"""

import statistics
import sys
import tempfile
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
import torch.nn.functional as F
from torch import Tensor

from clip_medical.evaluation.retrieval import pair_ranks
from clip_medical.evaluation.search import SCHEMA, Index, write_part
from clip_medical.model import load_clip
from clip_medical.training.memory import peak_memory
from experiments.benchmark.measure import Benchmark, fresh_process, main, seconds

WIDTH = 512  # dimension of ViT-B/32's features
QUERIES = 20
CPU = torch.device("cpu")


def features(count: int, seed: int) -> Tensor:
    """Draw (count, WIDTH) of unit length. In place, because a copy would raise the peak memory."""
    matrix = torch.empty(count, WIDTH).normal_(generator=torch.Generator().manual_seed(seed))
    for block in matrix.split(1000):
        block.copy_(F.normalize(block, dim=-1))
    return matrix


def recall(pairs: int, repeats: int, seed: int) -> dict[str, Any]:
    """Time the ranking of `pairs` pairs in both directions -> {"pairs", "seconds", "megabytes"}."""
    images, texts, ids = features(pairs, seed), features(pairs, seed + 1), torch.arange(pairs)
    pair_ranks(images[:100], texts[:100], ids[:100], ids[:100])  # warm-up: libraries are loaded
    before = peak_memory(CPU)
    times = [seconds(CPU, pair_ranks, images, texts, ids, ids) for _ in range(repeats)]
    growth = (peak_memory(CPU) - before) / 1e6
    return {"pairs": pairs, "seconds": round(statistics.median(times), 2), "megabytes": round(growth, 1)}


def search(images: int, seed: int) -> dict[str, Any]:
    """Time queries over an index -> {"images", "milliseconds" (median), "longest_milliseconds", "load_seconds"}."""
    models = {"unadapted": load_clip()}
    with tempfile.TemporaryDirectory() as folder:
        Index(Path(folder), models)  # writes index.json
        columns = [pa.array([f"{row}" for row in range(images)]).cast(field.type) for field in SCHEMA]
        columns[SCHEMA.get_field_index("labels")] = pa.array(["{}"] * images)
        write_part(Path(folder, "part-00000.arrow"), pa.table(columns, SCHEMA), {"unadapted": features(images, seed)})
        loading = seconds(CPU, Index, Path(folder), models)
        query = partial(Index(Path(folder), models).search, "unadapted", k=5)
        times = [1000 * seconds(CPU, query, each) for each in features(QUERIES, seed + 1)]
    return {
        "images": images,
        "milliseconds": round(statistics.median(times), 1),
        "longest_milliseconds": round(max(times), 1),
        "load_seconds": round(loading, 2),
    }


@dataclass(frozen=True)
class Retrieval(Benchmark):
    """Measure seconds and memory of recall over a whole pool, and of a search."""

    pairs: int = 10_000
    """Pairs of the whole pool."""
    large: int = 80_000
    """Pairs of the large pool, which is measured once."""
    images: int = 100_000
    """Images in the index."""
    repeats: int = 3
    """Repeats of the whole pool; the median counts."""

    command = "benchmark.retrieval"
    minimum = {"pairs": 10, "large": 10, "images": 10, "repeats": 1}

    def measure(self) -> dict[str, Any]:
        results: dict[str, Any] = {"width": WIDTH}
        for name, pairs, repeats in (("whole", self.pairs, self.repeats), ("large", self.large, 1)):
            pool = results[name] = fresh_process(recall, pairs, repeats, self.seed)
            print(f"{name} pool   {pairs:,} pairs, both directions: {pool['seconds']:.2f} s, "
                  f"{pool['megabytes']:,.0f} MB beyond the features")  # fmt: skip
        index = results["search"] = fresh_process(search, self.images, self.seed)
        print(f"search       {self.images:,} images: {index['milliseconds']:.1f} ms per query, at most "
              f"{index['longest_milliseconds']:.1f} ms of {QUERIES}; {index['load_seconds']:.1f} s to load")  # fmt: skip
        return results


if __name__ == "__main__":
    sys.exit(main(Retrieval))
