"""The device and the precision of a run, with reasons."""

import torch


def choose_device() -> torch.device:
    """Return the GPU if there is one (under torchrun, this process's own), else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """Return the dtype of the frozen weights and the reason for it.

    `torch.cuda.is_bf16_supported()` is not asked: it answers True on a T4, which only emulates bf16, slowly.
    Hardware support starts at compute capability 8.0 (Ampere).
    """
    if requested != "auto":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[requested]
        return dtype, "as requested"
    if device.type == "cpu":  # the same on every CPU, so that results do not depend on its model
        able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # not in older versions of torch
        in_bf16 = able.get("amx_bf16") or able.get("avx512_bf16")
        hint = "; this CPU has bf16 instructions, --precision bf16 is faster" if in_bf16 else ""
        return torch.float32, f"the default on a CPU{hint}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 0):
        return torch.bfloat16, f"compute capability {major}.{minor} has bf16"
    return torch.float16, f"compute capability {major}.{minor} has no bf16: fp16 with loss scaling"
