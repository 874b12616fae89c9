"""The number format: chosen by what the hardware computes in, not by what it can emulate."""

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
    """Catches `is_bf16_supported()`, which says yes on a T4 (7.5) and means a slow emulation."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *args, **kwargs: True)
    dtype, reason = choose_precision("auto", torch.device("cuda"))
    assert dtype == expected and ".".join(map(str, capability)) in reason


def test_a_cpu_gets_fp32_and_a_wish_is_granted() -> None:
    """Catches half precision on a CPU by default, and a --precision that is ignored."""
    assert choose_precision("auto", torch.device("cpu"))[0] == torch.float32
    assert choose_precision("bf16", torch.device("cpu")) == (torch.bfloat16, "as asked")


@pytest.mark.parametrize("able", [{"amx_bf16": True}, {"avx512_bf16": True}, {"avx512_f": True}, {}])
def test_a_cpu_that_multiplies_in_bf16_is_told_of_it(monkeypatch: pytest.MonkeyPatch, able: dict[str, bool]) -> None:
    """Catches a hint that is not given, or given where bf16 would be slower."""
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able, raising=False)
    dtype, reason = choose_precision("auto", torch.device("cpu"))
    assert dtype == torch.float32 and ("--precision bf16" in reason) == any("bf16" in unit for unit in able)
