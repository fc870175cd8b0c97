"""Which query may see which key: ``causal() & padding([7, 5])``. True means *may attend*, everywhere.

The queries are the last L of the S positions, so that a causal mask is right with a cache.
"""

from headscope.ops.masks.compacting import compact
from headscope.ops.masks.mask import Mask
from headscope.ops.masks.ranges import causal, documents, padding, prefix, sliding_window, window
from headscope.ops.masks.sets import Step, heads, keys, queries, shifted, stacked
from headscope.ops.masks.tensors import dense, function, packed

__all__ = [
    "Mask",
    "Step",
    "causal",
    "compact",
    "dense",
    "documents",
    "function",
    "heads",
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
