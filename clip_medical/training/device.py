"""The device and the precision of a run, with reasons."""

import torch


def choose_device(precision: str) -> tuple[torch.device, torch.dtype, str]:
    """Return the GPU if there is one (under torchrun, this process's own) or else the CPU, the dtype of the frozen
    weights, and the reason for the dtype. precision: "auto", "fp32", "bf16" or "fp16".

    `torch.cuda.is_bf16_supported()` is not asked: it answers True on a T4, which only emulates bf16, slowly.
    Hardware support starts at compute capability 8.0 (Ampere).
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if precision != "auto":
        return device, {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[precision], "as requested"
    if device.type == "cpu":  # the same on every CPU, so that results do not depend on its model
        return device, torch.float32, "the default on a CPU"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 0):
        return device, torch.bfloat16, f"compute capability {major}.{minor} has bf16"
    return device, torch.float16, f"compute capability {major}.{minor} has no bf16: fp16 with loss scaling"
