"""Attention, and the attention matrix as an operator that is never built: masks, scores, kernels, reductions."""

from headscope.ops import masks, positions, reductions
from headscope.ops.functional import attention
from headscope.ops.matrix import AttentionMatrix

__all__ = ["AttentionMatrix", "attention", "masks", "positions", "reductions"]
