"""Reductions computed by a narrow product P @ x: masses, norms, mean distances; several share one product."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from headscope.ops.reductions import Block, Reduction
from headscope.ops.reductions.reduction import Shape

Rows = tuple[slice, slice, slice]


class ProductReduction(Reduction):
    """A reduction computed by a narrow product P @ x; several share one product, see :class:`SharedProduct`."""

    online = True
    width: int  # the number of columns N of x

    @abstractmethod
    def columns(self, batch: slice, heads: slice, keys: slice) -> Tensor:
        """X of some keys as [b or 1, h or 1, N, c]; positions in it count from the first of them."""

    def correct(self, block: Block, products: Tensor) -> None:
        """Change a block's P @ x, [b, h, r, N], in place before it is added up."""
        return

    def result(self, sums: Tensor) -> Tensor:
        """The result from the sums over all blocks, [B, H, L, N]."""
        return sums

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        return SharedProduct([self]).start(shape, like)

    def update(self, state: Tensor, block: Block) -> None:
        SharedProduct([self]).update(state, block)

    def rescale(self, state: Tensor, at: Rows, by: Tensor, total: Tensor) -> None:
        SharedProduct([self]).rescale(state, at, by, total)

    def finish(self, state: Tensor) -> Tensor:
        return self.result(state)


class SharedProduct(Reduction):
    """Several reductions by one product, which reads the weights once: the list of their results."""

    online = True

    def __init__(self, parts: Sequence[ProductReduction]) -> None:
        self.parts, self.widths = parts, [part.width for part in parts]

    def start(self, shape: Shape, like: Tensor) -> Tensor:
        return like.new_zeros((*shape[:3], sum(self.widths)))

    def update(self, state: Tensor, block: Block) -> None:
        each = [part.columns(block.batch, block.heads, block.keys) for part in self.parts]
        size = [max(x.shape[axis] for x in each) for axis in (0, 1)]
        product = block.product(torch.cat([x.expand(*size, -1, -1) for x in each], -2))
        for part, own in zip(self.parts, product.split(self.widths, -1), strict=True):
            part.correct(block, own)
        state[block.at].add_(product)

    def rescale(self, state: Tensor, at: Rows, by: Tensor, total: Tensor) -> None:
        state[at].mul_(by.exp())

    def finish(self, state: Tensor) -> list[Tensor]:
        return [part.result(own) for part, own in zip(self.parts, state.split(self.widths, -1), strict=True)]


class Product(ProductReduction):
    """P @ x for x [B, 1 or H, S, N], in the pass: [B, H, L, N]."""

    def __init__(self, x: Tensor) -> None:
        self._columns, self.width = x.transpose(-1, -2).contiguous(), x.shape[-1]

    def columns(self, batch: slice, heads: slice, keys: slice) -> Tensor:
        return self._columns[batch, slice(None) if self._columns.shape[1] == 1 else heads, :, keys]


class Distance(ProductReduction):
    """Σ_j P_ij·|i − j| over the keys of each of the sets ``among`` [B, S, N]: [B, H, L, N] (arXiv 1906.04284)."""

    def __init__(self, among: Tensor) -> None:
        self._among, self.width = among.transpose(-1, -2).contiguous(), 2 * among.shape[-1]

    def columns(self, batch: slice, heads: slice, keys: slice) -> Tensor:
        """For each set 1 at its keys, then their positions, which are small: large floats are inexact."""
        among = self._among[batch, :, keys].float()
        positions = torch.arange(among.shape[-1], dtype=among.dtype, device=among.device)
        return torch.cat([among, among * positions], -2).unsqueeze(1)

    def correct(self, block: Block, products: Tensor) -> None:
        """Turn the products into Σ P·(i − j), and add 2·Σ P·(j − i) over the keys after their rows."""
        start, span = block.keys.start, block.scores.positions(block.rows)
        masses, moments = products.chunk(2, -1)
        rows = torch.arange(span.start - start, span.stop - start, dtype=products.dtype, device=products.device)
        torch.addcmul(moments.neg_(), masses, rows[:, None], out=moments)
        after = slice(max(span.start + 1, start) - start, block.keys.stop - start)
        if after.start < after.stop and not block.hides_the_future:
            keys = torch.arange(after.start, after.stop, dtype=products.dtype, device=products.device)
            beyond = (keys - rows[:, None]).clamp(min=0)  # [r, c]
            for number, moment in enumerate(moments.unbind(-1)):
                part = beyond * self._among[block.batch, None, None, number, block.keys][..., after]
                moment.add_(torch.linalg.vecdot(block.weights[..., after], part), alpha=2)

    def result(self, sums: Tensor) -> Tensor:
        """The second half of the sums; the first are masses."""
        return sums[..., self.width // 2 :]
