"""How fast images reach the model: `python -m experiments.benchmark.data`, about 4 minutes on 2 cores.

Three ways to read the same Parquet shards of PNG images in the sizes of ROCOv2, on all cores, each in fresh processes:

    usual loader   `datasets` and CLIPProcessor in the collate function of a DataLoader, as in most training scripts
    first pass     this project's first epoch: decode, resize, crop, write the cache
    cached         this project's later epochs: read the cache

in images/s, medians over the rounds. The pixels are ready for the model: normalised floats in the usual loader, uint8
in this project, which normalises on the device. Then the peak memory of a first pass and an epoch over 1,000 and over
20,000 images. All shards are links to one, because decoding an image again costs the same.
"""

import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from clip_medical.config import Config
from clip_medical.data.batches import batches, prepare
from clip_medical.data.cache import ROOT_VARIABLE
from clip_medical.data.dataset import load_data
from clip_medical.data.synthetic.phantoms import describe
from clip_medical.model import load_clip
from clip_medical.training.memory import keep_freed_memory, peak_memory
from experiments.benchmark.contenders import usual_batch
from experiments.benchmark.inputs import radiology_image
from experiments.benchmark.measure import Benchmark, fresh_process, main

SIZE, BATCH = 224, 64  # image size of ViT-B/32; pairs
SHARD, FEW = 250, 1000  # images of the shard; of the smaller memory measurement
EPOCHS = 10  # cached epochs timed together, because one takes milliseconds
CPU = torch.device("cpu")


def write_shard(file: Path, seed: int) -> None:
    """Write SHARD PNG images with captions, in row groups of 100, as the Hub has them."""
    import datasets

    captions = [describe(seed, "benchmark", index)[0] for index in range(SHARD)]
    images = [radiology_image(index, seed) for index in range(SHARD)]
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    datasets.Dataset.from_dict({"image": images, "caption": captions}, features).to_parquet(file, batch_size=100)


def link_shards(shard: Path, name: str, count: int) -> Path:
    """Make the folder `name` beside the shard, with links to it that add up to `count` images."""
    folder = shard.with_name(name)
    folder.mkdir()
    for number in range(-(-count // SHARD)):
        os.link(shard, folder / f"train-{number:05}.parquet")
    return folder


def usual_loader(folder: Path) -> float:
    """Return images/s in the second epoch of a DataLoader, so that the start of its processes is not counted."""
    import datasets
    from transformers import CLIPImageProcessor, CLIPProcessor

    files = [str(path) for path in folder.glob("*.parquet")]
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "datasets"))
    processor = CLIPProcessor(CLIPImageProcessor(), load_clip().processor.tokenizer)
    loader: Any = torch.utils.data.DataLoader(
        rows, BATCH, shuffle=True, num_workers=len(os.sched_getaffinity(0)), persistent_workers=True,
        collate_fn=lambda rows: usual_batch(processor, [(row["image"], row["caption"]) for row in rows]),
        multiprocessing_context="fork",
    )  # fmt: skip
    for _ in loader:
        pass
    began = time.perf_counter()
    for _ in loader:
        pass
    return len(rows) / (time.perf_counter() - began)


def first_pass_and_cached(folder: Path, epochs: int) -> tuple[float, float, float]:
    """Prepare the pairs of the shards, with an empty image cache, and load some epochs as training does.

    Returns images/s of the first pass, tokenizing included, and of the epochs after it, and the peak memory in MB.
    """
    import datasets  # noqa: F401  imported before the clock starts, as in the usual loader

    keep_freed_memory(CPU)
    processor = load_clip().processor
    processor.image_size = SIZE  # the tiny CLIP has smaller images
    with tempfile.TemporaryDirectory(dir=folder) as os.environ[ROOT_VARIABLE]:
        began = time.perf_counter()
        pairs = prepare(load_data(str(folder)).train, processor, "benchmark")
        decoded = time.perf_counter()
        count = epochs * (len(pairs) // BATCH)
        for batch in islice(batches(pairs, Config(batch_size=BATCH, fragments=0)), count):
            assert len(batch.pixels) == BATCH
        cached = time.perf_counter() - decoded
    return len(pairs) / (decoded - began), count * BATCH / cached, peak_memory(CPU) / 1e6


@dataclass(frozen=True)
class Data(Benchmark):
    """Measure images per second, the usual way and this project's, and the memory of the latter."""

    images: int = 4000
    """Images in the measured dataset, rounded up to whole shards of 250."""
    rounds: int = 3
    """Rounds over all ways; the median counts."""
    many: int = 20_000
    """Images of the larger memory measurement; the smaller has 1,000."""

    command = "benchmark.data"

    def measure(self, folder: Path) -> dict[str, Any]:
        with tempfile.TemporaryDirectory() as root:
            shard = Path(root, "shard.parquet")
            write_shard(shard, self.seed)
            shards = link_shards(shard, "measured", self.images)
            rounds = [
                (fresh_process(usual_loader, shards), *fresh_process(first_pass_and_cached, shards, EPOCHS)[:2])
                for _ in range(self.rounds)
            ]
            peaks = {}
            for name, count in (("few", FEW), ("many", self.many)):
                _, _, peak = fresh_process(first_pass_and_cached, link_shards(shard, name, count), 1)
                peaks[f"peak memory of {count:,} images, MB"] = peak
            size = shard.stat().st_size / SHARD / 1e3
        usual, first, cached = (statistics.median(rates) for rates in zip(*rounds, strict=True))
        rates = {"usual loader, images/s": usual, "first pass, images/s": first, "cached, images/s": cached}
        ratios = {"first pass to usual loader": first / usual, "cached to usual loader": cached / usual}
        return {"kB per image": size, **rates, **ratios, **peaks, "rounds": rounds}


if __name__ == "__main__":
    sys.exit(main(Data))
