"""A GPU computes what the CPU computes, and runs there end in each precision and with each encoder.

Skipped without a GPU. Each test starts processes of its own, because conftest.py hides the GPUs from this one.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.encoders import ENCODERS

ROOT = Path(__file__).parent.parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(Path("/dev").glob("nvidia[0-9]*")), reason="no CUDA GPU"),
]

OnGPU = Callable[..., str]


@pytest.fixture
def on_gpu(visible_gpus: str | None) -> OnGPU:
    """on_gpu("a.py", "--flag") -> what `python a.py --flag` prints in a process that sees the GPUs."""
    if visible_gpus == "":
        pytest.skip("CUDA_VISIBLE_DEVICES hides the GPU")
    environment = {name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"}
    environment |= {} if visible_gpus is None else {"CUDA_VISIBLE_DEVICES": visible_gpus}
    environment |= {"PYTHONPATH": str(ROOT)}

    def run(*arguments: str) -> str:
        done = subprocess.run([sys.executable, *arguments], env=environment, cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run


GRADIENTS = """
import sys
import torch
from clip_medical.model import place
from clip_medical.training.grad_cache import contrastive_backward
from clip_medical.training.loss import info_nce
from tests.training.tools import N, relative_difference, small_clip, take_gradients, whole_batch

encoder, dropout = sys.argv[1], float(sys.argv[2])
results = []
for device, chunk, checkpointing in (("cpu", N, 0), ("cuda", N, 0), ("cuda", N, 1), ("cuda", 5, 0), ("cuda", 5, 1)):
    clip = small_clip(dropout, encoder=encoder)
    place(clip.model, device, torch.float32)
    clip.set_checkpointing(bool(checkpointing))
    assert clip.encoder.name == encoder
    torch.manual_seed(3)
    contrastive_backward(clip, whole_batch(1), info_nce, chunk)
    results.append([gradient.cpu() for gradient in take_gradients(clip)])
cpu, plain, checkpointed, chunked, both = results
print(relative_difference(plain, cpu), relative_difference(checkpointed, plain), relative_difference(chunked, plain),
      relative_difference(both, chunked))
"""


@pytest.mark.parametrize(("encoder", "dropout"), [*((each, 0.0) for each in ENCODERS), ("reference", 0.3)])
def test_the_gradient_is_that_of_the_cpu_and_the_same_in_chunks(encoder: str, dropout: float, on_gpu: OnGPU) -> None:
    """Catches rows of packed captions that are used before their copy has arrived, or returned in another order, and
    other dropout masks in the second pass than in the first."""
    to_cpu, checkpointed, chunked, both = map(float, on_gpu("-c", GRADIENTS, encoder, str(dropout)).split())
    assert checkpointed < 1e-5 and both < 1e-5
    if not dropout:  # masks differ between devices, and between chunk sizes
        assert to_cpu < 1e-4 and chunked < 1e-5


@pytest.mark.parametrize("encoder", ENCODERS)
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_ends_and_learns(precision: str, encoder: str, tmp_path: Path, on_gpu: OnGPU) -> None:
    """Catches a tensor left on the CPU, and a precision that the encoder, the loss, the report or load_run cannot
    handle."""
    flags = ["--precision", precision, "--encoder", encoder, "--steps", "60", "--output", str(tmp_path / "run")]
    output = on_gpu("train.py", *flags)
    losses = [json.loads(line)["loss"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert "on cuda" in output and f"Encoder  {encoder}: " in output
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])


@pytest.mark.parametrize("encoder", ENCODERS)
def test_a_stopped_run_is_resumed(encoder: str, tmp_path: Path, on_gpu: OnGPU) -> None:
    """Catches a random state or an optimizer state that cannot return to the GPU."""
    flags = ["--limit", "64", "--steps", "6", "--encoder", encoder, "--checkpoint-every-steps", "2"]
    flags += ["--dropout", "0.1"] if encoder == "reference" else []
    code = """
import sys
import train
from clip_medical.training import trainer
if "--resume" not in sys.argv:
    trainer.StopRequest = type("Stop", (), {"requested": True})
sys.exit({130: 0}.get(code := train.main(), code))
"""
    on_gpu("-c", code, *flags, "--output", str(tmp_path / "run"))
    output = on_gpu("-c", code, *flags, "--output", str(tmp_path / "run"), "--resume")
    assert "Resumed  after step 1 of 6" in output and (tmp_path / "run" / "report.md").is_file()


def test_gradients_of_a_token_row_that_captions_share_are_summed_in_fp32(on_gpu: OnGPU) -> None:
    """Catches a sum in half precision: in bf16 it stays at 256, however many ones are added to it."""
    pytest.importorskip("clip_medical.fast")
    code = """
import torch
from clip_medical.fast.packed import Group, unpack

captions = 1000
rows = torch.ones(1, 2, 4, dtype=torch.bfloat16, device="cuda", requires_grad=True)  # (T, heads, d)
gather, valid = torch.zeros(captions, dtype=torch.long), torch.ones(captions, 1, 1, 1, dtype=torch.bool)
unpack(rows, Group(gather.cuda(), valid.cuda())).sum().backward()
print(rows.grad.min().item(), rows.grad.max().item())
"""
    assert [float(value) for value in on_gpu("-c", code).split()] == [1000, 1000]
