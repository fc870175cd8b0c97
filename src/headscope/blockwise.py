"""The blockwise pass over exp(s − lse): every question in one pass, hidden blocks skipped, O(block) memory.

A strip is a few rows of queries against all the keys that they may see; its scores are made one block at a
time, and its weights are final before any question sees them, or final up to a factor a row that is told later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from headscope.normalizer import Normalizer
from headscope.reductions import Block, Reduction
from headscope.scores import LOWEST, Scores

__all__ = ["Strip", "stream", "strips"]

_BLOCK = 1 << 21  # scores in one block: small enough for the cache, large enough for the work around it
_ALONE = 3 << 17  # the same for one question alone or none: there is less work around a block
_ROWS = 768  # rows in one matrix product: more are no faster, and cross the diagonal of a causal mask further
_EDGE = 64  # rows that are not cut further where few keys are visible
_STRIP = 1 << 23  # scores in one strip whose blocks are held until its rows are known
_PLAIN = 1e13  # a row's sum of exp(s) below this, and above one divided by it, is as good as a centered one
_DRIFT = 40.0  # nats by which a row's largest score may outgrow what its blocks are centered on
_EVEN = 16  # rows come in multiples of it: odd shapes are slow in a matrix product
_FAR = 80.0  # nats above its row's sum that a hidden score may stand without its exp overflowing


@dataclass(frozen=True)
class Seen:
    """Which cells of a tile the mask shows, as factors and as terms: both are much faster than masked_fill_."""

    keep: Tensor  # 1 or 0
    lower: Tensor  # 0 or LOWEST


_Tile = tuple[slice, Seen]  # columns of a block, and what the mask shows of them


class Buffers:
    """Room for blocks, used again from block to block: fresh memory costs more than the sums that go into it."""

    def __init__(self, like: Tensor) -> None:
        self._like = like
        self._flat: dict[int, Tensor] = {}
        self._last: dict[int, Tensor] = {}

    def take(self, number: int, *shape: int) -> Tensor:
        """Buffer ``number`` in a shape; what it held is lost."""
        last = self._last.get(number)
        if last is not None and last.shape == shape:
            return last
        size = math.prod(shape)
        held = self._flat.get(number)
        if held is None or held.numel() < size:
            held = self._flat[number] = self._like.new_empty(size)
        self._last[number] = found = held[:size].view(shape)
        return found


@dataclass(frozen=True)
class Strip:
    """Some query rows of some heads, and the spans of keys (start, stop, mixed) they may see.

    ``seen``: what the mask shows of some of them, shared with the strips of other heads.
    """

    batch: slice
    groups: slice
    rows: slice
    spans: list[tuple[int, int, bool]]
    seen: dict[tuple[int, int], Seen]


def strips(scores: Scores, held: bool = True) -> Iterator[Strip]:
    """Cut an attention into strips: enough rows for a good matrix product, few enough for blocks to be ``held``."""
    batch, _, queries, keys = scores.shape
    groups, shared = scores.key.shape[1], scores.per_group
    rows = min(queries, max(_EVEN, _ROWS // shared // _EVEN * _EVEN))
    while rows > _EDGE and _width(scores, slice(queries - rows, queries)) < 2 * rows:
        rows //= 2  # a window: many rows at once would cross both of its edges
    if held:
        rows = max(1, min(rows, _STRIP // (shared * keys)))
    together = max(1, _BLOCK // (shared * rows * keys))  # short texts: several heads and rows at once
    many_groups = min(groups, together)
    many_batch = max(1, min(batch, together // groups))
    for b in range(0, batch, many_batch):
        part = slice(b, min(batch, b + many_batch))
        for q in range(0, queries, rows):
            span = slice(q, min(queries, q + rows))
            spans, seen = scores.spans(part, span), dict[tuple[int, int], Seen]()
            for g in range(0, groups, many_groups):
                yield Strip(part, slice(g, min(groups, g + many_groups)), span, spans, seen)


def _width(scores: Scores, rows: slice) -> int:
    """How many keys a strip of these rows would have."""
    return sum(stop - start for start, stop, _ in scores.spans(slice(0, scores.shape[0]), rows))


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
    buffers = Buffers(like)
    online = known is None and all(reduction.online for reduction in reductions)
    size = _ALONE if len(reductions) <= 1 else _BLOCK
    offset = None if known is None else known.offset
    asked = list(zip(reductions, states, strict=True))
    for strip in strips(scores, held=known is None and not online):
        if online:
            _online(scores, strip, found, buffers, asked, plain, size)
            continue
        if known is not None:
            blocks = _known_blocks(scores, strip, known.top, offset, buffers, size)
        else:
            blocks = _fresh_blocks(scores, strip, found, buffers, plain)
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


def _pieces(strip: Strip, width: int) -> Iterator[tuple[slice, list[slice]]]:
    """Blocks of keys up to ``width`` wide, and where inside each the mask must be applied."""
    start, stop, mixed = -1, -1, list[slice]()
    for lo, hi, is_mixed in strip.spans:
        for a in range(lo, hi, width):
            b = min(hi, a + width)
            if start < 0 or a != stop or b - start > width:
                if start >= 0:
                    yield slice(start, stop), mixed
                start, mixed = a, []
            stop = b
            if is_mixed:
                mixed = [*mixed, slice(a, b)]
    if start >= 0:
        yield slice(start, stop), mixed


def _raw_blocks(
    scores: Scores, strip: Strip, buffers: Buffers, size: int, reuse: bool = True
) -> Iterator[tuple[Tensor, slice, list[_Tile]]]:
    """Scores of the strip, up to ``size`` at once, none hidden yet. Block i lies in buffer 2·i, with ``reuse`` in 0."""
    queries = scores.queries(strip.batch, strip.groups, strip.rows)
    width = max(128, size // (queries.shape[0] * queries.shape[1]) // 128 * 128)
    for number, (keys, mixed) in enumerate(_pieces(strip, width)):
        room = buffers.take(0 if reuse else 2 * number, *queries.shape[:2], keys.stop - keys.start)
        x = scores.block(queries, strip.batch, strip.groups, strip.rows, keys, room)
        yield x, keys, [_tile(scores, strip, keys, part) for part in mixed]


def _tile(scores: Scores, strip: Strip, keys: slice, part: slice) -> _Tile:
    at = part.start, part.stop
    found = strip.seen.get(at)
    if found is None:
        seen = scores.visible(strip.batch, _heads(scores, strip), strip.rows, part)
        found = Seen(seen.to(scores.dtype), torch.where(seen, 0.0, LOWEST).to(scores.dtype))
        if seen.shape[1] == 1:  # the same for all heads
            strip.seen[at] = found
    return slice(part.start - keys.start, part.stop - keys.start), found


def _hide(x: Tensor, tiles: list[_Tile]) -> None:
    """−inf on what the mask hides, before maxima are looked for."""
    for columns, seen in tiles:
        x[..., columns] += seen.keep.log()


def _exp(x: Tensor, tiles: list[_Tile], room: Tensor) -> Tensor:
    """exp(x), 0 where the mask hides, and there ``x`` becomes LOWEST or less.

    The exp of −inf takes three to eight times as long as that of a number, so it is not asked for.
    """
    weights = torch.exp(x, out=room)
    for columns, seen in tiles:
        weights[..., columns] *= seen.keep
        if weights is not x:
            x[..., columns] += seen.lower
    return weights


def _heads(scores: Scores, strip: Strip) -> slice:
    return slice(strip.groups.start * scores.per_group, strip.groups.stop * scores.per_group)


def _block(
    scores: Scores,
    strip: Strip,
    keys: slice,
    tiles: list[_Tile],
    weights: Tensor,
    centered: Tensor,
    offset: Tensor,
    shifted: bool,
) -> Block:
    """A finished block: the logarithm of a hidden weight becomes finite, so that 0 · log 0 is 0."""
    if scores.bias is not None:
        centered.clamp_(min=LOWEST)
    else:
        for columns, _ in tiles:
            centered[..., columns].clamp_(min=LOWEST)
    heads = _heads(scores, strip)
    return Block(weights, centered, offset, strip.batch, heads, strip.rows, keys, bool(tiles), shifted, scores)


def _known_blocks(
    scores: Scores, strip: Strip, top: Tensor, offset: Tensor | None, buffers: Buffers, size: int
) -> Iterator[Block]:
    """Blocks that are final at once: P = exp(s − top + offset), without ``offset`` where it is 0 throughout."""
    at = (strip.batch, _heads(scores, strip), strip.rows)
    shift = top[at].unsqueeze(-1)
    own = torch.zeros_like(shift) if offset is None else offset[at].unsqueeze(-1)
    factor = None if offset is None else own.exp()
    for x, keys, tiles in _raw_blocks(scores, strip, buffers, size):
        centered = x.sub_(shift)
        for columns, _ in tiles:
            centered[..., columns].clamp_(max=_FAR)
        weights = _exp(centered, tiles, buffers.take(1, *centered.shape))
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
    top = found.top.new_full(_rows_of(scores, strip), -torch.inf)
    center, total = torch.zeros_like(top), torch.zeros_like(top)
    at = (strip.batch, _heads(scores, strip), strip.rows)
    offset = torch.zeros_like(top)
    for x, keys, tiles in _raw_blocks(scores, strip, buffers, size):
        if not plain:
            _hide(x, tiles)
            top, center, total = _recenter(x, asked, at, top, center, total)
            x = x.sub_(center)
        weights = _exp(x, tiles if plain else [], buffers.take(1, *x.shape) if asked else x)
        total = total + weights.sum(-1, keepdim=True)
        if asked:
            block = _block(scores, strip, keys, tiles, weights, x, offset, shifted=False)
        for reduction, state in asked:
            reduction.update(state, block)
    if plain:
        _refuse_extremes(scores, strip, total)
    log_total = total.log()
    whole = center
    if scores.sinks is not None:  # the larger of the two is kept apart: finfo.min + 0.4 would forget 0.4
        logit = scores.sinks[at[1]].detach().to(top.dtype).view(1, -1, 1, 1)
        whole = torch.maximum(center, logit)
        log_total = torch.logaddexp(log_total + (center - whole), logit - whole)
    by = (center - whole - log_total).clamp(min=-1e4)
    _rescale(asked, at, torch.where(total > 0, by, 0.0), total)
    _keep(found, at, whole, log_total, plain)


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
    heads, sees = _heads(scores, strip), torch.zeros_like(good)
    for start, stop, mixed in strip.spans:
        part = slice(start, stop)
        sees |= scores.visible(strip.batch, heads, strip.rows, part).any(-1, keepdim=True) if mixed else True
    if not bool((good | (~sees & (total == 0))).all()):
        raise _NotPlain


def _keep(found: Normalizer, at: tuple[slice, slice, slice], top: Tensor, log_total: Tensor, plain: bool) -> None:
    """The rows' sums; in a plain pass as one number, so that later passes have one thing less to do."""
    if plain:
        seen = log_total > -torch.inf
        top, log_total = torch.where(seen, top + log_total, 0.0), torch.where(seen, 0.0, -torch.inf)
    found.top[at] = top.squeeze(-1)
    found.log_total[at] = log_total.squeeze(-1)


def _rescale(asked: list[tuple[Reduction, Any]], at: tuple[slice, slice, slice], by: Tensor, total: Tensor) -> None:
    for reduction, state in asked:
        reduction.rescale(state, at, by, total)


def _rows_of(scores: Scores, strip: Strip) -> tuple[int, int, int, int]:
    """Room for one number a row of the strip, [b, h, r, 1]."""
    heads, rows = _heads(scores, strip), strip.rows
    return strip.batch.stop - strip.batch.start, heads.stop - heads.start, rows.stop - rows.start, 1


def _fresh_blocks(scores: Scores, strip: Strip, found: Normalizer, buffers: Buffers, plain: bool) -> Iterator[Block]:
    """Blocks wait, each centered on the largest score so far (``plain``: on 0), until their rows' sums are known."""
    heads = _heads(scores, strip)
    held: list[tuple[slice, list[_Tile], Tensor, Tensor, Tensor]] = []
    top = found.top.new_full(_rows_of(scores, strip), -torch.inf)
    total = torch.zeros_like(top)
    for number, (x, keys, tiles) in enumerate(_raw_blocks(scores, strip, buffers, _BLOCK, reuse=False)):
        shift = torch.zeros_like(top)
        if not plain:
            _hide(x, tiles)
            higher = torch.maximum(top, x.amax(-1, keepdim=True))
            shift = torch.where(higher == -torch.inf, 0.0, higher)
            total = total * (top - shift).exp()
            x, top = x.sub_(shift), higher
        weights = _exp(x, tiles if plain else [], buffers.take(2 * number + 1, *x.shape))
        total = total + weights.sum(-1, keepdim=True)
        held.append((keys, tiles, weights, x, shift))
    if plain:
        _refuse_extremes(scores, strip, total)
    shift = torch.where(top == -torch.inf, 0.0, top)
    if scores.sinks is not None:
        logit = scores.sinks[heads].detach().to(top.dtype).view(1, -1, 1, 1)
        higher = torch.maximum(shift, logit)
        total = total * (shift - higher).exp() + (logit - higher).exp()
        shift = higher
    log_total = total.log()
    at = (strip.batch, heads, strip.rows)
    _keep(found, at, shift, log_total, plain)
    while held:
        keys, tiles, weights, centered, own = held.pop(0)
        lower = (own - shift).clamp(max=0)  # own may stand above where the row has seen nothing yet
        offset = torch.where(total > 0, lower - log_total, 0.0)
        weights.mul_(offset.exp())
        yield _block(scores, strip, keys, tiles, weights, centered, offset, shifted=True)
