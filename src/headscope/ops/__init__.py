"""Attention and its matrix, which is computed when you ask and never stored.

`masks/` say who may attend to whom, positions and scores come before the softmax, `kernels/` compute, `reductions/`
are the sums, maxima and totals that one pass over the matrix gives. What they say about a head is a measure, in heads.
"""

from headscope.ops import masks, positions, reductions
from headscope.ops.functional import attention
from headscope.ops.matrix import AttentionMatrix

__all__ = ["AttentionMatrix", "attention", "masks", "positions", "reductions"]
