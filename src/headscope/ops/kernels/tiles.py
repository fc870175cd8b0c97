"""How the matrix is cut: strips of rows, blocks of keys; their scores, and what the mask hides of them.

A strip is a few rows of queries against all the keys that they may see; its scores are made one block at a time.
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

__all__ = [
    "Buffers",
    "Strip",
    "Tile",
    "block_size",
    "buffers_for",
    "exp",
    "heads_of",
    "hide",
    "make_finite",
    "raw_blocks",
    "strips",
]

_BLOCK = 3 << 19  # scores in one block: small enough for the cache, large enough for the work around it
_ALONE = 3 << 17  # the same for one question alone or none: there is less work around a block
_ROWS = 768  # rows in one matrix product: more are no faster, and cross the diagonal of a causal mask further
_EDGE = 64  # rows that are not cut further where few keys are visible
_STRIP = 1 << 23  # scores in one strip whose blocks are held until its rows are known
_EVEN = 16  # rows come in multiples of it: odd shapes are slow in a matrix product


@dataclass(frozen=True)
class Seen:
    """Which cells of a tile the mask shows, as factors and as terms: both are much faster than masked_fill_."""

    keep: Tensor  # 1 or 0
    lower: Tensor  # 0 or LOWEST


Tile = tuple[slice, Seen]  # columns of a block, and what the mask shows of them


class Buffers:
    """Room for blocks, used again from block to block: fresh memory costs more than the sums that go into it.

    Each has room for ``least`` scores from the start, so that it need not grow with a causal mask's blocks; what is not
    written into is only promised by the system.
    """

    def __init__(self, device: torch.device, dtype: torch.dtype, least: int = 0) -> None:
        self.least = least
        self._device, self._dtype = device, dtype
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
            with torch.inference_mode(False):  # the next to write into it may not be in that mode
                held = torch.empty(max(size, self.least), dtype=self._dtype, device=self._device)
            self._flat[number] = held
        self._last[number] = found = held[:size].view(shape)
        return found

    def shrink(self) -> None:
        """Keep what every pass needs: two buffers of a block's size."""
        self._last.clear()
        self._flat = {n: held for n, held in self._flat.items() if n in (0, 1) and held.numel() <= _BLOCK}


_kept = threading.local()


@contextmanager
def buffers_for(like: Tensor, least: int) -> Iterator[Buffers]:
    """Buffers of a dtype and device for one pass; on the CPU they are kept for this thread's next one.

    A pass that is asked for while another one runs, by a question, has its own.
    """
    name = f"{like.device} {like.dtype}"
    found: Buffers = vars(_kept).pop(name, None) or Buffers(like.device, like.dtype)
    found.least = least
    try:
        yield found
    finally:
        if like.device.type == "cpu":
            found.shrink()
            vars(_kept)[name] = found


@dataclass(frozen=True)
class Strip:
    """Some query rows of some heads, and the spans of keys (start, stop, mixed) they may see.

    ``seen``: what the mask shows of some of them, shared with the strips of other heads and of rows that see the like.
    """

    batch: slice
    groups: slice
    rows: slice
    spans: list[tuple[int, int, bool]]
    seen: dict[Hashable, Seen]


def block_size(questions: int) -> int:
    """How many scores a block should have for so many questions."""
    return _ALONE if questions <= 1 else _BLOCK


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
    alike = dict[Hashable, Seen]()
    for b in range(0, batch, many_batch):
        part = slice(b, min(batch, b + many_batch))
        for q in range(0, queries, rows):
            span = slice(q, min(queries, q + rows))
            spans = scores.spans(part, span)
            seen = alike if scores.alike(span, span) is not None else dict[Hashable, Seen]()
            for g in range(0, groups, many_groups):
                yield Strip(part, slice(g, min(groups, g + many_groups)), span, spans, seen)


def _width(scores: Scores, rows: slice) -> int:
    """How many keys a strip of these rows would have."""
    return sum(stop - start for start, stop, _ in scores.spans(slice(0, scores.shape[0]), rows))


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


def raw_blocks(
    scores: Scores, strip: Strip, buffers: Buffers, size: int, reuse: bool = True
) -> Iterator[tuple[Tensor, slice, list[Tile]]]:
    """Scores of the strip, up to ``size`` at once, none hidden yet. Block i lies in buffer 2·i, with ``reuse`` in 0."""
    heads, rows = heads_of(scores, strip), strip.rows
    shape = strip.batch.stop - strip.batch.start, heads.stop - heads.start, rows.stop - rows.start
    room = buffers.take(-1, *shape, scores.query.shape[-1])
    queries = scores.queries(strip.batch, strip.groups, rows, room)
    width = max(128, size // (queries.shape[0] * queries.shape[1]) // 128 * 128)
    for number, (keys, mixed) in enumerate(_pieces(strip, width)):
        room = buffers.take(0 if reuse else 2 * number, *queries.shape[:2], keys.stop - keys.start)
        x = scores.block(queries, strip.batch, strip.groups, strip.rows, keys, room)
        yield x, keys, [_tile(scores, strip, keys, part) for part in mixed]


def _tile(scores: Scores, strip: Strip, keys: slice, part: slice) -> Tile:
    at = scores.alike(strip.rows, part) or (part.start, part.stop)
    found = strip.seen.get(at)
    if found is None:
        seen = scores.visible(strip.batch, heads_of(scores, strip), strip.rows, part)
        found = Seen(seen.to(scores.dtype), (seen.to(scores.dtype) - 1) * -LOWEST)
        if seen.shape[1] == 1:  # the same for all heads
            strip.seen[at] = found
    return slice(part.start - keys.start, part.stop - keys.start), found


def hide(x: Tensor, tiles: list[Tile]) -> None:
    """−inf on what the mask hides, before maxima are looked for."""
    for columns, seen in tiles:
        x[..., columns].add_(seen.keep.log())


def exp(x: Tensor, tiles: list[Tile], room: Tensor) -> Tensor:
    """The exp of each score; 0 where the mask hides, and there ``x`` becomes LOWEST or less.

    The exp of −inf takes three to eight times as long as that of a number, so it is not asked for.
    """
    weights = torch.exp(x, out=room)
    for columns, seen in tiles:
        weights[..., columns].mul_(seen.keep)  # `*=` would write all of it a second time
        if weights is not x:
            x[..., columns].add_(seen.lower)
    return weights


def make_finite(scores: Scores, x: Tensor, tiles: list[Tile]) -> None:
    """The logarithm of a hidden weight becomes finite, so that 0 · log 0 is 0."""
    if scores.bias is not None:
        x.clamp_(min=LOWEST)
    else:
        for columns, _ in tiles:
            x[..., columns].clamp_(min=LOWEST)


def heads_of(scores: Scores, strip: Strip) -> slice:
    """The strip's query heads."""
    return slice(strip.groups.start * scores.per_group, strip.groups.stop * scores.per_group)
