"""The blockwise pass over exp(s − lse): every question in one pass, hidden blocks skipped, O(block) memory.

A strip's weights are final before any question sees them, or final up to a factor a row that is told later.
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
    Strip,
    Tile,
    block_size,
    buffers_for,
    exp,
    heads_of,
    hide,
    make_finite,
    raw_blocks,
    strips,
)
from headscope.ops.reductions import Block, Reduction
from headscope.ops.scores import LOWEST, Normalizer, Scores

__all__ = ["stream"]

_PLAIN = 1e13  # a row's sum of exp(s) below this, and above one divided by it, is as good as a centered one
_DRIFT = 40.0  # nats by which a row's largest score may outgrow what its blocks are centered on
_FAR = 80.0  # nats above its row's sum that a hidden score may stand without its exp overflowing


def stream(
    scores: Scores, reductions: Sequence[Reduction], known: Normalizer | None = None
) -> tuple[list[Any], Normalizer]:
    """Answer all ``reductions`` in one pass; no gradients. Gives the answers, and the rows' normalizer.

    With ``known`` each block is final at once. Without it, reductions that can :meth:`~Reduction.rescale` see
    blocks that are final up to a factor a row; for others a strip's blocks wait until their rows' sums are known.

    Scores are first taken as they are; where a row's sum of exp(s) is too large or too small for that, all begins
    again with scores that are centered on their row's maximum.
    """
    with torch.no_grad(), torch.autocast(scores.query.device.type, enabled=False):
        if known is None and not isinstance(scores.bias, Tensor):  # which may hide a row that the mask shows
            with suppress(_NotPlain):
                return _stream(scores, reductions, None, plain=True)
        return _stream(scores, reductions, known, plain=False)


class _NotPlain(Exception):
    """A row's sum of exp(s) is too large or too small for float32 unless its scores are centered."""


def _stream(
    scores: Scores, reductions: Sequence[Reduction], known: Normalizer | None, plain: bool
) -> tuple[list[Any], Normalizer]:
    like = scores.query.new_empty(0, dtype=scores.dtype)
    states = [reduction.start(scores.shape, like) for reduction in reductions]
    found = known or Normalizer(like.new_zeros(scores.shape[:3]), like.new_zeros(scores.shape[:3]))
    online = known is None and all(reduction.online for reduction in reductions)
    size = block_size(len(reductions))
    offset = None if known is None else known.offset
    asked = list(zip(reductions, states, strict=True))
    with buffers_for(like, min(size, math.prod(scores.shape))) as buffers:
        for strip in strips(scores, held=known is None and not online):
            if online:
                _online(scores, strip, found, buffers, asked, plain, size)
                continue
            if known is not None:
                blocks = _known_blocks(scores, strip, known.shift, offset, buffers, size)
            else:
                blocks = _fresh_blocks(scores, strip, found, buffers, plain, block_size(2))
            for block in blocks:
                for reduction, state in asked:
                    reduction.update(state, block)
    _refuse_overflow(found)
    return [r.finish(s) for r, s in zip(reductions, states, strict=True)], found


def _refuse_overflow(found: Normalizer) -> None:
    """Raise ValueError where finite operands made scores that are not: a NaN or +inf in a row's sum."""
    sums = found.logsumexp
    if not bool((sums < torch.inf).all()):
        raise ValueError(
            f"scores overflow {sums.dtype}: the products of finite queries and keys are too large for it. Make them "
            "smaller, pass a smaller scale=, or give float64."
        )


def _block(
    scores: Scores,
    strip: Strip,
    keys: slice,
    tiles: list[Tile],
    weights: Tensor,
    centered: Tensor,
    offset: Tensor,
    shifted: bool,
) -> Block:
    """A finished block."""
    heads = heads_of(scores, strip)
    return Block(weights, centered, offset, strip.batch, heads, strip.rows, keys, bool(tiles), shifted, scores)


def _known_blocks(
    scores: Scores, strip: Strip, top: Tensor, offset: Tensor | None, buffers: Buffers, size: int
) -> Iterator[Block]:
    """Blocks that are final at once: P = exp(s − top + offset), without ``offset`` where it is 0 throughout."""
    at = (strip.batch, heads_of(scores, strip), strip.rows)
    shift = top[at].unsqueeze(-1)
    own = torch.zeros_like(shift) if offset is None else offset[at].unsqueeze(-1)
    factor = None if offset is None else own.exp()
    for x, keys, tiles in raw_blocks(scores, strip, buffers, size):
        centered = x.sub_(shift)
        for columns, _ in tiles:
            centered[..., columns].clamp_(LOWEST, _FAR)
        weights = exp(centered, tiles, buffers.take(1, *centered.shape))
        if scores.bias is not None:
            centered.clamp_(min=LOWEST)
        if factor is not None:
            weights.mul_(factor)
        yield _block(scores, strip, keys, tiles, weights, centered, own, shifted=offset is not None)


def _online(
    scores: Scores,
    strip: Strip,
    found: Normalizer,
    buffers: Buffers,
    asked: list[tuple[Reduction, Any]],
    plain: bool,
    size: int,
) -> None:
    """No block waits: each is centered on one number a row, and what was counted is rescaled at the end.

    In a ``plain`` pass that number is 0. Else it is a row's first visible maximum; a later score that outgrows it by
    ``_DRIFT`` takes its place, so that nothing overflows (the lazy rescaling of online softmax, arXiv 1805.02867).
    """
    top = found.shift.new_full(_rows_of(scores, strip), -torch.inf)
    center, total = torch.zeros_like(top), torch.zeros_like(top)
    at = (strip.batch, heads_of(scores, strip), strip.rows)
    offset = torch.zeros_like(top)
    for x, keys, tiles in raw_blocks(scores, strip, buffers, size):
        if not plain:
            hide(x, tiles)
            top, center, total = _recenter(x, asked, at, top, center, total)
            x = x.sub_(center)
        weights = exp(x, tiles if plain else [], buffers.take(1, *x.shape) if asked else x)
        total = total + weights.sum(-1, keepdim=True)
        make_finite(scores, x, [] if plain else tiles)
        if asked:
            block = _block(scores, strip, keys, tiles, weights, x, offset, shifted=False)
        for reduction, state in asked:
            reduction.update(state, block)
    if plain:
        _refuse_extremes(scores, strip, total)
    log_sum = total.log()
    whole = center
    if scores.sinks is not None:  # the larger of the two is kept apart: finfo.min + 0.4 would forget 0.4
        logit = scores.sinks[at[1]].detach().to(top.dtype).view(1, -1, 1, 1)
        whole = torch.maximum(center, logit)
        log_sum = torch.logaddexp(log_sum + (center - whole), logit - whole)
    by = (center - whole - log_sum).clamp(min=-1e4)
    _rescale(asked, at, torch.where(total > 0, by, 0.0), total)
    _keep(found, at, whole, log_sum, plain)


def _recenter(
    x: Tensor,
    asked: list[tuple[Reduction, Any]],
    at: tuple[slice, slice, slice],
    top: Tensor,
    center: Tensor,
    total: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows' maxima, the numbers to center on, and the sums so far, with these scores seen."""
    higher = torch.maximum(top, x.amax(-1, keepdim=True))
    moved = (higher - center > _DRIFT) | ((top == -torch.inf) & (higher > top))
    if bool(moved.any()):
        by = torch.where(moved & (total > 0), center - higher, 0.0).clamp(min=-1e4)  # e⁻¹⁰⁰⁰⁰ is 0
        _rescale(asked, at, by, total)
        total = total * by.exp()
        center = torch.where(moved, higher, center)
    return higher, center, total


def _refuse_extremes(scores: Scores, strip: Strip, total: Tensor) -> None:
    """Raise _NotPlain unless all sums of exp(s) are of a middling size, or 0 where a row sees nothing."""
    good = (total > 1 / _PLAIN) & (total < _PLAIN)
    if bool(good.all()):
        return
    heads, sees = heads_of(scores, strip), torch.zeros_like(good)
    for start, stop, mixed in strip.spans:
        part = slice(start, stop)
        sees |= scores.visible(strip.batch, heads, strip.rows, part).any(-1, keepdim=True) if mixed else True
    if not bool((good | (~sees & (total == 0))).all()):
        raise _NotPlain


def _keep(found: Normalizer, at: tuple[slice, slice, slice], top: Tensor, log_sum: Tensor, plain: bool) -> None:
    """The rows' sums; in a plain pass as one number, so that later passes have one thing less to do."""
    if plain:
        seen = log_sum > -torch.inf
        top, log_sum = torch.where(seen, top + log_sum, 0.0), torch.where(seen, 0.0, -torch.inf)
    found.shift[at] = top.squeeze(-1)
    found.log_sum[at] = log_sum.squeeze(-1)


def _rescale(asked: list[tuple[Reduction, Any]], at: tuple[slice, slice, slice], by: Tensor, total: Tensor) -> None:
    for reduction, state in asked:
        reduction.rescale(state, at, by, total)


def _rows_of(scores: Scores, strip: Strip) -> tuple[int, int, int, int]:
    """Room for one number a row of the strip, [b, h, r, 1]."""
    heads, rows = heads_of(scores, strip), strip.rows
    return strip.batch.stop - strip.batch.start, heads.stop - heads.start, rows.stop - rows.start, 1


def _fresh_blocks(
    scores: Scores, strip: Strip, found: Normalizer, buffers: Buffers, plain: bool, size: int
) -> Iterator[Block]:
    """Blocks wait, each centered on the largest score so far (``plain``: on 0), until their rows' sums are known."""
    heads = heads_of(scores, strip)
    held: list[tuple[slice, list[Tile], Tensor, Tensor, Tensor]] = []
    top = found.shift.new_full(_rows_of(scores, strip), -torch.inf)
    total = torch.zeros_like(top)
    for number, (x, keys, tiles) in enumerate(raw_blocks(scores, strip, buffers, size, reuse=False)):
        shift = torch.zeros_like(top)
        if not plain:
            hide(x, tiles)
            higher = torch.maximum(top, x.amax(-1, keepdim=True))
            shift = torch.where(higher == -torch.inf, 0.0, higher)
            total = total * (top - shift).exp()
            x, top = x.sub_(shift), higher
        weights = exp(x, tiles if plain else [], buffers.take(2 * number + 1, *x.shape))
        total = total + weights.sum(-1, keepdim=True)
        make_finite(scores, x, [] if plain else tiles)
        held.append((keys, tiles, weights, x, shift))
    if plain:
        _refuse_extremes(scores, strip, total)
    shift = torch.where(top == -torch.inf, 0.0, top)
    if scores.sinks is not None:
        logit = scores.sinks[heads].detach().to(top.dtype).view(1, -1, 1, 1)
        higher = torch.maximum(shift, logit)
        total = total * (shift - higher).exp() + (logit - higher).exp()
        shift = higher
    log_sum = total.log()
    at = (strip.batch, heads, strip.rows)
    _keep(found, at, shift, log_sum, plain)
    while held:
        keys, tiles, weights, centered, own = held.pop(0)
        lower = (own - shift).clamp(max=0)  # own may stand above where the row has seen nothing yet
        offset = torch.where(total > 0, lower - log_sum, 0.0)
        weights.mul_(offset.exp())
        yield _block(scores, strip, keys, tiles, weights, centered, offset, shifted=True)
