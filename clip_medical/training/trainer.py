"""The training loop, and what a run needs to be saved, resumed and reported."""

import hashlib
import json
import math
import time
from dataclasses import asdict, dataclass, field
from itertools import repeat
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor

from clip_medical.config import Config
from clip_medical.data.batches import Batch, Epoch, Pairs, batches
from clip_medical.errors import UserError
from clip_medical.evaluation.encode import validation_recall
from clip_medical.model import Clip
from clip_medical.run_folder import make_folder, write_text
from clip_medical.training import checkpoint, distributed
from clip_medical.training.flight_check import flight_check
from clip_medical.training.grad_cache import contrastive_backward, random_state, restore
from clip_medical.training.logging import Progress, StopRequest
from clip_medical.training.loss import Loss
from clip_medical.training.memory import GIB, Plan, explain_out_of_memory, make_plan, memory_in_use
from clip_medical.training.optimizer import Optimizer


@dataclass
class Best:
    """The weights with the highest validation recall so far; step 0: none was measured."""

    step: int = 0
    recall: float = -1.0
    weights: list[Tensor] = field(default_factory=list)
    measured: int = 0  # number of measurements


class Trainer:
    """Train the adapter of a CLIP on image-caption pairs with a contrastive loss.

    Attributes: done, the number of steps taken, which also is the position in the data; steps, how many there will be;
        plan, how a batch goes through the model; chance, the chance level of the loss.
    """

    def __init__(self, clip: Clip, train: Pairs, validation: Pairs, config: Config, folder: Path, loss: Loss) -> None:
        self.clip, self.train_pairs, self.validation_pairs = clip, train, validation
        self.config, self.folder, self.loss = config, folder, loss
        self.steps = config.steps or config.epochs * (len(train) // config.batch_size)
        self.optimizer = Optimizer(clip.model, config, self.steps, scaled=clip.dtype == torch.float16)
        self.plan, self.best, self.done, self.chance = Plan(), Best(), 0, math.nan
        self.pairs_per_process, rest = divmod(config.batch_size, distributed.world_size())
        if rest:
            processes = distributed.world_size()
            raise UserError(f"--batch-size {config.batch_size} is not a multiple of the {processes} processes.")
        if len(train.caption_ids.unique()) == 1:
            raise UserError(
                f"All {len(train):,} training captions are {train.split.captions[0][:80]!r} to the model, so nothing "
                "tells the images apart. Choose another --caption-column, or write captions with --template."
            )
        self.precision = str(clip.dtype).removeprefix("torch.")
        content = json.dumps([list(train.digests), train.split.captions]).encode()
        self.identity = {"training pairs": hashlib.sha256(content).hexdigest(), "base model": clip.fingerprint}
        # the circumstances that a plan is made for: with others, --resume makes a new one
        self.plan_for = [config.chunk_size, config.checkpointing, distributed.world_size(), clip.device.type]

    def train(self, preset: str) -> None:
        """Check that the run can succeed, or resume it, then take its steps. Ctrl-C ends it early, after a whole
        step."""
        clip, pairs = self.clip, self.train_pairs
        clip.model.train()
        with explain_out_of_memory(self):
            choice = clip.encoder_choice()
            print(f"Encoder  {choice.encoder.name}: {choice.reason}")
            resumed = self.config.resume and self._resume()
            if not resumed:
                self.plan = make_plan(clip, Epoch(pairs, self.config, 0), self.config, self.pairs_per_process)
                clip.set_checkpointing(self.plan.checkpointing)
                batch = next(batches(pairs, self.config, 0, distributed.rank(), distributed.world_size()))
                self.chance = flight_check(clip, batch, self.loss, self.optimizer, self.plan, self.steps)
                if clip.device.type == "cuda":
                    torch.cuda.reset_peak_memory_stats()  # the checks hold copies of the model
            if distributed.rank() == 0:  # also when resumed, as data or base model may lie elsewhere now
                settings = json.dumps(asdict(self.config) | {"preset": preset}, indent=2)
                write_text(make_folder(self.folder) / "config.json", settings + "\n")
            if not resumed:
                self.save()  # so that the run can be resumed whenever it is killed
            self._loop()

    def _loop(self) -> None:
        """Take steps `done` + 1 to `steps`; each is a line of metrics.jsonl."""
        clip, config, optimizer = self.clip, self.config, self.optimizer
        stop, stopped, saved = StopRequest(), False, time.perf_counter()
        rank, world_size, start = distributed.rank(), distributed.world_size(), 0 if config.overfit_batch else self.done
        loader = batches(self.train_pairs, config, start, rank, world_size)
        if config.overfit_batch:
            loader = repeat(next(loader))
        clip.model.train()
        with Progress(self.folder, self.done, self.steps) as progress:
            while self.done < self.steps and not stopped:
                began = time.perf_counter()
                batch = next(loader)
                waiting = time.perf_counter() - began
                loss = contrastive_backward(clip, batch, self.loss, self.plan.chunk_size, optimizer.scaler.scale)
                if not loss.isfinite():
                    self._refuse(batch, "loss")
                lr, norm = optimizer.adamw.param_groups[0]["lr"], optimizer.step(config.max_grad_norm)
                # fp16 skips the step and halves the loss scale; at a scale of 1, as always in fp32, it cannot
                if not math.isfinite(norm) and optimizer.scaler.get_scale() <= 1:
                    self._refuse(batch, "gradient")
                self.done += 1
                seconds = time.perf_counter() - began
                record = {
                    "step": self.done, "loss": loss.item(), "lr": lr,
                    "temperature": (-clip.model.logit_scale).exp().item(),
                    "gradient_norm": norm if math.isfinite(norm) else None, "skipped_steps": optimizer.skipped,
                    "pairs_per_second": round(config.batch_size / seconds, 1), "waiting": round(waiting / seconds, 3),
                    "peak_gib": round(memory_in_use(clip.device, peak=True) / GIB, 3),
                }  # fmt: skip
                if config.validate_every and (self.done % config.validate_every == 0 or self.done == self.steps):
                    record["validation_recall"] = self._validate()
                progress.log(record)
                due = time.perf_counter() - saved > 60 * config.checkpoint_every_minutes
                due = due or bool(config.checkpoint_every_steps and self.done % config.checkpoint_every_steps == 0)
                stopped = stop.requested
                if distributed.world_size() > 1:  # all processes stop and save together
                    stopped, due = distributed.any_process(stopped, due, device=clip.device)
                if due:
                    self.save()
                    saved = time.perf_counter()
        self.save()

    def _validate(self) -> float | None:
        """Recall on the validation pairs, measured on rank 0; the best adapter is kept."""
        if distributed.rank() > 0:
            return None
        recall = validation_recall(self.clip, self.validation_pairs)
        measured = self.best.measured + 1
        if recall > self.best.recall:  # of equals the earlier stays, which has been trained less
            self.best = Best(self.done, recall, self.optimizer.weights())
        self.best.measured = measured
        return recall

    def _refuse(self, batch: Batch, what: str) -> NoReturn:
        """Stop at a loss or gradient that is not finite: keep what was learned before and list the rows of the
        batch."""
        self.clip.model.zero_grad(set_to_none=True)
        self.save()
        names = [self.train_pairs.split.ids[row] for row in batch.rows.tolist()]
        file, step = self.folder / "non_finite_batch.json", self.done + 1
        if distributed.rank() == 0:
            write_text(file, json.dumps({"step": step, "rows": batch.rows.tolist(), "names": names}, indent=2) + "\n")
        raise UserError(
            f"Non-finite {what} at step {step}. The batch is listed in {file} and the checkpoint of step {self.done} "
            f"is intact. Inspect those pairs, or retry with --lr below {self.config.lr:g} or with --precision fp32."
        )

    def save(self) -> None:
        """Write a checkpoint. Called by all processes; rank 0 writes."""
        own = random_state(self.clip.device)
        states = distributed.all_gather_objects(own)
        if distributed.rank() == 0:
            state = {"step": self.done, "optimizer": self.optimizer.state_dict(), "best": asdict(self.best),
                     "random": states, "plan": asdict(self.plan), "plan_for": self.plan_for, "chance": self.chance,
                     "precision": self.precision, "identity": self.identity, "encoder": self.clip.encoder.name,
                     "config": asdict(self.config)}  # fmt: skip
            checkpoint.save(self.folder, state)

    def _resume(self) -> bool:
        """Go back to the last checkpoint; False where the run was killed before its first."""
        state = distributed.from_rank_0(lambda: checkpoint.load(self.folder))
        if state is None:
            return False
        if state["precision"] != self.precision:
            flag = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[state["precision"]]
            raise UserError(
                f"The run in {self.folder} was started in {state['precision']} and would continue in "
                f"{self.precision}. Resume it with --precision {flag}, or start a new run."
            )
        for what, digest in state.get("identity", {}).items():  # absent from checkpoints of earlier versions
            if digest != self.identity[what]:
                raise UserError(
                    f"The {what} of the run in {self.folder} had another content. They may lie elsewhere with "
                    "--resume, but have to be the same. Bring them back, or start a new run."
                )
        if state["encoder"] != self.clip.encoder.name:
            print(f"         the steps so far were computed by the {state['encoder']} encoder: rounding can differ")
        self.done, self.best, self.chance = state["step"], Best(**state["best"]), state["chance"]
        self.optimizer.load_state_dict(state["optimizer"])
        self.plan = Plan(**state["plan"])  # made anew it could come out differently, and with it the rounding
        if state["plan_for"] != self.plan_for:
            first = Epoch(self.train_pairs, self.config, 0)
            self.plan = make_plan(self.clip, first, self.config, self.pairs_per_process)
        self.clip.set_checkpointing(self.plan.checkpointing)
        restore(state["random"][distributed.rank() % len(state["random"])])
        report = self.folder / "report.md"
        if report.is_file() and self.done >= self.steps:
            raise UserError(f"The run in {self.folder} has taken {self.done} steps. Give more --steps to extend it.")
        report.unlink(missing_ok=True)  # of a complete run that goes on: it is complete no more
        print(f"Resumed  after step {self.done} of {self.steps}, from the checkpoint in {self.folder}")
        return True

    def facts(self) -> dict[str, Any]:
        """For the report: how the run was computed, and which adapter it ended with."""
        adapter = "that of the last step"
        if self.best.step:
            adapter = (
                f"step {self.best.step}, the best of {self.best.measured} by recall on the validation pairs "
                f"({self.best.recall:.1%}), which are also reported on: the report is optimistic"
            )
        choice = self.clip.encoder_choice()
        return {
            "steps": self.steps, "batch size": self.config.batch_size, "learning rate": self.config.lr,
            "learning rate of the vision tower": self.config.lr * self.config.vision_lr, "chance level": self.chance,
            "precision": self.precision, "encoder": f"{choice.encoder.name}: {choice.reason}",
            "batch": self.plan.describe(self.pairs_per_process), "processes": distributed.world_size(),
            "steps skipped by loss scaling": self.optimizer.skipped, "adapter": adapter,
        }  # fmt: skip
