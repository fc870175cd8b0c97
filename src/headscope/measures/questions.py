"""Questions that measures of heads ask in the pass over the weights, beyond those that everybody asks."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

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
        self.width = x.shape[-1]
        self._columns = x.transpose(-1, -2).contiguous()

    @classmethod
    def joined(cls, parts: Sequence[Product]) -> Product:
        """Several products as one, which reads the weights once; its answer is theirs side by side."""
        heads = max(part._columns.shape[1] for part in parts)
        columns = [part._columns.expand(-1, heads, -1, -1) for part in parts]
        return cls(torch.cat(columns, -2).transpose(-1, -2))

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        """Zeros, [B, H, L, N]."""
        return like.new_zeros((*shape[:3], self._columns.shape[-2]))

    def update(self, state: Tensor, block: Block) -> None:
        """A narrow matrix product."""
        heads = slice(None) if self._columns.shape[1] == 1 else block.heads
        state[block.at] += block.product(self._columns[block.batch, heads, :, block.keys])

    def rescale(self, state: Tensor, at: Rows, by: Tensor, total: Tensor) -> None:
        """Every weight by its row's factor."""
        state[at] *= by.exp()


class Distance(Reduction):
    """Σ_j P_ij·|i − j| over the keys in ``among`` [B, S]: [B, H, L], in tokens (arXiv 1906.04284)."""

    online = True

    def __init__(self, among: Tensor) -> None:
        self.among, self._places = among, _Places(among)

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        """Zeros, [B, H, L]."""
        return like.new_zeros(shape[:3])

    def update(self, state: Tensor, block: Block) -> None:
        """Σ P·(i − j) is two narrow products; keys after their rows, which may lie at the end, count twice over."""
        if not self._places.number(block.keys):
            return
        among = self.among[block.batch, block.keys].to(state.dtype)[:, None, None]
        start = block.keys.start  # positions count from here: the difference of large ones would be inexact
        rows, keys = (block.q_idx - start).to(state.dtype), (block.kv_idx - start).to(state.dtype)
        mass, place = block.product(torch.cat([among, among * keys], -2)).unbind(-1)
        state[block.at] += rows[:, 0] * mass - place
        after = max(block.scores.positions(block.rows).start + 1 - start, 0)
        if after < block.weights.shape[-1] and not _hides_the_future(block):
            beyond = (keys[after:] - rows).clamp(min=0) * among[..., after:]
            state[block.at] += 2 * torch.linalg.vecdot(block.weights[..., after:], beyond)

    def rescale(self, state: Tensor, at: Rows, by: Tensor, total: Tensor) -> None:
        """Every weight by its row's factor."""
        state[at] *= by.exp().squeeze(-1)


def _hides_the_future(block: Block) -> bool:
    """Whether this is known without a look at the cells: the weights beyond the diagonal are 0 then."""
    mask = block.scores.mask
    return mask is not None and mask.is_causal


class MaxAmong(Max):
    """The largest weight of each row among the keys in ``among`` [B, S], and its key: each [B, H, L]."""

    _FEW = 16

    def __init__(self, among: Tensor) -> None:
        self.among, self._places = among, _Places(among)

    def update(self, state: tuple[Tensor, Tensor], block: Block) -> None:
        """Look at the few that are among them; or hide the few that are not, for as long as this question looks."""
        among = self.among[block.batch, block.keys]
        if self._places.number(block.keys) <= self._FEW:
            if columns := self._places.chosen(block.keys):
                x = block.centered[..., columns].masked_fill_(~among[:, columns][:, None, None], LOWEST)
                values, which = x.max(-1)
                self._keep(state, block, values, torch.tensor(columns, device=which.device)[which])
            return
        others = self._places.left_out(block.keys)
        if not others:
            super().update(state, block)
            return
        held = block.centered[..., others]
        block.centered[..., others] = torch.where(among[:, others][:, None, None], held, LOWEST)
        super().update(state, block)
        block.centered[..., others] = held


class _Places:
    """Which keys any text of a batch chooses, and which any leaves out: known once, asked of every block."""

    def __init__(self, among: Tensor) -> None:
        self._chosen = among.any(0).nonzero().flatten().tolist()
        self._left_out = (~among).any(0).nonzero().flatten().tolist()

    def number(self, keys: slice) -> int:
        """How many are chosen in a span of keys."""
        return bisect_left(self._chosen, keys.stop) - bisect_left(self._chosen, keys.start)

    def chosen(self, keys: slice) -> list[int]:
        """Those chosen in a span of keys, counted from its start."""
        return _inside(self._chosen, keys)

    def left_out(self, keys: slice) -> list[int]:
        """Those left out in a span of keys, counted from its start."""
        return _inside(self._left_out, keys)


def _inside(places: list[int], keys: slice) -> list[int]:
    first, last = bisect_left(places, keys.start), bisect_left(places, keys.stop)
    return [place - keys.start for place in places[first:last]]
