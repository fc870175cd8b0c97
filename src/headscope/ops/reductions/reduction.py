"""Reduction and Block: what is computed from weights in one pass, and the part of them that it reads at a time."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.ops.scores import Scores

Shape = tuple[int, int, int, int]
_FEW = 4  # rows in one small matrix product


@dataclass(frozen=True, eq=False)
class Block:
    """A block of weights in a pass. Small letters (b, h, r query rows, c keys) are parts of B, H, L, S."""

    weights: Tensor  # [b, h, r, c], final: before dropout, rows sum to 1 over all blocks (less with sinks)
    centered: Tensor  # [b, h, r, c], log-weights minus a constant per row; LOWEST or less where hidden
    offset: Tensor  # [b, h, r, 1], that constant: log_weights = centered + offset
    batch: slice
    heads: slice
    rows: slice
    keys: slice
    mixed: bool  # whether the mask hides something in this block
    shifted: bool  # whether the offset is not 0 throughout
    scores: Scores

    @property
    def at(self) -> tuple[slice, slice, slice]:
        """The rows of this block in a [B, H, L, …] tensor."""
        return self.batch, self.heads, self.rows

    @property
    def log_weights(self) -> Tensor:
        """Natural logarithm of the weights; very negative (not −inf) where hidden."""
        return self.centered + self.offset

    @property
    def q_idx(self) -> Tensor:
        """Absolute positions of the queries, [r, 1]."""
        span = self.scores.positions(self.rows)
        return torch.arange(span.start, span.stop, device=self.weights.device)[:, None]

    @property
    def kv_idx(self) -> Tensor:
        """Positions of the keys, [c]."""
        return torch.arange(self.keys.start, self.keys.stop, device=self.weights.device)

    @property
    def visible(self) -> Tensor | None:
        """Which cells may be attended to, broadcastable to the block; None: all of them."""
        if not self.mixed:
            return None
        return self.scores.visible(self.batch, self.heads, self.rows, self.keys)

    @property
    def hides_the_future(self) -> bool:
        """Whether the mask is causal, so that weights beyond the diagonal are 0."""
        mask = self.scores.mask
        return mask is not None and mask.is_causal

    def expected_log(self) -> Tensor:
        """Σ_j P_ij·centered_ij for this block: [b, h, r].

        It is the diagonal of a matrix product of a few rows. That reads the block once and writes nothing, and takes
        two thirds of the time of a product cell by cell with its sum.
        """
        rows, width = self.weights.shape[-2:]
        if rows % _FEW:
            return torch.linalg.vecdot(self.weights, self.centered)
        few = self.weights.reshape(-1, _FEW, width)
        products = torch.bmm(few, self.centered.reshape(-1, _FEW, width).transpose(1, 2))
        return products.diagonal(dim1=1, dim2=2).reshape(self.weights.shape[:-1])

    def band(self, tensor: Tensor, radius: int) -> Iterator[tuple[slice, slice, Tensor]]:
        """Views of a tensor like this block's, [b, h, r, c], at keys at most ``radius`` from their rows.

        Each comes with its rows and its offsets, counted from −radius. Together they are the whole band, without
        offsets above 0 if the mask is causal.
        """
        rows, width = tensor.shape[-2:]
        first = self.scores.positions(self.rows).start - self.keys.start  # the column of the first row's position
        low, high = -radius, 0 if self.hides_the_future else radius
        start, stop = max(0, -first - high), min(rows, width - first - low)  # rows with some offsets
        begin, end = max(start, -first - low), min(stop, width - first - high)  # rows with all offsets
        begin, end = (begin, end) if begin < end else (stop, stop)
        if begin < end:
            batch, heads, down, right = tensor.stride()
            offset = tensor.storage_offset() + begin * down + (first + begin + low) * right
            size = (*tensor.shape[:2], end - begin, high - low + 1)
            yield (
                slice(begin, end),
                slice(0, size[-1]),
                tensor.as_strided(size, (batch, heads, down + right, right), offset),
            )
        for row in (*range(start, begin), *range(end, stop)):
            left, right = max(0, first + row + low), min(width, first + row + high + 1)
            offsets = slice(left - first - row - low, right - first - row - low)
            yield slice(row, row + 1), offsets, tensor[..., row : row + 1, left:right]

    def product(self, columns: Tensor) -> Tensor:
        """P @ columnsᵀ for this block, columns [b|1, h|1, N, c]: [b, h, r, N].

        A narrow matrix product is four times as fast with its columns as rows of memory.
        """
        batch, heads, rows, width = self.weights.shape
        factors = columns.to(self.weights.dtype).expand(batch, heads, -1, -1).reshape(batch * heads, -1, width)
        return torch.bmm(self.weights.reshape(-1, rows, width), factors.transpose(1, 2)).view(batch, heads, rows, -1)


class Reduction(ABC):
    """A reduction of weights: ``start`` makes a state, ``update`` adds a block to it, ``finish`` gives the result.

    The object keeps no state, so that it may be used for many matrices at once.

    ``online = True`` means that :meth:`rescale` is implemented. Then no block is kept until its rows' sums are known.
    """

    online = False

    @abstractmethod
    def start(self, shape: Shape, like: Tensor) -> Any:
        """An empty state for an attention of ``shape`` (B, H, L, S); ``like`` has its dtype and device."""

    @abstractmethod
    def update(self, state: Any, block: Block) -> None:
        """Add one block to the state, in place. Every visible cell comes exactly once.

        The block's tensors are reused for the next one: keep no view of them, and do not write into them.
        """

    def rescale(self, state: Any, at: tuple[slice, slice, slice], log_factor: Tensor, total: Tensor) -> None:
        """Multiply the weights so far of rows ``at`` by exp(log_factor); their logarithms grow by it.

        ``log_factor`` and ``total``, the sum of those weights before, are [b, h, r, 1]. Called only if ``online``.
        """
        raise NotImplementedError(
            f"{type(self).__name__} has online = True, but no rescale(): implement it, or leave online False."
        )

    def finish(self, state: Any) -> Any:
        """The result."""
        return state


def check_reductions(reductions: Iterable[object]) -> None:
    """Raise TypeError if something is not a reduction."""
    for reduction in reductions:
        if isinstance(reduction, Reduction):
            continue
        if isinstance(reduction, Mapping):
            raise TypeError("reductions by name go alone: pass one mapping, {name: reduction, …}, or reductions.")
        if isinstance(reduction, type):
            raise TypeError(f"{reduction.__name__} is a class: pass an object, {reduction.__name__}(…).")
        raise TypeError(f"{reduction!r} is not a reduction: wanted reductions, such as Entropy() or Max().")
