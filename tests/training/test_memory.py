"""The plan of a step: the cheapest one that fits, and a forecast that is not below what a step takes."""

import subprocess
import sys
import weakref
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from clip_medical.config import Config
from clip_medical.data.batches import Batch, Epoch
from clip_medical.errors import UserError
from clip_medical.training import memory
from clip_medical.training.grad_cache import WHOLE, contrastive_backward
from clip_medical.training.loss import info_nce
from clip_medical.training.memory import Plan, explain_out_of_memory, make_plan
from tests.training.tools import N, random_pairs, small_clip

BATCH = 4096
CONFIG = Config(batch_size=BATCH, fragments=0)
CPU = torch.device("cpu")


class LiveBytes(TorchDispatchMode):
    """Count the bytes of all tensors that operations inside the `with` have created and that are still alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = self.peak = 0

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # True would import torch.compile, which takes seconds

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        inputs = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for storage in {t.untyped_storage() for t in tree_leaves(out) if isinstance(t, Tensor)}:
            if storage._cdata not in inputs:  # otherwise a view, or a result written in place
                self.now += storage.nbytes()
                weakref.finalize(storage, self.drop, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return out

    def drop(self, size: int) -> None:
        self.now -= size


def plan_within(limit: int, config: Config, monkeypatch: pytest.MonkeyPatch) -> Plan:
    """The plan of a process with `limit` bytes, for all pairs of a batch."""
    monkeypatch.setattr(memory, "memory_limit", lambda device: limit)
    monkeypatch.setattr(memory, "memory_in_use", lambda device: 0)
    clip, before = small_clip(dropout=0.3), torch.get_rng_state()
    plan = make_plan(clip, Epoch(random_pairs(), config, 0), config, config.batch_size)
    assert torch.equal(before, torch.get_rng_state()), "planning changed the random state"
    assert all(p.grad is None for p in clip.model.parameters()), "planning left gradients"
    return plan


def test_the_cheapest_plan_that_fits_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches checkpointing where the batch fits without it, chunks where checkpointing is enough, and a plan above
    the limit."""
    plain = plan_within(2**50, CONFIG, monkeypatch)
    assert (plain.chunk_size, plain.checkpointing) == (BATCH, False)
    checkpointed = plan_within(plain.forecast - 1, CONFIG, monkeypatch)
    assert (checkpointed.chunk_size, checkpointed.checkpointing) == (BATCH, True)
    chunked = plan_within(checkpointed.forecast - 1, CONFIG, monkeypatch)
    assert not chunked.checkpointing and memory.LEAST <= chunked.chunk_size < BATCH
    assert all(plan.forecast <= plan.limit for plan in (plain, checkpointed, chunked))


def test_values_that_the_user_gives_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an automatic choice that overrides a flag."""
    plan = plan_within(2**50, replace(CONFIG, chunk_size=100, checkpointing="on"), monkeypatch)
    assert (plan.chunk_size, plan.checkpointing) == (100, True)
    plan = plan_within(2**23, replace(CONFIG, checkpointing="off"), monkeypatch)
    assert plan.chunk_size < BATCH and not plan.checkpointing
    assert plan_within(1, replace(CONFIG, chunk_size=BATCH), monkeypatch).chunk_size == BATCH


def test_fragments_and_their_features_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches a forecast for the captions alone."""
    plain, with_fragments = (plan_within(2**50, replace(CONFIG, fragments=n), monkeypatch) for n in (0, 3))
    assert with_fragments.forecast > 1.5 * plain.forecast


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("chunk_size", [32, 128])
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_the_forecast_is_near_what_a_step_takes(
    checkpointing: bool, chunk_size: int, dropout: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches a forecast that a step exceeds by more than a tenth, and one that leaves most of the memory unused."""
    monkeypatch.setattr(memory, "memory_in_use", lambda device: 0)
    config = Config(batch_size=128, fragments=1, chunk_size=chunk_size, checkpointing="on" if checkpointing else "off")
    clip, epoch = small_clip(dropout), Epoch(random_pairs(128), config, 0)
    clip.encoder_choice()  # the trials of the fast encoder are no part of a step
    forecast = make_plan(clip, epoch, config, 128).forecast
    clip.set_checkpointing(checkpointing)
    batch = epoch.batch(torch.arange(128))
    with LiveBytes() as live:
        contrastive_backward(clip, batch, info_nce, chunk_size)
    assert 0.4 < live.peak / forecast < 1.1


def test_live_tensors_are_counted_to_the_byte() -> None:
    """Catches, in the counter of these tests, a view or an in-place result counted twice, and a dropped tensor that
    still counts."""
    source = torch.ones(1000)
    with LiveBytes() as live:
        first = source * 2  # 4,000 bytes
        first.view(10, 100).add_(1)
        source.view(100, 10)
        second = source + 1  # 4,000 more
        assert live.now == 8000
        del second
        assert live.now == 4000
    assert live.peak == 8000


def test_memory_grows_with_the_chunk_and_not_with_the_batch() -> None:
    """Catches activations of earlier chunks that stay alive, so that chunks save nothing."""
    clip, epoch = small_clip(), Epoch(random_pairs(), replace(CONFIG, batch_size=16), 0)
    clip.encoder_choice()

    def batch(count: int) -> Batch:
        return epoch.batch(torch.arange(count) % N)

    peaks = {}
    for chunk, count in ((4, 16), (4, 64), (16, 64)):
        pairs = batch(count)
        with LiveBytes() as live:
            contrastive_backward(clip, pairs, info_nce, chunk)
        peaks[chunk, count] = live.peak
        clip.model.zero_grad(set_to_none=True)
    features = 10 * 4 * 48 * 16 + 6 * 4 * 64**2  # what may grow: features of 48 more pairs, similarities of 64
    assert peaks[4, 64] < peaks[4, 16] + features
    assert peaks[16, 64] > 2 * peaks[4, 64]


def test_out_of_memory_is_a_user_error_with_the_flags_that_help(tmp_path: Path) -> None:
    """Catches a traceback of the allocator, and --resume recommended where there is no checkpoint."""
    trainer = SimpleNamespace(plan=Plan(64), done=6, pairs_per_process=128, folder=tmp_path)
    with (
        pytest.raises(UserError, match="step 7.*--chunk-size 32 or --checkpointing on"),
        explain_out_of_memory(trainer),
    ):
        torch.empty(2**60)
    trainer.plan = Plan(WHOLE, checkpointing=True)
    with pytest.raises(UserError, match="--chunk-size 64, which") as caught, explain_out_of_memory(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "--checkpointing on" not in str(caught.value) and "--resume" not in str(caught.value)
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "state.pt").touch()
    with pytest.raises(UserError, match="--resume continues"), explain_out_of_memory(trainer):
        raise torch.OutOfMemoryError("CUDA out of memory")
    with pytest.raises(RuntimeError, match="shapes"), explain_out_of_memory(trainer):
        raise RuntimeError("shapes do not match")


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux passes a peak on to a child process")
def test_a_process_has_its_own_peak() -> None:
    """Catches the peak of the parent process taken for one's own, as getrusage's ru_maxrss has it."""
    block = bytearray(1 << 30)
    code = (
        "import torch; from clip_medical.training.memory import memory_in_use as used; "
        "print(used(torch.device('cpu'), peak=True))"
    )
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak < len(block) < memory.memory_in_use(CPU, peak=True)
