"""Tiles of query rows and blocks of keys in them: how the matrix is cut, their scores, and their mask.

A tile is some query rows of some heads against all keys that they may see. Its scores are computed block by block.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.ops.scores import LOWEST, Scores

_BLOCK = 3 << 19  # scores in one block: small enough for the cache, large enough for the overhead of each block
_SMALL_BLOCK = 3 << 17  # the same for at most one reduction: there is less overhead per block
_ROWS = 768  # rows in one matrix product: more are no faster, and cross the diagonal of a causal mask further
_MIN_ROWS = 64  # tiles with this many rows are not halved where few keys are visible
_TILE = 1 << 23  # scores in one tile whose blocks wait in memory for their rows' log-sum-exp
_ROW_MULTIPLE = 16  # rows come in multiples of it: odd shapes are slow in a matrix product


@dataclass(frozen=True)
class MaskCells:
    """A mask on some cells, as factors and as terms: both are much faster than masked_fill_."""

    keep: Tensor  # 1 where visible, 0 where hidden
    penalty: Tensor  # 0 where visible, LOWEST where hidden


MaskedColumns = tuple[slice, MaskCells]  # columns of a block, and the mask on them


class Buffers:
    """Memory for blocks, reused from block to block: fresh memory costs more than the sums that go into it.

    Each buffer has room for ``min_size`` scores from the start, so that it need not grow with a causal mask's blocks.
    The system provides memory only once it is written to.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, min_size: int = 0) -> None:
        self.min_size = min_size
        self._device, self._dtype = device, dtype
        self._storage: dict[int, Tensor] = {}
        self._views: dict[int, Tensor] = {}

    def take(self, number: int, *shape: int) -> Tensor:
        """Buffer ``number`` in a shape; its contents are lost."""
        view = self._views.get(number)
        if view is not None and view.shape == shape:
            return view
        size = math.prod(shape)
        storage = self._storage.get(number)
        if storage is None or storage.numel() < size:
            with torch.inference_mode(False):  # the next pass may write into it outside of that mode
                storage = torch.empty(max(size, self.min_size), dtype=self._dtype, device=self._device)
            self._storage[number] = storage
        self._views[number] = view = storage[:size].view(shape)
        return view

    def shrink(self) -> None:
        """Keep what every pass needs: two buffers of a block's size."""
        self._views.clear()
        self._storage = {n: s for n, s in self._storage.items() if n in (0, 1) and s.numel() <= _BLOCK}


_thread = threading.local()


@contextmanager
def buffers_for(like: Tensor, min_size: int) -> Iterator[Buffers]:
    """Buffers of a dtype and device for one pass; on the CPU this thread's next pass reuses them.

    A pass that a reduction starts inside another pass has buffers of its own.
    """
    name = f"{like.device} {like.dtype}"
    buffers: Buffers = vars(_thread).pop(name, None) or Buffers(like.device, like.dtype)
    buffers.min_size = min_size
    try:
        yield buffers
    finally:
        if like.device.type == "cpu":
            buffers.shrink()
            vars(_thread)[name] = buffers


@dataclass(frozen=True)
class Tile:
    """Some query rows of some heads (whole groups), and the spans of keys (start, stop, mixed) they may see."""

    batch: slice
    heads: slice
    rows: slice
    spans: list[tuple[int, int, bool]]
    mask_cells: dict[Hashable, MaskCells]  # shared with other heads, and with rows of which the mask shows the same

    @property
    def at(self) -> tuple[slice, slice, slice]:
        """Its rows in a [B, H, L, …] tensor."""
        return self.batch, self.heads, self.rows

    @property
    def shape(self) -> tuple[int, int, int]:
        """(b, h, r), its numbers of batch rows, heads and query rows."""
        batch, heads, rows = (part.stop - part.start for part in self.at)
        return batch, heads, rows


def block_size(num_reductions: int) -> int:
    """How many scores a block should have for so many reductions."""
    return _SMALL_BLOCK if num_reductions <= 1 else _BLOCK


def cut_tiles(scores: Scores, buffered: bool = True) -> Iterator[Tile]:
    """Cut an attention into tiles: enough rows for a fast product, few enough to keep all blocks if ``buffered``."""
    batch, _, queries, keys = scores.shape
    groups, group_size = scores.key.shape[1], scores.per_group
    rows = min(queries, max(_ROW_MULTIPLE, _ROWS // group_size // _ROW_MULTIPLE * _ROW_MULTIPLE))
    while rows > _MIN_ROWS and _width(scores, slice(queries - rows, queries)) < 2 * rows:
        rows //= 2  # a window: many rows at once would cross both of its edges
    if buffered:
        rows = max(1, min(rows, _TILE // (group_size * keys)))
    tile_groups_and_batch = max(1, _BLOCK // (group_size * rows * keys))  # short texts: several heads and rows at once
    tile_groups = min(groups, tile_groups_and_batch)
    tile_batch = max(1, min(batch, tile_groups_and_batch // groups))
    shared_cells = dict[Hashable, MaskCells]()
    for b in range(0, batch, tile_batch):
        batch_rows = slice(b, min(batch, b + tile_batch))
        for q in range(0, queries, rows):
            query_rows = slice(q, min(queries, q + rows))
            spans = scores.spans(batch_rows, query_rows)
            shared = scores.block_key(query_rows, query_rows) is not None
            mask_cells = shared_cells if shared else dict[Hashable, MaskCells]()
            for g in range(0, groups, tile_groups):
                heads = slice(g * group_size, min(groups, g + tile_groups) * group_size)
                yield Tile(batch_rows, heads, query_rows, spans, mask_cells)


def _width(scores: Scores, rows: slice) -> int:
    """How many keys a tile of these rows would have."""
    return sum(stop - start for start, stop, _ in scores.spans(slice(0, scores.shape[0]), rows))


def _key_blocks(tile: Tile, width: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of keys up to ``width`` wide, and where inside each the mask must be applied."""
    start, stop, mixed = -1, -1, list[slice]()
    for span_start, span_stop, is_mixed in tile.spans:
        for a in range(span_start, span_stop, width):
            b = min(span_stop, a + width)
            if start < 0 or a != stop or b - start > width:
                if start >= 0:
                    yield slice(start, stop), mixed
                start, mixed = a, []
            stop = b
            if is_mixed:
                mixed = [*mixed, slice(a, b)]
    if start >= 0:
        yield slice(start, stop), mixed


def raw_blocks(
    scores: Scores, tile: Tile, buffers: Buffers, size: int, reuse: bool = True
) -> Iterator[tuple[Tensor, slice, list[MaskedColumns]]]:
    """Scores of the tile, up to ``size`` at once, none hidden yet. Block i is in buffer 2·i, with ``reuse`` in 0."""
    if scores.wide:  # float64 has no place in the buffers
        queries = scores.queries(*tile.at)
    else:
        queries = scores.queries(*tile.at, buffers.take(-1, *tile.shape, scores.query.shape[-1]))
    width = max(128, size // (queries.shape[0] * queries.shape[1]) // 128 * 128)
    for number, (keys, mixed) in enumerate(_key_blocks(tile, width)):
        buffer = None
        if not scores.wide:
            buffer = buffers.take(0 if reuse else 2 * number, *queries.shape[:2], keys.stop - keys.start)
        x = scores.block(queries, *tile.at, keys, buffer)
        yield x, keys, [_masked_columns(scores, tile, keys, columns) for columns in mixed]


def _masked_columns(scores: Scores, tile: Tile, keys: slice, masked_keys: slice) -> MaskedColumns:
    at = scores.block_key(tile.rows, masked_keys) or (masked_keys.start, masked_keys.stop)
    cells = tile.mask_cells.get(at)
    if cells is None:
        visible = scores.visible(*tile.at, masked_keys)
        keep = visible.to(scores.dtype)
        cells = MaskCells(keep, (keep - 1) * -LOWEST)
        if visible.shape[1] == 1:  # the same for all heads
            tile.mask_cells[at] = cells
    return slice(masked_keys.start - keys.start, masked_keys.stop - keys.start), cells


def hide(x: Tensor, masked: list[MaskedColumns]) -> None:
    """Set hidden scores to −inf, before row maxima are taken."""
    for columns, cells in masked:
        x[..., columns].add_(cells.keep.log())


def exp(x: Tensor, masked: list[MaskedColumns], out: Tensor) -> Tensor:
    """The exp of each score, 0 where the mask hides; hidden scores in ``x`` become LOWEST or less.

    They are not set to −inf: its exp takes three to eight times as long as that of a finite number.
    """
    weights = torch.exp(x, out=out)
    for columns, cells in masked:
        weights[..., columns].mul_(cells.keep)  # `*=` would write all of it a second time
        if weights is not x:
            x[..., columns].add_(cells.penalty)
    return weights


def make_finite(scores: Scores, x: Tensor, masked: list[MaskedColumns]) -> None:
    """Make the logarithm of a hidden weight finite, so that 0 · log 0 is 0."""
    if scores.bias is not None:
        x.clamp_(min=LOWEST)
    else:
        for columns, _ in masked:
            x[..., columns].clamp_(min=LOWEST)
