"""P[index]: any part of the matrix, computed from the rows and keys that the index names."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from headscope.ops.kernels.blockwise import stream
from headscope.ops.positions import Alibi
from headscope.ops.scores import Normalizer, Scores

_POINTS = 1 << 16  # scattered cells computed at once
_CELLS = 1 << 22  # cells of a block computed at once
_CACHED = 1 << 18  # cells of a part up to which it is kept, for when it is read again


class PartReader:
    """Reads parts of an attention matrix, and keeps the normalizers of the rows that it has read."""

    def __init__(self, scores: Scores, normalizer: Normalizer | None) -> None:
        self.scores = scores
        shape = scores.shape[:3]
        with torch.inference_mode(False):  # written into later, perhaps outside of that mode
            blank = torch.full(shape, torch.nan, dtype=scores.score_dtype, device=scores.query.device)
            self.normalizer = normalizer or Normalizer(blank, blank.to(scores.dtype, copy=True))
        self._last: tuple[list[Any], Tensor] | None = None

    def __getitem__(self, index: Any) -> Tensor:
        parts = _parse_index(index, self.scores.shape, self.scores.query.device)
        scattered = any(isinstance(part, Tensor) for part in parts)
        if not scattered and self._last is not None and self._last[0] == parts:
            return self._last[1].clone()  # the caller may write into it
        with torch.no_grad(), torch.autocast(self.scores.query.device.type, enabled=False):
            if scattered:
                return self._gathered(parts)
            part = self._cut(parts)
            if part.numel() <= _CACHED:
                self._last = parts, part.clone()
            return part

    def _cut(self, parts: list[Any]) -> Tensor:
        """Ints and slices: one block of each head."""
        spans = [slice(p, p + 1, 1) if isinstance(p, int) else p for p in parts]
        sizes = [len(range(s.start, s.stop, s.step)) for s in spans]
        if 0 in sizes:
            out = self.scores.query.new_zeros(sizes, dtype=self.scores.dtype)
        else:
            b, h, q, k = (slice(s.start, s.start + (n - 1) * s.step + 1) for s, n in zip(spans, sizes, strict=True))
            self._normalize_block(b, h, q)
            steps = tuple(slice(None, None, s.step) for s in spans)
            out = self._weights(b, h, q, k, steps)
        return out[tuple(0 if isinstance(p, int) else slice(None) for p in parts)]

    def _weights(self, b: slice, h: slice, q: slice, k: slice, steps: tuple[slice, ...]) -> Tensor:
        """Weights of a block of the matrix, [b, h, q, k], thinned by the steps."""
        part = self.scores.narrow(b, h, q)
        batch, heads, queries, _ = part.shape
        all_batch, all_heads = slice(0, batch), slice(0, heads)
        width = k.stop - k.start
        rows = max(1, _CELLS // (max(1, batch) * heads * width)) // steps[2].step * steps[2].step or steps[2].step
        pieces = []
        for start in range(0, queries, rows):
            span = slice(start, min(queries, start + rows))
            block_rows = all_batch, all_heads, span
            x = part.block(part.queries(*block_rows), *block_rows, k)
            if not part.all_visible(all_batch, span, k):
                x = x.masked_fill(~part.visible(*block_rows, k), -torch.inf)
            at = (b, h, slice(q.start + span.start, q.start + span.stop))
            pieces.append(_weights_of(x, self.normalizer, at)[steps])
        return torch.cat(pieces, 2)

    def _gathered(self, parts: list[Any]) -> Tensor:
        """Index tensors: torch itself says which cell goes where, because it indexes grids of positions."""
        keys = parts[3]
        if isinstance(keys, slice):
            return self._gathered_rows(parts[:3], keys)
        cells = [g.contiguous() for g in _grids(parts, self.scores.shape, self.scores.query.device)]
        shape = cells[0].shape
        b, h, q, k = (c.flatten() for c in cells)
        out = self.scores.query.new_zeros(b.numel(), dtype=self.scores.dtype)
        self._normalize_rows(b, h, q)
        for start in range(0, b.numel(), _POINTS):
            part = slice(start, start + _POINTS)
            out[part] = self._points(b[part], h[part], q[part], k[part])
        return out.view(shape)

    def _gathered_rows(self, parts: list[Any], keys: slice) -> Tensor:
        cells = _grids(parts, self.scores.shape[:3], self.scores.query.device)
        shape = cells[0].shape
        b, h, q = (c.flatten() for c in cells)
        width = len(range(keys.start, keys.stop, keys.step))
        out = self.scores.query.new_zeros((b.numel(), width), dtype=self.scores.dtype)
        if out.numel():
            self._normalize_rows(b, h, q)
            for start, stop in _consecutive(torch.stack([b, h, q], 1)):
                first = int(q[start])
                rows = slice(first, first + stop - start, 1)
                out[start:stop] = self._cut([int(b[start]), int(h[start]), rows, keys])
        return out.view(*shape, width)

    def _points(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        scores = self.scores
        query = scores.query[b, h, q].to(scores.score_dtype) * scores.scale
        x = scores.capped((query * scores.key[b, h // scores.per_group, k].to(scores.score_dtype)).sum(-1))
        if scores.bias is not None:
            x = x + self._bias_points(b, h, q, k)
        if scores.mask is not None:
            first_b, first_h, first_q = scores.origin
            visible = scores.mask(b + first_b, h + first_h, q + first_q, k)
            x = x.masked_fill(~visible, -torch.inf)
        at = (b, h, q)
        log_sum = self.normalizer.log_sum[at]
        return (x - self.normalizer.shift[at] - log_sum).to(scores.dtype).exp().masked_fill(log_sum == -torch.inf, 0)

    def _bias_points(self, b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        bias = self.scores.bias
        if isinstance(bias, Alibi):
            return bias.points(h, q + self.scores.origin[2], k, self.scores.dtype)
        assert bias is not None
        index = [i if n > 1 else torch.zeros_like(i) for i, n in zip((b, h, q, k), bias.shape, strict=True)]
        return bias[tuple(index)].to(self.scores.dtype)

    def _normalize_rows(self, b: Tensor, h: Tensor, q: Tensor) -> None:
        """Normalizers of rows that are named one by one; consecutive rows are computed together."""
        rows = torch.stack([b, h, q], 1).unique(dim=0)
        if not len(rows):
            return
        for start, stop in _consecutive(rows):
            bi, hi, first = rows[start].tolist()
            last = int(rows[stop - 1, 2])
            self._normalize_block(slice(bi, bi + 1), slice(hi, hi + 1), slice(first, last + 1))

    def _normalize_block(self, b: slice, h: slice, q: slice) -> None:
        """Normalizers of a block of rows, unless they are known."""
        missing = self.normalizer.shift[b, h, q].isnan()
        if not bool(missing.any()):
            return
        missing_rows = missing.any(1).any(0).nonzero().flatten()
        first, last = int(missing_rows[0]), int(missing_rows[-1]) + 1
        rows = slice(q.start + first, q.start + last)
        _, computed = stream(self.scores.narrow(b, h, rows), [])
        self.normalizer.shift[b, h, rows] = computed.shift
        self.normalizer.log_sum[b, h, rows] = computed.log_sum


def _consecutive(rows: Tensor) -> Iterator[tuple[int, int]]:
    """Spans of rows (b, h, q), [N, 3], in which only q grows, by one each time."""
    new = (rows[1:, :2] != rows[:-1, :2]).any(1) | (rows[1:, 2] != rows[:-1, 2] + 1)
    return pairwise([0, *(new.nonzero().flatten() + 1).tolist(), len(rows)])


def _weights_of(x: Tensor, normalizer: Normalizer, at: tuple[slice, slice, slice]) -> Tensor:
    log_sum = normalizer.log_sum[at].unsqueeze(-1)
    log_weights = ((x - normalizer.shift[at].unsqueeze(-1)) - log_sum).to(log_sum.dtype)
    return log_weights.exp().masked_fill(log_sum == -torch.inf, 0)


def _grids(parts: list[Any], shape: Sequence[int], device: torch.device) -> list[Tensor]:
    """For each axis, the position along it of every cell that ``parts`` picks, in the picked shape."""
    grids = []
    for axis, size in enumerate(shape):
        line = torch.arange(size, device=device)
        grid = line.view([-1 if a == axis else 1 for a in range(len(shape))]).expand(*shape)
        grids.append(grid[tuple(parts)])
    return grids


def _parse_index(index: Any, shape: Sequence[int], device: torch.device) -> list[Any]:
    """Four parts, each an int from 0, a slice with all three numbers, or a tensor of positions from 0."""
    parts = list(index) if isinstance(index, tuple) else [index]
    dots = [i for i, part in enumerate(parts) if part is Ellipsis]
    if len(dots) > 1:
        raise IndexError("P[...] takes one ellipsis at most.")
    if dots:
        parts[dots[0] : dots[0] + 1] = [slice(None)] * (len(shape) - len(parts) + 1)
    if len(parts) > len(shape):
        raise IndexError(f"P has 4 axes (B, H, L, S), the index names {len(parts)}.")
    parts += [slice(None)] * (len(shape) - len(parts))
    return [_parse_part(part, size, axis, device) for axis, (part, size) in enumerate(zip(parts, shape, strict=True))]


def _parse_part(part: Any, size: int, axis: int, device: torch.device) -> Any:
    name = "BHLS"[axis]
    if part is None or isinstance(part, bool):
        raise ValueError(f"P[index]: axis {name} got {part}; wanted ints, slices, '...' or index tensors.")
    if isinstance(part, slice):
        if part.step is not None and operator.index(part.step) < 1:
            raise ValueError(f"P[index]: axis {name} got step {part.step}; steps count forwards, from 1.")
        start, stop, step = part.indices(size)
        return slice(start, max(start, stop), step)
    if isinstance(part, (list, tuple, range, Tensor)) or hasattr(part, "__array__"):
        positions = torch.as_tensor(part, device=device)
        if not isinstance(part, Tensor) and not positions.numel():
            positions = positions.long()
        if positions.dtype == torch.bool or positions.is_floating_point():
            raise ValueError(
                f"P[index]: axis {name} got a {positions.dtype} tensor; use positions, such as mask.nonzero()."
            )
        if positions.numel():
            _in_range(int(positions.min()), size, name)
            _in_range(int(positions.max()), size, name)
        positions = positions.long()
        return torch.where(positions < 0, positions + size, positions)
    position = operator.index(part)
    _in_range(position, size, name)
    return position % size


def _in_range(position: int, size: int, name: str) -> None:
    if not -size <= position < size:
        raise IndexError(f"P[index]: {position} is out of range for axis {name}, which has {size}.")
