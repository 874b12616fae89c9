"""Is LoRA needed, and what does it cost? `python -m experiments.ablation --run runs/x`.

Data, model and budget (steps and batch size) are those of the run. Each variant starts from the unadapted model:

    LoRA            several ranks; q and v or all projections; one tower or both; strengths from 0 to 1
    linear map      frozen encoders, only the two projections are trained
    full            all weights are trained except the temperature

The scaling alpha / r of LoRA is the same for all ranks. A larger rank or more layers make a stronger update at the same
learning rate, so each variant has its own rate, selected on training pairs: the variant is trained for all steps on
nine tenths of them with three rates, and the lowest loss on the last tenth wins. While that is the lowest or highest
rate, the next one beyond is tried too. The validation pairs play no part in this selection.

Forgetting is measured as retrieval of coloured shapes, the domain that the tiny CLIP was pretrained on. Finished parts
are saved in ablation.json: repeat the command to continue after an interruption.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from clip_medical.data.batches import Pairs, prepare
from clip_medical.data.processor import Processor
from clip_medical.data.synthetic.shapes import scene
from clip_medical.errors import UserError
from clip_medical.evaluation import plots
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.retrieval import pair_ranks
from clip_medical.evaluation.table import Row, as_text, comparison
from clip_medical.evaluation.zero_shot import zero_shot_report
from clip_medical.model import Clip, load_clip
from clip_medical.run_folder import read_json
from clip_medical.training.memory import keep_freed_memory
from experiments.common import Experiment, main, share
from experiments.variants import FULL, LINEAR, Bench, Variant, choose_lr, fit, reference, variants
from lora import count_parameters, set_strength

STRENGTHS = tuple(s / 10 for s in range(11))
SHAPES = 512  # images
K, SHAPES_K = 10, 1  # of Recall@K on radiology and on shapes, chosen so that neither is near 0 or 100 %
MEASURES = {"recall": f"Recall@{K}", "shapes": f"Recall@{SHAPES_K} of shapes"}
plots.COLOURS |= dict(zip(MEASURES.values(), (plots.ADAPTED, plots.ACCENT), strict=True))
UNADAPTED = "unadapted"


def shape_pairs(processor: Processor) -> Pairs:
    """Draw images of coloured shapes with captions, none of which the tiny CLIP was pretrained on."""
    scenes = [scene(0, "validation", i) for i in range(SHAPES)]
    pixels = torch.from_numpy(np.stack([processor.pixels(each.image) for each in scenes]))
    captions = [each.caption for each in scenes]
    caption_ids = torch.from_numpy(np.unique(captions, return_inverse=True)[1])
    return Pairs(pixels, *processor.tokens(captions), caption_ids, torch.arange(SHAPES))


def hits_at(k: int, images: Tensor, texts: Tensor, pairs: Pairs) -> Tensor:
    """Return (N,) 0, 1 or 2 for each pair: in how many directions its positive is among the first k candidates."""
    ranks = pair_ranks(images, texts, pairs.caption_ids, pairs.image_ids)
    image = torch.unique(pairs.image_ids, return_inverse=True)[1]
    return (ranks["image_to_text"].rank[image] < k).long() + (ranks["text_to_image"].rank < k)


def measure(bench: Bench, clip: Clip) -> dict[str, Any]:
    """Measure one model: recall of validation pairs and of shapes, over both directions, and zero-shot accuracy."""
    images, texts = encode(clip, bench.validation)
    hits = hits_at(K, images, texts, bench.validation)
    shape_hits = hits_at(SHAPES_K, *encode(clip, bench.shapes), bench.shapes)
    report = zero_shot_report(clip, images, bench.validation.split.labels)
    facets = {facet: row["accuracy"] for facet, row in report.items()}
    return {
        "recall": share(hits / 2, bench.validation.image_ids),
        "zero_shot": {"facets": facets, "mean": sum(facets.values()) / len(facets) if facets else None},
        "shapes": share(shape_hits / 2),
        "hits": "".join(map(str, hits.tolist())),  # a digit per pair, so that variants can be compared pair by pair
    }


def difference(bench: Bench, one: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Return the recall of one row minus that of another, with a 95 % interval from the pairwise differences."""
    a, b = (torch.tensor([int(digit) for digit in row["hits"]]) for row in (one, other))
    result = share((a - b) / 2, bench.validation.image_ids)
    if not (a - b).any():  # the interval of no difference has one side: it is open to both
        result["low"] = -result["high"]
    return result


def verdict(bench: Bench, rows: dict[str, dict[str, Any]]) -> list[str]:
    """Compare LoRA with the linear map and with full fine-tuning, a sentence each."""
    own, sentences = reference(bench.config), []
    for name in (LINEAR, FULL):
        value, low, high = (100 * difference(bench, rows[own], rows[name])[key] for key in ("value", "low", "high"))
        outcome = "higher" if low > 0 else "lower" if high < 0 else "no significant difference"
        points = f"{value:+.1f} [{low:.1f}, {high:.1f}]"
        sentences.append(f"{own} against {name}, Recall@{K} in points on the same pairs: {outcome} ({points})")
    return sentences


def table_rows(bench: Bench, rows: dict[str, dict[str, Any]]) -> list[Row]:
    """Return the rows of the table, a column for each measure."""
    own, table = rows[reference(bench.config)], []
    for name, row in rows.items():
        columns = {"trained (1,000)": {"value": row["trained"] / 1000}, "lr": {"value": round(row["lr"], 6)}}
        columns |= {label: row[key] for key, label in MEASURES.items()}
        columns["minus LoRA"] = difference(bench, row, own)
        if row["zero_shot"]["mean"] is not None:
            columns["zero-shot (%)"] = {"value": round(100 * row["zero_shot"]["mean"], 1)}
        table.append(Row(name, columns, len(bench.validation)))
    return table


def rates_tried(rates: dict[str, Any]) -> list[str]:
    """Describe how the learning rate of each variant was selected, a line each."""
    lines = []
    for name, tried in rates.items():
        losses = ", ".join(f"{loss:.3f} at {lr}" for lr, loss in tried["losses"].items())
        note = ", the lowest or highest tried: a better one may lie beyond" if tried["at the edge"] else ""
        lines.append(f"{name}: lr {tried['lr']:.2g}{note}; loss on held-back training pairs: {losses}")
    return lines


def measure_all(bench: Bench, chosen: list[Variant], results: dict[str, Any], save: Callable[[], None]) -> None:
    """Train and measure the variants that `results` does not contain; call `save` after each part."""
    rows, rates = results["variants"], results["rates"]
    if UNADAPTED not in rows:
        rows[UNADAPTED] = measure(bench, bench.base()) | {"trained": 0, "lr": 0.0}
        save()
    for variant in chosen:
        if variant.name in rows:
            continue
        if variant.name not in rates:
            rates[variant.name] = choose_lr(bench, variant)
            save()
        lr = rates[variant.name]["lr"]
        clip = fit(bench, variant, lr, torch.arange(len(bench.train)))
        training = {"trained": count_parameters(clip.model).trainable, "lr": lr}
        if variant.name == reference(bench.config):
            for strength in STRENGTHS:  # ends with 1, as trained
                set_strength(clip.model, strength)
                results["strength"][f"{strength:.1f}"] = measure(bench, clip) | training
        rows[variant.name] = measure(bench, clip) | training
        save()


@dataclass(frozen=True)
class Ablation(Experiment):
    """LoRA of several ranks and places against a linear map and full fine-tuning, and what each of them forgets."""

    steps: int | None = None
    """Optimizer steps of each variant. Default: those of the run."""
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)
    """Ranks of LoRA on q and v of both towers. The rank of the run is always included."""

    name = "ablation"

    def perform(self) -> int:
        config = self.read_config()
        setup = self.load_models()
        data, base = self.load_data(setup), setup.models[UNADAPTED]
        count, batch = len(data.train), config.batch_size
        if count < 2 * batch:
            raise UserError(f"{count} training pairs are too few for batches of {batch}. Name more data with --data.")
        keep_freed_memory(base.device)
        bench = Bench(
            config=replace(config, steps=self.steps or config.steps or config.epochs * (count // batch)),
            base=partial(load_clip, base.name, base.device, revision=base.revision),
            train=prepare(data.train, base.processor, "training"),
            validation=prepare(data.validation, base.processor, "validation"),
            shapes=shape_pairs(base.processor),
        )
        settings = {"config": asdict(bench.config), "data": setup.facts["data"], "model": base.fingerprint}
        settings = json.loads(json.dumps(settings | {"seed": self.seed}))  # as it is read back: lists for tuples
        results = read_json(setup.folder / "ablation.json").get("results", {})
        if results.get("settings") != settings:
            results = {"settings": settings, "rates": {}, "variants": {}, "strength": {}}
        chosen = variants(bench.config, self.ranks)
        measure_all(bench, chosen, results, lambda: self.save(setup, self.name, results))

        rows = {name: results["variants"][name] for name in [UNADAPTED, *(variant.name for variant in chosen)]}
        results["verdict"] = verdict(bench, rows)
        table = table_rows(bench, rows | {f"strength {s}": row for s, row in results["strength"].items()})
        print(as_text(comparison(table)))
        print("\n" + "\n".join([*rates_tried(results["rates"]), *results["verdict"]]))
        measures = [Row(name, {label: of[label] for label in MEASURES.values()}, n) for name, of, n in table]
        plots.share_bars(measures, "%, both directions, 95 % interval", setup.folder / "ablation.png")
        self.save(setup, self.name, results, "ablation.png")
        return 0


if __name__ == "__main__":
    sys.exit(main(Ablation))
