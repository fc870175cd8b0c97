"""Reductions computed by a narrow product P @ x: masses, norms, mean distances; several share one product."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from headscope.ops.reductions import Block, Reduction
from headscope.ops.reductions.reduction import Shape

_FEW = 64  # neighbouring keys: columns that are 0 elsewhere have a product of their own
_AHEAD = 1 << 12  # keys whose columns are computed at once

Rows = tuple[slice, slice, slice]


class ProductReduction(Reduction):
    """A reduction computed by a narrow product P @ x; several share one product, see :class:`SharedProduct`."""

    online = True
    width: int  # the number of columns N of x
    corrects = False  # whether correct() does anything

    @abstractmethod
    def columns(self, batch: slice, heads: slice, keys: slice, origin: int) -> Tensor:
        """X of some keys as [b or 1, h or 1, N, c]; positions in it count from ``origin``."""

    def correct(self, block: Block, products: list[Tensor | None]) -> None:
        """Change a block's P @ x in place before it is added up: N of [b, h, r], None where x is 0.

        The origin of its columns was the block's first key.
        """
        return

    def result(self, sums: list[Tensor]) -> Tensor:
        """The result from the sums over all blocks, N of [B, H, L]."""
        return torch.stack(sums, -1)

    def start(self, shape: Shape, like: Tensor) -> _ColumnSums:
        return SharedProduct([self]).start(shape, like)

    def update(self, state: _ColumnSums, block: Block) -> None:
        SharedProduct([self]).update(state, block)

    def rescale(self, state: _ColumnSums, at: Rows, by: Tensor, total: Tensor) -> None:
        SharedProduct([self]).rescale(state, at, by, total)

    def finish(self, state: _ColumnSums) -> Tensor:
        return SharedProduct([self]).finish(state)[0]


class SharedProduct(Reduction):
    """Several reductions by one product, which reads the weights once: the list of their results.

    Columns that are 0 except for a few neighbouring keys, such as those of sinks, have a product of their own.
    """

    online = True

    def __init__(self, parts: Sequence[ProductReduction]) -> None:
        self.parts = parts

    def start(self, shape: Shape, like: Tensor) -> _ColumnSums:
        every, keys = slice(None), slice(0, shape[3])
        used = torch.cat([(part.columns(every, every, keys, -1) != 0).flatten(0, 1).any(0) for part in self.parts])
        wide, narrow, span = _split(used)
        groups = [_ColumnGroup(numbers, at, like.new_zeros((*shape[:3], len(numbers))))
                  for numbers, at in ((wide, keys), (narrow, span)) if numbers]  # fmt: skip
        return _ColumnSums(groups, like.new_zeros(()).expand(shape[:3]))

    def update(self, state: _ColumnSums, block: Block) -> None:
        """One product of many keys' columns, and one of few keys' where the block has them."""
        products = [(group, group.product(self.parts, block)) for group in state.groups if group.is_in(block)]
        for part, own in self._numbered():
            if part.corrects:
                columns = {n: x[..., i] for group, x in products for i, n in enumerate(group.numbers) if n in own}
                part.correct(block, [columns.get(number) for number in own])
        for group, product in products:
            group.sums[block.at].add_(product)

    def rescale(self, state: _ColumnSums, at: Rows, by: Tensor, total: Tensor) -> None:
        for group in state.groups:
            group.sums[at].mul_(by.exp())

    def finish(self, state: _ColumnSums) -> list[Tensor]:
        columns = {n: x for group in state.groups for n, x in zip(group.numbers, group.sums.unbind(-1), strict=True)}
        return [part.result([columns.get(number, state.zeros) for number in own]) for part, own in self._numbered()]

    def _numbered(self) -> Iterator[tuple[ProductReduction, range]]:
        """Each reduction with the numbers of its columns."""
        first = 0
        for part in self.parts:
            yield part, range(first, first + part.width)
            first += part.width


@dataclass(frozen=True, eq=False)
class _ColumnGroup:
    """Columns, numbered over all parts, that are 0 outside of some keys, and the sums of their products."""

    numbers: list[int]
    keys: slice
    sums: Tensor  # [B, H, L, N]
    cache: dict[tuple[int, int, int], Tensor] = field(default_factory=dict)

    def is_in(self, block: Block) -> bool:
        """Whether a block has any of the keys."""
        return self.keys.start < block.keys.stop and block.keys.start < self.keys.stop

    def product(self, parts: Sequence[ProductReduction], block: Block) -> Tensor:
        """P @ x, [b, h, r, N]."""
        keys = slice(max(self.keys.start, block.keys.start), min(self.keys.stop, block.keys.stop))
        columns = self._columns(parts, block, keys)[..., : keys.stop - keys.start]
        if keys == block.keys:
            return block.product(columns)
        return block.product(columns, slice(keys.start - block.keys.start, keys.stop - block.keys.start))

    def _columns(self, parts: Sequence[ProductReduction], block: Block, keys: slice) -> Tensor:
        """The columns of the keys and of some after them: blocks of later rows begin at the same key and are wider."""
        block_key = block.batch.start, block.heads.start, block.keys.start
        columns = self.cache.get(block_key)
        if columns is None or columns.shape[-1] < keys.stop - keys.start:
            stop = max(2 * keys.stop - keys.start, keys.start + _AHEAD)
            span = slice(keys.start, min(self.keys.stop, stop))
            each = [part.columns(block.batch, block.heads, span, block.keys.start) for part in parts]
            size = [max(x.shape[axis] for x in each) for axis in (0, 1)]
            joined = torch.cat([x.expand(*size, -1, -1) for x in each], -2)
            columns = self.cache[block_key] = joined[:, :, self.numbers].to(block.weights.dtype)
        return columns


@dataclass(frozen=True, eq=False)
class _ColumnSums:
    """The sums over all blocks so far."""

    groups: list[_ColumnGroup]
    zeros: Tensor  # [B, H, L]: the sums of a column that is 0


def _split(used: Tensor) -> tuple[list[int], list[int], slice]:
    """The numbers of columns [N, S] that are not 0 at many keys; of those that are 0 outside of a span; the span."""
    positions = torch.arange(used.shape[-1], device=used.device)
    first = torch.where(used, positions, used.shape[-1]).amin(-1).tolist()
    last = torch.where(used, positions, -1).amax(-1).tolist()
    start = min((a for a, b in zip(first, last, strict=True) if 0 <= b < a + _FEW), default=0)
    narrow = [n for n, (a, b) in enumerate(zip(first, last, strict=True)) if start <= a <= b < start + _FEW]
    wide = [n for n, b in enumerate(last) if b >= 0 and n not in narrow]
    return wide, narrow, slice(start, 1 + max((last[n] for n in narrow), default=start - 1))


class Product(ProductReduction):
    """P @ x for x [B, 1 or H, S, N], in the pass: [B, H, L, N]."""

    def __init__(self, x: Tensor) -> None:
        self._columns, self.width = x.transpose(-1, -2).contiguous(), x.shape[-1]

    def columns(self, batch: slice, heads: slice, keys: slice, origin: int) -> Tensor:
        return self._columns[batch, slice(None) if self._columns.shape[1] == 1 else heads, :, keys]


class Distance(ProductReduction):
    """Σ_j P_ij·|i − j| over the keys of each of the sets ``among`` [B, S, N]: [B, H, L, N] (arXiv 1906.04284)."""

    corrects = True

    def __init__(self, among: Tensor) -> None:
        self._among, self.width = among.transpose(-1, -2).contiguous(), 2 * among.shape[-1]

    def columns(self, batch: slice, heads: slice, keys: slice, origin: int) -> Tensor:
        """For each set 1 at its keys, then their positions from ``origin``, which is near: large floats are inexact."""
        among = self._among[batch, :, keys].float()
        positions = torch.arange(keys.start - origin, keys.stop - origin, dtype=among.dtype, device=among.device)
        return torch.cat([among, among * positions], -2).unsqueeze(1)

    def correct(self, block: Block, products: list[Tensor | None]) -> None:
        """Turn the products into Σ P·(i − j), and add 2·Σ P·(j − i) over the keys after their rows."""
        start, span, sets = block.keys.start, block.scores.positions(block.rows), len(products) // 2
        like = block.weights
        rows = torch.arange(span.start - start, span.stop - start, dtype=like.dtype, device=like.device)
        after = slice(max(span.start + 1, start) - start, block.keys.stop - start)
        for number, (mass, moment) in enumerate(zip(products[:sets], products[sets:], strict=True)):
            if mass is None or moment is None:
                continue
            torch.addcmul(moment.neg_(), mass, rows, out=moment)
            if after.start < after.stop and not block.hides_the_future:
                keys = torch.arange(after.start, after.stop, dtype=like.dtype, device=like.device)
                beyond = (keys - rows[:, None]).clamp(min=0)  # [r, c]
                beyond = beyond * self._among[block.batch, None, None, number, block.keys][..., after]
                moment.add_(torch.linalg.vecdot(block.weights[..., after], beyond), alpha=2)

    def result(self, sums: list[Tensor]) -> Tensor:
        """The second half of the sums; the first are masses."""
        return torch.stack(sums[self.width // 2 :], -1)
