"""What a reader changes in LoRALinear.forward is what training computes: with the same edit in the file and as a
subclass, the losses of a run are equal to the last digit; or the run stops."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.encoders import ENCODERS

FORWARD = "        return y + branch.to(y.dtype)\n"
EDITS = {
    "ten times the branch": "        return y + 10 * branch.to(y.dtype)\n",
    "tanh between A and B": (
        "        branch = F.linear(torch.tanh(F.linear(x, A)), B)\n        return y + branch.to(y.dtype)\n"
    ),
    "DoRA with a fixed magnitude": (
        "        W = self.base.weight\n"
        "        norm = (W + self.delta_weight()).detach().norm(dim=1)\n"
        "        y = (W.norm(dim=1) / norm) * (y + branch.to(y.dtype) - self.base.bias) + self.base.bias\n"
        "        return y\n"
    ),
    "a hook": FORWARD,
}
HOOK = "        self.register_forward_hook(lambda layer, inputs, output: 1.01 * output)\n"
MODE = "        self.train(base.training)"
RUN = ["train.py", "--limit", "40", "--batch-size", "16", "--steps", "3", "--lr", "0.05", "--output"]


def train(project: Path, name: str) -> tuple[list[float], str]:
    """Losses and output of three steps of the project in a folder."""
    command = [sys.executable, *RUN, str(project / name)]
    done = subprocess.run(command, cwd=project, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [
        json.loads(line)["loss"] for line in (project / name / "metrics.jsonl").read_text().splitlines()
    ], done.stdout


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{file} holds {old!r} {text.count(old)} times"
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.slow
@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_of_the_layer_trains_as_the_same_subclass_does(edit: str, project_copy: Path) -> None:
    """Catches a fast encoder that computes the branch by itself: an edit would be ignored in all layers but a few."""
    layer, story = project_copy / "lora" / "layer.py", project_copy / "train.py"
    plain, said = train(project_copy, "plain")
    original = layer.read_text(encoding="utf-8")
    replace(layer, FORWARD, EDITS[edit])
    if edit == "a hook":
        replace(layer, MODE, HOOK + MODE)
    edited, said = train(project_copy, "edited")
    reasons = ["edited", "a hook is registered"] if "fast" in ENCODERS else ["clip_medical/fast is not installed"]
    assert "Encoder  reference: " in said and any(reason in said for reason in reasons)

    layer.write_text(original, encoding="utf-8")
    body = (edited_source := original.replace(FORWARD, EDITS[edit]))[edited_source.index("    def forward(") :]
    body = body[: body.index("    def delta_weight(")]
    subclass = f"class Edited(LoRALinear):\n    peft_fields = {{'peft_type': 'EDITED'}}\n\n{body}\n"
    if edit == "a hook":
        subclass += f"    def __init__(self, base, *settings):\n        super().__init__(base, *settings)\n{HOOK}"
    header = "import torch\nimport torch.nn.functional as F\nfrom lora import LoRALinear\nTensor = torch.Tensor\n\n\n"
    (project_copy / "edited_layer.py").write_text(header + subclass, encoding="utf-8")
    replace(
        story, "from lora import DoRALinear, LoRALinear", "from edited_layer import Edited\nfrom lora import DoRALinear"
    )
    replace(story, "else LoRALinear,", "else Edited,")
    as_subclass, said = train(project_copy, "subclass")
    assert "Encoder  reference: " in said
    assert edited == as_subclass and edited[1:] != plain[1:]


@pytest.mark.slow
def test_an_exception_in_the_layer_stops_the_run(project_copy: Path) -> None:
    """Catches training that does not call LoRALinear.forward, or that hides what it raises."""
    replace(project_copy / "lora" / "layer.py", FORWARD, "        raise RuntimeError('raised by the layer')\n")
    command = [sys.executable, *RUN, str(project_copy / "run")]
    done = subprocess.run(command, cwd=project_copy, capture_output=True, text=True)
    assert done.returncode != 0 and "raised by the layer" in done.stderr
    assert not (project_copy / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_adapted_layer_is_called_in_each_step(encoder: str, project_copy: Path) -> None:
    """Catches a fast path around the taught layer: its calls are counted over the steps of a run with each encoder."""
    replace(project_copy / "lora" / "layer.py", FORWARD, "        print('called', flush=True)\n" + FORWARD)
    calls = []
    for steps in ("1", "3"):
        command = [sys.executable, *RUN, str(project_copy / steps), "--steps", steps, "--fragments", "0"]
        command += ["--encoder", encoder]
        done = subprocess.run(command, cwd=project_copy, capture_output=True, text=True)
        assert done.returncode == 0 and f"Encoder  {encoder}: " in done.stdout, done.stderr
        calls.append(done.stdout.count("called"))
    assert calls[1] - calls[0] == 2 * 12  # two more steps, 12 adapted layers


@pytest.mark.slow
def test_an_exception_in_the_loss_stops_the_run(project_copy: Path) -> None:
    """Catches a training loop with a loss of its own beside the public info_nce."""
    loss = project_copy / "clip_medical" / "training" / "loss.py"
    replace(
        loss,
        "    n = len(image_features)\n",
        "    raise RuntimeError('raised by the loss')\n    n = len(image_features)\n",
    )
    command = [sys.executable, *RUN, str(project_copy / "run")]
    done = subprocess.run(command, cwd=project_copy, capture_output=True, text=True)
    assert done.returncode != 0 and "raised by the loss" in done.stderr
