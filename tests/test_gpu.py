"""A GPU computes what the CPU computes, and a run there comes to its end in each format. Skipped without a GPU."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent

if not any(Path("/dev").glob("nvidia[0-9]*")):
    pytest.skip("no CUDA GPU", allow_module_level=True)


OnGPU = Callable[..., str]


@pytest.fixture
def on_gpu(visible_gpus: str | None) -> OnGPU:
    """on_gpu("a.py", "--flag") -> what `python a.py --flag` prints where it sees the GPUs that conftest.py hides."""
    if visible_gpus == "":
        pytest.skip("CUDA_VISIBLE_DEVICES hides the GPU")
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if visible_gpus is None else {"CUDA_VISIBLE_DEVICES": visible_gpus}

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_gradient_is_that_of_the_cpu_and_the_same_in_chunks(dropout: float, on_gpu: OnGPU) -> None:
    """Mistake: rows of the packed captions read before their copy has arrived, or put back in another order than they
    were taken; on the GPU other dropout masks in the second pass than in the first."""
    code = f"""
import torch
from tests.training.test_contrastive import N, gradients, pairs, relative, small_clip
from clip_medical.training.grad_cache import contrastive_backward

found = []
for device, chunk, checkpointing in (("cpu", N, 0), ("cuda", N, 0), ("cuda", N, 1), ("cuda", 5, 0), ("cuda", 5, 1)):
    clip = small_clip({dropout})
    clip.model.to(device)
    clip.mean, clip.std, clip.checkpointing = clip.mean.to(device), clip.std.to(device), bool(checkpointing)
    torch.manual_seed(3)
    contrastive_backward(clip, pairs(), torch.arange(N), chunk)
    found.append([g.cpu() for g in gradients(clip)])
print(relative(found[1], found[0]), relative(found[2], found[1]), relative(found[3], found[1]),
      relative(found[4], found[3]))
"""
    to_cpu, checkpointed, chunked, both = map(float, on_gpu("-c", code).split())
    assert checkpointed < 1e-5 and both < 1e-5
    if not dropout:  # which draws otherwise on another device, or for another chunk
        assert to_cpu < 1e-4 and chunked < 1e-5


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_comes_to_its_end_and_learns(precision: str, tmp_path: Path, on_gpu: OnGPU) -> None:
    """Mistake: a tensor left on the CPU; a format that the loss, the report or the reading back cannot take."""
    folder = tmp_path / "run"
    told = on_gpu("train.py", "--precision", precision, "--steps", "60", "--output", str(folder))
    losses = [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert "on cuda" in told and sum(losses[-10:]) < 0.9 * sum(losses[:10])


def test_the_gradients_of_a_token_that_many_captions_share_are_added_up_in_fp32(on_gpu: OnGPU) -> None:
    """Mistake: a sum in half precision, which in bf16 stays at 256 however many ones are added to it."""
    code = """
import torch
from clip_medical.fused import repeated

row = torch.ones(1, 2, dtype=torch.bfloat16, device="cuda", requires_grad=True)
repeated(row, torch.zeros(1000, dtype=torch.long, device="cuda")).sum().backward()
print(row.grad[0, 0].item())
"""
    assert float(on_gpu("-c", code)) == 1000
