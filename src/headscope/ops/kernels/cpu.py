"""Whether the processor has instructions for half precision, or torch only emulates it."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

FEW_ROWS = 8  # below, conversion to float32 costs more than it saves


def _cpu_words() -> frozenset[str]:
    """The CPU's feature flags from /proc/cpuinfo; empty where there is no such file."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return frozenset()
    named = ("flags", "Features")  # on x86, on ARM
    return frozenset(word for line in lines if line.startswith(named) for word in line.split(":")[-1].split())


_WORDS = _cpu_words()
_NEEDED = {
    torch.bfloat16: {"amx_bf16", "avx512_bf16", "bf16", "svebf16"},
    torch.float16: {"amx_fp16", "avx512_fp16", "asimdhp"},
}


def multiplies(dtype: torch.dtype, device: torch.device) -> bool | None:
    """Whether a device has instructions that multiply ``dtype``; None if that is not known.

    >>> multiplies(torch.float32, torch.device("cpu"))
    True
    """
    if dtype not in _NEEDED:
        return True
    if device.type == "cuda":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu" or not _WORDS:
        return None
    return not _WORDS.isdisjoint(_NEEDED[dtype])


_EMULATED = frozenset(dtype for dtype in _NEEDED if multiplies(dtype, torch.device("cpu")) is False)


def is_emulated(x: Tensor) -> bool:
    """Whether products of ``x`` are better made in float32: on this CPU its precision is only emulated.

    Under autocast, torch chooses the precision of products itself, and this says False.
    """
    return x.dtype in _EMULATED and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")
