"""Reductions that find the largest weight of each row among chosen keys, and read the weights on nearby keys."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from headscope.ops.reductions import Block, Max, Reduction
from headscope.ops.reductions.reduction import Shape
from headscope.ops.scores import LOWEST

Rows = tuple[slice, slice, slice]
_SMALL = -87.0  # log-weights below this count as weight 0
_NONE, _SOME, _ALL = range(3)  # of the texts in a batch
_ROWS = 128  # rows whose near keys are hidden in one copy: few enough that the copy is small


class MaxAmong(Max):
    """The largest weight of each row among the keys in ``among`` [B, S], and its key: each [B, H, L]."""

    def __init__(self, among: Tensor) -> None:
        self._among = among

    def update(self, state: tuple[Tensor, Tensor], block: Block) -> None:
        among = self._among[block.batch, None, None, block.keys]
        if bool(among.any()):
            super().update(state, replace(block, centered=block.centered.masked_fill(~among, LOWEST)))


class StrongestKeys(NamedTuple):
    """See :class:`Strongest`."""

    values: Tensor  # [B, H, L]
    offsets: Tensor  # [B, H, L]
    others: Tensor  # [B, H, L]
    near: Tensor  # [B, H, L, 2·radius+1]


class Strongest(Reduction):
    """Of each row: the largest weight among the keys in ``among`` [B, S], the offset of its key if that is near, the
    largest weight among all other keys, and the weights of all near keys, as `Offsets` gives them.

    Values are [B, H, L], 0 where a row sees none of the keys. Offsets go from −radius to radius; they are FAR where
    the key is farther away or another one has the same weight. The key of a far maximum is not looked up, as
    `MaxAmong` does: that costs more.
    """

    online = True
    FAR = 1 << 30

    def __init__(self, among: Tensor, radius: int) -> None:
        self.radius, self._choice = radius, _Choice(among)

    def start(self, shape: Shape, like: Tensor) -> _Maxima:
        far, others = (like.new_full(shape[:3], LOWEST) for _ in range(2))
        return _Maxima(far, like.new_full((*shape[:2], 2 * self.radius + 1, shape[2]), LOWEST), others)

    def update(self, state: _Maxima, block: Block) -> None:
        """Copy the near log-weights, and raise the maxima of all other keys."""
        state.first = block.scores.origin[2]
        near = state.near.transpose(-1, -2)[block.at]
        for rows, offsets, part in block.band(block.centered, self.radius):
            near[..., rows, offsets] = part + block.offset[..., rows, :] if block.shifted else part
        every = slice(0, block.centered.shape[-2])
        for chosen_by, run in self._choice.runs(block.keys):
            columns = block.centered[..., run.start - block.keys.start : run.stop - block.keys.start]
            if chosen_by == _SOME:
                columns = columns.masked_fill(self._choice.among[block.batch, None, None, run], LOWEST)
            if chosen_by != _ALL:
                _raise_to(state.others[block.at], columns, every, block)
        for rows, keys, part in _without_near(block, self.radius):
            for chosen_by, run in self._choice.runs(keys):
                columns = part[..., run.start - keys.start : run.stop - keys.start]
                if chosen_by == _SOME:
                    columns = columns.masked_fill(~self._choice.among[block.batch, None, None, run], LOWEST)
                if chosen_by != _NONE:
                    _raise_to(state.far[block.at], columns, rows, block)

    def rescale(self, state: _Maxima, at: Rows, by: Tensor, total: Tensor) -> None:
        state.far[at].add_(by.squeeze(-1))
        state.near.transpose(-1, -2)[at].add_(by)
        state.others[at].add_(by.squeeze(-1))

    def finish(self, state: _Maxima) -> StrongestKeys:
        """The largest near key is the strongest if it is above each other near key and above all far keys."""
        near = state.near
        candidates = near.clone()
        for rows, left_out in self._choice.left_out_near(self.radius, state.first, near.shape[-1]):
            candidates[..., rows].masked_fill_(left_out, LOWEST)
        best = candidates.amax(2)
        is_best = candidates.sub_(best.unsqueeze(2)).sign_().add_(1)
        apart = torch.arange(-self.radius, self.radius + 1, dtype=near.dtype, device=near.device)
        count, offsets = (torch.stack([torch.ones_like(apart), apart]) @ is_best).unbind(2)
        offsets = offsets.long().where((best > state.far) & (count == 1), self.FAR)
        return StrongestKeys(
            _weights(torch.maximum(state.far, best)), offsets, _weights(state.others), _weights(near).mT
        )


@dataclass(eq=False)
class _Maxima:
    """The largest log-weights so far."""

    far: Tensor  # [B, H, L]: of chosen keys that are not near
    near: Tensor  # [B, H, 2·radius+1, L]: the log-weight at each offset
    others: Tensor  # [B, H, L]: of keys that are not chosen
    first: int = 0  # the position of the first row


def _weights(logs: Tensor) -> Tensor:
    """Their exp; 0 below what float32 represents well, where exp is thirty times as slow."""
    return torch.threshold_(logs.clamp(min=_SMALL).exp_(), 2 * math.exp(_SMALL), 0.0)


def _raise_to(maxima: Tensor, centered: Tensor, rows: slice, block: Block) -> None:
    """Raise the maxima [b, h, r] of some rows of a block to the largest log-weight in ``centered``."""
    if not centered.shape[-1]:
        return
    largest = centered.amax(-1)
    if block.shifted:
        largest = largest + block.offset[..., rows, 0]
    torch.maximum(maxima[..., rows], largest, out=maxima[..., rows])


def _without_near(block: Block, radius: int) -> Iterator[tuple[slice, slice, Tensor]]:
    """The block's log-weights in parts: rows of the block, absolute keys, and [b, h, r, c] with near keys LOWEST.

    Parts without near keys are views; keys after a row are left out where the mask hides the future.
    """
    height, width = block.centered.shape[-2:]
    first = block.scores.positions(block.rows).start - block.keys.start  # the column of the first row's position
    if first - radius >= width or first + height + radius <= 0:
        yield slice(0, height), block.keys, block.centered
        return
    start = block.keys.start
    for top in range(0, height, _ROWS):
        rows = slice(top, min(top + _ROWS, height))
        left = min(max(first + rows.start - radius, 0), width)
        right = min(max(first + rows.stop + radius, left), width)
        yield rows, slice(start, start + left), block.centered[..., rows, :left]
        if left < right:
            part = block.centered[..., rows, left:right]
            yield (
                rows,
                slice(start + left, start + right),
                part + _hide_near(*part.shape[-2:], first + top - left, radius).to(part),
            )
        if right < width and not block.hides_the_future:
            yield rows, slice(start + right, block.keys.stop), block.centered[..., rows, right:]


@cache
def _hide_near(height: int, width: int, first: int, radius: int) -> Tensor:
    """[height, width]: LOWEST for near cells, else 0; ``first`` is the column of the first row's position."""
    apart = torch.arange(width) - torch.arange(first, first + height)[:, None]
    return torch.zeros(height, width).masked_fill(apart.abs() <= radius, LOWEST)


class _Choice:
    """Which keys the texts of a batch choose, as runs of neighbouring keys that all, none or some texts choose."""

    def __init__(self, among: Tensor) -> None:
        self.among = among
        chosen_by = among.any(0).int() + among.all(0).int()
        edges = [0, *((chosen_by.diff() != 0).nonzero().flatten() + 1).tolist(), len(chosen_by)]
        self._runs = [slice(start, stop) for start, stop in pairwise(edges)]
        self._chosen_by = chosen_by[edges[:-1]].tolist()
        self._left_out: dict[tuple[int, int, int], list[tuple[slice, Tensor]]] = {}

    def runs(self, keys: slice) -> Iterator[tuple[int, slice]]:
        """The runs within a span of keys: _NONE, _SOME or _ALL, and the keys."""
        first = bisect_right(self._runs, keys.start, key=lambda run: int(run.stop))
        last = bisect_left(self._runs, keys.stop, key=lambda run: int(run.start))
        for chosen_by, run in zip(self._chosen_by[first:last], self._runs[first:last], strict=True):
            yield chosen_by, slice(max(run.start, keys.start), min(run.stop, keys.stop))

    def left_out_near(self, radius: int, first: int, rows: int) -> list[tuple[slice, Tensor]]:
        """Rows, counted from position ``first``, with near keys that are left out; which, [B, 1, 2·radius+1, rows].

        Computed once for all matrices of this shape.
        """
        at = radius, first, rows
        if at not in self._left_out:
            room = (radius, radius + max(0, first + rows - self.among.shape[-1]))
            windows = torch.nn.functional.pad(~self.among, room).unfold(-1, 2 * radius + 1, 1)
            windows = windows[:, first : first + rows]
            self._left_out[at] = [(run, windows[:, run].mT.unsqueeze(1)) for run in _runs(windows.any(-1).any(0))]
        return self._left_out[at]


def _runs(chosen: Tensor) -> list[slice]:
    """Neighbours among the chosen of [S], as slices: views of a tensor, where an index would copy."""
    edges = torch.nn.functional.pad(chosen.int(), (1, 1)).diff()
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [slice(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]
