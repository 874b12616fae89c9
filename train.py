"""Adapt a CLIP to radiology with LoRA and show what it bought: `python train.py [demo|roco] [--flag value ...]`.

Read `run` from top to bottom: data -> model -> inject -> loop -> report -> save. What the adapter is stands in
lora/layer.py, what the loss is in clip_medical/training/losses.py; each flag is a field of clip_medical/config.py.
"""

import json
import math
import shlex
import signal
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from clip_medical import command_line
from clip_medical.config import PRESETS, Config
from clip_medical.data.batches import Pairs, prepare, row_batches
from clip_medical.data.sources import load_data
from clip_medical.errors import UserError
from clip_medical.evaluation.report import as_text, environment, evaluate, table, write_report
from clip_medical.model import Clip, load_clip
from clip_medical.provenance import data_fingerprint
from clip_medical.runs import STATE, choose_folder, load_run, save_run, write_text
from clip_medical.training.contrastive import contrastive_backward
from clip_medical.training.learner import Learner
from clip_medical.training.precision import choose_device, choose_precision
from lora import adapter_parameters, count_parameters, disabled, inject


def run(preset: str, config: Config) -> int:
    """One adapter from start to report. Returns the exit code: 0 done, 130 stopped by hand with the work saved."""
    folder = choose_folder(preset, config)
    device = choose_device()
    dtype, why = choose_precision(config.precision, device)
    torch.manual_seed(config.seed)

    # data: pairs of picture and caption
    columns = {"image_column": config.image_column, "caption_column": config.caption_column}
    data = load_data(config.data, **columns, limit=config.limit, seed=config.seed)  # type: ignore[arg-type]
    train, held_out = data.train, data.validation
    if len(train) < config.batch_size:
        raise UserError(
            f"{data.source} has {len(train)} training pairs, too few for a batch of {config.batch_size}: "
            f"give --batch-size {len(train)} or less, or more data."
        )
    print(f"Data     {data.source}: {len(train):,} training pairs, {len(held_out):,} held out ({data.split_rule})")

    # model and adapter: all weights of CLIP are frozen; A and B are put beside each target layer
    clip = load_clip(config.model, device, dtype)
    inject(clip.model, config.targets, config.rank, config.alpha, config.dropout, config.rslora)
    learned = adapter_parameters(clip.model)
    if config.train_logit_scale:
        learned.append(clip.model.logit_scale.requires_grad_(True))
    if config.checkpointing == "on":  # the reentrant kind would lose the gradients where the input is frozen
        clip.model.gradient_checkpointing_enable({"use_reentrant": False})
    pairs, held_out_pairs = prepare(train, clip, "training"), prepare(held_out, clip, "held-out")

    # loop
    steps = config.steps or config.epochs * (len(pairs) // config.batch_size)
    learner = Learner(learned, config, steps, scaled=dtype == torch.float16)
    print(f"Model    {config.model} on {device.type} in {str(dtype).removeprefix('torch.')}: {why}")
    if config.resume:
        done = learner.load(folder / STATE)
    else:
        done = 0
        flight_check(clip, pairs, config, steps)
        folder.mkdir(parents=True, exist_ok=True)
        write_text(folder / "config.json", json.dumps(asdict(config) | {"preset": preset}, indent=2) + "\n")
    done = loop(clip, pairs, config, learner, folder, done, steps)
    count = count_parameters(clip.model)
    facts: dict[str, Any] = {
        "run": {"command": shlex.join(["python", *sys.argv]), "preset": preset, "seed": config.seed},
        "data": {"source": data.source, "training pairs": len(train), "held-out pairs": len(held_out),
                 "fingerprint": data_fingerprint(data)},
        "model": {"base": config.model, "revision": clip.revision, "fingerprint": clip.fingerprint,
                  "rank": config.rank, "trainable parameters": count.trainable,
                  "base parameters": count.total, "trainable in per cent": round(count.percent, 3)},
        "environment": environment(),
    }  # fmt: skip
    save_run(clip, folder, config, facts)
    if done < steps:
        flags = [flag for flag in sys.argv if flag != "--resume"] + ([] if config.output else ["--output", str(folder)])
        print(f"\nStopped after step {done} of {steps}; the adapter and a checkpoint stand in {folder}. To go on:")
        print(shlex.join(["python", *flags, "--resume"]))
        return 130

    # report: the same measurements with the adapter switched off and on
    with disabled(clip.model):
        before = evaluate(clip, held_out_pairs, held_out)
    after = evaluate(clip, held_out_pairs, held_out)
    print(f"\n{as_text(table(before.results, after.results))}")
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    facts["training"] = {"steps": steps, "batch size": config.batch_size, "learning rate": config.lr,
                         "first loss": losses[0], "last loss": sum(losses[-20:]) / len(losses[-20:])}  # fmt: skip
    write_report(folder, facts, before, after, held_out, losses)

    # what was saved is what was trained: read it back and compare
    with torch.no_grad():
        pixels = held_out_pairs.pixels[:8]
        off = (load_run(folder, device, dtype).image_features(pixels) - clip.image_features(pixels)).abs().max().item()
    if not off < 1e-4:
        raise RuntimeError(f"the adapter read back from {folder} gives features that differ by {off}")
    print(f"\nLoss     {losses[0]:.2f} at first, {facts['training']['last loss']:.2f} in the mean of the last 20 steps")
    print(f"Saved    {folder}: report.md, figures/, adapter/ (as PEFT has it; read back, features differ by {off:.0e})")
    return 0


def flight_check(clip: Clip, pairs: Pairs, config: Config, steps: int) -> None:
    """One batch forwards and backwards, and what can be known from it before anything is written or learned."""
    clip.model.train()
    began = time.perf_counter()
    rows = next(row_batches(len(pairs), config.batch_size, config.seed))
    loss = contrastive_backward(clip, pairs, rows, config.pairs_at_a_time)
    minutes = (time.perf_counter() - began) * steps / 60
    moved = {name for name, p in clip.model.named_parameters() if p.grad is not None and p.grad.any()}
    every_b = {name for name, _ in clip.model.named_parameters() if name.endswith("lora_B")}
    frozen = {name for name, p in clip.model.named_parameters() if not p.requires_grad}
    clip.model.zero_grad(set_to_none=True)
    count, size = count_parameters(clip.model), config.batch_size
    much = "" if count.percent < 1 else " (not the less than 1 % that a smaller --rank would give)"
    print(f"Adapter  {len(every_b)} layers of rank {config.rank}: {count.trainable:,} trainable parameters beside")
    print(f"         {count.total:,} frozen ones, {count.percent:.2f} %{much}")
    reached, leaked = f"{len(moved & every_b)} of {len(every_b)}", f"{len(moved & frozen)} of {len(frozen)}"
    print(f"Check    first loss {loss.item():.2f}, where knowing nothing costs ln {size} = {math.log(size):.2f};")
    print(f"         gradient in {reached} lora_B, in {leaked} frozen weights")
    print(f"Plan     {steps} steps of {size} pairs, about {minutes:.1f} minutes")
    if moved & every_b != every_b or moved & frozen or not loss.isfinite():
        raise RuntimeError("the gradients did not go where they belong: nothing would be learned, so nothing was begun")


def loop(clip: Clip, pairs: Pairs, config: Config, learner: Learner, folder: Path, done: int, steps: int) -> int:
    """Steps `done` + 1 to `steps`, each a line of metrics.jsonl; returns the last one taken. Ctrl-C ends it early."""
    stop = StopRequest()
    saved = time.perf_counter()
    clip.model.train()
    batches = row_batches(len(pairs), config.batch_size, config.seed, start=done)
    metrics = folder / "metrics.jsonl"
    if done:  # steps after the checkpoint were not kept: they are taken again
        write_text(metrics, "".join(metrics.read_text().splitlines(keepends=True)[:done]))
    with open(metrics, "a") as log, tqdm(initial=done, total=steps, unit="step") as bar:
        while done < steps and not stop.asked:
            began = time.perf_counter()
            loss = contrastive_backward(clip, pairs, next(batches), config.pairs_at_a_time, learner.scaler.scale)
            if not loss.isfinite():
                raise UserError(f"the loss of step {done + 1} is {loss.item()}: give a lower --lr than {config.lr}.")
            lr, norm = learner.lr, learner.step(config.clip_norm)
            with torch.no_grad():
                clip.model.logit_scale.clamp_(0, math.log(100))
            done, rate = done + 1, config.batch_size / (time.perf_counter() - began)
            temperature = (-clip.model.logit_scale).exp().item()
            length = norm if math.isfinite(norm) else None  # not finite: a step that fp16's loss scaling skipped
            record = dict(step=done, loss=loss.item(), lr=lr, gradient_norm=length, temperature=temperature)
            print(json.dumps(record | {"pairs_per_second": round(rate, 1)}), file=log, flush=True)
            bar.set_postfix_str(f"loss {loss.item():.3f}, lr {lr:.1e}, {rate:.0f} pairs/s")
            bar.update()
            if time.perf_counter() - saved > 60 * config.checkpoint_every_minutes:
                learner.save(folder / STATE, done)
                saved = time.perf_counter()
    learner.save(folder / STATE, done)
    return done


class StopRequest:
    """Turns the first Ctrl-C (or SIGTERM) into a wish, which the loop meets after the step; a second one interrupts."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: Any) -> None:
        self.asked = True
        signal.signal(number, signal.default_int_handler)


def parse(arguments: list[str]) -> tuple[str, Config]:
    """Preset and configuration from the command line: tyro makes the flags from the fields of Config."""
    preset = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "demo"
    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}: the first word may be one of {', '.join(PRESETS)}.")
    return preset, command_line.parse(Config, arguments, f"python train.py {preset}", PRESETS[preset])


def main() -> int:
    return command_line.exit_code("train.py", lambda: run(*parse(sys.argv[1:])))


if __name__ == "__main__":
    sys.exit(main())
