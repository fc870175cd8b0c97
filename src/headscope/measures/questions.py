"""Questions that measures of heads ask in the pass over the weights, beyond those that everybody asks."""

from __future__ import annotations

from abc import abstractmethod
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from headscope.reductions import Block, Max, Reduction, WeightsAt
from headscope.scores import LOWEST

__all__ = ["Distance", "LargestAmong", "Linear", "MaxAmong", "Product", "Strongest", "Together"]

Shape = tuple[int, int, int, int]
Rows = tuple[slice, slice, slice]


class Linear(Reduction):
    """A question that a narrow product P @ x answers; several of them share one product, see :class:`Together`."""

    online = True

    @abstractmethod
    def columns(self, block: Block) -> Tensor | None:
        """X of the block's keys as [b or 1, h or 1, N, c]; None where it is 0."""

    @abstractmethod
    def add(self, state: Tensor, block: Block, found: Tensor) -> None:
        """Add a block's P @ x, [b, h, r, N]."""

    def update(self, state: Tensor, block: Block) -> None:
        """A product of its own."""
        columns = self.columns(block)
        if columns is not None:
            self.add(state, block, block.product(columns))


class Together(Reduction):
    """Several linear questions by one product, which reads the weights once: the list of their answers."""

    online = True

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = parts

    def start(self, shape: Shape, like: Tensor) -> list[Tensor]:
        """The state of each."""
        return [part.start(shape, like) for part in self.parts]

    def update(self, state: list[Tensor], block: Block) -> None:
        """One product of all columns side by side."""
        asked = [(part, own, part.columns(block)) for part, own in zip(self.parts, state, strict=True)]
        given = [(part, own, columns) for part, own, columns in asked if columns is not None]
        if not given:
            return
        size = [max(columns.shape[axis] for _, _, columns in given) for axis in (0, 1)]
        joined = torch.cat([columns.expand(*size, -1, -1) for _, _, columns in given], -2)
        found = block.product(joined).split([columns.shape[-2] for _, _, columns in given], -1)
        for (part, own, _), answer in zip(given, found, strict=True):
            part.add(own, block, answer)

    def rescale(self, state: list[Tensor], at: Rows, by: Tensor, total: Tensor) -> None:
        """Each its own way."""
        for part, own in zip(self.parts, state, strict=True):
            part.rescale(own, at, by, total)

    def finish(self, state: list[Tensor]) -> list[Tensor]:
        """The answer of each."""
        return [part.finish(own) for part, own in zip(self.parts, state, strict=True)]


class Product(Linear):
    """P @ x for x [B, 1 or H, S, N], in the pass: [B, H, L, N]."""

    def __init__(self, x: Tensor) -> None:
        self._columns = x.transpose(-1, -2).contiguous()

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        """Zeros, [B, H, L, N]."""
        return like.new_zeros((*shape[:3], self._columns.shape[-2]))

    def columns(self, block: Block) -> Tensor:
        """As they were given."""
        heads = slice(None) if self._columns.shape[1] == 1 else block.heads
        return self._columns[block.batch, heads, :, block.keys].to(block.weights.dtype)

    def add(self, state: Tensor, block: Block, found: Tensor) -> None:
        """Sums over keys."""
        state[block.at] += found

    def rescale(self, state: Tensor, at: Rows, by: Tensor, total: Tensor) -> None:
        """Every weight by its row's factor."""
        state[at] *= by.exp()


class Distance(Linear):
    """Σ_j P_ij·|i − j| over the keys in ``among`` [B, S]: [B, H, L], in tokens (arXiv 1906.04284)."""

    def __init__(self, among: Tensor) -> None:
        self.among, self._places = among, _Places(among)

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        """Zeros, [B, H, L]."""
        return like.new_zeros(shape[:3])

    def columns(self, block: Block) -> Tensor | None:
        """1 and the position for each key among them."""
        if not self._places.number(block.keys):
            return None
        among = self.among[block.batch, block.keys].to(block.weights.dtype)
        places = _counted(block.keys, block, among)
        return torch.stack([among, among * places], -2).unsqueeze(1)

    def add(self, state: Tensor, block: Block, found: Tensor) -> None:
        """Σ P·(i − j) is what the product gives; keys after their rows, which may lie at the end, count twice over."""
        at, span = state[block.at], block.scores.positions(block.rows)
        rows = _counted(span, block, state)
        at.addcmul_(found[..., 0], rows).sub_(found[..., 1])
        after = slice(max(span.start + 1, block.keys.start), block.keys.stop)
        if after.start < after.stop and not block.hides_the_future:
            beyond = (_counted(after, block, state) - rows.unsqueeze(-1)).clamp(min=0)
            beyond = beyond * self.among[block.batch, after][:, None, None]
            weights = block.weights[..., after.start - block.keys.start :]
            at += 2 * torch.linalg.vecdot(weights, beyond)

    def rescale(self, state: Tensor, at: Rows, by: Tensor, total: Tensor) -> None:
        """Every weight by its row's factor."""
        state[at] *= by.exp().squeeze(-1)


def _counted(positions: slice, block: Block, like: Tensor) -> Tensor:
    """Positions from the block's first key on: the difference of large ones would be inexact."""
    start = block.keys.start
    return torch.arange(positions.start - start, positions.stop - start, dtype=like.dtype, device=like.device)


class MaxAmong(Max):
    """The largest weight of each row among the keys in ``among`` [B, S], and its key: each [B, H, L]."""

    def __init__(self, among: Tensor) -> None:
        self._places = _Places(among)

    def update(self, state: tuple[Tensor, Tensor], block: Block) -> None:
        """Hide the others for as long as this question looks."""
        if self._places.number(block.keys):
            with self._places.alone(block):
                super().update(state, block)


class LargestAmong(Reduction):
    """The largest weight of each row among few keys in ``among`` [B, S]: [B, H, L]; 0 where it sees none of them."""

    online = True

    def __init__(self, among: Tensor) -> None:
        self.among, self._places = among, _Places(among)

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        """Nothing found yet, [B, H, L]."""
        return like.new_full(shape[:3], LOWEST)

    def update(self, state: Tensor, block: Block) -> None:
        """Look at them alone."""
        for run in self._places.chosen(block.keys):
            among = self.among[block.batch, block.keys][:, None, None, run]
            _raise_to(state[block.at], torch.where(among, block.centered[..., run], LOWEST), block)

    def rescale(self, state: Tensor, at: Rows, by: Tensor, total: Tensor) -> None:
        """What was found keeps its place."""
        state[at] += by.squeeze(-1)

    def finish(self, state: Tensor) -> Tensor:
        """The weights from their logarithms."""
        return state.exp().masked_fill_(state <= LOWEST / 2, 0)


class Strongest(Reduction):
    """The largest weight of each row among the keys in ``among`` [B, S], and how far off its key is, if it is near.

    Values [B, H, L], 0 where a row sees none of them; offsets [B, H, L] from −radius to radius, and FAR where the key
    is farther off or not the only one with that weight. To know this costs less than to know its place, as `MaxAmong`
    does.
    """

    online = True
    FAR = 1 << 30

    def __init__(self, among: Tensor, radius: int) -> None:
        self.radius, self._places = radius, _Places(among)

    def start(self, shape: Shape, like: Tensor) -> tuple[Tensor, Tensor]:
        """Nothing found yet: among the far keys, [B, H, L], and at each offset, [B, H, L, 2·radius+1]."""
        return like.new_full(shape[:3], LOWEST), like.new_full((*shape[:3], 2 * self.radius + 1), LOWEST)

    def update(self, state: tuple[Tensor, Tensor], block: Block) -> None:
        """Note the near keys, and hide them while the largest of the others is looked for."""
        if not self._places.number(block.keys):
            return
        far, near = (part[block.at] for part in state)
        with self._places.alone(block):
            band = list(block.band(block.centered, self.radius))
            held = [part.clone() for _, _, part in band]
            for (rows, offsets, part), before in zip(band, held, strict=True):
                near[..., rows, offsets] = before + block.offset[..., rows, :] if block.shifted else before
                part.fill_(LOWEST)
            _raise_to(far, block.centered, block)
            for (_, _, part), before in zip(band, held, strict=True):
                part.copy_(before)

    def rescale(self, state: tuple[Tensor, Tensor], at: Rows, by: Tensor, total: Tensor) -> None:
        """What was found keeps its place."""
        state[0][at] += by.squeeze(-1)
        state[1][at] += by

    def finish(self, state: tuple[Tensor, Tensor]) -> WeightsAt:
        """The largest at any offset is the strongest if it is above each other there and all that are far."""
        far, near = state
        best = near.max(-1)
        logs = torch.maximum(far, best.values)
        alone = (best.values > far) & ((near == best.values.unsqueeze(-1)).sum(-1) == 1)
        offsets = (best.indices - self.radius).where(alone, self.FAR)
        return WeightsAt(logs.exp().masked_fill_(logs <= LOWEST / 2, 0), offsets)


def _raise_to(held: Tensor, centered: Tensor, block: Block) -> None:
    """Each row's largest log-weight so far, [b, h, r], with some of the block's columns looked at."""
    largest = centered.amax(-1)
    torch.maximum(held, largest + block.offset.squeeze(-1) if block.shifted else largest, out=held)


class _Places:
    """Which keys any text of a batch chooses, and which any leaves out: known once, asked of every block."""

    def __init__(self, among: Tensor) -> None:
        self._among = among
        self._chosen = among.any(0).nonzero().flatten().tolist()
        self._left_out = (~among).any(0).nonzero().flatten().tolist()

    def number(self, keys: slice) -> int:
        """How many are chosen in a span of keys."""
        return bisect_left(self._chosen, keys.stop) - bisect_left(self._chosen, keys.start)

    def chosen(self, keys: slice) -> list[slice]:
        """Runs of those chosen in a span of keys, counted from its start."""
        return _runs(self._chosen, keys)

    @contextmanager
    def alone(self, block: Block) -> Iterator[None]:
        """Hide the others in ``block.centered``, and show them again at the end."""
        runs = _runs(self._left_out, block.keys)
        parts = [block.centered[..., run] for run in runs]
        held = [part.clone() for part in parts]
        for part, run in zip(parts, runs, strict=True):
            among = self._among[block.batch, block.keys][:, None, None, run]
            part.copy_(torch.where(among, part, LOWEST))
        yield
        for part, before in zip(parts, held, strict=True):
            part.copy_(before)


def _runs(places: list[int], keys: slice) -> list[slice]:
    """Neighbours among sorted ``places``, as slices: views of a tensor, where an index would copy."""
    found: list[slice] = []
    for place in places[bisect_left(places, keys.start) : bisect_left(places, keys.stop)]:
        at = place - keys.start
        if found and found[-1].stop == at:
            found[-1] = slice(found[-1].start, at + 1)
        else:
            found.append(slice(at, at + 1))
    return found
