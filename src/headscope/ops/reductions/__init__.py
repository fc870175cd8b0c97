"""Reductions of attention weights, block by block; several of them share one pass.

Write your own by subclassing :class:`Reduction`::

    class FarMass(Reduction):
        \"\"\"Weight on keys more than ``distance`` positions back: [B, H, L].\"\"\"
        def __init__(self, distance): self.distance = distance
        def start(self, shape, like): return like.new_zeros(shape[:3])
        def update(self, state, block):
            far = block.q_idx - block.kv_idx > self.distance
            state[block.at] += (block.weights * far).sum(-1)
"""

from headscope.ops.reductions.columns import Received, TransposedProduct
from headscope.ops.reductions.groups import Groups, Pool
from headscope.ops.reductions.reduction import Block, Reduction, check_reductions
from headscope.ops.reductions.rows import Entropy, Mass, Max, Offsets, TopK, WeightsAt

__all__ = [
    "Block",
    "Entropy",
    "Groups",
    "Mass",
    "Max",
    "Offsets",
    "Pool",
    "Received",
    "Reduction",
    "TopK",
    "TransposedProduct",
    "WeightsAt",
    "check_reductions",
]
