"""How fast images reach the model: `python -m experiments.benchmark.data`, about 4 minutes on 2 cores.

Three ways to read the same Parquet shards of PNG images in the sizes of ROCOv2, on all cores, each in fresh processes:

    usual        `datasets` and CLIPProcessor in the collate function of a DataLoader, as in most training scripts
    first_pass   this project's first epoch: decode, resize, crop, write the cache
    cached       this project's later epochs: read the cache

in images/s, medians over the rounds. The pixels are ready for the model: normalised floats in `usual`, uint8 in this
project, which normalises on the device. Then the peak memory of a first pass and an epoch over 1,000 and over 20,000
images. Only DRAWN images are distinct: where more are needed, their shards are linked several times.
"""

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from clip_medical.config import Config
from clip_medical.data.batches import Pairs, batches, prepare
from clip_medical.data.cache import ROOT_VARIABLE
from clip_medical.data.dataset import load_data
from clip_medical.data.synthetic.phantoms import describe
from clip_medical.errors import UserError
from clip_medical.model import load_clip
from clip_medical.training.memory import keep_freed_memory, peak_memory
from experiments.benchmark.inputs import radiology_image
from experiments.benchmark.measure import Benchmark, fresh_process, main

SIZE, BATCH = 224, 64  # image size of ViT-B/32; pairs
EPOCHS = 10  # cached epochs timed together, because one takes milliseconds
DRAWN, SHARD = 1000, 250  # distinct images; images per shard
CPU = torch.device("cpu")


def write_shards(folder: Path, count: int, seed: int) -> None:
    """Write `count` PNG images and captions into Parquet shards, in row groups of 100, as the Hub has them."""
    import datasets

    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for first in range(0, count, SHARD):
        indices = range(first, min(first + SHARD, count))
        captions = [describe(seed, "benchmark", index)[0] for index in indices]
        rows = {"image": [radiology_image(index, seed) for index in indices], "caption": captions}
        file = folder / f"train-{first // SHARD:05}.parquet"
        datasets.Dataset.from_dict(rows, features).to_parquet(file, batch_size=100)


@contextmanager
def linked_shards(drawn: Path, count: int) -> Iterator[Path]:
    """Make a folder beside `drawn` with `count` images: links to its shards, repeated."""
    with tempfile.TemporaryDirectory(dir=drawn.parent) as folder:
        shards = sorted(drawn.glob("*.parquet"))
        for number in range(count // SHARD):
            os.link(shards[number % len(shards)], Path(folder) / f"train-{number:05}.parquet")
        yield Path(folder)


def usual(folder: Path) -> float:
    """Return images/s of the usual loader in its second epoch, so that the start of its processes is not counted."""
    import datasets
    from transformers import CLIPImageProcessor, CLIPProcessor

    files = sorted(str(path) for path in folder.glob("*.parquet"))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "datasets"))
    processor = CLIPProcessor(CLIPImageProcessor(), load_clip().processor.tokenizer)

    def collate(batch: list[dict[str, Any]]) -> Any:
        torch.set_num_threads(1)
        images, texts = [row["image"].convert("RGB") for row in batch], [row["caption"] for row in batch]
        return processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)

    workers = len(os.sched_getaffinity(0))
    loader = torch.utils.data.DataLoader(
        rows, BATCH, shuffle=True, num_workers=workers, persistent_workers=True, collate_fn=collate,
        multiprocessing_context="fork",
    )  # fmt: skip
    for _ in loader:
        pass
    began = time.perf_counter()
    count = sum(len(batch["pixel_values"]) for batch in loader)
    return count / (time.perf_counter() - began)


def cached_pairs(folder: Path) -> Pairs:
    """Make the pairs of the shards as train.py does, with their image cache in `folder`."""
    keep_freed_memory(CPU)
    os.environ[ROOT_VARIABLE] = str(folder / "cache")
    processor = load_clip().processor
    processor.image_size = SIZE  # the tiny CLIP has smaller images
    return prepare(load_data(str(folder)).train, processor, "benchmark")


def read_epochs(pairs: Pairs, epochs: int) -> int:
    """Load the batches of some epochs as training does; returns the number of images."""
    config = Config(batch_size=BATCH, fragments=0)
    return sum(len(batch.pixels) for batch in islice(batches(pairs, config), epochs * (len(pairs) // BATCH)))


def first_pass_and_cached(folder: Path) -> tuple[float, float]:
    """Return images/s of a first pass into an empty cache, captions included, and of the epochs after it."""
    import datasets  # noqa: F401  imported before the clock starts, as in `usual`

    began = time.perf_counter()
    pairs = cached_pairs(folder)
    first = len(pairs) / (time.perf_counter() - began)
    began = time.perf_counter()
    return first, read_epochs(pairs, EPOCHS) / (time.perf_counter() - began)


def peak_of_an_epoch(folder: Path) -> float:
    """Return the peak resident memory in MB of a first pass and an epoch."""
    read_epochs(cached_pairs(folder), 1)
    return round(peak_memory(CPU) / 1e6, 1)


@dataclass(frozen=True)
class Data(Benchmark):
    """Measure images per second, the usual way and this project's, and the memory of the latter."""

    images: int = 4000
    """Images in the measured dataset."""
    rounds: int = 3
    """Rounds over all ways; the median counts."""
    many: int = 20_000
    """Images of the larger memory measurement; the smaller has 1,000."""

    command = "benchmark.data"
    packages = ("datasets", "pillow")
    minimum = {"rounds": 1, "images": SHARD, "many": SHARD}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.images % SHARD or self.many % SHARD:
            raise UserError(f"Found --images {self.images} --many {self.many}, expected multiples of {SHARD}.")

    def measure(self) -> dict[str, Any]:
        rounds: dict[str, list[float]] = {"usual": [], "first_pass": [], "cached": []}
        peaks = {}
        with tempfile.TemporaryDirectory() as root:
            drawn = Path(root) / "drawn"
            drawn.mkdir()
            print(f"Drawing  {DRAWN:,} PNG images in Parquet shards")
            write_shards(drawn, DRAWN, self.seed)
            size = sum(path.stat().st_size for path in drawn.glob("*.parquet")) / DRAWN / 1e3
            for number in range(self.rounds):
                with linked_shards(drawn, self.images) as folder:  # a new folder, hence an empty cache
                    rates = fresh_process(usual, folder), *fresh_process(first_pass_and_cached, folder)
                for name, rate in zip(rounds, rates, strict=True):
                    rounds[name].append(rate)
                print(
                    f"Round {number + 1}  " + ", ".join(f"{rounds[name][-1]:,.0f} images/s {name}" for name in rounds)
                )
            for count in (1000, self.many):
                with linked_shards(drawn, count) as folder:
                    peaks[str(count)] = fresh_process(peak_of_an_epoch, folder)
        medians = {name: round(statistics.median(values), 1) for name, values in rounds.items()}
        ratios = {f"{name}_to_usual": round(medians[name] / medians["usual"], 2) for name in ("first_pass", "cached")}
        print(f"\nPNG images of {size:.0f} kB on average, resized to {SIZE} pixels")
        for name, rate in medians.items():
            print(f"{name:12} {rate:9,.0f} images/s {rate / medians['usual']:6.1f} x")
        print("peak memory  " + ", ".join(f"{int(count):,} images: {mb:,.0f} MB" for count, mb in peaks.items()))
        settings = {"images": self.images, "kilobytes_per_image": round(size, 1), "pixels": SIZE, "batch_size": BATCH}
        return settings | medians | ratios | {"rounds": rounds, "peak_memory_mb": peaks}


if __name__ == "__main__":
    sys.exit(main(Data))
