"""Masks that select heads, queries or keys, and the masks of several calls stacked into one."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.ops.masks.mask import Mask


def heads(ids: Iterable[int]) -> Mask:
    """True for these heads, for all queries and keys. ``causal() | ~heads([3])``: only head 3 is causal."""
    return _Selection("heads", _sorted("heads", ids))


def queries(positions: Iterable[int]) -> Mask:
    """True for the queries at these positions (negative ones exist where L is more than S)."""
    return _Selection("queries", tuple(sorted({int(p) for p in positions})))


def keys(positions: Iterable[int]) -> Mask:
    """True for the keys at these positions. ``causal() & ~keys([0])``: no query sees the first token."""
    return _Selection("keys", _sorted("keys", positions))


@dataclass(frozen=True)
class StackedStep:
    """The rows of one call in stacked(): its own positions are the stacked ones minus the shifts."""

    mask: Mask | None
    rows: slice  # absolute query positions in the stack
    query_shift: int
    key_shift: int
    num_keys: int


def shifted(mask: Mask, num_keys: int, num_kept: int) -> Mask:
    """The mask of a text of ``num_keys`` positions, for the last ``num_kept`` of them."""
    dropped = num_keys - num_kept
    if dropped == 0 or mask.is_causal:
        return mask
    return stacked([StackedStep(mask, slice(0, num_kept), -dropped, -dropped, num_keys)])


def stacked(steps: Iterable[StackedStep]) -> Mask:
    """The masks of several calls, one below the other, as the steps of a generation."""
    return _Stacked(tuple(steps))


class _Selection(Mask):
    def __init__(self, axis: str, positions: tuple[int, ...]) -> None:
        self.axis, self.positions = axis, positions

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        index = {"heads": h, "queries": q_idx, "keys": kv_idx}[self.axis]
        chosen = torch.isin(index, torch.tensor(self.positions, dtype=index.dtype, device=index.device))
        shape = torch.broadcast_shapes(b.shape, h.shape, q_idx.shape, kv_idx.shape)
        return chosen.expand(shape)

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        if self.axis == "heads":
            return None if self.positions else False
        span = q if self.axis == "queries" else k
        inside = sum(span.start <= p < span.stop for p in self.positions)
        if inside == span.stop - span.start:
            return True
        return None if inside else False

    def __repr__(self) -> str:
        return f"{self.axis}({list(self.positions)})"


class _Stacked(Mask):
    def __init__(self, steps: tuple[StackedStep, ...]) -> None:
        self.steps = steps

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        shape = torch.broadcast_shapes(b.shape, h.shape, q_idx.shape, kv_idx.shape)
        visible = torch.zeros(shape, dtype=torch.bool, device=q_idx.device)
        low, high = (int(q_idx.min()), int(q_idx.max())) if q_idx.numel() else (0, -1)
        for step in self.steps:
            if step.rows.stop <= low or step.rows.start > high:
                continue
            own_key = kv_idx - step.key_shift
            inside = (q_idx >= step.rows.start) & (q_idx < step.rows.stop)
            inside = inside & (own_key >= 0) & (own_key < step.num_keys)
            if step.mask is not None:
                own_query = (q_idx - step.query_shift).clamp(
                    step.rows.start - step.query_shift, step.rows.stop - 1 - step.query_shift
                )
                inside = inside & step.mask(b, h, own_query, own_key.clamp(0, step.num_keys - 1))
            visible = visible | inside
        return visible

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        verdicts = set()
        for step in self.steps:
            rows = slice(max(q.start, step.rows.start), min(q.stop, step.rows.stop))
            if rows.start < rows.stop:
                verdicts.add(self._classify_step(step, b, rows, k))
        return verdicts.pop() if len(verdicts) == 1 else None

    def _classify_step(self, step: StackedStep, b: slice, rows: slice, k: slice) -> bool | None:
        own = slice(k.start - step.key_shift, k.stop - step.key_shift)
        if own.stop <= 0 or own.start >= step.num_keys:
            return False
        if own.start < 0 or own.stop > step.num_keys:
            return None
        if step.mask is None:
            return True
        own_rows = slice(rows.start - step.query_shift, rows.stop - step.query_shift)
        return step.mask.classify(b, own_rows, own)

    def __repr__(self) -> str:
        return f"stacked({len(self.steps)} steps)"


def _sorted(name: str, positions: Iterable[int]) -> tuple[int, ...]:
    ordered = tuple(sorted({int(p) for p in positions}))
    if ordered and ordered[0] < 0:
        raise ValueError(f"{name}() got {ordered[0]}: positions count from 0.")
    return ordered
