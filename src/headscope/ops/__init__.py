"""Attention, and the matrix that is never stored: `masks/`, positions, scores, `reductions/`, and `kernels/`."""

from headscope.ops import masks, positions, reductions
from headscope.ops.functional import attention
from headscope.ops.matrix import AttentionMatrix

__all__ = ["AttentionMatrix", "attention", "masks", "positions", "reductions"]
