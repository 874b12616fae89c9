"""A run under way: what its loop works on, how it is saved, resumed and judged."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from torch import Tensor

from clip_medical.config import Config
from clip_medical.data.batches import Pairs
from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.runs import write_text
from clip_medical.training import checkpoint, distributed
from clip_medical.training.learner import Learner
from clip_medical.training.memory import Plan, make_plan
from clip_medical.training.validation import Best, validation_recall


@dataclass
class Job:
    """A run under way: what the loop works on, and what a checkpoint keeps of it."""

    folder: Path
    config: Config
    clip: Clip
    pairs: Pairs
    held_out: Pairs
    learner: Learner
    steps: int
    names: Sequence[str]  # of the rows of `pairs`
    plan: Plan = field(default_factory=Plan)
    done: int = 0  # batches taken, and so the place in the data: a permutation for each epoch is drawn from the seed
    best: Best = field(default_factory=Best)

    @property
    def _how(self) -> list[Any]:
        """What the plan was made for."""
        return [self.config.chunk_size, self.config.checkpointing, distributed.world_size(), self.clip.device.type]

    @property
    def _precision(self) -> str:
        """float32, bfloat16 or float16: what --precision came to."""
        return str(self.clip.dtype).removeprefix("torch.")

    def save(self) -> None:
        """Called by all processes; rank 0 writes."""
        states = distributed.from_everyone(checkpoint.random_states())
        if distributed.rank() == 0:
            state = {
                "step": self.done,
                "learner": self.learner.state_dict(),
                "best": asdict(self.best),
                "random": states,
                "plan": asdict(self.plan),
                "how": self._how,
                "precision": self._precision,
                "config": asdict(self.config),
            }
            checkpoint.save(self.folder, state)

    def resume(self) -> bool:
        """Go back to where the checkpoint was made; False where the run was killed before its first."""
        state = distributed.from_rank_0(lambda: checkpoint.load(self.folder))
        if state is None:
            return False
        if state["precision"] != self._precision:
            flag = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}[state["precision"]]
            raise UserError(
                f"the run in {self.folder} was begun in {state['precision']} and would go on in {self._precision}: "
                f"resume it with --precision {flag}, or start a new run."
            )
        self.done, self.best = state["step"], Best(**state["best"])
        self.learner.load_state_dict(state["learner"])
        if state["how"] == self._how:
            self.plan = Plan(**state["plan"])  # made anew it could come out differently, and with it the rounding
            self.clip.checkpointing = self.plan.checkpointing
        else:
            pairs = self.pairs.in_epoch(self.config, 0)  # the fragments take memory too
            self.plan = make_plan(self.clip, pairs, self.config, distributed.divide(self.config.batch_size))
        checkpoint.restore_random_states(state["random"][distributed.rank() % len(state["random"])])
        print(f"Resumed  after step {self.done} of {self.steps}, from the checkpoint in {self.folder}")
        return True

    def validate(self) -> float | None:
        """Recall on the held-out pairs, measured on rank 0; the best adapter is kept."""
        if distributed.rank() > 0:
            return None
        recall = validation_recall(self.clip, self.held_out)
        self.best.consider(self.done, recall, self.learner.weights())
        return recall

    def refuse(self, rows: Tensor, what: str, value: float) -> NoReturn:
        """The loss or the gradient of `rows` is not finite: keep what was learned before, name the rows, stop."""
        self.learner.optimizer.zero_grad(set_to_none=True)
        self.save()
        names = [self.names[row] for row in rows.tolist()]
        file = self.folder / "non_finite_batch.json"
        if distributed.rank() == 0:
            write_text(
                file, json.dumps({"step": self.done + 1, "rows": rows.tolist(), "names": names}, indent=2) + "\n"
            )
        raise UserError(
            f"the {what} of step {self.done + 1} is {value}, in a batch of {len(names)} pairs that begins with "
            f"{', '.join(names[:3])}, all named in {file}; the checkpoint is from before: look at them, or start again "
            f"with a lower --lr than {self.config.lr} or with --precision fp32."
        )

    def in_words(self) -> dict[str, Any]:
        """For the report: how it was computed, and which adapter it is."""
        adapter = "that of the last step"
        if self.best.step:
            adapter = (
                f"best of {self.best.measured} by recall on the held-out pairs ({self.best.recall:.1%}), the same ones "
                "that are reported on: a little flattered by that choice"
            )
        batch = distributed.divide(self.config.batch_size)
        return {
            "precision": self._precision,
            "batch": self.plan.in_words(batch),
            "processes": distributed.world_size(),
            "steps skipped by loss scaling": self.learner.skipped,
            "adapter": adapter,
        }
