"""Questions that measures of heads ask in the pass over the weights, beyond those that everybody asks."""

from __future__ import annotations

import torch
from torch import Tensor

from headscope.reductions import Block, Max, Reduction
from headscope.scores import LOWEST

__all__ = ["Distance", "MaxAmong", "Product"]

Shape = tuple[int, int, int, int]
Rows = tuple[slice, slice, slice]


class Product(Reduction):
    """P @ x for x [B, 1 or H, S, N], in the pass: [B, H, L, N]."""

    online = True

    def __init__(self, x: Tensor) -> None:
        self.x = x

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        """Zeros, [B, H, L, N]."""
        return like.new_zeros((*shape[:3], self.x.shape[-1]))

    def update(self, state: Tensor, block: Block) -> None:
        """A narrow matrix product."""
        heads = slice(None) if self.x.shape[1] == 1 else block.heads
        state[block.at] += block.weights @ self.x[block.batch, heads, block.keys].to(state.dtype)

    def rescale(self, state: Tensor, at: Rows, by: Tensor, total: Tensor) -> None:
        """Every weight by its row's factor."""
        state[at] *= by.exp()


class Distance(Reduction):
    """Σ_j P_ij·|i − j| over the keys in ``among`` [B, S]: [B, H, L], in tokens (arXiv 1906.04284)."""

    online = True

    def __init__(self, among: Tensor) -> None:
        self.among = among

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        """Zeros, [B, H, L]."""
        return like.new_zeros(shape[:3])

    def update(self, state: Tensor, block: Block) -> None:
        """Where all keys lie before all rows the distance is a difference: a narrow product instead of a block."""
        first = block.scores.positions(block.rows).start
        before = min(max(first - block.keys.start, 0), block.weights.shape[-1])
        among = self.among[block.batch, block.keys].to(state.dtype)[:, None, :, None]
        rows, keys = block.q_idx.to(state.dtype), block.kv_idx.to(state.dtype)
        if before:
            columns = torch.cat([among, among * keys[:, None]], -1)[:, :, :before]
            mass, place = (block.weights[..., :before] @ columns).unbind(-1)
            state[block.at] += rows[:, 0] * mass - place
        if before < block.weights.shape[-1]:
            apart = (rows - keys[before:]).abs() * among[:, :, before:].transpose(-1, -2)
            state[block.at] += torch.linalg.vecdot(block.weights[..., before:], apart)

    def rescale(self, state: Tensor, at: Rows, by: Tensor, total: Tensor) -> None:
        """Every weight by its row's factor."""
        state[at] *= by.exp().squeeze(-1)


class MaxAmong(Max):
    """The largest weight of each row among the keys in ``among`` [B, S], and its key: each [B, H, L]."""

    def __init__(self, among: Tensor) -> None:
        super().__init__()
        self.among = among

    def update(self, state: tuple[Tensor, Tensor], block: Block) -> None:
        """Hide the other keys, for as long as this question looks at the block."""
        left_out = ~self.among[block.batch, block.keys]
        columns = left_out.any(0).nonzero().flatten()
        if not len(columns):
            super().update(state, block)
            return
        held = block.centered[..., columns]
        hidden = left_out[:, columns][:, None, None, :]
        block.centered[..., columns] = torch.where(hidden, LOWEST, held)
        super().update(state, block)
        block.centered[..., columns] = held
