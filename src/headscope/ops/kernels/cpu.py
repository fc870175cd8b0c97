"""What the processor multiplies well: half precision or not, and by which of torch's libraries."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

__all__ = ["FEW_ROWS", "is_emulated", "multiplies", "prefers_onednn"]

FEW_ROWS = 8  # below, making the weights float32 costs more than it saves
_FEW_PRODUCTS = {False: 1 << 18, True: 1 << 24}  # below, oneDNN's call costs more than it saves; with gradients: True


def _cpu_words() -> frozenset[str]:
    """Who made the CPU, and what it says it has; nothing where there is no such list."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:  # not Linux
        return frozenset()
    named = ("flags", "Features", "vendor_id")
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


def _has_idle_avx512() -> bool:
    """Whether MKL, which torch multiplies float32 with, leaves this CPU's AVX-512 unused: it does on AMD's."""
    return (
        _WORDS.issuperset({"AuthenticAMD", "avx512f"})
        and torch.backends.mkl.is_available()
        and torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == "AVX512"
    )


_ONEDNN = _has_idle_avx512()


def prefers_onednn(x: Tensor, weight: Tensor, gradients: bool) -> bool:
    """Whether x Wᵀ, [*, n] by [m, n], is faster by oneDNN than by the library that torch would take.

    False wherever torch itself, or a transform of it, has to see an ordinary linear map.
    """
    return (
        _ONEDNN
        and torch._C._get_tracing_state() is None
        and x.dtype == weight.dtype == torch.float32
        and x.device.type == "cpu"
        and type(x) is Tensor
        and type(weight) in (Tensor, torch.nn.Parameter)
        and weight.numel() * x.numel() >= _FEW_PRODUCTS[gradients] * x.shape[-1]
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()
        and torch.autograd.forward_ad._current_level < 0
        and bool(torch.backends.mkldnn.enabled)
    )
