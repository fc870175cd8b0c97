"""Functions of positions that enter attention: ALiBi, a bias that grows with distance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["Alibi", "alibi", "alibi_slopes"]


@dataclass(frozen=True, eq=False)
class Alibi:
    """−slope·|i − j| for each head, made for the block that is needed: pass it as ``bias=`` (arXiv 2108.12409)."""

    slopes: Tensor  # [H], float32

    requires_grad = False

    def tile(self, heads: slice, queries: slice, keys: slice, device: torch.device, dtype: torch.dtype) -> Tensor:
        """The bias of some heads at some absolute positions, [1, h, q, k]."""
        rows = torch.arange(queries.start, queries.stop, device=device)[:, None]
        columns = torch.arange(keys.start, keys.stop, device=device)
        distance = (rows - columns).abs().to(dtype)
        return -self.slopes[heads].to(device, dtype).view(1, -1, 1, 1) * distance

    def points(self, heads: Tensor, queries: Tensor, keys: Tensor, dtype: torch.dtype) -> Tensor:
        """The bias of single cells named by head and absolute positions."""
        return -self.slopes.to(heads.device, dtype)[heads] * (queries - keys).abs().to(dtype)

    def of_heads(self, heads: slice) -> Alibi:
        """The bias of some heads only."""
        return replace(self, slopes=self.slopes[heads])


def alibi(slopes: Sequence[float] | Tensor) -> Alibi:
    """ALiBi by its slopes, one a head, as ``bias=``; see :func:`alibi_slopes` for the usual ones.

    Raises:
        ValueError: slopes that are not a row of finite numbers.

    Example:
        >>> import torch, headscope
        >>> x = torch.randn(1, 4, 9, 8)
        >>> bias = headscope.positions.alibi(headscope.positions.alibi_slopes(4))
        >>> headscope.attention(x, x, x, mask=headscope.masks.causal(), bias=bias).shape
        torch.Size([1, 4, 9, 8])
    """
    held = torch.as_tensor(slopes, dtype=torch.float32).detach()
    if held.dim() != 1 or not held.numel() or not bool(held.isfinite().all()):
        raise ValueError(f"alibi() got slopes of shape {tuple(held.shape)}: wanted one finite number for each head.")
    return Alibi(held)


def alibi_slopes(num_heads: int) -> Tensor:
    """The slopes of arXiv 2108.12409, [num_heads]: 2^(−8/n), 2^(−16/n) …; between powers of two, every other one.

    Example:
        >>> alibi_slopes(4)
        tensor([0.2500, 0.0625, 0.0156, 0.0039])
    """
    if num_heads < 1:
        raise ValueError(f"alibi_slopes() got {num_heads} heads: at least 1.")
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (i + 1) / power) for i in range(power)]
    slopes += [2 ** (-4 * (2 * i + 1) / power) for i in range(num_heads - power)]
    return torch.tensor(slopes)
