"""The strongest key of each row among those that count, and how far off it is."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from headscope.reductions import Block, Max, Reduction
from headscope.reductions.reduction import Shape
from headscope.scores import LOWEST

__all__ = ["MaxAmong", "Strongest", "StrongestKeys"]

Rows = tuple[slice, slice, slice]


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
    """Of each row, [B, H, L]: see :class:`Strongest`."""

    values: Tensor
    offsets: Tensor
    others: Tensor


class Strongest(Reduction):
    """The largest weight of each row among the keys in ``among`` [B, S], how far off its key is, if it is near, and the
    largest weight among all others.

    Values [B, H, L], 0 where a row sees none of them; offsets from −radius to radius, and FAR where the key is farther
    off or not the only one with that weight. To know this costs less than to know its place, as `MaxAmong` does.
    """

    online = True
    FAR = 1 << 30

    def __init__(self, among: Tensor, radius: int) -> None:
        self.radius, self._places = radius, _Places(among)

    def start(self, shape: Shape, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Nothing found yet: among the far keys, at each offset, [B, H, L, 2·radius+1], and among the others."""
        far, others = (like.new_full(shape[:3], LOWEST) for _ in range(2))
        return far, like.new_full((*shape[:3], 2 * self.radius + 1), LOWEST), others

    def update(self, state: tuple[Tensor, Tensor, Tensor], block: Block) -> None:
        """Note the others and the near keys, and hide them while the largest of the rest is looked for."""
        far, near, others = (part[block.at] for part in state)
        with self._places.alone(block) as hidden:
            for part in hidden:
                _raise_to(others, part, block)
            band = list(block.band(block.centered, self.radius))
            for rows, offsets, part in band:
                near[..., rows, offsets] = part
                part.fill_(LOWEST)
            _raise_to(far, block.centered, block)
            for rows, offsets, part in band:
                part.copy_(near[..., rows, offsets])
                if block.shifted:
                    near[..., rows, offsets].add_(block.offset[..., rows, :])

    def rescale(self, state: tuple[Tensor, Tensor, Tensor], at: Rows, by: Tensor, total: Tensor) -> None:
        """What was found keeps its place."""
        far, near, others = state
        far[at].add_(by.squeeze(-1))
        near[at].add_(by)
        others[at].add_(by.squeeze(-1))

    def finish(self, state: tuple[Tensor, Tensor, Tensor]) -> StrongestKeys:
        """The largest at any offset is the strongest if it is above each other there and all that are far."""
        far, near, others = state
        best = near.max(-1)
        alone = (best.values > far) & ((near == best.values.unsqueeze(-1)).sum(-1) == 1)
        offsets = (best.indices - self.radius).where(alone, self.FAR)
        return StrongestKeys(_weights(torch.maximum(far, best.values)), offsets, _weights(others))


def _weights(logs: Tensor) -> Tensor:
    return logs.exp().masked_fill_(logs <= LOWEST / 2, 0)


def _raise_to(held: Tensor, centered: Tensor, block: Block) -> None:
    """Each row's largest log-weight so far, [b, h, r], with some of the block's columns looked at."""
    largest = centered.amax(-1)
    torch.maximum(held, largest + block.offset.squeeze(-1) if block.shifted else largest, out=held)


class _Places:
    """Which keys a text of a batch leaves out: known once, asked of every block."""

    def __init__(self, among: Tensor) -> None:
        self._among = among
        self._left_out = _runs(~among.all(0))
        self._chosen = among.any(0)

    def any_in(self, keys: slice) -> bool:
        """Whether a text chooses any of some keys."""
        return bool(self._chosen[keys].any())

    @contextmanager
    def alone(self, block: Block) -> Iterator[list[Tensor]]:
        """Hide the others in ``block.centered``, and show them again at the end. Gives what was hidden."""
        parts, held, hidden = list[Tensor](), list[Tensor](), list[Tensor]()
        for run in _within(self._left_out, block.keys):
            part = block.centered[..., run.start - block.keys.start : run.stop - block.keys.start]
            before = part.clone()
            if bool(self._chosen[run].any()):
                among = self._among[block.batch, None, None, run]
                part.masked_fill_(~among, LOWEST)
                hidden.append(before.masked_fill(among, LOWEST))
            else:
                part.fill_(LOWEST)
                hidden.append(before)
            parts.append(part)
            held.append(before)
        yield hidden
        for part, before in zip(parts, held, strict=True):
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
