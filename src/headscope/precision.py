"""Half precision: whether a device multiplies it itself, and what to do on a CPU that can only emulate it."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FEW_ROWS", "Linear", "is_emulated", "linear", "multiplies"]

FEW_ROWS = 8  # below, making the weights float32 costs more than it saves


def _cpu_flags() -> frozenset[str]:
    """What the CPU says it has; nothing where there is no such list."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return frozenset()
    return frozenset(word for line in lines if line.startswith(("flags", "Features")) for word in line.split())


_FLAGS = _cpu_flags()
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
    if device.type != "cpu" or not _FLAGS:
        return None
    return not _FLAGS.isdisjoint(_NEEDED[dtype])


_EMULATED = frozenset(dtype for dtype in _NEEDED if multiplies(dtype, torch.device("cpu")) is False)


def is_emulated(x: Tensor) -> bool:
    """Whether products of ``x`` are better made in float32: on this CPU its precision is only emulated.

    Under autocast, torch chooses the precision of products itself, and this says False.
    """
    return x.dtype in _EMULATED and x.device.type == "cpu" and not torch.is_autocast_enabled("cpu")


class Linear(nn.Linear):
    """torch's linear map; many rows in a precision that the CPU only emulates are multiplied in float32.

    What comes out has the precision of what went in. This takes a sixth of the time, in training less.

    Example:
        >>> Linear(3, 2).bfloat16()(torch.ones(100, 3, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        """[*, in_features] to [*, out_features]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as a function: x Wᵀ + b."""
    if is_emulated(x) and x.dtype == weight.dtype and x.numel() >= FEW_ROWS * x.shape[-1]:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)
