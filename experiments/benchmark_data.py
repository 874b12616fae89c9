"""How fast images come to the model: `python -m experiments.benchmark_data`, about 4 minutes on two cores.

Three ways over the same Parquet shards of PNG in the sizes of ROCOv2, with all cores, one after another in each round,
theirs and ours in processes of their own:

    usual        datasets and CLIPProcessor batch by batch in a DataLoader, as most training scripts have it
    first_pass   our first epoch: decode, resize, crop, write the cache
    cached       our later epochs: read the cache

in images/s, the median of the rounds, as pixels ready for the model (`usual`: normalised floats; ours: uint8, which the
device normalises). Then the peak memory of a first pass and an epoch over 1,000 and over 20,000 images, each in a
process of its own. A thousand images are drawn; where more are wanted, their shards stand there several times.
Written to experiments/results/benchmark_data.json with command, seed, versions and hardware.
"""

import json
import os
import shlex
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from clip_medical import cli, load_clip
from clip_medical.data.batches import Pairs, prepare, row_batches
from clip_medical.data.cache import ROOT_VARIABLE
from clip_medical.data.synthetic.phantoms import phantom
from clip_medical.data.dataset import load_data
from clip_medical.errors import UserError
from clip_medical.evaluation.report import environment
from clip_medical.model import Clip
from clip_medical.run_folder import write_text
from clip_medical.training import memory
from experiments.benchmark_parts import fresh_process

RESULT = Path(__file__).parent / "results" / "benchmark_data.json"
SIZE, BATCH = 224, 64  # ViT-B/32's pixels; pairs
EPOCHS = 10  # cached ones measured together: one alone is a matter of milliseconds
DRAWN, SHARD = 1000, 250  # images drawn; images in a shard


@dataclass(frozen=True)
class Options:
    """Images per second, the usual way and ours, and the memory that ours takes."""

    images: int = 4000
    """Images in the measured data set: so many that the start of a pass counts for little."""
    rounds: int = 3
    """Times that each way is measured; the median counts."""
    many: int = 20_000
    """Images of the larger memory measurement, against 1,000."""
    seed: int = 0
    """Draws the images."""

    def __post_init__(self) -> None:
        if self.rounds < 1 or any(count < SHARD or count % SHARD for count in (self.images, self.many)):
            raise UserError(f"give --rounds of 1 or more, --images and --many of {SHARD} or a multiple of it.")


def write_shards(folder: Path, count: int, seed: int) -> None:
    """`count` PNG images in Parquet shards. ROCOv2 on the Hub has them 225 to 260 kB large, most of them grey."""
    import datasets

    rng = np.random.default_rng(seed)
    features = datasets.Features({"image": datasets.Image(), "caption": datasets.Value("string")})
    for first in range(0, count, SHARD):
        rows: dict[str, list[Any]] = {"image": [], "caption": []}
        for i in range(first, min(first + SHARD, count)):
            drawn = phantom(seed, "benchmark", i)
            width, height = (int(side) for side in rng.normal((640, 560), (120, 110)).clip(250, 1200))
            body = np.asarray(drawn.image.resize((width, height), Image.Resampling.BICUBIC), np.float32)
            grain = body + rng.normal(0, 4, body.shape)  # without it a PNG would shrink to a tenth
            pixels = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
            if rng.random() < 0.1:  # coloured, as Doppler ultrasound is
                pixels = Image.merge("RGB", (pixels, pixels, pixels.point(lambda value: 255 - value)))
            rows["image"].append(pixels)
            rows["caption"].append(drawn.caption)
        shard = datasets.Dataset.from_dict(rows, features)
        shard.to_parquet(folder / f"train-{first // SHARD:05}.parquet", batch_size=100)  # rows a group, as on the Hub


def usual(folder: Path) -> float:
    """Images/s of datasets and CLIPProcessor in a second epoch: the start of the workers is not counted."""
    import datasets
    from transformers import CLIPImageProcessor, CLIPProcessor

    files = sorted(str(path) for path in folder.glob("*.parquet"))
    rows = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(folder / "datasets"))
    processor = CLIPProcessor(CLIPImageProcessor(), load_clip().tokenizer)

    def collate(batch: list[dict[str, Any]]) -> Any:
        torch.set_num_threads(1)
        images, texts = [row["image"].convert("RGB") for row in batch], [row["caption"] for row in batch]
        return processor(text=texts, images=images, return_tensors="pt", padding=True, truncation=True)

    loader = torch.utils.data.DataLoader(
        rows,
        BATCH,
        shuffle=True,
        num_workers=len(os.sched_getaffinity(0)),
        persistent_workers=True,
        collate_fn=collate,
        multiprocessing_context="fork",
        prefetch_factor=2,
    )
    for _ in loader:
        pass
    began = time.perf_counter()
    count = sum(len(batch["pixel_values"]) for batch in loader)
    return count / (time.perf_counter() - began)


def small_clip() -> Clip:
    """For its tokenizer; told to look at pictures of ViT-B/32's size."""
    clip = load_clip()
    clip.image_size = SIZE
    return clip


def ours(folder: Path, clip: Clip) -> Pairs:
    """The cached pairs of the shards, as train.py makes them."""
    return prepare(load_data(str(folder)).train, clip, "benchmark")


def epoch(pairs: Pairs) -> int:
    """Every batch of one epoch in memory, as training asks for it; returns how many images that were."""
    batches = row_batches(len(pairs), BATCH, seed=0)
    count = 0
    for _ in range(len(pairs) // BATCH):
        rows = next(batches)
        count += len(pairs.pixels[rows]) + 0 * len(pairs.tokens[rows])
    return count


def first_pass_and_cached(folder: Path) -> tuple[float, float]:
    """Images/s of the first pass into an empty cache, captions included, and of an epoch after it; as in train.py."""
    import datasets  # noqa: F401  imported here, so that the clock does not count it, as it does not for `usual`

    memory.keep_freed_memory(torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=folder) as root:
        os.environ[ROOT_VARIABLE] = root
        clip = small_clip()
        began = time.perf_counter()
        pairs = ours(folder, clip)
        first = len(pairs) / (time.perf_counter() - began)
        began = time.perf_counter()
        count = sum(epoch(pairs) for _ in range(EPOCHS))
        return first, count / (time.perf_counter() - began)


@contextmanager
def copies(drawn: Path, count: int) -> Iterator[Path]:
    """A folder beside `drawn` with `count` images: its shards, again and again."""
    with tempfile.TemporaryDirectory(dir=drawn.parent) as folder:
        shards = sorted(drawn.glob("*.parquet"))
        for number in range(count // SHARD):
            os.link(shards[number % len(shards)], Path(folder) / f"train-{number:05}.parquet")
        yield Path(folder)


def peak_memory(drawn: Path, count: int) -> float:
    """Peak resident memory in MB of a first pass and an epoch over `count` images."""
    with copies(drawn, count) as folder:
        return fresh_process(_measure_memory, folder)


def _measure_memory(folder: Path) -> float:
    os.environ[ROOT_VARIABLE] = str(folder / "cache")
    memory.keep_freed_memory(torch.device("cpu"))
    epoch(ours(folder, small_clip()))
    return memory.peak_memory(torch.device("cpu")) / 1e6


def run(options: Options) -> int:
    rates: dict[str, list[float]] = {"usual": [], "first_pass": [], "cached": []}
    with tempfile.TemporaryDirectory(prefix="benchmark_data-") as root:
        drawn = Path(root) / "drawn"
        drawn.mkdir()
        print(f"Drawing  {DRAWN:,} PNG images in Parquet shards")
        write_shards(drawn, DRAWN, options.seed)
        size = sum(path.stat().st_size for path in drawn.glob("*.parquet")) / DRAWN / 1e3
        with copies(drawn, options.images) as folder:
            for number in range(options.rounds):
                rates["usual"].append(fresh_process(usual, folder))
                first, cached = fresh_process(first_pass_and_cached, folder)
                rates["first_pass"].append(first)
                rates["cached"].append(cached)
                print(f"Round {number + 1}  usual {rates['usual'][-1]:,.0f}, first pass {first:,.0f}, "
                      f"cached {cached:,.0f} images/s")  # fmt: skip
        peaks = {str(count): round(peak_memory(drawn, count), 1) for count in (1000, options.many)}
    result: dict[str, Any] = {name: round(statistics.median(values), 1) for name, values in rates.items()}
    result["first_pass_to_usual"] = round(result["first_pass"] / result["usual"], 2)
    result["cached_to_usual"] = round(result["cached"] / result["usual"], 2)
    result |= {
        "rounds": rates,
        "peak_memory_mb": peaks,
        "images": options.images,
        "kilobytes_an_image": round(size, 1),
    }
    result |= {"pixels": SIZE, "batch_size": BATCH, "seed": options.seed, "environment": environment()}
    result["command"] = shlex.join(["python", "-m", "experiments.benchmark_data", *sys.argv[1:]])
    RESULT.parent.mkdir(exist_ok=True)
    write_text(RESULT, json.dumps(result, indent=2) + "\n")
    print(f"\nusual way    {result['usual']:9,.0f} images/s    1 x   ({size:.0f} kB an image, {SIZE} pixels wide)")
    print(f"first pass   {result['first_pass']:9,.0f} images/s {result['first_pass_to_usual']:4.1f} x")
    print(f"cached       {result['cached']:9,.0f} images/s {result['cached_to_usual']:4.0f} x")
    print("peak memory  " + ", ".join(f"{int(count):,} images: {mb:,.0f} MB" for count, mb in peaks.items()))
    print(f"Saved        {RESULT}")
    return 0


def main() -> int:
    return cli.exit_code(
        "benchmark_data",
        lambda: run(cli.parse(Options, sys.argv[1:], "python -m experiments.benchmark_data")),
    )


if __name__ == "__main__":
    sys.exit(main())
