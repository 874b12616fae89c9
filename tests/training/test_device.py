"""The precision of a run: chosen by what the hardware computes in, not by what it can emulate."""

import pytest
import torch

from clip_medical.training.device import choose_precision


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
    dtype, reason = choose_precision("auto", torch.device("cuda"))
    assert dtype == expected and ".".join(map(str, capability)) in reason


def test_a_cpu_gets_fp32_and_a_requested_precision_is_taken() -> None:
    """Catches half precision on a CPU by default, and a --precision that is ignored."""
    assert choose_precision("auto", torch.device("cpu"))[0] == torch.float32
    assert choose_precision("bf16", torch.device("cpu")) == (torch.bfloat16, "as requested")


@pytest.mark.parametrize("capabilities", [{"amx_bf16": True}, {"avx512_bf16": True}, {"avx512_f": True}, {}])
def test_a_cpu_with_bf16_instructions_gives_a_hint(
    monkeypatch: pytest.MonkeyPatch, capabilities: dict[str, bool]
) -> None:
    """Catches a missing hint, and one on a CPU where bf16 is slower."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: capabilities, raising=False)
    dtype, reason = choose_precision("auto", torch.device("cpu"))
    assert dtype == torch.float32
    assert ("--precision bf16" in reason) == any("bf16" in instruction for instruction in capabilities)
