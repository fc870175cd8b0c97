"""The blockwise pass over P = exp(s − logsumexp): all reductions in one pass, O(block) memory, hidden blocks skipped.

It is the reference: plain torch, any device and dtype.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from headscope.ops.kernels.tiles import (
    Buffers,
    MaskedColumns,
    Tile,
    block_size,
    buffers_for,
    cut_tiles,
    exp,
    hide,
    make_finite,
    raw_blocks,
)
from headscope.ops.reductions import Block, Reduction
from headscope.ops.scores import LOWEST, Normalizer, Scores

_UNCENTERED = 1e13  # a row's sum of exp(s) below it and above 1 ÷ it is as exact as a centred one
_RECENTER = 40.0  # nats by which a row's largest score may exceed the number that its blocks are centred on
_MAX_HIDDEN = 80.0  # nats above its row's log-sum-exp that a hidden score may have without overflow of its exp

Pairs = list[tuple[Reduction, Any]]  # each reduction with its state
At = tuple[slice, slice, slice]  # rows in a [B, H, L, …] tensor


def stream(
    scores: Scores, reductions: Sequence[Reduction], normalizer: Normalizer | None = None
) -> tuple[list[Any], Normalizer]:
    """The results of all ``reductions`` from one pass, without gradients, and the rows' normalizer.

    With a known ``normalizer`` each block is final at once. Without it, online reductions get blocks that are final up
    to a factor per row; for others a tile's blocks are kept until their rows' sums are known.

    Scores are first taken uncentred. If a row's sum of exp(s) is too large or too small for that, the pass starts again
    with scores that are centred on their row's maximum.
    """
    with torch.no_grad(), torch.autocast(scores.query.device.type, enabled=False):
        may_hide = isinstance(scores.bias, Tensor)  # a row that the mask shows
        if normalizer is None and not may_hide and not scores.wide:
            with suppress(_NeedsCentering):
                return _stream(scores, reductions, None, uncentered=True)
        return _stream(scores, reductions, normalizer, uncentered=False)


class _NeedsCentering(Exception):
    """A row's sum of exp(s) is too large or too small for float32 unless its scores are centred."""


def _stream(
    scores: Scores, reductions: Sequence[Reduction], known: Normalizer | None, uncentered: bool
) -> tuple[list[Any], Normalizer]:
    like = scores.query.new_empty(0, dtype=scores.dtype)
    shape = scores.shape
    pairs: Pairs = [(reduction, reduction.start(shape, like)) for reduction in reductions]
    normalizer = known or Normalizer(like.new_zeros(shape[:3], dtype=scores.score_dtype), like.new_zeros(shape[:3]))
    online = known is None and all(reduction.online for reduction in reductions)
    size = block_size(len(reductions))
    offset = None if known is None else known.offset
    with buffers_for(like, min(size, math.prod(shape))) as buffers:
        for tile in cut_tiles(scores, buffered=known is None and not online):
            if online:
                _reduce_online(scores, tile, normalizer, buffers, pairs, uncentered, size)
                continue
            if known is not None:
                blocks = _normalized_blocks(scores, tile, known.shift, offset, buffers, size)
            else:
                blocks = _buffered_blocks(scores, tile, normalizer, buffers, uncentered, block_size(2))
            for block in blocks:
                for reduction, state in pairs:
                    reduction.update(state, block)
    _check_overflow(normalizer)
    return [reduction.finish(state) for reduction, state in pairs], normalizer


def _check_overflow(normalizer: Normalizer) -> None:
    """Raise ValueError where finite operands give scores that are not: NaN or +inf as log-sum-exp."""
    logsumexp = normalizer.logsumexp
    if not bool((logsumexp < torch.inf).all()):
        raise ValueError(
            f"scores overflow {logsumexp.dtype}: the products of finite queries and keys are too large for it. Make "
            "them smaller, pass a smaller scale=, or give float64."
        )


def _normalized_blocks(
    scores: Scores, tile: Tile, shift: Tensor, offset: Tensor | None, buffers: Buffers, size: int
) -> Iterator[Block]:
    """Blocks that are final at once: P = exp(s − shift + offset); no ``offset`` if it is 0 for all rows."""
    row_shift = shift[tile.at].unsqueeze(-1)
    row_offset = torch.zeros_like(row_shift) if offset is None else offset[tile.at].unsqueeze(-1)
    factor = None if offset is None else row_offset.exp()
    for x, keys, masked in raw_blocks(scores, tile, buffers, size):
        centered = x.sub_(row_shift).to(scores.dtype)
        for columns, _ in masked:
            centered[..., columns].clamp_(LOWEST, _MAX_HIDDEN)
        weights = exp(centered, masked, buffers.take(1, *centered.shape))
        if scores.bias is not None:
            centered.clamp_(min=LOWEST)
        if factor is not None:
            weights.mul_(factor)
        yield Block(weights, centered, row_offset, *tile.at, keys, bool(masked), offset is not None, scores)


def _reduce_online(
    scores: Scores,
    tile: Tile,
    normalizer: Normalizer,
    buffers: Buffers,
    pairs: Pairs,
    uncentered: bool,
    size: int,
) -> None:
    """Reduce each block at once, centred on one number per row, and rescale the states at the end.

    That number is 0 if ``uncentered``. Else it is the row's first visible maximum; a later score that exceeds it by
    ``_RECENTER`` takes its place, so that nothing overflows (the lazy rescaling of online softmax, arXiv 1805.02867).
    """
    row_max = normalizer.shift.new_full((*tile.shape, 1), -torch.inf)
    center, total = torch.zeros_like(row_max), torch.zeros_like(row_max, dtype=scores.dtype)
    offset = torch.zeros_like(total)
    for x, keys, masked in raw_blocks(scores, tile, buffers, size):
        if not uncentered:
            hide(x, masked)
            row_max, center, total = _recenter(x, pairs, tile.at, row_max, center, total)
            x = x.sub_(center).to(scores.dtype)
        weights = exp(x, masked if uncentered else [], buffers.take(1, *x.shape) if pairs else x)
        total = total + weights.sum(-1, keepdim=True)
        make_finite(scores, x, [] if uncentered else masked)
        block = Block(weights, x, offset, *tile.at, keys, bool(masked), False, scores)
        for reduction, state in pairs:
            reduction.update(state, block)
    if uncentered:
        _check_row_sums(scores, tile, total)
    log_sum, shift = total.log(), center
    if scores.sinks is not None:  # the larger of the two is kept apart: finfo.min + 0.4 would lose 0.4
        sink = _sinks_of(scores, tile)
        shift = torch.maximum(center, sink)
        log_sum = torch.logaddexp(log_sum + (center - shift), sink - shift).to(scores.dtype)
    log_factor = (center - shift - log_sum).clamp(min=-1e4).to(scores.dtype)
    _rescale(pairs, tile.at, torch.where(total > 0, log_factor, 0.0), total)
    _store(normalizer, tile.at, shift, log_sum, uncentered)


def _recenter(
    x: Tensor, pairs: Pairs, at: At, row_max: Tensor, center: Tensor, total: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The row maxima, the numbers to centre on, and the sums so far, after these scores."""
    new_max = torch.maximum(row_max, x.amax(-1, keepdim=True).to(row_max.dtype))
    moved = (new_max - center > _RECENTER) | ((row_max == -torch.inf) & (new_max > row_max))
    if bool(moved.any()):
        log_factor = (
            torch.where(moved & (total > 0), center - new_max, 0.0).clamp(min=-1e4).to(total.dtype)
        )  # e⁻¹⁰⁰⁰⁰ is 0
        _rescale(pairs, at, log_factor, total)
        total = total * log_factor.exp()
        center = torch.where(moved, new_max, center)
    return new_max, center, total


def _check_row_sums(scores: Scores, tile: Tile, total: Tensor) -> None:
    """Raise _NeedsCentering unless each sum of exp(s) is of middling size, or 0 where a row sees nothing."""
    exact = (total > 1 / _UNCENTERED) & (total < _UNCENTERED)
    if bool(exact.all()):
        return
    sees_any = torch.zeros_like(exact)
    for start, stop, mixed in tile.spans:
        sees_any |= scores.visible(*tile.at, slice(start, stop)).any(-1, keepdim=True) if mixed else True
    if not bool((exact | (~sees_any & (total == 0))).all()):
        raise _NeedsCentering


def _store(normalizer: Normalizer, at: At, shift: Tensor, log_sum: Tensor, uncentered: bool) -> None:
    """Write the rows' normalizer; if ``uncentered`` as one number, so that later passes need not add a second."""
    if uncentered:
        sees_any = log_sum > -torch.inf
        shift, log_sum = torch.where(sees_any, shift + log_sum, 0.0), torch.where(sees_any, 0.0, -torch.inf)
    normalizer.shift[at] = shift.squeeze(-1)
    normalizer.log_sum[at] = log_sum.squeeze(-1)


def _rescale(pairs: Pairs, at: At, log_factor: Tensor, total: Tensor) -> None:
    for reduction, state in pairs:
        reduction.rescale(state, at, log_factor, total)


def _sinks_of(scores: Scores, tile: Tile) -> Tensor:
    """The sinks' logits of a tile's heads, [1, h, 1, 1]."""
    assert scores.sinks is not None
    return scores.sinks[tile.heads].detach().to(scores.dtype).view(1, -1, 1, 1)


def _buffered_blocks(
    scores: Scores, tile: Tile, normalizer: Normalizer, buffers: Buffers, uncentered: bool, size: int
) -> Iterator[Block]:
    """Final blocks, kept until their rows' sums are known; each centred on the row maximum so far (0: uncentred)."""
    waiting: list[tuple[slice, list[MaskedColumns], Tensor, Tensor, Tensor]] = []
    row_max = normalizer.shift.new_full((*tile.shape, 1), -torch.inf)
    total = torch.zeros_like(row_max, dtype=scores.dtype)
    for number, (x, keys, masked) in enumerate(raw_blocks(scores, tile, buffers, size, reuse=False)):
        shift = torch.zeros_like(row_max)
        if not uncentered:
            hide(x, masked)
            new_max = torch.maximum(row_max, x.amax(-1, keepdim=True).to(row_max.dtype))
            shift = torch.where(new_max == -torch.inf, 0.0, new_max)
            total = total * (row_max - shift).exp().to(scores.dtype)
            x, row_max = x.sub_(shift).to(scores.dtype), new_max
        weights = exp(x, masked if uncentered else [], buffers.take(2 * number + 1, *x.shape))
        total = total + weights.sum(-1, keepdim=True)
        make_finite(scores, x, [] if uncentered else masked)
        waiting.append((keys, masked, weights, x, shift))
    if uncentered:
        _check_row_sums(scores, tile, total)
    shift = torch.where(row_max == -torch.inf, 0.0, row_max)
    if scores.sinks is not None:
        sink = _sinks_of(scores, tile)
        higher = torch.maximum(shift, sink)
        total = (total * (shift - higher).exp() + (sink - higher).exp()).to(scores.dtype)
        shift = higher
    log_sum = total.log()
    _store(normalizer, tile.at, shift, log_sum, uncentered)
    while waiting:
        keys, masked, weights, centered, block_shift = waiting.pop(0)
        lower = (
            (block_shift - shift).clamp(max=0).to(scores.dtype)
        )  # block_shift may be higher before the first visible key
        offset = torch.where(total > 0, lower - log_sum, 0.0)
        weights.mul_(offset.exp())
        yield Block(weights, centered, offset, *tile.at, keys, bool(masked), True, scores)
