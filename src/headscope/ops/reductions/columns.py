"""Reductions with a result per key: what it receives."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.ops.reductions.reduction import Block, Reduction, Shape


class Received(Reduction):
    """What each key receives: [B, H, S]. The sum of its column; with ``mean`` ÷ the queries that may see it.

    The accumulated score of arXiv 2306.14048.
    """

    def __init__(self, mean: bool = False) -> None:
        self.mean = mean

    def start(self, shape: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
        size = (shape[0], shape[1], shape[3])
        return like.new_zeros(size), like.new_zeros(size if self.mean else (0, 0, 0))

    def update(self, state: tuple[Tensor, Tensor], block: Block) -> None:
        at = (block.batch, block.heads, block.keys)
        state[0][at].add_(block.weights.sum(-2))
        if self.mean:
            visible, rows = block.visible, block.weights.shape[-2]
            state[1][at] += rows if visible is None else visible.expand(-1, -1, rows, -1).sum(-2)

    def finish(self, state: tuple[Tensor, Tensor]) -> Tensor:
        """A key that no query may see gets 0."""
        return state[0] / state[1].clamp(min=1) if self.mean else state[0]


class TransposedProduct(Reduction):
    """Pᵀ @ x for x [B, H, L, N]: [B, H, S, N]."""

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        return like.new_zeros((shape[0], shape[1], shape[3], self.x.shape[-1]))

    def update(self, state: Tensor, block: Block) -> None:
        x = self.x[block.at].to(state.dtype).transpose(-1, -2).flatten(0, 1)  # few rows times a block is fast
        product = torch.bmm(x, block.weights.flatten(0, 1)).unflatten(0, block.weights.shape[:2])
        state[block.batch, block.heads, block.keys].add_(product.transpose(-1, -2))
