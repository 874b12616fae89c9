"""What did it cost, and was LoRA needed? `python -m experiments.ablation --run runs/x`.

Data, model and budget (steps and batch) are those of the run. Each variant starts from the unadapted model:

    LoRA            ranks 1 to 32; q and v against all projections; one tower against two; strengths from 0 to 1
    linear map      the two towers frozen, the projections after them retrained: a linear map on frozen features
    full            every weight trained but the temperature

LoRA's scaling alpha / r is the same for all ranks. Each variant has a learning rate of its own, as a larger rank or
more layers are a stronger update at the same rate. All are chosen alike, without the held-out pictures: variants are
trained with three rates, and with those beyond while the best is the lowest or the highest, on nine tenths of the
training pairs; the lowest loss on the last tenth wins, and all of them are printed. They take all the steps, as a rate
that is good for few of them can be too high for many.

What was forgotten is measured on the coloured shapes that the tiny CLIP was trained on, drawn anew for this. Measured
so far is kept in ablation.json: the same command goes on from there.
"""

import hashlib
import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from clip_medical.config import Config
from clip_medical.data import shapes
from clip_medical.data.batches import Pairs, prepare
from clip_medical.data.shapes import scene
from clip_medical.data.sources import Data, Split
from clip_medical.errors import UserError
from clip_medical.evaluation.report import as_text, encode, percent
from clip_medical.evaluation.retrieval import bootstrap_interval, pair_ranks
from clip_medical.evaluation.zero_shot import zero_shot_report
from clip_medical.model import Clip, load_clip
from clip_medical.runs import read_json
from clip_medical.training.memory import keep_freed_memory
from experiments import common, figures
from experiments.variants import FULL, LINEAR, Bench, Variant, choose_lr, fit, reference, variants
from lora import set_strength

STRENGTHS = tuple(s / 10 for s in range(11))
SHAPES = 512  # held-out shapes
K, SHAPES_K = 10, 1  # Recall@K of the radiology pairs and of the shapes: where neither is near 0 or 100 %
UNADAPTED = "unadapted"


@dataclass(frozen=True)
class Ablation(common.Common):
    """LoRA of all ranks and places against a linear map and full fine-tuning, and what each of them forgets."""

    steps: int | None = None
    """Optimizer steps of each variant; default: those of the run."""
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Ranks to try with q and v of both towers; that of the run is among them always."""


# ---- the measurements


def both_ways(images: Tensor, texts: Tensor, pairs: Pairs, k: int) -> Tensor:
    """(N,) 0, 1 or 2: of a pair, whether its caption finds its picture, and its picture its caption, in the first k."""
    both = pair_ranks(images, texts, pairs.caption_ids, pairs.image_ids)
    picture = pairs.image_ids.unique(return_inverse=True)[1]
    return (both["image_to_text"].rank[picture] < k).long() + (both["text_to_image"].rank < k)


def share(hits: Tensor, groups: Tensor) -> dict[str, float]:
    low, high = bootstrap_interval(hits / 2, groups)
    return {"value": hits.double().mean().item() / 2, "low": low, "high": high}


def measure(bench: Bench, clip: Clip) -> dict[str, Any]:
    """One row: Recall@10 of the held-out pairs, mean zero-shot accuracy, Recall@1 of the shapes; both ways."""
    images, texts = encode(clip, bench.held_out)
    hits = both_ways(images, texts, bench.held_out, K)
    zero_shot = zero_shot_report(clip, images, bench.labels)
    shapes_kept = both_ways(*encode(clip, bench.shapes), bench.shapes, SHAPES_K)
    facets = {facet: row["accuracy"] for facet, row in zero_shot.items()}
    return {
        "recall": share(hits, bench.held_out.image_ids),
        "zero_shot": {"facets": facets, "mean": sum(facets.values()) / len(facets) if facets else None},
        "shapes": share(shapes_kept, bench.shapes.image_ids),
        "hits": "".join(map(str, hits.tolist())),  # a digit a pair, 0 to 2: rows are compared pair by pair
    }


def difference(bench: Bench, one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Recall of one row less that of another, with the 95 % interval of the difference on the same pictures."""
    a, b = (torch.tensor([int(digit) for digit in row["hits"]]) for row in (one, other))
    found = share(a - b, bench.held_out.image_ids)
    if not (a - b).any():  # no pair tells them apart: a difference either way stays possible
        found["low"] = -found["high"]
    return found


def verdict(bench: Bench, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Whether LoRA was needed, in sentences, whatever the answer."""
    said = []
    for name in (LINEAR, FULL):
        found = difference(bench, rows[reference(bench.config)], rows[name])
        how = "above" if found["low"] > 0 else "below" if found["high"] < 0 else "not distinguishable from"
        points = f"{100 * found['value']:+.1f} points [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
        said.append(f"{reference(bench.config)}: Recall@{K} {how} {name}, {points} on the same pictures")
    return said


# ---- the experiment


def read_config(options: Ablation) -> Config:
    """The choices of the run, or those of `python train.py` with --model and --data."""
    if options.run is None:
        config = Config(model=options.model or "", data=options.data or "phantoms", seed=options.seed)
    else:
        stored = read_json(Path(options.run, "config.json"))
        if not stored:
            raise UserError(f"{options.run} has no config.json: give a run of train.py, or --model and --data.")
        known = {field.name for field in fields(Config)}
        chosen: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in stored.items() if k in known}
        config = Config(**chosen)
    return replace(config, steps=options.steps or config.steps)


def held_out_shapes() -> Split:
    scenes = [scene(0, "held out", i) for i in range(SHAPES)]
    names = [f"shapes {i}" for i in range(SHAPES)]
    drawn_by = hashlib.sha256(Path(shapes.__file__).read_bytes()).hexdigest()[:16]
    origins = [f"{drawn_by} {name}" for name in names]
    return Split([s.caption for s in scenes], names, {}, lambda row: scenes[row].image, origins)


def make_bench(setup: common.Setup, config: Config, data: Data) -> Bench:
    base = setup.models["unadapted"]
    keep_freed_memory(base.device)  # as train.py does
    count, batch = len(data.train), config.batch_size
    if count < 2 * batch:
        raise UserError(f"{count} training pairs are too few for batches of {batch}: name other --data.")
    train, held_out = prepare(data.train, base, "training"), prepare(data.validation, base, "held-out")
    steps = config.steps or config.epochs * (count // batch)
    fresh = partial(load_clip, base.name, base.device, revision=base.revision)
    held_shapes = prepare(held_out_shapes(), base, "shapes")
    return Bench(config, steps, fresh, train, held_out, held_out.split.labels, held_shapes)


def table(bench: Bench, rows: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Rows of text, heading first."""
    head = ["", "trained", "lr", f"Recall@{K}", "less that of LoRA", "zero-shot", f"shapes, Recall@{SHAPES_K}"]
    shown = [head]
    own = rows.get(reference(bench.config))
    for name, row in rows.items():
        less = ""
        if own and name != reference(bench.config):
            found = difference(bench, row, own)
            less = f"{100 * found['value']:+.1f} [{100 * found['low']:+.1f}, {100 * found['high']:+.1f}]"
        mean = row["zero_shot"]["mean"]
        accuracy = "" if mean is None else f"{100 * mean:.1f} %"
        rate = f"{row['lr']:.2g}" if row["lr"] else ""
        shown.append(
            [name, f"{row['trained']:,}", rate, percent(row["recall"]), less, accuracy, percent(row["shapes"])]
        )
    return shown


def rates_tried(rates: dict[str, Any]) -> list[str]:
    """How the learning rate of each variant was chosen, in a sentence each."""
    said = []
    for name, found in rates.items():
        losses = ", ".join(f"{loss:.3f} at {lr}" for lr, loss in found["losses"].items())
        edge = f"{found['lr']:.2g}" in (list(found["losses"])[0], list(found["losses"])[-1])
        note = ", the last that was tried: a better one may lie beyond" if edge else ""
        said.append(
            f"Learning rate of {name}: loss on kept-back training pairs {losses}; {found['lr']:.2g} taken{note}"
        )
    return said


def measure_all(bench: Bench, tried: list[Variant], results: dict[str, Any], keep: Callable[[], None]) -> None:
    """Train and measure what `results` does not hold yet; keep() after each."""
    rows, strengths, own = results["variants"], results["strength"], reference(bench.config)
    if UNADAPTED not in rows:
        rows[UNADAPTED] = measure(bench, bench.base()) | {"trained": 0, "lr": None}
        keep()
    for variant in (v for v in tried if v.name not in rows):
        if variant.name not in results["rates"]:
            results["rates"][variant.name] = choose_lr(bench, variant)
            keep()
        lr = results["rates"][variant.name]["lr"]
        clip = fit(bench, variant, lr, torch.arange(len(bench.train)), bench.steps)
        if variant.name == own:
            for strength in STRENGTHS:
                set_strength(clip.model, strength)
                strengths[f"{strength:.1f}"] = measure(bench, clip)
        trained = sum(p.numel() for p in clip.model.parameters() if p.requires_grad)
        rows[variant.name] = measure(bench, clip) | {"trained": trained, "lr": lr}
        keep()


def run(options: Ablation) -> int:
    config = read_config(options)
    setup = common.load_models("ablation", options)
    bench = make_bench(setup, config, common.load_evidence(setup, options))
    settings = {"steps": bench.steps, "rates": "chosen for each variant in all the steps",
                "batch size": config.batch_size, "fragments": config.fragments,
                "augment": config.augment,
                "rank": config.rank, "alpha": config.alpha, "lr": config.lr,
                "training pairs": len(bench.train), "held-out pairs": len(bench.held_out),
                "data": setup.facts["data"]["fingerprint"], "model": setup.facts["model"]["fingerprint"],
                "seed": config.seed}  # fmt: skip
    stored = read_json(setup.folder / "ablation.json").get("results", {})
    results: dict[str, Any] = stored if stored.get("settings") == settings else {}
    results = {"settings": settings, "rates": {}, "variants": {}, "strength": {}} | results
    tried = variants(config, options.ranks)
    measure_all(bench, tried, results, lambda: common.save(setup, "ablation", results))
    rows = {name: results["variants"][name] for name in [UNADAPTED, *(variant.name for variant in tried)]}
    results["verdict"] = verdict(bench, rows)
    common.save(setup, "ablation", results)
    print(as_text(table(bench, rows)))
    steps = [[s, percent(row["recall"]), percent(row["shapes"])] for s, row in results["strength"].items()]
    print("\n" + as_text([["strength", f"Recall@{K}", f"shapes, Recall@{SHAPES_K}"], *steps]))
    print("\n" + "\n".join([*rates_tried(results["rates"]), *results["verdict"]]))
    n = (len(bench.held_out), len(bench.shapes))
    figures.ablation(rows, results["strength"], (K, SHAPES_K), n, setup.folder / "ablation.png")
    common.said(setup, "ablation.json", "ablation.png")
    return 0


if __name__ == "__main__":
    sys.exit(common.main("ablation", Ablation, run))
