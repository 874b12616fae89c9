"""The precision of a run: chosen by what the hardware computes in, not by what it can emulate."""

import pytest
import torch

from clip_medical.training.device import choose_device


@pytest.mark.parametrize(
    ("capability", "expected"),
    [((7, 0), torch.float16), ((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)],
)
def test_a_t4_gets_fp16_and_an_ampere_card_bf16(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], expected: torch.dtype
) -> None:
    """Catches a choice by `is_bf16_supported()`, which is true on a T4 (7.5), where bf16 is emulated and slow."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    device, dtype, reason = choose_device("auto")
    assert device.type == "cuda" and dtype == expected and ".".join(map(str, capability)) in reason


def test_a_cpu_gets_fp32_and_a_requested_precision_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Catches half precision on a CPU by default, and a --precision that is ignored."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device("auto")[:2] == (torch.device("cpu"), torch.float32)
    assert choose_device("bf16") == (torch.device("cpu"), torch.bfloat16, "as requested")
