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


def recall(pairs: int, repeats: int, seed: int) -> tuple[float, float]:
    """Time the ranking of `pairs` pairs in both directions -> seconds (median), MB beyond the features."""
    images, texts, ids = features(pairs, seed), features(pairs, seed + 1), torch.arange(pairs)
    pair_ranks(images[:100], texts[:100], ids[:100], ids[:100])  # warm-up: libraries are loaded
    before = peak_memory(CPU)
    times = [seconds(pair_ranks, images, texts, ids, ids) for _ in range(repeats)]
    return statistics.median(times), (peak_memory(CPU) - before) / 1e6


def search(images: int, seed: int) -> tuple[float, float, float]:
    """Time queries over an index of `images` -> ms per query (median), the longest, seconds to load the index."""
    models = {"unadapted": load_clip()}
    with tempfile.TemporaryDirectory() as folder:
        Index(Path(folder), models)  # writes index.json
        cells = {field.name: [f"{row}".encode() for row in range(images)] for field in SCHEMA}
        cells["labels"] = [b"{}"] * images
        rows = pa.table(cells).cast(SCHEMA)
        write_part(Path(folder, "part-00000.arrow"), rows, {"unadapted": features(images, seed)})
        loading = seconds(Index, Path(folder), models)
        index = Index(Path(folder), models)
        times = [1000 * seconds(index.search, "unadapted", query) for query in features(QUERIES, seed + 1)]
    return statistics.median(times), max(times), loading


@dataclass(frozen=True)
class Retrieval(Benchmark):
    """Measure seconds and memory of recall over a whole pool, and of a search."""

    pairs: int = 10_000
    """Pairs of the whole pool."""
    large: int = 80_000
    """Pairs of the large pool, which is ranked once."""
    images: int = 100_000
    """Images in the index."""
    repeats: int = 3
    """Repeats of the whole pool; the median counts."""

    command = "benchmark.retrieval"

    def measure(self, folder: Path) -> dict[str, Any]:
        results: dict[str, Any] = {}
        for pairs, repeats in ((self.pairs, self.repeats), (self.large, 1)):
            pool = f"recall of {pairs:,} pairs, both directions"
            time, memory = fresh_process(recall, pairs, repeats, self.seed)
            results |= {f"{pool}, s": time, f"{pool}, MB beyond the features": memory}
        query, longest, loading = fresh_process(search, self.images, self.seed)
        index = f"search in {self.images:,} images"
        results |= {
            f"{index}, ms": query,
            f"{index}, longest of {QUERIES}, ms": longest,
            f"{index}, s to load": loading,
        }
        return results


if __name__ == "__main__":
    sys.exit(main(Retrieval))
