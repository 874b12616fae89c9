"""Adapt a CLIP to radiology with LoRA, and compare it with the unadapted model.

    python train.py [demo|roco] [--flag value ...]

Read `run` from top to bottom: data -> model -> inject -> train -> report. The adapter is lora/layer.py, the loss
clip_medical/training/loss.py, the loop clip_medical/training/trainer.py; each flag is a field of
clip_medical/config.py.
"""

import json
import shlex
import sys
from typing import Any

import torch

from clip_medical import cli
from clip_medical.config import Config, parse
from clip_medical.data.batches import Pairs, prepare
from clip_medical.data.dataset import Data, data_fingerprint, load_data
from clip_medical.errors import UserError
from clip_medical.evaluation.calibration import calibrate
from clip_medical.evaluation.report import environment, evaluate, result_rows, write_report
from clip_medical.evaluation.table import as_text, comparison
from clip_medical.model import load_clip
from clip_medical.run_folder import CALIBRATION, choose_folder, load_base, load_run, save_run, trained_on, write_text
from clip_medical.training import distributed
from clip_medical.training.device import choose_device
from clip_medical.training.logging import METRICS
from clip_medical.training.loss import info_nce
from clip_medical.training.trainer import Trainer
from lora import BiasLoRALinear, DoRALinear, FullLinear, LoRALinear, count_parameters, inject
from lora.inject import lora_layers


def run(preset: str, config: Config) -> int:
    """Train and report one adapter. Returns the exit code: 0 done, 130 stopped by hand with the work saved."""
    folder = distributed.from_rank_0(lambda: choose_folder(preset, config))
    device, dtype, why = choose_device(config.precision)
    torch.manual_seed(config.seed)

    # data: images with captions
    with distributed.rank_0_first():
        data = load_data(config.data, **config.reading())
    count, validation_count = len(data.train), len(data.validation)
    if count < config.batch_size:
        raise UserError(
            f"{data.source} has {count} training pairs, too few for a batch of {config.batch_size}. "
            f"Give --batch-size {count} or less, or more data."
        )
    print(
        f"Data     {data.source}: {count:,} training pairs, {validation_count:,} validation pairs ({data.split_rule})",
        *data.notes,
        sep="\n         ",
    )

    # model and adapter: all weights of CLIP are frozen; what is trained is added beside them
    if config.from_adapter:
        clip = load_run(config.from_adapter, device, dtype, config.encoder, base=config.model)
        clip.calibration = {}  # it is chosen anew
    else:
        clip = load_clip(config.model, device, dtype, encoder=config.encoder)
        towers = None if config.towers == "both" else f"{config.towers}_model"
        targets = config.targets[0] if len(config.targets) == 1 else config.targets  # one alone can be a regex
        kind = DoRALinear if config.dora else LoRALinear if config.bias == "none" else BiasLoRALinear
        settings = (config.rank, config.alpha, config.dropout, config.rslora)
        inject(clip.model, targets, *settings, within=towers, layer=kind, modules_to_save=config.modules_to_save)
    clip.model.logit_scale.requires_grad_(config.train_logit_scale)
    print(f"Model    {config.model} on {device.type} in {str(dtype).removeprefix('torch.')}: {why}")

    # training
    with distributed.rank_0_first():
        train_pairs = prepare(data.train, clip.processor, "training")
        validation_pairs = prepare(data.validation, clip.processor, "validation")
        kept_back = prepare(data.calibration, clip.processor, "calibration") if len(data.calibration) else None
    print(f"Images   training: {train_pairs.summary}\n         validation: {validation_pairs.summary}")
    if kept_back is not None:
        print(f"         {len(kept_back):,} more training pairs are kept back to calibrate probabilities")
    trained = {*train_pairs.digests, *trained_on(config.from_adapter)}
    if repeated := sum(digest in trained for digest in validation_pairs.digests):
        print(f"         {repeated:,} of the validation images are also in the training split of the source")
    trainer = Trainer(clip, train_pairs, validation_pairs, config, folder, loss=info_nce)
    torch.manual_seed(config.seed + distributed.rank())  # from here on only dropout draws, differently on each process
    trainer.train(preset)

    # results
    if distributed.rank() > 0:
        return 0
    if trainer.best.step:
        trainer.optimizer.load_weights(trainer.best.weights)
    facts = provenance(preset, trainer, data)
    save_run(clip, folder, config, facts, train_pairs.digests)
    if trainer.done < trainer.steps:
        flags = [f for f in sys.argv[1:] if f != "--resume"] + ([] if config.output else ["--output", str(folder)])
        print(f"\nStopped after step {trainer.done} of {trainer.steps}. {folder} holds the adapter and a checkpoint.")
        print(f"To continue:\n{cli.console or 'python train.py'} {shlex.join([*flags, '--resume'])}")
        return 130
    # not in the provenance, which is published with the adapter: notes name files
    facts["data"] |= {"split": data.split_rule, "notes": "; ".join(data.notes) or "none",
                      "captions": train_pairs.cut or "none of them cut"}  # fmt: skip
    report(trainer, kept_back, facts)
    return 0


def provenance(preset: str, trainer: Trainer, data: Data) -> dict[str, Any]:
    """What stands beside the results: command, seed, data, model and machine."""
    clip, config, parameters = trainer.clip, trainer.config, count_parameters(trainer.clip.model)
    return {
        "run": {"command": f"{cli.console or 'python train.py'} {shlex.join(sys.argv[1:])}".strip(), "preset": preset,
                "seed": config.seed},
        "data": {"source": data.source, "training pairs": len(trainer.train_pairs),
                 "validation pairs": len(trainer.validation_pairs), "fingerprint": data_fingerprint(data)},
        "model": {"base": config.model, "revision": clip.revision, "fingerprint": clip.fingerprint,
                  "rank": next(x.rank for x in lora_layers(clip.model).values() if not isinstance(x, FullLinear)),
                  "trainable parameters": parameters.trainable, "base parameters": parameters.total,
                  "trainable in per cent": round(parameters.percent, 3)},
        "environment": environment(),
    }  # fmt: skip


def report(trainer: Trainer, kept_back: Pairs | None, facts: dict[str, Any]) -> None:
    """Calibrate and measure the unadapted and the adapted model; read the saved adapter back and compare."""
    clip, folder, pairs = trainer.clip, trainer.folder, trainer.validation_pairs
    clip.model.eval()
    base = load_base(clip, folder)
    if kept_back is not None:  # temperatures and thresholds, chosen on pairs that are neither trained nor reported on
        chosen = {"unadapted": calibrate(base, kept_back), "adapted": calibrate(clip, kept_back)}
        write_text(folder / "adapter" / CALIBRATION, json.dumps(chosen, indent=2) + "\n")
    before, after = evaluate(base, pairs), evaluate(clip, pairs)
    print(f"\n{as_text(comparison(result_rows(before.results, after.results)))}")
    records = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    losses = [record["loss"] for record in records]
    last_loss = sum(losses[-20:]) / len(losses[-20:])
    seconds = [1 / record["pairs_per_second"] for record in records]  # of a pair, and batches are of one size
    waiting = f"{sum(s * r['waiting'] for s, r in zip(seconds, records, strict=True)) / sum(seconds):.1%}"
    measured = {"first loss": losses[0], "last loss": last_loss, "time spent waiting for data": waiting}
    facts["training"] = trainer.facts() | measured
    write_report(folder, facts, before, after, pairs.split, records)

    with torch.no_grad():
        pixels, encoder = pairs.pixels[:8], "auto" if clip.encoder.name == "fast" else "reference"
        reloaded = load_run(folder, clip.device, clip.dtype, encoder).image_features(pixels)
        difference = (reloaded - clip.image_features(pixels)).abs().max().item()
    if not difference < (1e-4 if clip.dtype == torch.float32 else 1e-2):  # half precision rounds differently by kernel
        raise RuntimeError(f"the adapter read back from {folder} gives features that differ by {difference}")
    print(f"\nLoss     {losses[0]:.2f} at the first step, {last_loss:.2f} as the mean of the last 20")
    print(f"Time     {waiting} of it spent waiting for data")
    if trainer.best.step:
        print(f"Adapter  {facts['training']['adapter']}")
    print(f"Saved    {folder}: report.md, figures/, adapter/ in PEFT's layout (features read back: {difference:.0e})")


@distributed.processes()
def start() -> int:
    return run(*distributed.from_rank_0(lambda: parse(sys.argv[1:])))


def main() -> int:
    return cli.exit_code("train.py", start)


if __name__ == "__main__":
    sys.exit(main())
