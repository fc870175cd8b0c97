"""Questions that a narrow product P @ x answers: masses, norms, mean distances; several share one product."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.ops.reductions import Block, Reduction
from headscope.ops.reductions.reduction import Shape

__all__ = ["Distance", "Linear", "Product", "Together"]

_FEW = 64  # neighbouring keys: columns that are 0 but for them have a product of their own
_AHEAD = 1 << 12  # keys whose columns are made at once

Rows = tuple[slice, slice, slice]


class Linear(Reduction):
    """A question that a narrow product P @ x answers; several of them share one product, see :class:`Together`."""

    online = True
    number: int  # how many columns N the x has
    settles = False  # whether settle() does anything

    @abstractmethod
    def columns(self, batch: slice, heads: slice, keys: slice, origin: int) -> Tensor:
        """X of some keys as [b or 1, h or 1, N, c]; positions in it count from ``origin``."""

    def settle(self, block: Block, found: list[Tensor | None]) -> None:
        """What must be done in place to a block's P @ x before it is added up: N of [b, h, r], None where x is 0.

        The origin of its columns was the block's first key.
        """
        return

    def answer(self, sums: list[Tensor]) -> Tensor:
        """The answer from the sums over all blocks, N of [B, H, L]."""
        return torch.stack(sums, -1)

    def start(self, shape: Shape, like: Tensor) -> _Sums:
        """As the only one of several."""
        return Together([self]).start(shape, like)

    def update(self, state: _Sums, block: Block) -> None:
        """A product of its own."""
        Together([self]).update(state, block)

    def rescale(self, state: _Sums, at: Rows, by: Tensor, total: Tensor) -> None:
        """Every weight by its row's factor."""
        Together([self]).rescale(state, at, by, total)

    def finish(self, state: _Sums) -> Tensor:
        """The answer."""
        return Together([self]).finish(state)[0]


class Together(Reduction):
    """Several linear questions by one product, which reads the weights once: the list of their answers.

    Columns that are 0 but for a few neighbouring keys, as those of sinks are, have a product of their own with these.
    """

    online = True

    def __init__(self, parts: Sequence[Linear]) -> None:
        self.parts = parts

    def start(self, shape: Shape, like: Tensor) -> _Sums:
        """Zeros for all columns that are not 0 throughout."""
        every, keys = slice(None), slice(0, shape[3])
        used = torch.cat([(part.columns(every, every, keys, -1) != 0).flatten(0, 1).any(0) for part in self.parts])
        many, few, near = _kinds(used)
        kinds = [_Kind(numbers, at, like.new_zeros((*shape[:3], len(numbers))))
                 for numbers, at in ((many, keys), (few, near)) if numbers]  # fmt: skip
        return _Sums(kinds, len(used), like.new_zeros(()).expand(shape[:3]))

    def update(self, state: _Sums, block: Block) -> None:
        """One product of many keys' columns, and one of few keys' where the block has them."""
        found = [(kind, kind.product(self.parts, block)) for kind in state.kinds if kind.is_in(block)]
        first = 0
        for question in self.parts:
            own = range(first, first + question.number)
            first = own.stop
            if question.settles:
                known = {n: part[..., i] for kind, part in found for i, n in enumerate(kind.numbers) if n in own}
                question.settle(block, [known.get(number) for number in own])
        for kind, part in found:
            kind.sums[block.at].add_(part)

    def rescale(self, state: _Sums, at: Rows, by: Tensor, total: Tensor) -> None:
        """Every weight by its row's factor."""
        for kind in state.kinds:
            kind.sums[at].mul_(by.exp())

    def finish(self, state: _Sums) -> list[Tensor]:
        """The answer of each."""
        columns = {n: part for kind in state.kinds for n, part in zip(kind.numbers, kind.sums.unbind(-1), strict=True)}
        answers, first = list[Tensor](), 0
        for part in self.parts:
            own = range(first, first + part.number)
            answers.append(part.answer([columns.get(number, state.zeros) for number in own]))
            first += part.number
        return answers


@dataclass(frozen=True, eq=False)
class _Kind:
    """Columns, numbered over all parts, that are 0 outside of some keys, and the sums of their products so far."""

    numbers: list[int]
    keys: slice
    sums: Tensor  # [B, H, L, N]
    held: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def is_in(self, block: Block) -> bool:
        """Whether a block has any of the keys."""
        return self.keys.start < block.keys.stop and block.keys.start < self.keys.stop

    def product(self, parts: Sequence[Linear], block: Block) -> Tensor:
        """P @ x, [b, h, r, N]."""
        keys = slice(max(self.keys.start, block.keys.start), min(self.keys.stop, block.keys.stop))
        columns = self._columns(parts, block, keys)[..., : keys.stop - keys.start]
        if keys == block.keys:
            return block.product(columns)
        return block.product(columns, slice(keys.start - block.keys.start, keys.stop - block.keys.start))

    def _columns(self, parts: Sequence[Linear], block: Block, keys: slice) -> Tensor:
        """Those of the keys, and of some after them: other rows' blocks may begin with the same key, and see more."""
        at = block.batch.start, block.heads.start, block.keys.start
        held = self.held.get(at)
        if held is None or held.shape[-1] < keys.stop - keys.start:
            stop = max(2 * keys.stop - keys.start, keys.start + _AHEAD)
            some = slice(keys.start, min(self.keys.stop, stop))
            found = [part.columns(block.batch, block.heads, some, block.keys.start) for part in parts]
            size = [max(columns.shape[axis] for columns in found) for axis in (0, 1)]
            joined = torch.cat([columns.expand(*size, -1, -1) for columns in found], -2)
            held = self.held[at] = joined[:, :, self.numbers].to(block.weights.dtype)
        return held


@dataclass(frozen=True, eq=False)
class _Sums:
    """What has been summed up, by kinds of columns."""

    kinds: list[_Kind]
    number: int  # of all columns
    zeros: Tensor  # [B, H, L]: the sums of a column that is 0


def _kinds(used: Tensor) -> tuple[list[int], list[int], slice]:
    """The numbers of columns that many keys use, [N, S], of those that a few neighbours use, and these."""
    places = torch.arange(used.shape[-1], device=used.device)
    first = torch.where(used, places, used.shape[-1]).amin(-1).tolist()
    last = torch.where(used, places, -1).amax(-1).tolist()
    start = min((a for a, b in zip(first, last, strict=True) if 0 <= b < a + _FEW), default=0)
    few = [n for n, (a, b) in enumerate(zip(first, last, strict=True)) if start <= a <= b < start + _FEW]
    many = [n for n, b in enumerate(last) if b >= 0 and n not in few]
    return many, few, slice(start, 1 + max((last[n] for n in few), default=start - 1))


class Product(Linear):
    """P @ x for x [B, 1 or H, S, N], in the pass: [B, H, L, N]."""

    def __init__(self, x: Tensor) -> None:
        self._columns, self.number = x.transpose(-1, -2).contiguous(), x.shape[-1]

    def columns(self, batch: slice, heads: slice, keys: slice, origin: int) -> Tensor:
        """As they were given."""
        return self._columns[batch, slice(None) if self._columns.shape[1] == 1 else heads, :, keys]


class Distance(Linear):
    """Σ_j P_ij·|i − j| over the keys of each of the sets ``among`` [B, S, N]: [B, H, L, N] (arXiv 1906.04284)."""

    settles = True

    def __init__(self, among: Tensor) -> None:
        self._among, self.number = among.transpose(-1, -2).contiguous(), 2 * among.shape[-1]

    def columns(self, batch: slice, heads: slice, keys: slice, origin: int) -> Tensor:
        """Of each set 1 for each of its keys; then the positions of these. Differences of large ones are inexact."""
        among = self._among[batch, :, keys].float()
        positions = torch.arange(keys.start - origin, keys.stop - origin, dtype=among.dtype, device=among.device)
        return torch.cat([among, among * positions], -2).unsqueeze(1)

    def settle(self, block: Block, found: list[Tensor | None]) -> None:
        """Σ P·(i − j) is what the product gives; keys after their rows, which may lie at the end, count twice over."""
        start, span, sets = block.keys.start, block.scores.positions(block.rows), len(found) // 2
        like = block.weights
        rows = torch.arange(span.start - start, span.stop - start, dtype=like.dtype, device=like.device)
        after = slice(max(span.start + 1, start) - start, block.keys.stop - start)
        for number, (mass, moment) in enumerate(zip(found[:sets], found[sets:], strict=True)):
            if mass is None or moment is None:
                continue
            torch.addcmul(moment.neg_(), mass, rows, out=moment)
            if after.start < after.stop and not block.hides_the_future:
                keys = torch.arange(after.start, after.stop, dtype=like.dtype, device=like.device)
                beyond = (keys - rows[:, None]).clamp(min=0)  # [r, c]
                beyond = beyond * self._among[block.batch, None, None, number, block.keys][..., after]
                moment.add_(torch.linalg.vecdot(block.weights[..., after], beyond), alpha=2)

    def answer(self, sums: list[Tensor]) -> Tensor:
        """The second half."""
        return torch.stack(sums[self.number // 2 :], -1)
