"""Masks that name heads, queries or keys; masks of several steps joined."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from headscope.ops.masks.mask import Mask


def heads(ids: Iterable[int]) -> Mask:
    """True for these heads, whoever looks at whom. ``causal() | ~heads([3])``: all but head 3 see everything."""
    return _Chosen("heads", _sorted("heads", ids))


def queries(positions: Iterable[int]) -> Mask:
    """True for the queries at these positions (negative ones exist where L is more than S)."""
    return _Chosen("queries", tuple(sorted({int(p) for p in positions})))


def keys(positions: Iterable[int]) -> Mask:
    """True for the keys at these positions. ``causal() & ~keys([0])``: nobody may look at the first token."""
    return _Chosen("keys", _sorted("keys", positions))


@dataclass(frozen=True)
class Step:
    """One call's rows inside a joined attention: its own positions are joined ones minus the shifts."""

    mask: Mask | None
    rows: slice  # joined absolute query positions
    query_shift: int
    key_shift: int
    num_keys: int


def shifted(mask: Mask, num_keys: int, held: int) -> Mask:
    """The mask of a text of ``num_keys`` positions, for the last ``held`` of them alone."""
    gone = num_keys - held
    if gone == 0 or mask.is_causal:
        return mask
    return stacked([Step(mask, slice(0, held), -gone, -gone, num_keys)])


def stacked(steps: Iterable[Step]) -> Mask:
    """The masks of several calls, one below the other: what generation did, step by step."""
    return _Stacked(tuple(steps))


class _Chosen(Mask):
    def __init__(self, axis: str, positions: tuple[int, ...]) -> None:
        self.axis, self.positions = axis, positions

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        index = {"heads": h, "queries": q_idx, "keys": kv_idx}[self.axis]
        chosen = torch.isin(index, torch.tensor(self.positions, dtype=index.dtype, device=index.device))
        whole = torch.broadcast_shapes(b.shape, h.shape, q_idx.shape, kv_idx.shape)
        return chosen.expand(whole)

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
    def __init__(self, steps: tuple[Step, ...]) -> None:
        self.steps = steps

    def __call__(self, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        whole = torch.broadcast_shapes(b.shape, h.shape, q_idx.shape, kv_idx.shape)
        seen = torch.zeros(whole, dtype=torch.bool, device=q_idx.device)
        low, high = (int(q_idx.min()), int(q_idx.max())) if q_idx.numel() else (0, -1)
        for step in self.steps:
            if step.rows.stop <= low or step.rows.start > high:
                continue
            own_key = kv_idx - step.key_shift
            here = (q_idx >= step.rows.start) & (q_idx < step.rows.stop)
            here = here & (own_key >= 0) & (own_key < step.num_keys)
            if step.mask is not None:
                own_query = (q_idx - step.query_shift).clamp(
                    step.rows.start - step.query_shift, step.rows.stop - 1 - step.query_shift
                )
                here = here & step.mask(b, h, own_query, own_key.clamp(0, step.num_keys - 1))
            seen = seen | here
        return seen

    def classify(self, b: slice, q: slice, k: slice) -> bool | None:
        verdicts = set()
        for step in self.steps:
            rows = slice(max(q.start, step.rows.start), min(q.stop, step.rows.stop))
            if rows.start < rows.stop:
                verdicts.add(self._classify_step(step, b, rows, k))
        return verdicts.pop() if len(verdicts) == 1 else None

    def _classify_step(self, step: Step, b: slice, rows: slice, k: slice) -> bool | None:
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
    found = tuple(sorted({int(p) for p in positions}))
    if found and found[0] < 0:
        raise ValueError(f"{name}() got {found[0]}: count from 0.")
    return found
