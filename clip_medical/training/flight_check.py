"""The flight check: one batch forward and backward before anything is written, and all that can be known from it.

Most ways to lose a day with LoRA raise no error: the model trains, and stays its base. Each is looked for here.
"""

import copy
import time
from tempfile import TemporaryDirectory

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.module import register_module_forward_hook

from clip_medical.data.batches import Batch
from clip_medical.errors import UserError
from clip_medical.model import Clip
from clip_medical.training import distributed
from clip_medical.training.grad_cache import contrastive_backward, random_state, restore
from clip_medical.training.loss import Loss, same_rows
from clip_medical.training.memory import GIB, Plan
from clip_medical.training.optimizer import Optimizer
from lora import LoRAError, adapter_parameters, count_parameters, load_adapter, merge, remove, save_adapter
from lora.inject import lora_layers


def flight_check(clip: Clip, batch: Batch, loss: Loss, optimizer: Optimizer, plan: Plan, steps: int) -> float:
    """Print the size of the adapter, the first loss, time and memory; stop where nothing could be learned.

    Returns the chance level of the loss on this batch: ln N for info_nce with one positive a row. Leaves gradients
    empty and the random state as it was. Raises UserError if a forward was not called, a gradient is missing or in the
    wrong place, a trainable parameter is not in the optimizer, the loss is not finite, or the adapter does not survive
    saving and loading.
    """
    state, began = random_state(clip.device), time.perf_counter()
    called: set[nn.Module] = set()
    hook = register_module_forward_hook(lambda module, _, __: called.add(module))
    try:
        first_loss = contrastive_backward(clip, batch, loss, plan.chunk_size)
    finally:
        hook.remove()
    minutes = (time.perf_counter() - began) * steps / 60
    problems = {"not finite": [] if first_loss.isfinite() else ["the first loss"]}
    problems |= gradient_problems(clip.model, called, optimizer)
    clip.model.zero_grad(set_to_none=True)
    for problem, names in problems.items():
        if names:
            raise UserError(
                f"Flight check: {problem} ({len(names)}, such as {names[0]}). The adapter would learn nothing or the "
                "wrong thing, so no step was taken and nothing was written."
            )
    adapter_file = check_file_and_merge(clip.model)
    restore(state)
    positives = same_rows(*batch.captions[0].ids).to(clip.device)
    equal = F.normalize(torch.ones(len(positives), 2, device=clip.device), dim=-1)  # features that tell nothing apart
    chance = loss(equal, equal, clip.model.logit_scale.detach(), positives).item()

    count, layers, pairs = count_parameters(clip.model), len(lora_layers(clip.model)), len(batch.rows)
    above = "" if count.percent < 1 else ", above 1 %: lower --rank, or train fewer layers"
    processes = distributed.world_size()
    shared = f" on {processes} processes, each" if processes > 1 else ","
    memory = f"{plan.forecast / GIB:.1f} of {plan.limit / GIB:.1f} GiB"
    print(f"Adapter  {layers} layers: {count.trainable:,} trainable parameters, {count.percent:.2f} % of CLIP's{above}")
    print(f"Check    first loss {first_loss.item():.2f}, chance level {chance:.2f}")
    print(f"         gradients in every adapted layer and in no frozen weight; adapter {adapter_file}")
    print(f"Plan     {steps} steps of {pairs} pairs{shared} {plan.describe(pairs // processes)}")
    print(f"         about {minutes:.1f} minutes, {memory}")
    return chance


def gradient_problems(model: nn.Module, called: set[nn.Module], optimizer: Optimizer) -> dict[str, list[str]]:
    """What went wrong in a backward pass: problem -> names of layers or parameters, empty where there is none."""
    layers, parameters = lora_layers(model), dict(model.named_parameters())
    reached = {name for name, p in parameters.items() if p.grad is not None and p.grad.any()}
    frozen = {name for name, p in parameters.items() if not p.requires_grad}
    optimized = {id(p) for p in optimizer.parameters}
    forgotten = [n for n, p in parameters.items() if n not in frozen and id(p) not in optimized]
    return {
        "forward was not called": [name for name, layer in layers.items() if layer not in called],
        # while B is zero A has none
        "no gradient": [n for n in parameters if n.endswith((".lora_B", ".trained_weight")) and n not in reached],
        "gradient in a frozen weight": sorted(reached & frozen),
        "trainable, but not in the optimizer": forgotten,
    }


def check_file_and_merge(model: nn.Module) -> str:
    """Save, reload and merge a random adapter in a copy of the model, and say how that went.

    Raises LoRAError where save_adapter refuses, UserError where the reloaded tensors differ. A layer that cannot be
    merged can still be trained: that is reported and no error.
    """
    trial = copy.deepcopy(model).eval()
    generator = torch.Generator().manual_seed(0)
    before = adapter_parameters(trial)
    for p in before:
        p.data += torch.randn(p.shape, generator=generator).to(p)
    with TemporaryDirectory() as folder:
        save_adapter(trial, folder)
        remove(trial)
        load_adapter(trial, folder)
    if not all(torch.equal(a, b) for a, b in zip(before, adapter_parameters(trial), strict=True)):
        raise UserError("Flight check: the adapter saved and loaded again has other numbers. Nothing was written.")
    try:
        merge(trial)
    except LoRAError as error:
        return f"saved and reloaded; it cannot be merged ({error})"
    return "saved, reloaded and merged"
