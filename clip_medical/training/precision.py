"""Which device, which number format, and why."""

import torch


def choose_device() -> torch.device:
    """A GPU where there is one; it is this process's own under torchrun."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def choose_precision(requested: str, device: torch.device) -> tuple[torch.dtype, str]:
    """The format of the frozen weights and the reason for it, in words.

    `torch.cuda.is_bf16_supported()` is not asked: it answers True on a T4, which only emulates bf16, slowly. Compute
    capability 8.0 (Ampere) is where the hardware begins.
    """
    if requested != "auto":
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[requested]
        return dtype, "as asked"
    if device.type == "cpu":  # fp32 on all of them: the format is not to depend on which of them it happens to be
        able: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()  # an older torch cannot say
        in_bf16 = able.get("amx_bf16") or able.get("avx512_bf16")
        faster = "; this one multiplies in bf16: --precision bf16 is faster" if in_bf16 else ""
        return torch.float32, f"as on any CPU{faster}"
    major, minor = torch.cuda.get_device_capability(device)
    if (major, minor) >= (8, 0):
        return torch.bfloat16, f"compute capability {major}.{minor} computes in bf16"
    return torch.float16, f"compute capability {major}.{minor} has no bf16: fp16 with loss scaling"
