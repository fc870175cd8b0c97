"""What makes weights of a row's scores: its log-sum-exp, in two numbers."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Normalizer", "learned"]


@dataclass(frozen=True, eq=False)
class Normalizer:
    """Two numbers a row, [B, H, L] each, that turn scores into weights: P = exp((s − top) − log_total).

    Kept apart because lse = top + log_total loses log_total when a mask has put −3e38 on a whole row.
    """

    top: Tensor
    log_total: Tensor

    @property
    def logsumexp(self) -> Tensor:
        """Log Σ_j exp(s_ij), [B, H, L]; −inf where nothing is visible."""
        return self.top + self.log_total

    @property
    def offset(self) -> Tensor | None:
        """−log_total, 0 for rows that see nothing; None when it is 0 throughout: a kernel's sums are in ``top``."""
        offset = -self.log_total
        offset = torch.where(offset == torch.inf, 0.0, offset)
        return offset if bool(offset.any()) else None


def learned(sums: Tensor) -> Normalizer:
    """Of rows whose log-sum-exp, [B, H, L], somebody else knows; NaN: nobody does yet."""
    with torch.inference_mode(False):  # written into later, perhaps outside of that mode
        return Normalizer(sums.detach().clone(), torch.zeros_like(sums, requires_grad=False))
