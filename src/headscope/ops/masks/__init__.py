"""Masks: which query may see which key, as in ``causal() & padding([7, 5])``. True means *may attend*, everywhere.

The queries are the last L of the S positions, so that a causal mask is correct with a cache.
"""

from headscope.ops.masks.compacting import compact
from headscope.ops.masks.mask import Mask
from headscope.ops.masks.ranges import causal, documents, padding, prefix, sliding_window, window
from headscope.ops.masks.sets import StackedStep, heads, keys, queries, shifted, stacked
from headscope.ops.masks.tensors import dense, function, keep, packed

__all__ = [
    "Mask",
    "StackedStep",
    "causal",
    "compact",
    "dense",
    "documents",
    "function",
    "heads",
    "keep",
    "keys",
    "packed",
    "padding",
    "prefix",
    "queries",
    "shifted",
    "sliding_window",
    "stacked",
    "window",
]
