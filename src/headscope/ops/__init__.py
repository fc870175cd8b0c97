"""Attention and AttentionMatrix, weights that are computed when you ask: masks, scores, kernels, reductions."""

from headscope.ops import masks, positions, reductions
from headscope.ops.functional import attention
from headscope.ops.matrix import AttentionMatrix

__all__ = ["AttentionMatrix", "attention", "masks", "positions", "reductions"]
