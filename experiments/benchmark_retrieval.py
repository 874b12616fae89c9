"""Speed and memory of the evaluation: `python -m experiments.benchmark_retrieval`, about 5 minutes on two cores.

    whole pool    every picture against every caption, both ways, with 10,000 pairs: the size of ROCOv2's test set
    large pool    the same with 80,000 pairs, all of ROCOv2: their table of similarities would take 26 GB
    search        a query over an index of 100,000 pictures, once the index is loaded

with random features of 512 numbers, as ViT-B/32 has them. Memory is the peak beyond the features, in a process of its
own for each. Written to experiments/results/benchmark_retrieval.json with command, seed, versions and hardware.
"""

import json
import shlex
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor

from clip_medical import cli, load_clip
from clip_medical.errors import UserError
from clip_medical.evaluation.report import environment
from clip_medical.evaluation.retrieval import pair_ranks
from clip_medical.evaluation.search import COLUMNS, Index
from clip_medical.run_folder import write_text
from clip_medical.training.memory import peak_memory
from experiments.benchmark_parts import fresh_process

RESULT = Path(__file__).parent / "results" / "benchmark_retrieval.json"
WIDTH = 512  # of the features of ViT-B/32
QUERIES = 20


@dataclass(frozen=True)
class Options:
    """Seconds and memory of recall over a whole pool and of a search."""

    pairs: int = 10_000
    """Pairs of the whole pool."""
    large: int = 80_000
    """Pairs of the large pool, which is measured once."""
    pictures: int = 100_000
    """Pictures in the index."""
    repeats: int = 3
    """Times that the whole pool is measured; the median counts."""
    seed: int = 0
    """Draws the features."""

    def __post_init__(self) -> None:
        if min(self.pairs, self.large, self.pictures) < 10 or self.repeats < 1:
            raise UserError("give --pairs, --large and --pictures of 10 and --repeats of 1 or more.")


def features(count: int, seed: int) -> Tensor:
    """(count, WIDTH) unit length, made in place: a copy would count as a peak of memory."""
    made = torch.empty(count, WIDTH).normal_(generator=torch.Generator().manual_seed(seed))
    for part in made.split(1000):
        part.copy_(F.normalize(part, dim=-1))
    return made


def recall(pairs: int, repeats: int, seed: int) -> dict[str, Any]:
    """{"seconds", "megabytes"} of both ways over a pool of `pairs`."""
    images, texts, ids = features(pairs, seed), features(pairs, seed + 1), torch.arange(pairs)
    pair_ranks(images[:100], texts[:100], ids[:100], ids[:100])  # what the first call of all has to load
    before, seconds = peak_memory(images.device), []
    for _ in range(repeats):
        began = time.perf_counter()
        pair_ranks(images, texts, ids, ids)
        seconds.append(time.perf_counter() - began)
    extra = (peak_memory(images.device) - before) / 1e6
    return {"pairs": pairs, "seconds": round(statistics.median(seconds), 2), "megabytes": round(extra, 1)}


def search(pictures: int, seed: int) -> dict[str, Any]:
    """{"milliseconds" of a query, the median and the longest, "load_seconds"} of an index of `pictures`."""
    models = {"unadapted": load_clip()}
    with tempfile.TemporaryDirectory() as folder:
        Index(Path(folder), models)
        rows = {key: [f"{key} {row}" if key != "labels" else "{}" for row in range(pictures)] for key in COLUMNS}
        pq.write_table(pa.table(rows), Path(folder, "part-00000.parquet"))
        save_file({"unadapted": features(pictures, seed)}, Path(folder, "part-00000.safetensors"))
        began = time.perf_counter()
        index = Index(Path(folder), models)
        loaded = time.perf_counter() - began
        spent = []
        for query in features(QUERIES, seed + 1):
            began = time.perf_counter()
            index.search("unadapted", query, k=5)
            spent.append(1000 * (time.perf_counter() - began))
    return {
        "pictures": pictures,
        "milliseconds": round(statistics.median(spent), 1),
        "longest_milliseconds": round(max(spent), 1),
        "load_seconds": round(loaded, 2),
    }


def run(options: Options) -> int:
    result: dict[str, Any] = {"command": shlex.join(["python", "-m", "experiments.benchmark_retrieval", *sys.argv[1:]])}
    result |= {"seed": options.seed, "width": WIDTH, "environment": environment()}
    for name, pairs, repeats in (("whole", options.pairs, options.repeats), ("large", options.large, 1)):
        found = result[name] = fresh_process(recall, pairs, repeats, options.seed)
        print(
            f"{name} pool   {pairs:,} x {pairs:,}, both ways: {found['seconds']:.2f} s, "
            f"{found['megabytes']:,.0f} MB beyond the features"
        )
    found = result["search"] = fresh_process(search, options.pictures, options.seed)
    print(
        f"search       {options.pictures:,} pictures: {found['milliseconds']:.1f} ms a query, the longest of {QUERIES} "
        f"{found['longest_milliseconds']:.1f} ms, after {found['load_seconds']:.1f} s to load"
    )
    RESULT.parent.mkdir(exist_ok=True)
    write_text(RESULT, json.dumps(result, indent=2) + "\n")
    print(f"Saved        {RESULT}")
    return 0


def main() -> int:
    command = "python -m experiments.benchmark_retrieval"
    return cli.exit_code(
        "benchmark_retrieval", lambda: run(cli.parse(Options, sys.argv[1:], command))
    )


if __name__ == "__main__":
    sys.exit(main())
