"""Is LoRA needed, and what does it cost? `python -m experiments.ablation --run runs/x`.

Data, model and budget (steps and batch size) are those of the run, and all variants are trained as by train.py. Each
starts from the unadapted model:

    LoRA            several ranks; q and v or all projections; one tower or both; as DoRA
    linear map      frozen encoders, only the two projections are trained
    full            all weights are trained except the temperature

The scaling alpha / r of LoRA is the same for all ranks. A larger rank or more layers make a stronger update at the same
learning rate, so each variant has its own rate, selected on training pairs: the variant is trained for all steps on
nine tenths of them with three rates, and the lowest loss on the last tenth wins. While that is the lowest or highest
rate, the next one beyond is tried too. The validation pairs play no part in this selection.

Zero-shot accuracy on findings is measured without calibration. Forgetting is measured as retrieval of coloured shapes,
the domain that the tiny CLIP was pretrained on. Finished parts are saved in ablation.json: repeat the command to
continue after an interruption.
"""

import json
import re
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from clip_medical.config import Config
from clip_medical.data.batches import Pairs, batches, prepare
from clip_medical.data.splits import Split
from clip_medical.data.synthetic import shapes
from clip_medical.errors import UserError
from clip_medical.evaluation import plots
from clip_medical.evaluation.encode import encode
from clip_medical.evaluation.retrieval import pair_ranks, share
from clip_medical.evaluation.table import Row, as_text, comparison
from clip_medical.evaluation.zero_shot import zero_shot_report
from clip_medical.model import Clip, load_clip
from clip_medical.run_folder import read_json
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.loss import info_nce, same_rows
from clip_medical.training.optimizer import Optimizer
from experiments.common import Experiment, main
from lora import DoRALinear, count_parameters, inject

QV, ALL = ("q_proj", "v_proj"), ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
UNADAPTED, LINEAR, FULL = "unadapted", "linear map on frozen features", "full fine-tuning"
MAX_RATES = 6  # learning rates tried for one variant
SHAPES = 512  # images
K, SHAPES_K = 10, 1  # of Recall@K on radiology and on shapes, chosen so that neither is near 0 or 100 %
MEASURES = {"recall": f"Recall@{K}", "finding": "zero-shot finding", "shapes": f"Recall@{SHAPES_K} of shapes"}
plots.COLOURS |= dict(zip(MEASURES.values(), (plots.ADAPTED, plots.UNADAPTED, plots.ACCENT), strict=True))


class Variant(NamedTuple):
    """One row of the ablation: what is trained, and with which learning rates to begin."""

    name: str
    rates: tuple[float, ...]
    adapter: dict[str, Any] | None = None  # arguments of `inject`; else
    weights: str = ""  # a regular expression that the names of the trained weights match


class Bench(NamedTuple):
    """What all variants have in common."""

    config: Config  # `steps` is set
    base: Callable[[], Clip]  # loads the unadapted model
    train: Pairs
    validation: Pairs
    shapes: Pairs  # coloured shapes, to measure forgetting


def variants(config: Config, ranks: tuple[int, ...]) -> list[Variant]:
    """Return all variants, first LoRA on q and v with the rank of the run, which the others are compared with."""
    rank, alpha, rates = config.rank, config.alpha, (config.lr / 3, config.lr, 3 * config.lr)
    adapter: dict[str, Any] = dict(rank=rank, alpha=alpha, dropout=config.dropout, rslora=config.rslora, targets=QV)
    # alpha follows the rank, so that the scaling alpha / r is the same for all
    lora: dict[str, Any] = {f"r = {r}, q and v": dict(rank=r, alpha=alpha * r / rank) for r in [rank, *sorted(ranks)]}
    lora |= {f"r = {rank}, q and v, as DoRA": dict(layer=DoRALinear)}
    lora |= {f"r = {rank}, all projections": dict(targets=ALL)}
    lora |= {f"r = {rank}, {tower} tower only": dict(within=f"{tower}_model") for tower in ("vision", "text")}
    return [
        *(Variant(f"LoRA {name}", rates, adapter | change) for name, change in lora.items()),
        Variant(LINEAR, (3e-3, 1e-2, 3e-2), weights="visual_projection|text_projection"),
        Variant(FULL, (1e-4, 3e-4, 1e-3), weights="(?!logit_scale)"),  # no variant trains the temperature
    ]


def shape_pairs(clip: Clip) -> Pairs:
    """Draw images of coloured shapes with captions, none of which the tiny CLIP was pretrained on."""
    captions = [shapes.scene(0, "validation", row).caption for row in range(SHAPES)]
    names = [f"shapes {shapes.VERSION} 0 validation {row:09}" for row in range(SHAPES)]
    split = Split(captions, names, {}, lambda row: shapes.scene(0, "validation", row).image, names)
    return prepare(split, clip.processor, "shapes")


def fit(bench: Bench, variant: Variant, lr: float, rows: Tensor) -> Clip:
    """Train the unadapted model on `rows` of the training pairs as train.py does, with InfoNCE, in one chunk."""
    # the run's own rate for the vision tower is for LoRA in both towers
    vision_lr = bench.config.vision_lr if variant.adapter and "within" not in variant.adapter else 1.0
    config, steps = replace(bench.config, lr=lr, vision_lr=vision_lr), bench.config.steps or 0
    torch.manual_seed(config.seed)
    clip = bench.base()
    if variant.adapter:
        inject(clip.model, **variant.adapter)
    else:
        for name, parameter in clip.model.named_parameters():
            parameter.requires_grad_(re.match(variant.weights, name) is not None)
    optimizer = Optimizer(clip.model, config, steps)
    clip.model.train()
    first = islice(batches(bench.train, config, rows=rows), steps)
    for batch in tqdm(first, total=steps, desc=f"{variant.name}, lr {lr:g}", unit="step", leave=False):
        loss = contrastive_backward(clip, batch, info_nce, config.batch_size)
        if not loss.isfinite():
            break  # the learning rate is too high, and the loss measured next shows it
        optimizer.step(config.max_grad_norm)
    clip.model.eval()
    return clip


def loss_on(pairs: Pairs, rows: Tensor, clip: Clip) -> float:
    """Return the InfoNCE loss of `rows` of the pairs as one batch, infinity instead of NaN."""
    columns: tuple[Any, ...] = (pairs.pixels, pairs.tokens, pairs.lengths, pairs.caption_ids, pairs.image_ids)
    batch = Pairs(*(column[rows] for column in columns))
    positives = same_rows(batch.caption_ids, batch.image_ids)
    loss = info_nce(*encode(clip, batch), clip.model.logit_scale.detach().cpu(), positives)
    return loss.nan_to_num(nan=torch.inf, posinf=torch.inf).item()


def choose_lr(bench: Bench, variant: Variant) -> dict[str, Any]:
    """Train with several learning rates on nine tenths of the training pairs, and choose by the loss on the last tenth.

    While the best rate is the lowest or the highest, the next one beyond it is tried too, a third or three times as
    high. Returns {"lr": the best rate, "at the edge": whether it is the lowest or the highest of all, "losses": rate ->
    loss, by ascending rate}.
    """
    order = torch.randperm(len(bench.train), generator=torch.Generator().manual_seed(bench.config.seed))
    held_back, train = order.tensor_split([len(order) // 10])
    losses: dict[float, float] = {}
    untried = list(variant.rates)
    while untried:
        losses |= {lr: loss_on(bench.train, held_back, fit(bench, variant, lr, train)) for lr in untried}
        best = min(sorted(losses), key=losses.__getitem__)
        beyond = {min(losses): best / 3, max(losses): 3 * best}
        untried = [beyond[best]] if best in beyond and len(losses) < MAX_RATES else []
    return {"lr": best, "at the edge": best in beyond, "losses": {f"{lr:.2g}": losses[lr] for lr in sorted(losses)}}


def measure(bench: Bench, variant: Variant | None = None, lr: float = 0.0) -> dict[str, Any]:
    """Train a variant on all training pairs, and measure the recall of validation pairs and of shapes, over both
    directions, and zero-shot accuracy on findings, uncalibrated; without a variant that of the unadapted model.

    "hits" has a digit for each pair, the number of directions in which it is found, so that variants can be compared
    pair by pair.
    """
    clip = fit(bench, variant, lr, torch.arange(len(bench.train))) if variant else bench.base()
    row: dict[str, Any] = {"trained": count_parameters(clip.model).trainable if variant else 0, "lr": lr}
    for key, k, pairs in (("recall", K, bench.validation), ("shapes", SHAPES_K, bench.shapes)):
        images, texts = encode(clip, pairs)
        ranks = pair_ranks(images, texts, pairs.caption_ids, pairs.image_ids)
        image = torch.unique(pairs.image_ids, return_inverse=True)[1]
        hits = (ranks["image_to_text"].rank[image] < k).long() + (ranks["text_to_image"].rank < k)
        row[key] = share(hits / 2, pairs.image_ids) | {"hits": "".join(map(str, hits.tolist()))}
        reports = zero_shot_report(clip, images, {"finding": pairs.split.labels.get("finding", [])})
        row |= {facet: report["accuracy"] for facet, report in reports.items() if "accuracy" in report}
    return row


def difference(pairs: Pairs, row: dict[str, Any], other: dict[str, Any]) -> dict[str, float]:
    """Return the recall of one row minus that of another, with a 95 % interval from the pairwise differences."""
    a, b = (torch.tensor([int(digit) for digit in each["recall"]["hits"]]) for each in (row, other))
    result = share((a - b) / 2, pairs.image_ids)
    if not (a - b).any():  # the interval of no difference has one side: it is open to both
        result["low"] = -result["high"]
    return result


def table_rows(pairs: Pairs, rows: dict[str, dict[str, Any]], reference: str) -> list[Row]:
    """Return the rows of the table, a column for each measure. A significant difference has an interval without 0."""
    table = []
    for name, row in rows.items():
        columns = {"trained (1,000)": {"value": row["trained"] / 1000}, "lr": {"value": round(row["lr"], 6)}}
        columns |= {label: row[key] for key, label in MEASURES.items() if key in row}
        columns[f"minus {reference}"] = difference(pairs, row, rows[reference])
        table.append(Row(name, columns, len(pairs)))
    return table


@dataclass(frozen=True)
class Ablation(Experiment):
    """LoRA of several ranks and places against a linear map and full fine-tuning, and what each of them forgets."""

    trains = True

    # Optimizer steps of each variant. Default: those of the run.
    steps: int | None = None
    # Ranks of LoRA on q and v of both towers. The rank of the run is always included.
    ranks: tuple[int, ...] = (1, 2, 4, 8, 16, 32)

    name = "ablation"

    def perform(self) -> int:
        config = self.read_config()
        setup = self.load_models()
        data, base = self.load_data(setup), setup.models[UNADAPTED]
        count, batch = len(data.train), config.batch_size
        if count < 2 * batch:
            raise UserError(f"{count} training pairs are too few for batches of {batch}. Name more data with --data.")
        bench = Bench(
            config=replace(config, steps=self.steps or config.steps or config.epochs * (count // batch)),
            base=partial(load_clip, base.name, base.device, revision=base.revision),
            train=prepare(data.train, base.processor, "training"),
            validation=prepare(data.validation, base.processor, "validation"),
            shapes=shape_pairs(base),
        )
        settings = {"config": asdict(bench.config), "data": setup.facts["data"], "model": base.fingerprint}
        settings |= {"seed": self.seed, "shapes": shapes.VERSION}
        results = read_json(setup.folder / "ablation.json").get("results", {})
        if results.get("settings") != json.loads(json.dumps(settings)):  # as it is read back: lists for tuples
            results = {"settings": settings, "rates": {}, "variants": {}}

        def stored(section: str, name: str, compute: Callable[[], dict[str, Any]]) -> Any:
            if name not in results[section]:
                results[section][name] = compute()
                self.save(setup, self.name, results)
            return results[section][name]

        rows = {UNADAPTED: stored("variants", UNADAPTED, partial(measure, bench))}
        reference, *others = variants(bench.config, self.ranks)
        for variant in (reference, *others):
            rate = stored("rates", variant.name, partial(choose_lr, bench, variant))
            rows[variant.name] = stored("variants", variant.name, partial(measure, bench, variant, rate["lr"]))
            if rate["at the edge"]:
                print(f"{variant.name}: lr {rate['lr']:.2g} is at the edge of those tried. Others may be better.")

        table = table_rows(bench.validation, rows, reference.name)
        print(as_text(comparison(table)))
        measures = [Row(name, {x: of[x] for x in MEASURES.values() if x in of}, n) for name, of, n in table]
        plots.share_bars(measures, "%, 95 % interval", setup.folder / "ablation.png")
        self.save(setup, self.name, results, "ablation.png")
        return 0


if __name__ == "__main__":
    sys.exit(main(Ablation))
