"""The plan of a step: the cheapest way that fits, and a forecast that counts what is really held."""

import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from clip_medical.config import Config
from clip_medical.errors import UserError
from clip_medical.training import memory
from clip_medical.training.memory import Plan, _LiveBytes, make_plan, out_of_memory_in_words
from tests.training.test_contrastive import pairs, small_clip

BATCH = 4096
CONFIG = Config(batch_size=BATCH)


def forecast(config: Config, limit: int, monkeypatch: pytest.MonkeyPatch) -> tuple[Plan, bool]:
    """The plan under a limit of `limit` bytes, and whether the model checkpoints after it."""
    monkeypatch.setattr(memory, "memory_limit", lambda device: limit)
    monkeypatch.setattr(memory, "memory_in_use", lambda device: 0)
    clip = small_clip(dropout=0.3)
    before = torch.get_rng_state()
    plan = make_plan(clip, pairs(), config, BATCH)
    assert torch.equal(before, torch.get_rng_state()), "planning moved the random state"
    assert all(p.grad is None for p in clip.model.parameters()), "planning left gradients"
    return plan, clip.checkpointing


def test_the_cheapest_way_that_fits_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches checkpointing where there is room without, chunks where checkpointing would do, and a plan over limit."""
    plain, on = forecast(CONFIG, 2**50, monkeypatch)
    assert (plain.chunk_size, plain.checkpointing, on) == (BATCH, False, False)
    saving, on = forecast(CONFIG, plain.forecast - 1, monkeypatch)
    assert (saving.chunk_size, saving.checkpointing, on) == (BATCH, True, True)
    chunked, on = forecast(CONFIG, saving.forecast - 1, monkeypatch)
    assert (chunked.checkpointing, on) == (False, False) and memory.LEAST <= chunked.chunk_size < BATCH
    for plan in (saving, chunked):
        assert plan.forecast <= plan.limit


def test_what_the_user_names_is_taken_as_given(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches an automatism that overrules a flag."""
    plan, on = forecast(replace(CONFIG, chunk_size=100, checkpointing="on"), 2**50, monkeypatch)
    assert (plan.chunk_size, plan.checkpointing, on) == (100, True, True)
    plan, on = forecast(replace(CONFIG, checkpointing="off"), 2**22, monkeypatch)
    assert plan.chunk_size < BATCH and not on
    assert forecast(replace(CONFIG, chunk_size=BATCH), 1, monkeypatch)[0].chunk_size == BATCH


def test_live_tensors_are_counted_to_the_byte() -> None:
    """Catches a view or an in-place result counted twice, and a dropped tensor still counted."""
    given = torch.ones(1000)
    with _LiveBytes() as live:
        kept = given * 2  # 4,000 bytes
        kept.view(10, 100).add_(1)
        given.view(100, 10)
        dropped = given + 1  # 4,000 more
        assert live.now == 8000
        del dropped
        assert live.now == 4000
    assert live.peak == 8000


def test_memory_grows_with_the_chunk_and_not_with_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches activations of earlier chunks that are kept alive: the whole point of the two passes would be lost."""
    clip, data = small_clip(), pairs()
    peaks = {}
    for chunk, count in ((4, 16), (4, 64), (8, 64)):
        rows = torch.arange(22).repeat(3)[:count]
        with _LiveBytes() as live:
            memory.contrastive_backward(clip, data, rows, chunk)
        peaks[chunk, count] = live.peak
        clip.model.zero_grad(set_to_none=True)
    features = 10 * 4 * 48 * 16 + 6 * 4 * 64**2  # what may grow: features of 48 more pairs, logits of 64
    assert peaks[4, 64] < peaks[4, 16] + features
    assert peaks[8, 64] > 1.5 * peaks[4, 64]


def test_out_of_memory_is_a_sentence_with_the_flags_that_help() -> None:
    """Catches a traceback of the allocator, and any other RuntimeError dressed up as lack of memory."""
    job = SimpleNamespace(plan=Plan(64, False, 0, 0), config=Config(batch_size=128), done=6)
    with pytest.raises(UserError, match="step 7.*--chunk-size 32 or --checkpointing on"), out_of_memory_in_words(job):
        torch.empty(2**60)
    with pytest.raises(UserError) as told, out_of_memory_in_words(SimpleNamespace(**vars(job) | {"plan": Plan()})):
        raise torch.OutOfMemoryError("CUDA out of memory")
    assert "--chunk-size 64" in str(told.value)
    with pytest.raises(RuntimeError, match="shapes"), out_of_memory_in_words(job):
        raise RuntimeError("shapes do not fit")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux hands a peak on to a child")
def test_a_process_has_its_own_peak() -> None:
    """Catches the peak of a parent taken for that of the process it started, as getrusage's ru_maxrss has it."""
    held = bytearray(1 << 30)
    code = "import torch; from clip_medical.training.memory import peak_memory; print(peak_memory(torch.device('cpu')))"
    peak = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert peak < len(held) < memory.peak_memory(torch.device("cpu"))


@pytest.mark.skipif(sys.platform != "linux", reason="what is kept is glibc's")
def test_freed_memory_is_kept_for_the_next_tensor() -> None:
    """Catches memory that is given back after each tensor, and memory that is kept but never used again."""
    code = """
import torch
from clip_medical.training.memory import keep_freed_memory, memory_in_use
cpu = torch.device("cpu")
keep_freed_memory(cpu)
before = memory_in_use(cpu)
for _ in range(10):
    torch.ones(2**24)  # 64 MiB, dropped at once
kept = memory_in_use(cpu) - before
assert 2**25 < kept < 2**28, kept  # of the 640 MiB taken in all: some is kept, and it is taken again
"""
    subprocess.run([sys.executable, "-c", code], check=True)
