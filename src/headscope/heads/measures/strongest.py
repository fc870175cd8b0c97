"""The strongest key of each row among those that count, how far off it is, and the weights on keys around the row."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from headscope.ops.reductions import Block, Max, Reduction
from headscope.ops.reductions.reduction import Shape
from headscope.ops.scores import LOWEST

__all__ = ["MaxAmong", "Strongest", "StrongestKeys"]

Rows = tuple[slice, slice, slice]
_SMALL = -87.0  # the logarithm of a weight that counts as none


class MaxAmong(Max):
    """The largest weight of each row among the keys in ``among`` [B, S], and its key: each [B, H, L]."""

    def __init__(self, among: Tensor) -> None:
        self._places = _Places(among)

    def update(self, state: tuple[Tensor, Tensor], block: Block) -> None:
        """Hide the others for as long as this question looks."""
        if self._places.any_in(block.keys):
            with self._places.alone(block):
                super().update(state, block)


class StrongestKeys(NamedTuple):
    """See :class:`Strongest`."""

    values: Tensor  # [B, H, L]
    offsets: Tensor  # [B, H, L]
    others: Tensor  # [B, H, L]
    near: Tensor  # [B, H, L, 2·radius+1]


class Strongest(Reduction):
    """The largest weight of each row among the keys in ``among`` [B, S], how far off its key is, if it is near, the
    largest weight among all others, and the weights of all near keys, as `Offsets` gives them.

    Values [B, H, L], 0 where a row sees none of them; offsets from −radius to radius, and FAR where the key is farther
    off or not the only one with that weight. To know this costs less than to know its place, as `MaxAmong` does.
    """

    online = True
    FAR = 1 << 30

    def __init__(self, among: Tensor, radius: int) -> None:
        self.radius, self._places = radius, _Places(among)

    def start(self, shape: Shape, like: Tensor) -> _Found:
        """Nothing found yet."""
        far, others = (like.new_full(shape[:3], LOWEST) for _ in range(2))
        return _Found(far, like.new_full((*shape[:2], 2 * self.radius + 1, shape[2]), LOWEST), others)

    def update(self, state: _Found, block: Block) -> None:
        """Note the near keys and the others, and hide them while the largest of the rest is looked for."""
        far, near, others = (part[block.at] for part in (state.far, state.near.transpose(-1, -2), state.others))
        state.first = block.scores.origin[2]
        band = list(block.band(block.centered, self.radius))
        for rows, offsets, part in band:
            near[..., rows, offsets] = part
            part.fill_(LOWEST)
        with self._places.alone(block) as hidden:
            for part in hidden:
                _raise_to(others, part, block)
            _raise_to(far, block.centered, block)
        for rows, offsets, part in band:
            part.copy_(near[..., rows, offsets])
            if block.shifted:
                near[..., rows, offsets].add_(block.offset[..., rows, :])

    def rescale(self, state: _Found, at: Rows, by: Tensor, total: Tensor) -> None:
        """What was found keeps its place."""
        state.far[at].add_(by.squeeze(-1))
        state.near.transpose(-1, -2)[at].add_(by)
        state.others[at].add_(by.squeeze(-1))

    def finish(self, state: _Found) -> StrongestKeys:
        """The largest at any offset is the strongest if it is above each other there and all that are far."""
        near, others = state.near, state.others
        chosen = near.clone()
        for rows, left_out in self._places.near(self.radius, state.first, near.shape[-1]):
            part = chosen[..., rows]
            others[..., rows].clamp_(min=part.masked_fill(~left_out, LOWEST).amax(2))
            part.masked_fill_(left_out, LOWEST)
        best = chosen.amax(2)
        equal = chosen.sub_(best.unsqueeze(2)).sign_().add_(1)
        apart = torch.arange(-self.radius, self.radius + 1, dtype=near.dtype, device=near.device)
        number, offsets = (torch.stack([torch.ones_like(apart), apart]) @ equal).unbind(2)
        offsets = offsets.long().where((best > state.far) & (number == 1), self.FAR)
        return StrongestKeys(_weights(torch.maximum(state.far, best)), offsets, _weights(others), _weights(near).mT)


@dataclass(eq=False)
class _Found:
    """The largest log-weights so far: of far keys [B, H, L], of each offset [B, H, 2·radius+1, L], of keys left out."""

    far: Tensor
    near: Tensor
    others: Tensor
    first: int = 0  # the position of the first row


def _weights(logs: Tensor) -> Tensor:
    """Their exp, 0 where it is below what float32 holds well: to ask for that takes thirty times as long."""
    return torch.threshold_(logs.clamp(min=_SMALL).exp_(), 2 * math.exp(_SMALL), 0.0)


def _raise_to(held: Tensor, centered: Tensor, block: Block) -> None:
    """Each row's largest log-weight so far, [b, h, r], with some of the block's columns looked at."""
    largest = centered.amax(-1)
    torch.maximum(held, largest + block.offset.squeeze(-1) if block.shifted else largest, out=held)


class _Places:
    """Which keys a text of a batch leaves out: known once, asked of every block."""

    def __init__(self, among: Tensor) -> None:
        self._among = among
        self._chosen = among.any(0)
        self._by_none = _runs(~self._chosen)
        self._by_some = _runs(self._chosen & ~among.all(0))
        self._near: dict[tuple[int, int, int], list[tuple[slice, Tensor]]] = {}

    def any_in(self, keys: slice) -> bool:
        """Whether a text chooses any of some keys."""
        return bool(self._chosen[keys].any())

    def near(self, radius: int, first: int, rows: int) -> list[tuple[slice, Tensor]]:
        """Rows, counted from ``first``, with keys at most ``radius`` off that are left out, and which of these are so.

        The latter as [B, 1, 2·radius+1, rows] bool; found once for all matrices that are asked.
        """
        at = radius, first, rows
        if at not in self._near:
            room = (radius, radius + max(0, first + rows - self._among.shape[-1]))
            left_out = torch.nn.functional.pad(~self._among, room).unfold(-1, 2 * radius + 1, 1)[
                :, first : first + rows
            ]
            self._near[at] = [(run, left_out[:, run].mT.unsqueeze(1)) for run in _runs(left_out.any(-1).any(0))]
        return self._near[at]

    @contextmanager
    def alone(self, block: Block) -> Iterator[list[Tensor]]:
        """Hide the others in ``block.centered``, and show them again at the end. Gives what was hidden."""
        held, hidden = list[tuple[Tensor, Tensor]](), list[Tensor]()
        for runs in (self._by_none, self._by_some):
            for run in _within(runs, block.keys):
                part = block.centered[..., run.start - block.keys.start : run.stop - block.keys.start]
                held.append((part, part.clone()))
                if runs is self._by_none:
                    hidden.append(held[-1][1])
                    part.fill_(LOWEST)
                else:
                    among = self._among[block.batch, None, None, run]
                    hidden.append(part.masked_fill(among, LOWEST))
                    part.masked_fill_(~among, LOWEST)
        yield hidden
        for part, before in held:
            part.copy_(before)


def _runs(chosen: Tensor) -> list[slice]:
    """Neighbours among the chosen of [S], as slices: views of a tensor, where an index would copy."""
    edges = torch.nn.functional.pad(chosen.int(), (1, 1)).diff()
    starts, stops = (edges == 1).nonzero().flatten(), (edges == -1).nonzero().flatten()
    return [slice(start, stop) for start, stop in zip(starts.tolist(), stops.tolist(), strict=True)]


def _within(runs: list[slice], keys: slice) -> list[slice]:
    """The parts of sorted runs in a span of keys."""
    first = bisect_right(runs, keys.start, key=lambda run: int(run.stop))
    last = bisect_left(runs, keys.stop, key=lambda run: int(run.start))
    return [slice(max(run.start, keys.start), min(run.stop, keys.stop)) for run in runs[first:last]]
