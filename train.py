"""Adapt a CLIP to radiology with LoRA and show what it bought: `python train.py [demo|roco] [--flag value ...]`.

Read `run` from top to bottom: data -> model -> inject -> loop -> report -> save. What the adapter is stands in
lora/layer.py, what the loss is in clip_medical/training/losses.py; each flag is a field of clip_medical/config.py.
"""

import gc

gc.disable()  # while importing: 700,000 objects that all stay, through which it would search again and again

import sys

from clip_medical.data import ahead

if __name__ == "__main__":
    ahead.start(sys.argv[1:])  # the demo's phantoms are drawn while torch is imported

import json
import math
import os
import shlex
import time
from contextlib import redirect_stdout
from dataclasses import asdict
from itertools import repeat
from typing import Any

import torch

from clip_medical import command_line
from clip_medical.config import Config, choose
from clip_medical.data.batches import epochs, prepare, row_batches
from clip_medical.data.sources import Data, load_data
from clip_medical.errors import UserError
from clip_medical.evaluation.report import as_text, environment, evaluate, table, write_report
from clip_medical.model import load_clip
from clip_medical.provenance import data_fingerprint
from clip_medical.runs import choose_folder, load_run, make_folder, save_run, write_text
from clip_medical.training import distributed
from clip_medical.training.contrastive import contrastive_backward
from clip_medical.training.flight_check import flight_check
from clip_medical.training.job import Job
from clip_medical.training.learner import Learner
from clip_medical.training.memory import GIB, keep_freed_memory, make_plan, out_of_memory_in_words, peak_memory
from clip_medical.training.precision import choose_device, choose_precision
from clip_medical.training.progress import METRICS, Progress, StopRequest, timed, waiting_share
from lora import adapter_parameters, count_parameters, disabled, inject

gc.freeze()  # nor later
gc.enable()


def run(preset: str, config: Config) -> int:
    """One adapter from start to report. Returns the exit code: 0 done, 130 stopped by hand with the work saved."""
    folder = distributed.from_rank_0(lambda: choose_folder(preset, config))
    device = choose_device()
    keep_freed_memory(device)
    dtype, why = choose_precision(config.precision, device)
    torch.manual_seed(config.seed)

    # data: pairs of picture and caption
    with distributed.first_on_rank_0():
        data = load_data(
            config.data,
            image_column=config.image_column,
            caption_column=config.caption_column,
            limit=config.limit,
            seed=config.seed,
            revision=config.revision,
            streaming=config.streaming == "on",
        )
        if len(data.train) < config.batch_size:
            raise UserError(
                f"{data.source} has {len(data.train)} training pairs, too few for a batch of {config.batch_size}: "
                f"give --batch-size {len(data.train)} or less, or more data."
            )
    held_out = len(data.validation)
    print(f"Data     {data.source}: {len(data.train):,} training pairs, {held_out:,} held out ({data.split_rule})")

    # model and adapter: all weights of CLIP are frozen; A and B are put beside each target layer
    clip = load_clip(config.model, device, dtype)
    inject(clip.model, config.targets, config.rank, config.alpha, config.dropout, config.rslora)
    clip.model.logit_scale.requires_grad_(config.train_logit_scale)
    with distributed.first_on_rank_0():
        pairs, held_out_pairs = prepare(data.train, clip, "training"), prepare(data.validation, clip, "held-out")
    print(f"Images   training: {pairs.summary}\n         held out: {held_out_pairs.summary}")

    # loop
    steps = config.steps or config.epochs * (len(pairs) // config.batch_size)
    learner = Learner(adapter_parameters(clip.model), clip.model.logit_scale, config, steps, dtype == torch.float16)
    print(f"Model    {config.model} on {device.type} in {str(dtype).removeprefix('torch.')}: {why}")
    torch.manual_seed(config.seed + distributed.rank())  # from here on dropout draws: on each process its own
    job = Job(folder, config, clip, pairs, held_out_pairs, learner, steps, pairs.split.ids)
    learn(job, preset)
    if distributed.rank() > 0:
        return 0
    if job.best.step:
        learner.put_weights(job.best.weights)
    facts = provenance(preset, job, data)
    save_run(clip, folder, config, facts)
    if job.done < steps:
        flags = [flag for flag in sys.argv if flag != "--resume"] + ([] if config.output else ["--output", str(folder)])
        print(f"\nStopped after step {job.done} of {steps}; the adapter and a checkpoint stand in {folder}. To go on:")
        print(shlex.join(["python", *flags, "--resume"]))
        return 130
    report(job, data, facts)
    return 0


def learn(job: Job, preset: str) -> None:
    """Go on from the checkpoint, or else see that the run can succeed before anything is written; then the loop."""
    config, folder = job.config, job.folder
    with out_of_memory_in_words(job):
        if not (config.resume and job.resume()):
            first = job.pairs.in_epoch(config, 0)
            job.plan = make_plan(job.clip, first, config, distributed.divide(config.batch_size))
            flight_check(job.clip, first, config, job.plan, job.steps)
            if distributed.rank() == 0:
                make_folder(folder)
                write_text(folder / "config.json", json.dumps(asdict(config) | {"preset": preset}, indent=2) + "\n")
            job.save()  # so that a run can be resumed whenever it is killed
        loop(job)


def loop(job: Job) -> None:
    """Steps `job.done` + 1 to `job.steps`, each a line of metrics.jsonl. Ctrl-C ends it early, after a whole step."""
    clip, config, learner = job.clip, job.config, job.learner
    pairs, clock = timed(job.pairs)
    all_rows = torch.arange(len(pairs))
    batches = epochs(pairs, all_rows, config, job.done)
    if config.overfit_batch:
        batches = repeat((pairs, next(row_batches(len(pairs), config.batch_size, config.seed))))
    clip.model.train()
    stop, stopped, saved = StopRequest(), False, time.perf_counter()
    with Progress(job.folder, job.done, job.steps, config.tensorboard) as progress:
        following = next(batches)
        while job.done < job.steps and not stopped:
            began, clock.seconds = time.perf_counter(), 0.0
            (read, rows), following = following, next(batches)
            own = following[1][distributed.share(following[1])]
            clock.announce(own[: job.plan.chunk_size])  # the first chunk of the next step is read during this one
            clock.seconds = time.perf_counter() - began
            loss = contrastive_backward(clip, read, rows, job.plan.chunk_size, learner.scaler.scale)
            if not loss.isfinite():
                job.refuse(rows, "loss", loss.item())
            lr, norm = learner.lr, learner.step(config.clip_norm)
            # in fp16 the step was skipped and the scale of the loss halved; at 1, as always in fp32, there is no more
            # to halve
            if not math.isfinite(norm) and learner.scaler.get_scale() <= 1:
                job.refuse(rows, "gradient", norm)
            job.done, seconds = job.done + 1, time.perf_counter() - began
            record = {
                "step": job.done, "loss": loss.item(), "lr": lr, "temperature": (-clip.model.logit_scale).exp().item(),
                "gradient_norm": norm if math.isfinite(norm) else None,  # not finite: a step that fp16 skipped
                "skipped_steps": learner.skipped, "pairs_per_second": round(config.batch_size / seconds, 1),
                "waiting": round(clock.seconds / seconds, 3), "peak_gib": round(peak_memory(clip.device) / GIB, 3),
            }  # fmt: skip
            if config.validate_every and (job.done % config.validate_every == 0 or job.done == job.steps):
                record["validation_recall"] = job.validate()
            progress.step(record)
            due = time.perf_counter() - saved > 60 * config.checkpoint_every_minutes
            due = due or bool(config.checkpoint_every_steps and job.done % config.checkpoint_every_steps == 0)
            stopped, due = distributed.any_process(stop.asked, due, device=clip.device)
            if due:
                job.save()
                saved = time.perf_counter()
    job.save()


def provenance(preset: str, job: Job, data: Data) -> dict[str, Any]:
    """What is to stand beside the results: command, seed, data, model and machine."""
    clip, config, count = job.clip, job.config, count_parameters(job.clip.model)
    return {
        "run": {"command": shlex.join(["python", *sys.argv]), "preset": preset, "seed": config.seed},
        "data": {"source": data.source, "training pairs": len(job.pairs), "held-out pairs": len(job.held_out),
                 "fingerprint": data_fingerprint(data)},
        "model": {"base": config.model, "revision": clip.revision, "fingerprint": clip.fingerprint,
                  "rank": config.rank, "trainable parameters": count.trainable,
                  "base parameters": count.total, "trainable in per cent": round(count.percent, 3)},
        "environment": environment(),
    }  # fmt: skip


def report(job: Job, data: Data, facts: dict[str, Any]) -> None:
    """The same measurements with the adapter switched off and on; and a look at what was saved."""
    clip, config, folder, held_out = job.clip, job.config, job.folder, job.held_out.split
    with disabled(clip.model):
        before = evaluate(clip, job.held_out, held_out)
    after = evaluate(clip, job.held_out, held_out)
    print(f"\n{as_text(table(before.results, after.results))}")
    records = [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]
    losses = [record["loss"] for record in records]
    facts["training"] = {"steps": job.steps, "batch size": config.batch_size, "learning rate": config.lr,
                         "first loss": losses[0], "last loss": sum(losses[-20:]) / len(losses[-20:]),
                         "time spent waiting for data": f"{waiting_share(records):.1%}"}  # fmt: skip
    facts["training"] |= job.in_words()
    write_report(folder, facts, before, after, held_out, losses)

    # what was saved is what was trained: read it back and compare
    with torch.no_grad():
        pixels = job.held_out.pixels[:8]
        again = load_run(folder, clip.device, clip.dtype).image_features(pixels)
        off = (again - clip.image_features(pixels)).abs().max().item()
    if not off < (1e-4 if clip.dtype == torch.float32 else 1e-2):  # half precision: another kernel may round otherwise
        raise RuntimeError(f"the adapter read back from {folder} gives features that differ by {off}")
    print(f"\nLoss     {losses[0]:.2f} at first, {facts['training']['last loss']:.2f} in the mean of the last 20 steps")
    print(f"Time     {facts['training']['time spent waiting for data']} of it spent waiting for data")
    if job.best.step:
        print(f"Adapter  of step {job.best.step}, {job.in_words()['adapter']}")
    print(f"Saved    {folder}: report.md, figures/, adapter/ (as PEFT has it; read back, features differ by {off:.0e})")


def parse(arguments: list[str]) -> tuple[str, Config]:
    """Preset and configuration from the command line: tyro makes the flags from the fields of Config."""
    preset, base, flags = choose(arguments)
    return preset, command_line.parse(Config, flags, f"python train.py {preset}", base)


def start() -> int:
    with distributed.processes():
        return run(*distributed.from_rank_0(lambda: parse(sys.argv[1:])))


def main() -> int:
    silent = int(os.environ.get("RANK", 0)) > 0  # of the processes that torchrun started, the first one speaks
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere if silent else sys.stdout):
        return command_line.exit_code("train.py", start)


if __name__ == "__main__":
    sys.exit(main())
