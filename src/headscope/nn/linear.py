"""Linear maps, x Wᵀ + b, by the way of multiplying that suits the processor."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from headscope.ops.kernels.cpu import FEW_ROWS, is_emulated, prefers_onednn

__all__ = ["Linear", "linear"]


class Linear(nn.Linear):
    """torch's linear map, faster where the CPU can do better than torch asks of it.

    - Many rows in a precision that the CPU only emulates are multiplied in float32. What comes out has the precision
      of what went in. This takes a sixth of the time, in training less.
    - float32 goes through oneDNN where MKL would leave AVX-512 unused, as it does on AMD's CPUs: a seventh less time.

    Example:
        >>> Linear(3, 2).bfloat16()(torch.ones(100, 3, dtype=torch.bfloat16)).dtype
        torch.bfloat16
    """

    def forward(self, x: Tensor) -> Tensor:
        """[*, in_features] to [*, out_features]."""
        return linear(x, self.weight, self.bias)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """The same as a function: x Wᵀ + b."""
    needs_grad = x.requires_grad or weight.requires_grad or (bias is not None and bias.requires_grad)
    gradients = needs_grad and torch.is_grad_enabled()
    if prefers_onednn(x, weight, gradients):
        return (_ByOneDnn.apply if gradients else _by_onednn)(x, weight, bias)
    if is_emulated(x) and x.dtype == weight.dtype and x.numel() >= FEW_ROWS * x.shape[-1]:
        return F.linear(x.float(), weight.float(), None if bias is None else bias.float()).to(x.dtype)
    return F.linear(x, weight, bias)


def _by_onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x.contiguous(), weight, bias, "none", [], "")


class _ByOneDnn(torch.autograd.Function):
    """oneDNN's product has no gradient of its own in torch; these are ordinary ones, differentiable in turn."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _by_onednn(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = grad.reshape(-1, grad.shape[-1])
        of_x, of_weight, of_bias = ctx.needs_input_grad
        return (
            linear(grad, weight.t()) if of_x else None,
            rows.t() @ x.reshape(-1, x.shape[-1]) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )
